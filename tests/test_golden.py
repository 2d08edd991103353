"""What a training computes, against what it computed when the version of the engine was raised last.

Three steps of every method of params.yaml, and of a teacher before them, at a tiny size: the learning rate
and the terms of each step, the settings of the optimisers, and two probes of what the steps did to the
weights. ``tests/golden.json`` holds the settings too, so that a weight that was tuned since changes nothing
here, and the sum of each method's files: one that has changed makes its own cells due and is left out.
``python tests/test_golden.py`` renews the file.

Tolerance: twenty times MEASURED, the largest relative difference between the kernels of one processor, which
``python tests/test_golden.py --measure`` prints: those of its choice (AVX2, an AMD EPYC) without oneDNN 2e-6
of a term and 3e-5 of a probe, without vector instructions (``ATEN_CPU_CAPABILITY=default``) 1.2e-4 and 1e-3.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from conftest import CIRKD, TINY_DATA, TINY_TRAINING, read_params, tiny, trained

from pipelines.config import Params
from pipelines.datasets import transforms
from pipelines.engine import machine
from pipelines.engine import train as engine
from pipelines.engine.pack import run_cell
from pipelines.engine.seeds import generator
from pipelines.engine.train import Trainee
from pipelines.files import write_bytes
from pipelines.runs.fingerprint import method_sum
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages.fetch import fetch

FILE = Path(__file__).with_name("golden.json")
MEASURED = {
    "terms": 1.2e-4,
    "weights": 1.0e-3,
    "exact": 1e-8,
}  # exact: no kernel computes it, seven digits are kept
TOLERANCE = 20  # times as much
FLOOR = 1e-2  # what is smaller is compared as if it were as large: almost 0 has no relative difference
OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "betas", "eps")  # of an optimiser

CHANGED = (
    "What a training computes has changed: raise `engine` in params.yaml by one and renew tests/golden.json "
    "by `python tests/test_golden.py`."
)
RENEW = "Renew tests/golden.json by `python tests/test_golden.py`."

TRAINING = TINY_TRAINING | {
    "steps": 3, "batch_size": 4, "warmup_steps": 1, "validate_every": 3, "lr": 0.0001, "momentum": 0.9,
    "weight_decay": 0.05, "power": 0.9, "auxiliary_weight": 0.4, "precision": "fp32",
    "augmentation": {
        "scale": [0.75, 1.5], "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.3, "hue": 0.05
    },
}  # fmt: skip
NETWORK = {"architecture": "PSPNet", "encoder": "tu-test_resnet", "output_stride": 8, "weights": None}

# With their usual weights these rule the loss, and three steps make much of little. CIRKD: of seconds.
TAME: dict[str, dict[str, Any]] = {"at": {"weight": 10.0}, "dsd": {"weight_psd": 10.0}, "cirkd": CIRKD}

Values = dict[str, dict[str, list[float]]]


def settings(known: dict[str, Any]) -> Params:
    """The tiny benchmark by values that stand here, and methods by those of the file."""
    raw = tiny(read_params())
    raw["benchmarks"]["streets"] = {
        "data": TINY_DATA,
        "training": TRAINING,
        "frames": 1,
        "teacher": {"network": NETWORK, "training": TRAINING, "seed": 1000},
    }
    raw["students"]["pspnet-resnet18"] = NETWORK
    raw["suite"].update(reference="none", controls=[1.5], threads=1, strict=False)
    for key, own in TAME.items():
        if key in raw["methods"]:
            raw["methods"][key] |= own
    raw["official"] = {}
    for key, own in known.items():
        if key in raw["methods"]:
            raw["methods"][key] = own["settings"]
        elif key.removeprefix("acfd-") in raw["acfd"]:
            raw["acfd"][key.removeprefix("acfd-")] = own["settings"]
    return Params.model_validate(raw)


States = dict[str, dict[str, torch.Tensor]]
OPTIMIZERS = "optimizers"  # the room of their options among the states


def states(one: Trainee) -> States:
    options = {
        f"{name} {type(optimizer).__name__} {number} {option}": torch.tensor(group[option]).double()
        for name, optimizer in one.found.items()
        for number, group in enumerate(optimizer.param_groups)
        for option in OPTIONS
        if option in group
    }
    rooms = {"student": one.student.state_dict(), "method": one.method.state_dict(), OPTIMIZERS: options}
    return {room: {name: value.clone() for name, value in own.items()} for room, own in rooms.items()}


@contextmanager
def watched() -> Iterator[tuple[dict[str, States], dict[str, States]]]:
    """The weights at the start of each training and after its last step. Meanwhile there is a row of the
    history at every step, and one thread for teachers too."""
    before, after = dict[str, States](), dict[str, States]()
    start, check = Trainee.start, Trainee.check_weights

    def started(self: Trainee) -> None:
        start(self)
        before[self.label] = states(self)

    def ended(self: Trainee) -> None:
        check(self)
        after[self.label] = states(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOG_EVERY", 1)
        patch.setattr(machine, "cores", lambda: 1)
        patch.setattr(Trainee, "start", started)
        patch.setattr(Trainee, "check_weights", ended)
        yield before, after


def teach(params: Params, root: Path) -> Values:
    """Make data and teacher; what the teacher's training computed."""
    cell = teacher_cell(params, "streets")
    fetch(root / "data", "streets", params.benchmark("streets"))
    with watched() as (before, after):
        run_cell(cell, params, root)
    with (cell.folder(root) / "history.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return values(rows, before[cell.path], after[cell.path])


def learn(params: Params, root: Path, methods: list[str]) -> dict[str, Values]:
    """What the trainings of students computed, in one pack."""
    cells = {key: Cell("streets", "pspnet-resnet18", key, 0) for key in methods}
    with watched() as (before, after):
        pack = trained(params, root, *cells.values())
    return {
        key: values(pack[key].trainee.history.rows, before[cell.path], after[cell.path])
        for key, cell in cells.items()
    }


def values(rows: list[dict[str, float]], before: States, after: States) -> Values:
    """The terms of each step, and of the change of the weights its mean size and a random direction."""
    names = [name for name in rows[0] if name not in ("step", "val_miou", "lr")]
    options = {name: value.flatten().tolist() for name, value in after[OPTIMIZERS].items()}
    return {
        "exact": {"lr": [float(f"{row['lr']:.7g}") for row in rows]} | options,
        "terms": {name: [float(f"{row[name]:.7g}") for row in rows] for name in names},
        "weights": {
            room: probe(before[room], own) for room, own in after.items() if own and room != OPTIMIZERS
        },
    }


def probe(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[float]:
    size, along, square = 0.0, 0.0, 0.0
    for name in sorted(after):
        moved = (after[name].double() - before[name].double()).flatten()
        direction = torch.randn(len(moved), generator=generator(0, "probe", name), dtype=torch.float64)
        size, along = size + float(moved.abs().sum()), along + float(moved @ direction)
        square += float(moved.square().sum())
    return [float(f"{value:.7g}") for value in (size, 1 + along / max(square, 1e-30) ** 0.5)]


def furthest(one: Values, other: Values) -> tuple[float, str]:
    """The largest relative difference, in units of what was measured, and where it is."""
    found = [(0.0, "")]
    for kind in ("exact", "terms", "weights"):
        if one[kind].keys() != other[kind].keys():
            return float("inf"), f"the {kind} {sorted(one[kind].keys() ^ other[kind].keys())}"
        for name in one[kind]:
            for number, pair in enumerate(zip(one[kind][name], other[kind][name], strict=True)):
                least = 1e-30 if kind == "exact" else FLOOR
                gap = abs(pair[0] - pair[1]) / max(least, *map(abs, pair))
                found.append((gap / MEASURED[kind], f"{name} [{number}] {pair[0]:g} → {pair[1]:g}"))
    return max(found)


def everything(params: Params, root: Path, methods: list[str]) -> dict[str, Values]:
    return {"teacher": teach(params, root)} | learn(params, root, methods)


# ---- tests


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def test_the_values_are_those_of_this_version(golden: dict[str, Any]) -> None:
    engine_now = read_params()["engine"]
    assert golden["engine"] == engine_now, (
        f"params.yaml has engine: {engine_now}, tests/golden.json is of {golden['engine']}. {RENEW}"
    )


def test_a_training_computes_what_it_did(golden: dict[str, Any], tmp_path: Path) -> None:
    params = settings(golden["methods"])
    methods = [key for key in params.method_keys if not key.endswith("-official")]
    known = {
        key: own
        for key, own in golden["methods"].items()
        if key in methods and own["sum"] == method_sum(params.module_key(key))
    }
    if unknown := sorted({*methods} - {*known}):
        text = f"tests/golden.json does not know {', '.join(unknown)} as of now. {RENEW}"
        warnings.warn(text, stacklevel=1)
    found = everything(params, tmp_path, [*known])
    gaps = {key: furthest(known[key]["values"], found[key]) for key in known}
    gaps["teacher"] = furthest(golden["teacher"], found["teacher"])
    moved = {key: f"{where} ({gap:.1g})" for key, (gap, where) in gaps.items() if gap > TOLERANCE}
    assert not moved, f"{CHANGED} {moved}"


@pytest.fixture(scope="module")
def classroom(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    teach(settings(golden["methods"]), root)
    return root


def _mean_over_all(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    logits = engine.upsample(logits.float(), batch.labels.shape[-2:])
    return torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=batch.ignore_index)


@pytest.mark.parametrize(
    ("owner", "name", "changed"),
    [
        (engine, "cross_entropy", lambda logits, batch: 1.01 * _mean_over_all(logits, batch)),
        (engine, "auxiliary_weight", lambda training, recipe: 0.39),
        (engine, "schedule", lambda training, step: (1 - step / training.steps) ** 0.95),
        (engine, "SGD", lambda *some, **more: torch.optim.SGD(*some, **more | {"weight_decay": 0.0})),
        (transforms, "contrast", lambda images, factor: images),
        (transforms, "saturation", lambda images, factor: images),
    ],
)
def test_a_small_change_is_seen(
    owner: Any, name: str, changed: Any, classroom: Path, golden: dict[str, Any], monkeypatch: Any
) -> None:
    params = settings(golden["methods"])
    usual = learn(params, classroom, ["none"])["none"]
    assert furthest(golden["methods"]["none"]["values"], usual)[0] <= TOLERANCE
    monkeypatch.setattr(owner, name, changed)
    assert furthest(usual, learn(params, classroom, ["none"])["none"])[0] > TOLERANCE


# ---- the file


def renew() -> None:
    params = settings({})
    methods = [key for key in params.method_keys if not key.endswith("-official")]
    with tempfile.TemporaryDirectory() as root:
        found = everything(params, Path(root), methods)
    content = {
        "engine": params.engine,
        "teacher": found.pop("teacher"),
        "methods": {
            key: {
                "sum": method_sum(params.module_key(key)),
                "settings": dict(params.method_values(key)),
                "values": own,
            }
            for key, own in found.items()
        },
    }
    text = json.dumps(content, indent=1)
    write_bytes(FILE, f"{text}\n".encode())


def measure() -> None:
    """How far the kernels of this processor lie apart from those of its own choice."""
    runs: dict[str, dict[str, Values]] = {}
    for capability, library in (("", True), ("", False), ("avx2", True), ("default", True)):
        command = [sys.executable, __file__, "--show", *(["--plain"] * (not library))]
        chosen = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run(command, env=os.environ | chosen, check=True, stdout=subprocess.PIPE, text=True)
        runs[f"{capability or 'usual'}, oneDNN {library}"] = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(runs.values()))
    for name, run in runs.items():
        gaps = sorted(((*furthest(first[key], own), key) for key, own in run.items()), reverse=True)
        sys.stdout.write(f"{name}: {[f'{gap:.2g} {key} {where}' for gap, where, key in gaps[:12]]}\n")


def show(library: bool) -> None:
    params = settings({})
    methods = [key for key in params.method_keys if not key.endswith("-official")]
    with torch.backends.mkldnn.flags(enabled=library), tempfile.TemporaryDirectory() as root:
        sys.stdout.write(f"{json.dumps(everything(params, Path(root), methods))}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--measure", "--show", "--plain"):
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    action: Callable[[], None] = renew
    if arguments.measure:
        action = measure
    elif arguments.show:
        show(not arguments.plain)
        return
    action()


if __name__ == "__main__":
    main()
