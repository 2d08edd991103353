"""The training loop: pairing, exact resume, the schedule, the teacher gate, and what stops a training."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rewrite, trained
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import config
from pipelines.config import ROOT, ConfigError, Network
from pipelines.engine import checkpoint
from pipelines.engine import pack as pack_module
from pipelines.engine import train as train_module
from pipelines.engine.pack import plan, round_weights, run_cell, run_pack
from pipelines.engine.train import cross_entropy, optimizers, schedule
from pipelines.method import TAPS, Batch, Distiller
from pipelines.methods import checked, reason
from pipelines.networks import SegmentationNetwork, file_sha256, tap_shapes
from pipelines.runs import records
from pipelines.runs.records import Cell

R18 = Network(architecture="PSPNet", encoder="tu-resnet18", output_stride=8, weights=None)


def load(root: Path) -> config.Params:
    return checked(config.load(root / "params.yaml"))


def student_cell(method: str, seed: int = 0) -> Cell:
    return Cell("streets", "pspnet-resnet18", method, seed)


def weights(root: Path, cell: Cell) -> dict[str, torch.Tensor]:
    return load_file(cell.folder(root) / "weights.safetensors")


# ---- networks


def test_the_network_is_the_dilated_pspnet_of_the_field() -> None:
    network = SegmentationNetwork(R18, 19)
    assert tap_shapes(network, (64, 96)) == {
        "backbone.1": (64, 16, 24),
        "backbone.2": (128, 8, 12),
        "backbone.3": (256, 8, 12),
        "backbone.4": (512, 8, 12),
        "fusion": (512, 8, 12),
        "logits": (19, 8, 12),
        "auxiliary": (19, 8, 12),
    }
    layers = dict(network.encoder.model.named_modules())
    assert layers["layer3.1.conv1"].dilation == (2, 2)
    assert layers["layer4.1.conv1"].dilation == (4, 4)
    assert (
        abs(network.deployed_parameters() / 1e6 - 12.05) < 0.05
    )  # the count of published PSPNet-R18 students
    assert sum(v.numel() for n, v in network.exported().items() if "auxiliary" in n) == 0


@pytest.mark.parametrize(
    ("architecture", "encoder", "stride"),
    [("PSPNet", "tu-resnet50", 8), ("PSPNet", "tu-mobilenetv2_100", 8), ("Segformer", "mit_b0", 32)],
)
def test_other_networks_offer_the_same_taps(architecture: str, encoder: str, stride: int) -> None:
    network = SegmentationNetwork(
        Network(architecture=architecture, encoder=encoder, output_stride=stride, weights=None), 5
    )
    shapes = tap_shapes(network, (64, 64))
    assert tuple(shapes) == TAPS
    assert shapes["logits"][0] == 5
    assert network.eval().predict(torch.zeros(1, 3, 64, 96)).shape == (1, 64, 96)


def test_an_unknown_encoder_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="tu-resnt18"):
        SegmentationNetwork(R18.model_copy(update={"encoder": "tu-resnt18"}), 3)


# ---- loss, schedule, optimisers


def test_task_loss_is_the_mean_over_labelled_pixels() -> None:
    logits, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    labels[0, :2] = 255
    expected = [
        -torch.log_softmax(logits[b, :, i, j], 0)[labels[b, i, j]]
        for b in range(2)
        for i in range(4)
        for j in range(4)
        if labels[b, i, j] != 255
    ]
    found = cross_entropy(logits, Batch(torch.zeros(2, 3, 4, 4), labels, 3, 255))
    assert torch.isclose(found.double(), torch.stack(expected).mean(), atol=1e-6)


def test_a_crop_without_labels_costs_nothing_and_is_no_nan() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, Batch(torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 255), 3, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.isnan().any()


def test_schedule_warms_up_then_decays(tiny_root: Path) -> None:
    training = (
        load(tiny_root)
        .benchmark("streets")
        .training.model_copy(update={"steps": 100, "warmup_steps": 10, "power": 0.9})
    )
    assert schedule(training, 0) == pytest.approx(0.1)
    assert schedule(training, 4) == pytest.approx(0.5 * 0.96**0.9)
    assert schedule(training, 50) == pytest.approx(0.5**0.9)
    assert schedule(training, 99) == pytest.approx(0.01**0.9)


def test_every_parameter_is_in_exactly_one_optimiser(tiny_root: Path) -> None:
    params = load(tiny_root)
    student = SegmentationNetwork(R18, 3)
    shapes = tap_shapes(student, (32, 32))
    for key in params.method_keys:
        planned = plan(params, student_cell(key))
        method = planned.method(planned.config, shapes, shapes)
        held = [
            id(p)
            for optimizer in optimizers(student, method, planned.training, None).values()
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for module in (student, method) for p in module.parameters()}


def test_all_learning_rates_follow_the_schedule(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    real = train_module.optimizers

    def watched(*args: Any) -> Any:
        found = real(*args)
        critic = found["critic"]
        step = critic.step

        def record(*a: Any, **k: Any) -> Any:
            seen.append({name: o.param_groups[0]["lr"] for name, o in found.items()})
            return step(*a, **k)

        critic.step = record
        return found

    monkeypatch.setattr(train_module, "optimizers", watched)
    params = load(place)
    planned = plan(params, student_cell("skd"))
    trained(params, place, student_cell("skd"))
    factors = [schedule(planned.training, step) for step in range(planned.training.steps)]
    assert [s["main"] for s in seen] == pytest.approx([planned.training.lr * f for f in factors])
    assert [s["critic"] for s in seen] == pytest.approx([planned.config.critic_lr * f for f in factors])  # type: ignore[attr-defined]


# ---- pairing and resume


def test_cells_of_one_seed_are_paired(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step sees the same student and the same batch whatever the method; another seed does not."""
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    params = load(place)
    keys = ("none", "kd", "skd", "acfd-full")
    found = trained(params, place, *map(student_cell, keys)) | trained(params, place, student_cell("cwd"))
    first = {key: prepared.trainee.history.rows[0]["task"] for key, prepared in found.items()}
    assert len(first) == 5 and len(set(first.values())) == 1, first
    other = trained(params, place, student_cell("none", seed=1))["none"]
    assert other.trainee.history.rows[0]["task"] != first["none"]


def test_resume_state_of_other_inputs_or_damaged_is_not_used(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = place / "state.pt"
    checkpoint.save(file, "one", {"step": 3})
    assert checkpoint.load(file, "one") == {"step": 3}
    assert checkpoint.load(file, "two") is None
    file.write_bytes(file.read_bytes()[:-20])
    assert checkpoint.load(file, "one") is None
    assert "other inputs" in caplog.text and "damaged" in caplog.text


def test_a_finished_cell_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, cell = load(place), student_cell("none")
    run_cell(cell, params, place)
    record = records.read(cell, place)
    monkeypatch.setattr(pack_module, "train_plans", lambda plans, *_: dict.fromkeys(map(int, plans)))
    run_cell(cell, params, place)
    assert records.read(cell, place) == record


# ---- records


def test_a_cell_leaves_its_whole_record(place: Path) -> None:
    params, cell = load(place), student_cell("acfd-full")
    run_cell(cell, params, place)
    record = records.read(cell, place)
    assert record is not None
    assert sorted(p.name for p in cell.folder(place).iterdir()) == [
        "confusion.npz",
        "history.csv",
        "metrics.json",
        "run.json",
        "weights.safetensors",
    ]
    assert not [*cell.scratch(place).glob("*")]  # no resume state, no note of a failure
    assert record.confusion("test").shape == (4, 12, 12)
    assert {"step", "lr", "loss", "task", "auxiliary", "afd", "ccd", "csd", "val_miou"} == set(
        record.history[0]
    )
    # validated every 3 steps, which is no multiple of the rows' 10
    assert [(r["step"], r["val_miou"] is not None) for r in record.history] == [(3, True), (6, True)]
    row = record.history[-1]
    parts = sum(row[name] for name in ("task", "auxiliary", "afd", "ccd", "csd"))  # type: ignore[misc]
    assert row["loss"] == pytest.approx(parts, rel=1e-4)
    assert row["val_miou"] == pytest.approx(record.metrics["val"]["miou"], abs=1e-3)
    assert (
        record.run["teacher"]["val_miou"]
        == records.read(records.teacher_cell(params, "streets"), place).metrics["val"]["miou"]
    )  # type: ignore[union-attr]
    assert record.run["student"]["parameters"] == sum(
        v.numel() for n, v in weights(place, cell).items() if "running" not in n and "num_batches" not in n
    )
    assert set(weights(place, cell)) == set(
        SegmentationNetwork(params.student("pspnet-resnet18"), 12).exported()
    )  # nothing of the method, no auxiliary


# ---- the teacher gate


def faulty(root: Path, fault: str) -> None:
    folder = root / "runs" / "streets" / "teacher"
    file = folder / "weights.safetensors"
    run = json.loads((folder / "run.json").read_text())
    if fault == "absent":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "altered":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
    elif fault == "architecture":
        other = SegmentationNetwork(R18.model_copy(update={"encoder": "tu-resnet34"}), 12)
        save_file(other.exported(), file)
        rewrite(folder, {"weights_sha256": file_sha256(file)})
    elif fault == "classes":
        rewrite(folder, {"classes": run["classes"][:-1]})
    elif fault == "score":
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["val"]["miou"] += 1
        rewrite(folder, metrics=json.dumps(metrics).encode())
    elif fault == "record":
        (folder / "run.json").write_text(json.dumps(run | {"steps": 1}))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("absent", "weights.safetensors is missing"),
        ("truncated", "truncated or altered"),
        ("altered", "truncated or altered"),
        ("architecture", "another architecture"),
        ("classes", "knows 11 classes"),
        ("score", "mIoU on validation, its record says"),
        ("record", "damaged or was changed by hand"),
    ],
)
def test_a_wrong_teacher_stops_before_any_step(
    place: Path, fault: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(place, fault)
    monkeypatch.setattr(pack_module, "train_plans", lambda *a, **k: pytest.fail("training began"))
    with pytest.raises(ConfigError, match=sentence) as error:
        run_cell(student_cell("kd"), load(place), place)
    assert "dvc repro" in str(error.value) or "make repro" in str(error.value)
    assert sentence.split()[0] in (records.failure(student_cell("kd"), place) or "")


def test_a_teacher_of_the_repository_takes_the_place_of_a_missing_file(place: Path) -> None:
    file = place / "runs" / "streets" / "teacher" / "weights.safetensors"
    kept = place / records.TEACHERS / "streets.safetensors"
    kept.parent.mkdir()
    file.rename(kept)
    run_cell(student_cell("kd"), load(place), place)
    assert file.read_bytes() == kept.read_bytes()


# ---- what stops a training


class Broken(Distiller):
    """A method with a fault: see ``fault``."""

    fault = ""
    student_taps = ("logits",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = 0
        if self.fault == "no gradient":
            self.unused = nn.Linear(2, 2)

    def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.fault == "buffer":
            self.register_buffer("seen", torch.zeros(self.calls))
        value = student["logits"].mean() * 0
        if self.fault == "nan" and self.calls > 4:
            value = value + float("nan")
        if self.fault == "shape":
            return {"wobble": student["logits"] * 0}
        if self.fault == "constant":
            value = value.detach()
        return {"lr" if self.fault == "name" else "wobble": value}

    def after_step(self, student: Any, teacher: Any, batch: Batch) -> dict[str, float]:
        return {self.fault: 1.0} if self.fault in ("step", "wobble") else {}

    def own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        own = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return {"main": own} if self.fault == "optimiser" else {}


def broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setattr(pack_module, "method_class", lambda key: Broken)


def resume_state(file: Path) -> dict[str, Any]:
    """What a resume file holds, whatever it belongs to."""
    return dict(torch.load(io.BytesIO(file.read_bytes()[checkpoint.HEAD :]), weights_only=True))


def test_a_nan_stops_with_the_term_and_keeps_the_last_good_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LOG_EVERY", 2)
    monkeypatch.setattr(train_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train_module, "SAVE_SHARE", 0.0)
    broken(monkeypatch, "nan")
    cell = student_cell("none")
    with pytest.raises(ConfigError, match="wobble is not finite at step 4"):
        run_cell(cell, load(place), place)
    state = resume_state(cell.scratch(place) / "state.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["student"].values())
    assert "wobble" in (records.failure(cell, place) or "")
    assert records.read(cell, place) is None


def test_a_parameter_without_gradient_stops_in_the_first_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "no gradient")
    with pytest.raises(ConfigError, match=r"No gradient reaches method\.unused"):
        run_cell(student_cell("none"), load(place), place)


def test_a_term_cannot_take_a_column_of_the_engine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "name")
    with pytest.raises(ConfigError, match="'lr', a name that the engine uses"):
        run_cell(student_cell("none"), load(place), place)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("step", "`after_step` gives 'step' a value, a name that a term or the engine has"),
        ("wobble", "`after_step` gives 'wobble' a value"),
        ("buffer", "The method makes or changes seen in its first step, so that it could not resume"),
        ("optimiser", "`own_optimizers` has one called 'main'"),
        ("shape", "`losses` gives a term 'wobble' that is not a tensor of one value"),
    ],
)
def test_a_method_takes_no_place_of_the_engine(
    place: Path, monkeypatch: pytest.MonkeyPatch, fault: str, sentence: str
) -> None:
    broken(monkeypatch, fault)
    with pytest.raises(ConfigError, match=sentence):
        run_cell(student_cell("none"), load(place), place)


def test_an_error_of_a_method_has_its_line() -> None:
    file = ROOT / "baselines" / "new.py"
    inside: dict[str, Any] = {"torch": torch}
    exec(compile("def losses():\n    return torch.zeros(2, 3) @ torch.ones(2)\n", file, "exec"), inside)
    with pytest.raises(RuntimeError) as caught:
        inside["losses"]()
    assert re.fullmatch(r"RuntimeError: .+ \(baselines/new\.py, line 2\)", reason(caught.value))
    assert reason(ConfigError("One\nsentence.")) == "One sentence."


def test_a_term_without_gradient_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch, "constant")
    run_cell(student_cell("none"), load(place), place)
    assert "no gradient comes from the term 'wobble'" in caplog.text and "'task'" not in caplog.text


def test_an_unknown_tap_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "")
    monkeypatch.setattr(Broken, "student_taps", ("neck",))
    with pytest.raises(ConfigError, match=r"unknown taps \['neck'\].*backbone.1"):
        run_cell(student_cell("none"), load(place), place)


def test_a_method_that_changes_the_teacher_is_caught(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, real = load(place), pack_module.train

    def meddling(trainees: Any, teacher: Any, *others: Any) -> None:
        *shared, finish, tell, left = others

        def late(trainee: Any) -> None:
            if "/kd/" in trainee.label:
                next(teacher.buffers()).data.add_(1)
            finish(trainee)

        real(trainees, teacher, *shared, late, tell, left)

    monkeypatch.setattr(pack_module, "train", meddling)
    cells = [student_cell(key) for key in ("none", "kd", "cwd")]
    found = run_pack(cells, params, place)
    assert "teacher changed" in str(found[cells[1]]) and "teacher changed" in str(found[cells[2]])
    assert found[cells[0]] is None  # it learns from none
    monkeypatch.undo()
    run_cell(cells[1], params, place)  # by the teacher in the file, read again


def test_a_teacher_is_rounded_as_it_is_stored(place: Path) -> None:
    """So that the file scores what its record says, and a network that is loaded from it is the same."""
    cell = records.teacher_cell(load(place), "streets")
    stored = weights(place, cell)
    assert {value.dtype for value in stored.values() if value.ndim > 1} == {torch.float16}
    assert all(value.dtype != torch.float16 for value in stored.values() if value.ndim <= 1)
    network = SegmentationNetwork(R18, 3)
    exact = {name: value.clone() for name, value in network.state_dict().items()}
    round_weights(network)
    for name, value in network.state_dict().items():
        wanted = exact[name].half().float() if value.ndim > 1 else exact[name]
        assert torch.equal(value, wanted) and value.dtype == exact[name].dtype
    assert any(not torch.equal(value, exact[name]) for name, value in network.state_dict().items())


def test_the_method_may_run_without_a_teacher(place: Path) -> None:
    shutil.rmtree(place / "runs" / "streets" / "teacher")
    run_cell(student_cell("none"), load(place), place)
    record = records.read(student_cell("none"), place)
    assert record is not None and record.run["teacher"] is None


def test_a_crash_of_any_kind_is_noted_for_the_tables(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pack_module, "train", crash)
    with pytest.raises(RuntimeError):
        run_cell(student_cell("none"), load(place), place)
    assert records.failure(student_cell("none"), place) == "RuntimeError: out of memory"
