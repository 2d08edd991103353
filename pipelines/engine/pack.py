"""From cells of params.yaml to their records: data, teacher gate, one training for the pack, evaluation.

What the cells of a benchmark share (images, the checked teacher) is kept in the process, so that a worker
that trains one pack after another loads it once.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import config, files
from pipelines.config import ROOT, ConfigError, Network, Params, Recipe, Training
from pipelines.datasets import folder as data_folder
from pipelines.engine import machine
from pipelines.engine.cost import Cost, step_cost
from pipelines.engine.evaluate import evaluate
from pipelines.engine.seeds import derive
from pipelines.engine.teacher import Teacher, checked_teacher, forget_teacher, state_sha256
from pipelines.engine.train import Told, Trainee, auxiliary_weight, silent, train
from pipelines.method import TAPS, Distiller, MethodConfig, Shapes
from pipelines.methods import configured, method_class, reason
from pipelines.networks import SegmentationNetwork, flops, load_encoder, tap_shapes
from pipelines.runs import records
from pipelines.runs.confusion import summary
from pipelines.runs.fingerprint import fingerprint, settings
from pipelines.runs.records import Cell

log = logging.getLogger(__name__)

SHARED = Path("/dev/shm")  # where worker processes put their batches, on Linux


@dataclass(frozen=True)
class Plan:
    """How a cell is trained: the network, by which method and settings, on which schedule."""

    cell: Cell
    network: Network
    training: Training
    method: type[Distiller]
    config: MethodConfig

    @property
    def recipe(self) -> Recipe | None:
        return self.network.recipe

    @property
    def auxiliary(self) -> bool:
        """Whether the network is trained with an auxiliary head."""
        return auxiliary_weight(self.training, self.recipe) > 0


def plan(params: Params, cell: Cell) -> Plan:
    """The plan of a cell. :class:`ConfigError`, with what exists, when params.yaml lacks a part of it."""
    benchmark = params.benchmark(cell.benchmark)
    if cell.is_teacher:
        return Plan(cell, benchmark.teacher.network, benchmark.teacher.training, Distiller, MethodConfig())
    student, values = params.student(cell.student), configured(params, cell.method)
    schedule = params.schedule(cell.benchmark, cell.method)
    return Plan(cell, student, schedule, method_class(params.module_key(cell.method)), values)


@dataclass(frozen=True)
class Bench:
    """What all cells of a benchmark share; on the device, read once a process."""

    description: data_folder.Description
    train: data_folder.Split | data_folder.Stream
    val: data_folder.Split | data_folder.Stream
    folder: Path
    workers: int

    @property
    def classes(self) -> list[str]:
        return list(self.description.classes)


@functools.lru_cache(maxsize=1)
def _bench(folder: Path, sha256: str, workers: int, device: str) -> Bench:
    """The data of the sum ``sha256`` in ``folder``."""
    description = data_folder.describe(folder)
    train, val = (data_folder.load(folder, split, workers) for split in ("train", "val"))
    return Bench(description, train.to(device), val, folder, workers)


def bench(params: Params, benchmark: str, root: Path = ROOT) -> Bench:
    """The data of a benchmark. :class:`ConfigError` when it is absent or damaged."""
    folder = root / "data" / benchmark
    sha256 = data_folder.describe(folder).sha256
    return _bench(folder, sha256, params.suite.workers, str(machine.device()))


@dataclass
class Prepared:
    """A cell that can be trained."""

    plan: Plan
    trainee: Trainee
    cost: Cost
    teacher: Teacher | None  # that the method asks for
    teacher_sha256: str | None  # of the benchmark's, in the fingerprint
    config: dict[str, Any]
    engine: int
    seconds: float  # of its preparation


def prepare(
    planned: Plan, params: Params, shared: Bench, teacher: Teacher | None, root: Path = ROOT
) -> Prepared:
    """Build a cell's student, method and optimisers, and count what a step costs. ``teacher`` is None where
    the benchmark's could not be had: :class:`ConfigError` then if the method asks for one."""
    cell, clock = planned.cell, time.perf_counter()
    classes = len(shared.classes)
    torch.manual_seed(derive(cell.seed, "network", cell.student))
    network = SegmentationNetwork(planned.network, classes, planned.auxiliary).to(machine.device())
    if (key := planned.network.weights) is not None:
        load_encoder(network, key, params.encoder_weights(key), root)
    shapes = tap_shapes(network, planned.training.crop)
    teacher_shapes: Shapes = shapes
    if not cell.is_teacher:
        teacher_shapes = teacher.shapes(planned.training.crop) if teacher else _unseen(params, cell, classes)
    torch.manual_seed(derive(cell.seed, "method"))
    method = planned.method(planned.config, shapes, teacher_shapes)
    for role, wanted, have in (
        ("student", method.student_taps, shapes),
        ("teacher", method.teacher_taps, teacher_shapes),
    ):
        if unknown := sorted(set(wanted) - set(TAPS)):
            raise ConfigError(
                f"{cell.method} asks the {role} for unknown taps {unknown}; the taps that exist: "
                f"{', '.join(TAPS)}."
            )
        if absent := sorted(set(wanted) - set(have)):
            raise ConfigError(
                f"{cell.method} asks the {role} for {absent[0]}, which that network has not: let `__init__` "
                "look for it in the shapes that it is given, or give the training an `auxiliary_weight`."
            )
    if method.teacher_taps and teacher is None:
        raise ConfigError(f"The method of {cell.path} asks for a teacher, and {cell.benchmark} has none.")
    used = teacher if method.teacher_taps else None
    cost = step_cost(
        network, used.network if used else None, method, classes, planned.training, planned.recipe
    )
    sha256 = teacher.sha256 if teacher else None

    def score(trainee: Trainee) -> float:
        return summary(validate(trainee, shared), shared.classes)["miou"]

    return Prepared(
        plan=planned,
        trainee=Trainee(
            label=cell.path,
            student=network,
            method=method,
            training=planned.training,
            recipe=planned.recipe,
            seed=cell.seed,
            state_file=cell.scratch(root) / "state.pt",
            mark=fingerprint(params, cell, shared.description.sha256, sha256),
            validate=score,
        ),
        cost=cost,
        teacher=used,
        teacher_sha256=sha256,
        config=settings(params, cell),
        engine=params.engine,
        seconds=time.perf_counter() - clock,
    )


def _unseen(params: Params, cell: Cell, classes: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of a teacher that nobody has trained yet, for a method that may not need it."""
    teacher = params.benchmark(cell.benchmark).teacher
    auxiliary = auxiliary_weight(teacher.training, teacher.network.recipe) > 0
    network = SegmentationNetwork(teacher.network, classes, auxiliary)
    return tap_shapes(network, params.benchmark(cell.benchmark).training.crop)


def validate(trainee: Trainee, shared: Bench) -> np.ndarray:
    """Counts (N, C, C) of the validation images."""
    start, description = time.perf_counter(), shared.description
    counts = evaluate(
        trainee.student, shared.val, len(shared.classes), description.ignore_index, trainee.training
    )
    trainee.evaluating += time.perf_counter() - start
    return counts


def run_cell(cell: Cell, params: Params, root: Path = ROOT, tell: Told = silent) -> None:
    """Train one cell, a pack of one. Raises what stopped it."""
    if (failure := run_pack([cell], params, root, tell)[cell]) is not None:
        raise failure


def run_pack(
    cells: Sequence[Cell], params: Params, root: Path = ROOT, tell: Told = silent
) -> dict[Cell, Exception | None]:
    """Train cells of one benchmark and seed side by side, each with its record in ``runs/``; what stopped a
    cell, or None. ValueError for cells that do not see the same batches.

    While another process trains one of the cells, this one waits. A whole record of exactly today's inputs is
    kept if its weights are here too: DVC asks for a cell without them, and waits for the file. The reason of
    a failure stays in ``.scratch/`` for the report. A teacher is a pack of its own.
    """
    for cell in cells:  # a name that does not exist leaves no trace
        records.check_names(cell, params)
    if len({(cell.benchmark, cell.seed, cell.is_teacher) for cell in cells}) != 1:
        raise ValueError(f"No pack: {', '.join(cell.path for cell in cells)} do not see the same batches.")
    failures: dict[Cell, Exception | None] = dict.fromkeys(cells)
    whole: set[Cell] = set()  # that have their record
    started, code = datetime.datetime.now(datetime.UTC), machine.git_state()
    with ExitStack() as stack:
        for cell in sorted(cells, key=lambda cell: cell.path):
            stack.enter_context(files.hold(cell.lock(root), cell.path))
            for folder in (cell.folder(root), cell.scratch(root)):
                files.clear_parts(folder)
        try:
            shared = bench(params, cells[0].benchmark, root)
            teacher = teacher_of(cells, params, shared, root)
            sums = (shared.description.sha256, teacher.sha256 if teacher else None)
            plans: list[Plan] = []
            for cell in failures:
                with _noting(cell, failures):
                    here = (cell.folder(root) / "weights.safetensors").is_file()
                    if here and records.is_finished(cell, fingerprint(params, cell, *sums), root):
                        log.info("%s has finished before, with exactly these inputs: it is kept.", cell.path)
                        whole.add(cell)
                    else:
                        plans.append(plan(params, cell))
            about = Circumstances(started, code, len(plans), root)

            def finish(prepared: Prepared) -> None:
                _finish(prepared, params, shared, about)
                whole.add(prepared.plan.cell)

            def fail(cell: Cell, failure: Exception) -> None:
                _leave_note(cell, failure, root)  # at once: a pack may be killed before its end

            failures |= train_plans(plans, params, shared, teacher, finish, tell, fail, root)
        except Exception as error:  # of what all share: the data, the teacher
            failures = {
                cell: failure or (None if cell in whole else error) for cell, failure in failures.items()
            }
        for cell, failure in failures.items():
            if failure is not None:
                _leave_note(cell, failure, root)
            else:  # of another time; until now it was the last that is known of the cell
                records.failure_note(cell, root).unlink(missing_ok=True)
    return failures


def teacher_of(cells: Sequence[Cell], params: Params, shared: Bench, root: Path = ROOT) -> Teacher | None:
    """The checked teacher of a benchmark; None for a pack that has no use for it: teachers, the reference and
    its controls."""
    learning = any(
        not cell.is_teacher and params.module_key(cell.method) != params.suite.reference for cell in cells
    )
    return (
        checked_teacher(params, cells[0].benchmark, shared.val, shared.description, root)
        if learning
        else None
    )


def train_plans(
    plans: Sequence[Plan],
    params: Params,
    shared: Bench,
    teacher: Teacher | None,
    finish: Callable[[Prepared], None],
    tell: Told = silent,
    fail: Callable[[Cell, Exception], None] = silent,
    root: Path = ROOT,
) -> dict[Cell, Exception | None]:
    """Train as planned, side by side, resuming where an interrupted run of exactly these plans stopped; no
    test image is read here. ``finish`` is called for each that is trained, ``fail`` for each that stops
    before. What stopped a cell, or None."""
    failures: dict[Cell, Exception | None] = {planned.cell: None for planned in plans}
    if not plans:
        return failures
    machine.set_up(params.suite, machine.cores() if plans[0].cell.is_teacher else None)
    ready: list[Prepared] = []
    for planned in plans:
        with _noting(planned.cell, failures):
            ready.append(prepare(planned, params, shared, teacher, root))
        if (failure := failures[planned.cell]) is not None:
            fail(planned.cell, failure)
    training, ignore = plans[0].training, shared.description.ignore_index
    if isinstance(shared.train, data_folder.Stream):
        _check_memory(shared.train, training, plans[0].cell.benchmark)
    if training.precision == "bf16" and machine.device().type == "cpu" and not machine.native_bf16():
        log.warning(
            "This processor has no bf16 instructions: it computes many times slower than in fp32. Set "
            "`precision: fp32` in params.yaml or use another machine."
        )

    def of(trainee: Trainee) -> Prepared:
        return next(one for one in ready if one.trainee is trainee)

    def done(trainee: Trainee) -> None:
        prepared = of(trainee)
        if prepared.teacher and state_sha256(prepared.teacher.network) != prepared.teacher.state:
            forget_teacher()
            raise ConfigError(f"The teacher changed while {trainee.label} was trained: leave it alone.")
        if prepared.plan.cell.is_teacher:
            round_weights(trainee.student)
        finish(prepared)
        trainee.state_file.unlink(missing_ok=True)

    def left(trainee: Trainee) -> None:
        assert trainee.failure is not None
        fail(of(trainee).plan.cell, trainee.failure)

    trainees = {one.plan.cell: one.trainee for one in ready}
    network = teacher.network if teacher else None
    train([*trainees.values()], network, shared.train, len(shared.classes), ignore, done, tell, left)
    return failures | {
        cell: trainee.failure for cell, trainee in trainees.items() if trainee.failure is not None
    }


def round_weights(network: torch.nn.Module) -> None:
    """Round all but vectors to half precision, in place: as a teacher is stored, so that its score is that of
    the file."""
    for value in network.state_dict().values():
        if value.is_floating_point() and value.ndim > 1:
            value.copy_(value.half().float())


@contextlib.contextmanager
def _noting(cell: Cell, failures: dict[Cell, Exception | None]) -> Iterator[None]:
    """What is raised inside stops this cell, and no other."""
    try:
        yield
    except Exception as error:
        failures[cell] = error


def _leave_note(cell: Cell, failure: Exception, root: Path) -> None:
    """Whatever stopped a cell, the tables say so."""
    with contextlib.suppress(OSError):  # of a full disk, say: the error itself is the message then
        files.write_bytes(records.failure_note(cell, root), f"{reason(failure)[:500]}\n".encode())


def _check_memory(data: data_folder.Stream, training: Training, benchmark: str) -> None:
    """Say how much memory the batches take that are read ahead. :class:`ConfigError` when that is more than
    processes can share: torch would die of it without a word."""
    crop, ahead = training.crop, data_folder.AHEAD * data.processes + 1
    batch = training.batch_size * crop[0] * crop[1] * (3 * 4 + 8) / 2**20
    log.info(
        "%s: %d images stay on disk, %d processes read them, up to %d batches of %.1f MB are in memory.",
        benchmark,
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


@dataclass(frozen=True)
class Circumstances:
    """Of the training of a pack."""

    started: datetime.datetime
    code: dict[str, Any]
    together: int
    root: Path


def _finish(prepared: Prepared, params: Params, shared: Bench, about: Circumstances) -> None:
    """Score a trained network, and write its record if all is still as it was when it began."""
    trainee, training, ignore = prepared.trainee, prepared.plan.training, shared.description.ignore_index
    val = validate(trainee, shared)
    trainee.history.rows[-1]["val_miou"] = summary(val, shared.classes)["miou"]
    start = time.perf_counter()
    test = data_folder.load(shared.folder, "test", shared.workers)
    counts = evaluate(trainee.student, test, len(shared.classes), ignore, training)
    seconds = {
        "wall": (datetime.datetime.now(datetime.UTC) - about.started).total_seconds(),
        "preparation": prepared.seconds,
        "training": sum(trainee.history.seconds),
        "step_median": float(np.median(trainee.history.seconds)),
        "validation": trainee.evaluating,
        "test": time.perf_counter() - start,
    }
    _check_unchanged(prepared, params, about.root)
    _write(prepared, shared, (val, counts), test.names, seconds, about)


def _check_unchanged(prepared: Prepared, params: Params, root: Path) -> None:
    """:class:`ConfigError` when the settings, the method's files or the data are not what they were when the
    cell began: DVC notes what it finds afterwards, and would take this for the result of that."""
    cell, file = prepared.plan.cell, root / "params.yaml"
    try:
        new = config.load(file) if file.is_file() else params
        data = data_folder.describe(root / "data" / cell.benchmark).sha256
        if fingerprint(new, cell, data, prepared.teacher_sha256) == prepared.trainee.mark:
            return
    except ConfigError:
        pass
    raise ConfigError(
        f"Since {cell.path} began, its settings, its method's file or its data changed: a result would "
        "belong to what was there before, so none is written. Run the same command again; should you put "
        "back what was there, it takes up what has been trained."
    )


def _write(
    prepared: Prepared,
    shared: Bench,
    counts: tuple[np.ndarray, np.ndarray],
    names: list[str],
    seconds: dict[str, float],
    about: Circumstances,
) -> None:
    from safetensors.torch import save

    planned, trainee, description = prepared.plan, prepared.trainee, shared.description
    cell, folder, training = planned.cell, planned.cell.folder(about.root), planned.training
    network, rows, (val, test) = trainee.student, trainee.history.rows, counts
    weights = save(stored(network, cell.is_teacher))
    (folder / "run.json").unlink(missing_ok=True)  # from here on an old record is none
    files.write_bytes(folder / "weights.safetensors", weights)

    validated = [(row["val_miou"], int(row["step"])) for row in rows if "val_miou" in row]
    best, best_step = max(validated, key=lambda item: (item[0], -item[1]))
    metrics = {
        "val": summary(val, shared.classes),
        "test": summary(test, shared.classes),
        "best_val": {"miou": best, "step": best_step},
    }
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays, test=test.astype(np.int64), val=val.astype(np.int64), test_names=np.array(names)
    )
    size = description.size or training.crop  # of images that differ in size, the crop stands for all
    teacher = prepared.teacher
    run = {
        "cell": asdict(cell),
        "engine": prepared.engine,
        "config": prepared.config,
        "classes": shared.classes,
        "data_sha256": description.sha256,
        "teacher": {"sha256": teacher.sha256, **teacher.scores} if teacher else None,
        "weights_sha256": files.sha256(weights),
        "fingerprint": trainee.mark,
        "steps": training.steps,
        "images_seen": training.steps * training.batch_size,
        "compute": {"step_flops": prepared.cost.flops, "flops": prepared.cost.flops * training.steps},
        "student": {
            "parameters": network.deployed_parameters(),
            "flops": _inference_flops(network, planned.network, size, len(shared.classes)),
            "input": list(size),
        },
        "method_parameters": sum(p.numel() for p in trainee.method.parameters()),
        "left_out": list(trainee.method.left_out),
        "trained_beside": about.together - 1,
        "started": about.started.isoformat(timespec="seconds"),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "memory_peak_mb": round(prepared.cost.memory_mb, 1),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "git": about.code,
    }
    others = {
        "history.csv": _table(rows).encode(),
        "confusion.npz": arrays.getvalue(),
        "metrics.json": files.json_bytes(metrics),
    }
    records.write(folder, run, others)


def stored(network: SegmentationNetwork, is_teacher: bool) -> dict[str, torch.Tensor]:
    """The tensors of weights.safetensors: of a student, what is deployed; of a teacher the auxiliary head
    too, and all but vectors in half precision, to which they were rounded before it was scored."""
    if not is_teacher:
        return {name: value.contiguous().cpu() for name, value in network.exported().items()}
    half = {
        name: value.is_floating_point() and value.ndim > 1 for name, value in network.state_dict().items()
    }
    return {
        name: (value.half() if half[name] else value).contiguous().cpu()
        for name, value in network.state_dict().items()
    }


_COUNTED: dict[str, int] = {}


def _inference_flops(
    network: SegmentationNetwork, about: Network, size: tuple[int, int], classes: int
) -> int:
    key = repr((about.architecture, about.encoder, about.output_stride, size, classes))
    if key not in _COUNTED:
        _COUNTED[key] = flops(network, size)
    return _COUNTED[key]


def _table(rows: list[dict[str, float]]) -> str:
    """history.csv: six digits are enough to draw and to compare."""
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "val_miou"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "val_miou"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: int(value) if key == "step" else f"{value:.6g}" for key, value in row.items()} for row in rows
    )
    return text.getvalue()
