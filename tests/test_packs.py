"""What a cell leaves behind is the same, bit for bit, whoever trained beside it and whatever stopped the
pack in between; and who cannot go on leaves it."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import CIRKD
from torch import nn
from torch.optim import SGD, Optimizer

from pipelines.config import ConfigError, Params
from pipelines.datasets import transforms
from pipelines.engine import pack as pack_module
from pipelines.engine import train as train_module
from pipelines.engine.pack import run_cell, run_pack
from pipelines.method import Batch, Distiller
from pipelines.networks import SegmentationNetwork
from pipelines.runs import records
from pipelines.runs.records import Cell

STUDENT = "pspnet-resnet18"
COMPARED = ("weights.safetensors", "history.csv", "metrics.json")
OF_THE_PACK = {"started", "seconds", "trained_beside", "files", "seal", "hardware"}  # all else is the cell's

Edit = Callable[[Callable[[dict[str, Any]], None]], Params]


def settings(steps: int) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["benchmarks"]["streets"]["training"].update(steps=steps, validate_every=2)
        raw["methods"]["cirkd"].update(CIRKD)

    return change


def cell(method: str, student: str = STUDENT, seed: int = 0) -> Cell:
    return Cell("streets", student, method, seed)


def left(own: Cell, root: Path) -> dict[str, Any]:
    """All that a cell has left behind that is not about time or company."""
    record = records.read(own, root)
    assert record is not None, (own, records.failure(own, root))
    assert records.failure(own, root) is None and not (own.scratch(root) / "state.pt").exists()
    found: dict[str, Any] = {name: (own.folder(root) / name).read_bytes() for name in COMPARED}
    found["counts"] = {split: record.confusion(split).tobytes() for split in ("val", "test")}
    return found | {key: value for key, value in record.run.items() if key not in OF_THE_PACK}


def alone(cells: list[Cell], params: Params, root: Path) -> dict[Cell, dict[str, Any]]:
    """What each leaves that is trained by itself; the records are gone afterwards."""
    found = {}
    for own in cells:
        run_cell(own, params, root)
        record = records.read(own, root)
        assert record is not None and record.run["trained_beside"] == 0
        found[own] = left(own, root)
    clear(cells, root)
    return found


def clear(cells: list[Cell], root: Path) -> None:
    for own in cells:
        shutil.rmtree(own.folder(root), ignore_errors=True)
        shutil.rmtree(own.scratch(root), ignore_errors=True)


def together(cells: list[Cell], params: Params, root: Path) -> dict[Cell, dict[str, Any]]:
    """What each leaves that is trained in one pack; the records are gone afterwards."""
    assert set(run_pack(cells, params, root).values()) == {None}
    found = {own: left(own, root) for own in cells}
    for own in cells:
        record = records.read(own, root)
        assert record is not None and record.run["trained_beside"] == len(cells) - 1
    clear(cells, root)
    return found


def differ(one: dict[Cell, dict[str, Any]], other: dict[Cell, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(own.path, key) for own in other for key in one[own] if one[own][key] != other[own][key]]


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the history and a resume file at every step."""
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    monkeypatch.setattr(train_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train_module, "SAVE_SHARE", 0.0)


# ---- company


def test_company_order_and_size_change_no_bit_of_any_method(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE_EVERY", 1e9)  # a resume file takes longer than a step
    params = edit(settings(steps=2))
    methods = [key for key in params.method_keys if not key.endswith("-official")]
    assert {*params.methods, *(f"acfd-{key}" for key in params.acfd), "none-x1.5"} == {*methods}
    cells = [cell(method) for method in methods]
    single = alone(cells, params, place)
    assert len({found["weights.safetensors"] for found in single.values()}) == len(cells)
    assert not differ(single, together(cells, params, place))
    some = cells[::-3]
    assert 2 < len(some) < len(cells) / 2
    assert not differ(single, together(some, params, place))


def test_two_students_and_a_longer_control_in_one_pack(place: Path, edit: Edit) -> None:
    other = "fpn-resnet18"  # of another optimiser, without an auxiliary head

    def change(raw: dict[str, Any]) -> None:
        settings(4)(raw)
        raw["students"][other]["encoder"] = "tu-test_resnet"

    params = edit(change)
    cells = [cell("dist"), cell("dist", other), cell("none-x1.5"), cell("kd", other), cell("none", other)]
    single = alone(cells, params, place)
    assert not differ(single, together(cells, params, place))
    assert [single[own]["left_out"] for own in cells[:2]] == [[], ["auxiliary"]]
    longer = single[cells[2]]
    assert longer["steps"] == 6 and longer["images_seen"] == 12 and longer["teacher"] is None
    assert [line.split(",")[0] for line in longer["history.csv"].decode().split()[1:]] == [*"123456"]
    for own in cells:
        run = single[own]
        assert run["engine"] == params.engine
        assert run["compute"]["flops"] == run["steps"] * run["compute"]["step_flops"] > 0
        assert (run["teacher"] is None) == own.method.startswith("none")
    # counted, not measured: the teacher and what the loss keeps take their part
    memory = [single[own]["memory_peak_mb"] for own in (cells[4], cells[3])]
    assert 1 < memory[0] < memory[1] < 100


def test_the_networks_of_a_pack_are_gone_when_the_next_one_trains(place: Path, edit: Edit) -> None:
    """Else a process that trains one pack after another would grow by all of them."""
    params, there = edit(settings(2)), list[int]()

    def students(*_: object) -> None:
        there.append(sum(isinstance(one, SegmentationNetwork) for one in gc.get_objects()))

    gc.collect()
    gc.disable()  # when it runs by itself is chance
    try:
        run_pack([cell(name) for name in ("none", "kd", "cwd")], params, place, students)
        first = max(there)
        run_pack([cell(name, seed=1) for name in ("none", "kd", "cwd")], params, place, students)
    finally:
        gc.enable()
    assert there[-1] == first


def test_cells_of_other_batches_are_no_pack(place: Path, edit: Edit) -> None:
    params = edit(settings(2))
    for others in (cell("kd", seed=1), Cell("camvid", STUDENT, "kd", 0), cell("teacher", "teacher")):
        with pytest.raises(ValueError, match="do not see the same batches"):
            run_pack([cell("kd"), others], params, place)


def test_cells_that_are_finished_are_no_company(place: Path, edit: Edit) -> None:
    params = edit(settings(2))
    run_cell(cell("kd"), params, place)
    old = records.read(cell("kd"), place)
    assert set(run_pack([cell("kd"), cell("none"), cell("cwd")], params, place).values()) == {None}
    assert records.read(cell("kd"), place) == old
    for method in ("none", "cwd"):
        record = records.read(cell(method), place)
        assert record is not None and record.run["trained_beside"] == 1


# ---- kills


KILLED = [cell(method) for method in ("skd", "none-x1.5", "acfd-full", "cwd")]


def stop_at(step: int, how: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop the stream of batches at a step; the steps that it has been asked for."""
    real, asked = transforms.training_batch, list[int]()

    def batch(data: Any, training: Any, ignore: int, seed: int, now: int) -> Any:
        asked.append(now)
        if now == step:
            how()
        return real(data, training, ignore, seed, now)

    monkeypatch.setattr(transforms, "training_batch", batch)
    return asked


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_pack_resumes_bit_for_bit_also_where_some_lag_behind(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = edit(settings(4))
    whole = together(KILLED, params, place)
    with monkeypatch.context() as patch:
        stop_at(2, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            run_pack(KILLED, params, place)
    early = (KILLED[3].scratch(place) / "state.pt").read_bytes()
    with monkeypatch.context() as patch:
        asked = stop_at(3, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            run_pack(KILLED[::-1], params, place)
        assert asked == [2, 3]
    # of four, two are at step 3, one is at step 2, and one has nothing
    (KILLED[3].scratch(place) / "state.pt").write_bytes(early)
    (KILLED[0].scratch(place) / "state.pt").unlink()
    with monkeypatch.context() as patch:
        asked = stop_at(-1, interrupt, patch)
        steps: list[tuple[str, int]] = []
        found = run_pack(KILLED, params, place, lambda label, step, *_: steps.append((label, step - 1)))
    assert set(found.values()) == {None} and asked == [0, 1, 2, 3, 4, 5]
    wanted = [(own.path, step) for step in range(6) for own in KILLED]
    first = {KILLED[0]: 0, KILLED[1]: 3, KILLED[2]: 3, KILLED[3]: 2}
    last = {own: 6 if own.method == "none-x1.5" else 4 for own in KILLED}
    due = {(own.path, step) for own in KILLED for step in range(first[own], last[own])}
    assert steps == [entry for entry in wanted if entry in due]
    assert not differ(whole, {own: left(own, place) for own in KILLED})


def test_a_process_that_is_killed_loses_nothing(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, cells = edit(settings(3)), KILLED[:2]
    whole = together(cells, params, place)
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(2, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            run_pack(cells, params, place)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    asked = stop_at(-1, interrupt, monkeypatch)
    assert set(run_pack(cells, params, place).values()) == {None}
    assert asked == [2, 3]  # of the control, whose 1.5 × 3 steps are 4
    assert not differ(whole, {own: left(own, place) for own in cells})


def test_what_stops_all_does_not_touch_those_that_are_done(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> None:
        raise ConfigError("the data is damaged")

    params, cells = edit(settings(2)), [cell("none"), cell("none-x1.5")]
    stop_at(2, damaged, monkeypatch)
    found = run_pack(cells, params, place)
    assert found[cells[0]] is None and str(found[cells[1]]) == "the data is damaged"
    left(cells[0], place)
    assert records.failure(cells[1], place) == "the data is damaged"


# ---- trainees that leave


class Faulty(Distiller):
    """Its fault shows in the second step, unless it cannot even be built."""

    fault: ClassVar[str] = ""
    seen: ClassVar[list[weakref.ref[torch.Tensor]]] = []
    student_taps = ("logits",)
    teacher_taps = ("logits", "fusion")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = 0
        if self.fault == "prepare":
            raise RuntimeError("no such layer")

    def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += 1
        value = student["logits"].mean() * 0
        if self.calls < 2:
            return {"wobble": value}
        if self.fault == "nan":
            value = value + float("nan")
        elif self.fault == "raise":
            self.seen.append(weakref.ref(student["logits"]))
            raise RuntimeError("out\nof memory")
        elif self.fault == "taps":
            teacher["fusion"].mul_(0)
        elif self.fault == "images":
            batch.images[0].zero_()
            raise RuntimeError("which is not all")
        elif self.fault == "labels":
            batch.labels.clamp_(max=1)
        return {"wobble": value}


class Drawing(Distiller):
    """Builds a network of its own where optimisers are built, as a method may."""

    student_taps = ("logits",)

    def own_optimizers(self) -> dict[str, Optimizer]:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(1, 1)
            self.optimizer = SGD(self.layer.parameters(), 0.1)
        return {"layer": self.optimizer}

    def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        return {"layer": student["logits"].mean() * self.layer.weight.detach().sum()}


REASONS = {  # of the method in whose place the faulty one is: fault, what the note says
    "at": ("nan", r"at/0: the term wobble is not finite at step 1\. The last good state is kept"),
    "fitnet": ("raise", "RuntimeError: out of memory"),
    "ifvd": ("taps", r"ifvd/0: the method changes the teacher's fusion in place, which others use"),
    "cankd": ("images", r"cankd/0: the method changes the images in place, which others use"),
    "lskd": ("labels", r"lskd/0: the method changes the labels in place, which others use"),
    "sp": ("prepare", "RuntimeError: no such layer"),
}


def test_who_fails_leaves_with_the_reason_and_harms_nobody(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, real = edit(settings(3)), pack_module.method_class
    replaced: dict[str, type[Distiller]] = {"mgd": Drawing}
    for key, (fault, _) in REASONS.items():
        replaced[key] = type(fault, (Faulty,), {"fault": fault})
    monkeypatch.setattr(pack_module, "method_class", lambda key: replaced.get(key) or real(key))
    good = [cell(method) for method in ("kd", "skd", "none-x1.5", "cwd", "mgd")]
    whole = alone(good, params, place)
    bad = [cell(method) for method in REASONS]
    mixed = [own for pair in itertools.zip_longest(bad, good) for own in pair if own is not None]
    assert mixed[0] in bad and mixed[-1] in bad
    found = run_pack(mixed, params, place)
    for own in bad:
        assert found[own] is not None and records.read(own, place) is None
        note = (own.scratch(place) / "failure.txt").read_text()
        assert note.count("\n") == 1
        assert re.search(REASONS[own.method][1], note), note
    assert not differ(whole, {own: left(own, place) for own in good})
    gc.collect()
    assert [kept() for kept in Faulty.seen] == [None]  # others get the memory, though the error is kept
    assert {own for own in mixed if found[own] is None} == set(good)


class Overflow(Distiller):
    """Its terms are finite, their gradient is not."""

    student_taps = ("logits",)

    def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        student["logits"].register_hook(lambda gradient: gradient * float("inf"))
        return {"wobble": student["logits"].mean()}


def test_weights_that_are_not_finite_are_no_result(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step was finite; its update is not."""
    monkeypatch.setattr(pack_module, "method_class", lambda key: Overflow)
    with pytest.raises(ConfigError, match=r"is not finite after step 1: lower `lr`"):
        run_cell(cell("none"), edit(settings(1)), place)
    assert records.read(cell("none"), place) is None


def test_a_training_with_a_nan_resumes_from_its_last_good_state(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, real = edit(settings(4)), pack_module.method_class
    faulty = type("nan", (Faulty,), {"fault": "nan"})
    monkeypatch.setattr(pack_module, "method_class", lambda key: faulty if key == "at" else real(key))
    run_pack([cell("none"), cell("at")], params, place)
    asked = stop_at(-1, interrupt, monkeypatch)
    with pytest.raises(ConfigError, match="wobble is not finite at step 2"):  # its calls are counted anew
        run_cell(cell("at"), params, place)
    assert asked == [1, 2]


# ---- time


class Clock:
    now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_a_step_costs_what_it_would_cost_alone(
    place: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch, the teacher if the method asks for it, and the own step; nothing of the others, of a
    validation or a resume file."""
    params, clock = edit(settings(4)), Clock()
    monkeypatch.setattr(
        train_module, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic)
    )

    def slower(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def slow(*args: Any, **named: Any) -> Any:
            clock.pass_(seconds)
            return real(*args, **named)

        monkeypatch.setattr(owner, name, slow)

    class Plain(Distiller):
        def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
            clock.pass_(100)
            return {}

    class Taught(Distiller):
        teacher_taps = ("logits",)

        def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
            clock.pass_(1000)
            return {}

    slower(transforms, "training_batch", 1)
    slower(train_module, "teacher_taps", 10)
    slower(train_module.checkpoint, "save", 1e5)
    slower(pack_module, "evaluate", 1e6)
    kinds = {"at": Plain, "sp": Taught}
    monkeypatch.setattr(pack_module, "method_class", kinds.__getitem__)
    cells = [cell(method) for method in ("sp", "at")]
    assert set(run_pack(cells, params, place).values()) == {None}
    for own, seconds in zip(cells, (1011, 101), strict=True):
        record = records.read(own, place)
        assert record is not None
        assert record.run["seconds"]["training"] == 4 * seconds
        assert record.run["seconds"]["step_median"] == seconds
