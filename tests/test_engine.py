"""The training loop: pairing, exact resume, the schedule, the teacher gate, and what stops a training."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rewrite
from pipelines.engine.cell import CODE, plan, run_cell, train
from pipelines.engine.fit import DistillationStep, cross_entropy, optimizers, schedule
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import config
from pipelines.config import ConfigError, Network
from pipelines.datasets import transforms
from pipelines.engine import cell as cell_module
from pipelines.engine import checkpoint
from pipelines.engine import fit as fit_module
from pipelines.method import Batch, Distiller, MethodConfig
from pipelines.methods import checked
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
    assert list(shapes) == ["backbone.1", "backbone.2", "backbone.3", "backbone.4", "fusion", "logits"]
    assert shapes["logits"][0] == 5
    assert network.eval().predict(torch.zeros(1, 3, 64, 96)).shape == (1, 64, 96)


def test_an_unknown_encoder_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="tu-resnt18"):
        SegmentationNetwork(R18.model_copy(update={"encoder": "tu-resnt18"}), 3)


def test_training_processes_do_not_import_the_compiler_but_can_compile() -> None:
    script = (
        "import sys, torch; from pipelines.networks import SegmentationNetwork; from pipelines.config "
        "import Network;"
        "n = SegmentationNetwork(Network(architecture='PSPNet', encoder='tu-resnet18', output_stride=8, "
        "weights=None), 3);"
        "o = torch.optim.SGD(n.parameters(), lr=0.1); o.step();"
        "assert 'torch._dynamo.symbolic_convert' not in sys.modules, 'compiler imported';"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=config.ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "2.0", done.stderr


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
    real = fit_module.optimizers

    def watched(*args: Any) -> Any:
        found = real(*args)
        critic = found["critic"]
        step = critic.step

        def record(*a: Any, **k: Any) -> Any:
            seen.append({name: o.param_groups[0]["lr"] for name, o in found.items()})
            return step(*a, **k)

        critic.step = record
        return found

    monkeypatch.setattr(fit_module, "optimizers", watched)
    params = load(place)
    planned = plan(params, student_cell("skd"))
    train(planned, params, place)
    factors = [schedule(planned.training, step) for step in range(planned.training.steps)]
    assert [s["main"] for s in seen] == pytest.approx([planned.training.lr * f for f in factors])
    assert [s["critic"] for s in seen] == pytest.approx([planned.config.critic_lr * f for f in factors])  # type: ignore[attr-defined]


def test_the_teacher_is_out_of_reach_of_the_optimiser_and_of_train() -> None:
    student, teacher = SegmentationNetwork(R18, 3), SegmentationNetwork(R18, 3).eval()
    module = DistillationStep(student, teacher, Distiller(MethodConfig(), {}, {}), 0.4)
    module.train()
    assert not teacher.training
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}


# ---- pairing and resume


def test_cells_of_one_seed_are_paired(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step sees the same student and the same batch whatever the method; another seed does not."""
    monkeypatch.setattr(fit_module, "LOG_EVERY", 1)
    params = load(place)
    first = {}
    for key in ("none", "kd", "skd", "acfd-full"):
        trained, _ = train(plan(params, student_cell(key)), params, place)
        first[key] = trained.history.rows[0]["task"]
    assert len(set(first.values())) == 1, first
    other, _ = train(plan(params, student_cell("none", seed=1)), params, place)
    assert other.history.rows[0]["task"] != first["none"]


@pytest.mark.parametrize("method", ["skd", "acfd-full"])
def test_resume_equals_uninterrupted_bit_for_bit(
    place: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "LOG_EVERY", 2)
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(fit_module, "SAVE_SHARE", 0.0)
    params, cell = load(place), student_cell(method)
    planned = plan(params, cell)
    whole, _ = train(planned, params, place)
    shutil.rmtree(cell.scratch(place))

    batches = transforms.training_batch

    def killed(data: Any, training: Any, ignore: int, seed: int, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return batches(data, training, ignore, seed, step)

    monkeypatch.setattr(transforms, "training_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(planned, params, place)
    steps: list[int] = []

    def counted(data: Any, training: Any, ignore: int, seed: int, step: int) -> Any:
        steps.append(step)
        return batches(data, training, ignore, seed, step)

    monkeypatch.setattr(transforms, "training_batch", counted)
    resumed, _ = train(planned, params, place)
    assert steps == [4, 5]  # it resumed, and at the last row before the kill
    assert resumed.history.rows == whole.history.rows
    a, b = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


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


def test_the_fingerprint_follows_the_params(place: Path, edit: Any) -> None:
    params = load(place)
    marks = {train(plan(params, student_cell("kd")), params, place)[0].fingerprint}
    params = edit(lambda raw: raw["methods"]["kd"].update(weight=0.5))
    marks.add(train(plan(params, student_cell("kd")), params, place)[0].fingerprint)
    params = edit(lambda raw: raw["benchmarks"]["streets"]["training"].update(lr=0.001))
    marks.add(train(plan(params, student_cell("kd")), params, place)[0].fingerprint)
    assert len(marks) == 3


def test_a_finished_training_is_kept_until_dvc_has_its_record(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DVC that was killed before it noted the record deletes it, and asks for the cell again."""
    steps: list[int] = []
    batches = transforms.training_batch

    def counted(data: Any, training: Any, ignore: int, seed: int, step: int) -> Any:
        steps.append(step)
        return batches(data, training, ignore, seed, step)

    monkeypatch.setattr(transforms, "training_batch", counted)
    params, cell = load(place), student_cell("kd")
    names = ("weights.safetensors", "metrics.json", "history.csv", "confusion.npz")

    def run() -> tuple[list[bytes], dict[str, Any], list[int]]:
        steps.clear()
        shutil.rmtree(cell.folder(place), ignore_errors=True)
        run_cell(cell, params, place)
        record = records.read(cell, place)
        assert record is not None
        return [(cell.folder(place) / name).read_bytes() for name in names], record.run, list(steps)

    files, whole, first = run()
    again, record, second = run()
    assert first == list(range(6)) and second == []
    assert again == files and record["fingerprint"] == whole["fingerprint"]
    assert record["seconds"]["training"] == whole["seconds"]["training"]
    assert record["memory_peak_mb"] >= whole["memory_peak_mb"]
    state, content = cell.scratch(place) / "state.pt", (cell.folder(place) / "run.json").read_bytes()
    checkpoint.forget(place)
    (place / "dvc.lock").write_text("md5: of another file")
    checkpoint.forget(place)
    assert state.is_file()
    (place / "dvc.lock").write_text(f"md5: {hashlib.md5(content).hexdigest()}")
    finished = state.read_bytes()
    checkpoint.save(state, "another training of the cell", {})
    checkpoint.forget(place)
    assert state.is_file()
    state.write_bytes(finished)
    checkpoint.forget(place)
    assert not state.exists() and records.read(cell, place) is not None
    assert run()[2] == first


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
    assert [p.name for p in cell.scratch(place).iterdir()] == ["state.pt"]  # until DVC has the record
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
    monkeypatch.setattr(cell_module, "fit", lambda *a, **k: pytest.fail("training began"))
    with pytest.raises(ConfigError, match=sentence) as error:
        run_cell(student_cell("kd"), load(place), place)
    assert "dvc repro" in str(error.value) or "make repro" in str(error.value)
    assert sentence.split()[0] in (records.failure(student_cell("kd"), place) or "")


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
        value = student["logits"].mean() * 0
        if self.fault == "nan" and self.calls > 4:
            value = value + float("nan")
        return {"lr" if self.fault == "name" else "wobble": value}


def broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setattr(cell_module, "method_class", lambda key: Broken)


def resume_state(file: Path) -> dict[str, Any]:
    """What a resume file holds, whatever it belongs to."""
    return dict(torch.load(io.BytesIO(file.read_bytes()[checkpoint.HEAD :]), weights_only=True))


def test_a_nan_stops_with_the_term_and_keeps_the_last_good_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "LOG_EVERY", 2)
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(fit_module, "SAVE_SHARE", 0.0)
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


def test_an_unknown_tap_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "")
    monkeypatch.setattr(Broken, "student_taps", ("neck",))
    with pytest.raises(ConfigError, match=r"unknown taps \['neck'\].*backbone.1"):
        run_cell(student_cell("none"), load(place), place)


def test_a_method_that_changes_the_teacher_is_caught(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load(place)
    real = cell_module.fit

    def meddling(student: Any, teacher: Any, *args: Any) -> Any:
        history = real(student, teacher, *args)
        next(teacher.parameters()).data.add_(1)
        return history

    monkeypatch.setattr(cell_module, "fit", meddling)
    with pytest.raises(ConfigError, match="teacher changed"):
        run_cell(student_cell("kd"), params, place)


def test_code_of_the_fingerprint_and_of_the_stages_are_the_same() -> None:
    import yaml

    stages = yaml.safe_load((config.ROOT / "dvc.yaml").read_text())["stages"]
    for name in ("train_teacher", "distill", "acfd"):
        deps = {d for d in stages[name]["deps"] if d.startswith("pipelines/")}
        assert deps - {"pipelines/stages/train_teacher.py", "pipelines/stages/distill.py"} == set(CODE)
        assert all((config.ROOT / d).is_file() for d in deps)


def test_the_method_may_run_without_a_teacher(place: Path) -> None:
    shutil.rmtree(place / "runs" / "streets" / "teacher")
    trained, _ = train(plan(load(place), student_cell("none")), load(place), place)
    assert trained.teacher is None


def test_a_crash_of_any_kind_is_noted_for_the_tables(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cell_module, "fit", crash)
    with pytest.raises(RuntimeError):
        run_cell(student_cell("none"), load(place), place)
    assert records.failure(student_cell("none"), place) == "RuntimeError: out of memory"
