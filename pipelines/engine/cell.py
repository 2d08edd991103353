"""One cell from params.yaml to its record: data, networks, teacher gate, training, evaluation."""

from __future__ import annotations

import contextlib
import csv
import datetime
import inspect
import io
import logging
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import files
from pipelines.config import PAPER, ROOT, ConfigError, Network, Params, Suite, Training, load
from pipelines.datasets import folder as data_folder
from pipelines.engine import checkpoint, eager
from pipelines.engine.cost import step_flops
from pipelines.engine.evaluate import evaluate, latency
from pipelines.engine.fit import History, fit, memory_peak_mb
from pipelines.engine.seeds import derive
from pipelines.engine.teacher import load_teacher
from pipelines.files import write_bytes
from pipelines.method import TAPS, Distiller, MethodConfig
from pipelines.methods import configured, method_class
from pipelines.networks import SegmentationNetwork, file_sha256, flops, load_encoder, tap_shapes
from pipelines.runs import records
from pipelines.runs.confusion import summary
from pipelines.runs.records import Cell, teacher_cell

log = logging.getLogger(__name__)

SHARED = Path("/dev/shm")  # where worker processes put their batches, on Linux

# What a training's outcome depends on beside its method's own file; dvc.yaml lists the same files.
CODE = (
    "pipelines/method.py",
    "pipelines/networks.py",
    "pipelines/datasets/folder.py",
    "pipelines/datasets/transforms.py",
    "pipelines/engine/cell.py",
    "pipelines/engine/cost.py",
    "pipelines/engine/evaluate.py",
    "pipelines/engine/fit.py",
    "pipelines/engine/seeds.py",
    "pipelines/engine/strict.py",
    "pipelines/engine/teacher.py",
    "pipelines/runs/confusion.py",
)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a training: what is trained, how, on what, and after which teacher."""

    cell: Cell
    network: Network
    training: Training
    method: type[Distiller]
    config: MethodConfig
    teacher: Network | None
    teacher_training: Training
    code: dict[str, str]  # sums of the files that compute it, as they were when it was planned

    def values(self, encoder: str | None = None) -> dict[str, Any]:
        """The resolved configuration, as it goes into the record; ``encoder`` is the sha256 of the weights
        that the encoder starts from."""
        network = self.network.written()
        if encoder is not None:
            network["weights"] = {"key": network["weights"], "sha256": encoder}
        return {
            "network": network,
            "training": self.training.written(),
            "method": self.config.model_dump(mode="json"),
            "teacher": self.teacher.written() if self.teacher else None,
        }


def plan(params: Params, cell: Cell) -> Plan:
    """The plan of a cell. :class:`ConfigError`, with what exists, when params.yaml lacks a part of it."""
    benchmark = params.benchmark(cell.benchmark)
    if cell.is_teacher:
        own = benchmark.teacher
        code = _code(Distiller)
        return Plan(cell, own.network, own.training, Distiller, MethodConfig(), None, own.training, code)
    student, config = params.student(cell.student), configured(params, cell.method)
    teacher, method = benchmark.teacher, method_class(params.module_key(cell.method))
    return Plan(
        cell,
        student,
        params.schedule(cell.benchmark, cell.method),
        method,
        config,
        teacher.network,
        teacher.training,
        _code(method),
    )


def _code(method: type[Distiller]) -> dict[str, str]:
    file = Path(inspect.getfile(method))
    own = sorted(file.parent.glob("*.py")) if file.parent.name == PAPER else [file]
    return checkpoint.sums([*(ROOT / name for name in CODE), *own])


@dataclass
class Prepared:
    """A training that can begin, with the fingerprint of everything that its outcome depends on."""

    plan: Plan
    config: dict[str, Any]  # the plan's values, resolved
    training: Training  # the plan's, lengthened where a method has to match the compute of others
    compute: dict[str, Any]
    network: SegmentationNetwork
    teacher: SegmentationNetwork | None
    teacher_scores: dict[str, Any] | None
    method: Distiller
    description: data_folder.Description
    val: data_folder.Split | data_folder.Stream
    workers: int  # that read a set from disk
    fingerprint: str
    seconds: float


@dataclass
class Trained:
    """A trained network with what was counted on the way."""

    network: SegmentationNetwork
    history: History
    val: np.ndarray
    method_parameters: int
    teacher: dict[str, Any] | None
    fingerprint: str
    seconds: dict[str, float]
    steps: int
    compute: dict[str, Any]


def train(plan: Plan, params: Params, root: Path = ROOT) -> tuple[Trained, data_folder.Description]:
    """Train as planned, resuming where an interrupted run of exactly this plan stopped; no test image is read
    here."""
    prepared = prepare(plan, params, root)
    return _train(prepared, root), prepared.description


def prepare(plan: Plan, params: Params, root: Path = ROOT) -> Prepared:
    """Build the networks, check the teacher, count what a step costs."""
    eager.install()
    set_up(params.suite)
    cell, clock = plan.cell, time.perf_counter()
    data = root / "data" / cell.benchmark
    description = data_folder.describe(data)
    classes, ignore_index = list(description.classes), description.ignore_index
    val = data_folder.load(data, "val", params.suite.workers)

    torch.manual_seed(derive(cell.seed, "network", cell.student))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = SegmentationNetwork(plan.network, len(classes)).to(device)
    encoder = None
    if (key := plan.network.weights) is not None:
        encoder = load_encoder(network, key, params.encoder_weights(key), root)
    values = plan.values(encoder)
    teacher = SegmentationNetwork(plan.teacher, len(classes)) if plan.teacher else None
    shapes = tap_shapes(network, plan.training.crop)
    teacher_shapes = tap_shapes(teacher, plan.training.crop) if teacher else shapes
    torch.manual_seed(derive(cell.seed, "method"))
    method = plan.method(plan.config, shapes, teacher_shapes)
    for role, wanted in (("student", method.student_taps), ("teacher", method.teacher_taps)):
        if unknown := sorted(set(wanted) - set(TAPS)):
            raise ConfigError(
                f"{cell.method} asks the {role} for unknown taps {unknown}; the taps that exist: "
                f"{', '.join(TAPS)}."
            )
    training = plan.training
    needed = teacher if method.teacher_taps else None
    own = step_flops(network, needed, method, len(classes), ignore_index, training)
    compute = {"step_flops": own, "flops": own * training.steps}
    scores = None
    if not method.teacher_taps:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"The method of {cell.path} asks for a teacher that this cell does not have.")
    else:
        owner = teacher_cell(params, cell.benchmark)
        record = load_teacher(teacher, owner, root, classes, ignore_index, val, plan.teacher_training)
        if record.run["data_sha256"] != description.sha256:
            raise ConfigError(
                f"The teacher of {cell.benchmark} was trained on other data than data/{cell.benchmark} holds "
                "now: run `make repro`, which makes both anew."
            )
        scores = {"sha256": record.run["weights_sha256"]}
        scores |= {f"{split}_miou": record.metrics[split]["miou"] for split in ("val", "test")}

    inputs = {
        "cell": cell.path,
        "seed": cell.seed,
        "data": description.sha256,
        "teacher_sha256": scores["sha256"] if scores else None,
        "steps": training.steps,
        "threads": params.suite.threads,
        "strict": params.suite.strict,
        # each rounds its own way
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "versions": {name: found for name, found in versions().items() if name != "python"},
        **values,
    }
    mark = checkpoint.fingerprint(inputs, plan.code)
    return Prepared(
        plan=plan,
        config=values,
        training=training,
        compute=compute,
        network=network,
        teacher=teacher,
        teacher_scores=scores,
        method=method,
        description=description,
        val=val,
        workers=params.suite.workers,
        fingerprint=mark,
        seconds=time.perf_counter() - clock,
    )


def set_up(suite: Suite) -> None:
    """The settings of torch that move the last digits of a score."""
    torch.set_num_threads(suite.threads)
    torch.use_deterministic_algorithms(suite.strict, warn_only=True)
    if suite.strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of the GPU


def _train(prepared: Prepared, root: Path) -> Trained:
    plan, network, teacher, method = prepared.plan, prepared.network, prepared.teacher, prepared.method
    cell, description = plan.cell, prepared.description
    classes, ignore_index = list(description.classes), description.ignore_index
    before = file_sha256_of(teacher) if teacher else None
    evaluating = 0.0

    def validate() -> np.ndarray:
        nonlocal evaluating
        start = time.perf_counter()
        counts = evaluate(network, prepared.val, len(classes), ignore_index, plan.training)
        evaluating += time.perf_counter() - start
        return counts

    data = data_folder.load(root / "data" / cell.benchmark, "train", prepared.workers)
    if isinstance(data, data_folder.Stream):
        _log_memory(data, plan)
    data = data.to(next(network.parameters()).device)  # so that the augmentation runs there too
    history = fit(
        network,
        teacher,
        method,
        data,
        len(classes),
        ignore_index,
        prepared.training,
        plan.network.recipe,
        cell.seed,
        lambda: summary(validate(), classes)["miou"],
        cell.scratch(root) / "state.pt",
        prepared.fingerprint,
        cell.path,
    )
    if teacher and file_sha256_of(teacher) != before:
        raise ConfigError(
            f"The teacher changed while {cell.path} was trained: the method must leave it alone."
        )
    counts = validate()
    history.rows[-1]["val_miou"] = summary(counts, classes)["miou"]
    seconds = {
        "preparation": prepared.seconds,
        "training": sum(history.seconds),
        "step_median": float(np.median(history.seconds)),
        "validation": evaluating,
    }
    return Trained(
        network=network,
        history=history,
        val=counts,
        method_parameters=sum(p.numel() for p in method.parameters()),
        teacher=prepared.teacher_scores,
        fingerprint=prepared.fingerprint,
        seconds=seconds,
        steps=prepared.training.steps,
        compute=prepared.compute,
    )


def _log_memory(data: data_folder.Stream, plan: Plan) -> None:
    """Say how much memory the batches take that are read ahead. :class:`ConfigError` when that is more than
    processes can share: torch would die of it without a word."""
    crop, ahead = plan.training.crop, data_folder.AHEAD * data.processes + 1
    batch = plan.training.batch_size * crop[0] * crop[1] * (3 * 4 + 8) / 2**20
    log.info(
        "%s: %d images stay on disk, %d processes read them, up to %d batches of %.1f MB are in memory.",
        plan.cell.path,
        len(data.names),
        data.processes,
        ahead,
        batch,
    )
    if (
        data.processes
        and SHARED.is_dir()
        and (free := shutil.disk_usage(SHARED).free / 2**20) < ahead * batch
    ):
        fits = max(0, int((free / batch - 1) // data_folder.AHEAD))
        raise ConfigError(
            f"{data.processes} processes that read images need {ahead * batch:,.0f} MB of shared memory "
            f"({SHARED}), and {free:,.0f} MB are free: give the container more (`docker run --shm-size`), or "
            f"set suite.workers to {fits} in params.yaml."
        )


def run_cell(cell: Cell, params: Params, root: Path = ROOT) -> None:
    """Train a cell and leave its record in ``runs/``. On an error the reason stays in ``.scratch/`` for the
    report.

    While another process trains the same cell, this one waits. A whole record of exactly these inputs, which
    that process may have left, is kept and not trained again. The last state of the training stays in
    ``.scratch/`` until dvc.lock has the record (:func:`checkpoint.forget`): a DVC that was killed before that
    deletes the record and asks for another one.
    """
    planned = plan(params, cell)
    checkpoint.forget(root)
    with files.hold(cell.lock(root), cell.path):
        for folder in (cell.folder(root), cell.scratch(root)):
            files.clear_parts(folder)
        note = records.failure_note(cell, root)
        note.unlink(missing_ok=True)
        started, code = datetime.datetime.now(datetime.UTC), git_state()
        try:
            prepared = prepare(planned, params, root)
            _check_unchanged(prepared, params, root)  # it may have waited
            if _finished(cell, prepared.fingerprint, root):
                log.info("%s has finished before, with exactly these inputs: its record is kept.", cell.path)
            else:
                _run(prepared, params, started, code, root)
        except Exception as error:  # whatever stopped it, the tables say so
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # of a full disk, say: the error itself is the message then
                write_bytes(note, f"{' '.join(reason.split())[:500]}\n".encode())
            raise


def _finished(cell: Cell, fingerprint: str, root: Path) -> bool:
    """Whether there is a whole record of this fingerprint, with its weights."""
    try:
        record = records.read(cell, root)
    except ConfigError:  # damaged
        return False
    weights = cell.folder(root) / "weights.safetensors"
    return (
        record is not None
        and record.run["fingerprint"] == fingerprint
        and weights.is_file()
        and file_sha256(weights) == record.run["weights_sha256"]
    )


def _run(
    prepared: Prepared, params: Params, started: datetime.datetime, code: dict[str, Any], root: Path
) -> None:
    planned, description = prepared.plan, prepared.description
    trained = _train(prepared, root)
    test = data_folder.load(root / "data" / planned.cell.benchmark, "test", prepared.workers)
    start = time.perf_counter()
    counts = evaluate(
        trained.network,
        test,
        len(description.classes),
        description.ignore_index,
        planned.training,
    )
    trained.seconds["test"] = time.perf_counter() - start
    trained.history.memory_mb = max(trained.history.memory_mb, memory_peak_mb())
    _check_unchanged(prepared, params, root)
    _write(prepared, trained, counts, test.names, started, code, root)


def _check_unchanged(prepared: Prepared, params: Params, root: Path) -> None:
    """:class:`ConfigError` when the cell is not what it was when it began: DVC notes what it finds after a
    stage, and would take this for the result of that."""
    planned, changed = prepared.plan, list[str]()
    if planned.code != _code(planned.method):
        changed.append("the code")
    if data_folder.describe(root / "data" / planned.cell.benchmark).sha256 != prepared.description.sha256:
        changed.append("the data")
    if (file := root / "params.yaml").is_file():
        try:
            new = load(file)
            same = new.suite.threads == params.suite.threads and new.suite.strict == params.suite.strict
            same = same and plan(new, planned.cell).values() == planned.values()
        except ConfigError:
            same = False
        if not same:
            changed.append("params.yaml")
    if changed:
        raise ConfigError(
            f"Since {planned.cell.path} began, {' and '.join(changed)} changed: a result would belong to "
            "what was there before, so none is written. Run the same command again; should you put back what "
            "was there, it takes up what has been trained."
        )


def _write(
    prepared: Prepared,
    trained: Trained,
    test: np.ndarray,
    names: list[str],
    started: datetime.datetime,
    code: dict[str, Any],
    root: Path,
) -> None:
    from safetensors.torch import save

    plan, description = prepared.plan, prepared.description
    cell, folder, classes = plan.cell, plan.cell.folder(root), list(description.classes)
    network, history = trained.network, trained.history
    weights = save({name: value.contiguous().cpu() for name, value in network.exported().items()})
    (folder / "run.json").unlink(missing_ok=True)  # from here on an old record is none
    write_bytes(folder / "weights.safetensors", weights)

    validated = [(row["val_miou"], int(row["step"])) for row in history.rows if "val_miou" in row]
    best, best_step = max(validated, key=lambda item: (item[0], -item[1]))
    metrics = {
        "val": summary(trained.val, classes),
        "test": summary(test, classes),
        "best_val": {"miou": best, "step": best_step},
    }
    columns = [
        name for name in dict.fromkeys(key for row in history.rows for key in row) if name != "val_miou"
    ] + ["val_miou"]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if key != "step" else int(value) for key, value in row.items()}
        for row in history.rows
    )
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays, test=test.astype(np.int64), val=trained.val.astype(np.int64), test_names=np.array(names)
    )

    size = description.size or plan.training.crop  # of images that differ in size, the crop stands for all
    wall = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    run = {
        "cell": {
            "benchmark": cell.benchmark,
            "student": cell.student,
            "method": cell.method,
            "seed": cell.seed,
        },
        "config": prepared.config,
        "classes": classes,
        "data_sha256": description.sha256,
        "teacher": trained.teacher,
        "weights_sha256": files.sha256(weights),
        "fingerprint": trained.fingerprint,
        "steps": trained.steps,
        "images_seen": trained.steps * plan.training.batch_size,
        "compute": trained.compute,
        "student": {
            "parameters": network.deployed_parameters(),
            "flops": flops(network, size),
            "latency_ms": round(latency(network, size, plan.training.precision), 3),
            "input": list(size),
        },
        "method_parameters": trained.method_parameters,
        "started": started.isoformat(timespec="seconds"),
        "seconds": {name: round(value, 4) for name, value in {"wall": wall, **trained.seconds}.items()},
        "memory_peak_mb": round(history.memory_mb, 1),
        "hardware": hardware(),
        "versions": versions(),
        "git": code,
    }
    others = {
        "history.csv": table.getvalue().encode(),
        "confusion.npz": arrays.getvalue(),
        "metrics.json": files.json_bytes(metrics),
    }
    records.write(folder, run, others)


def file_sha256_of(network: torch.nn.Module) -> str:
    """A hash of all parameters and buffers."""
    import hashlib

    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def hardware() -> dict[str, Any]:
    """The device, processor, cores and threads of this machine: what a time in a table was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        about = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text().splitlines())
        )
        if "model name" in about:  # which may hide what kernels depend on
            numbers = [f"{key} {about[key]}" for key in ("cpu family", "model") if key in about]
            processor = ", ".join([about["model name"], *numbers, torch.backends.cpu.get_cpu_capability()])
    return processor


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "timm", "segmentation-models-pytorch", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_state() -> dict[str, Any]:
    """The commit of the code and whether it had changes; nulls outside of a git checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py", "params.yaml"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed.strip())}
