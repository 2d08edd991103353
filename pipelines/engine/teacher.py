"""The teacher gate: a teacher is loaded strictly and must score what its record says, before anything learns
from it."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.config import ConfigError, Training
from pipelines.datasets.folder import Split, Stream
from pipelines.engine.evaluate import evaluate
from pipelines.networks import SegmentationNetwork, file_sha256, read_state
from pipelines.runs import records
from pipelines.runs.confusion import summary
from pipelines.runs.records import Cell, Record

TOLERANCE = 0.5  # mIoU between the teacher's recorded and measured score: rounding differs between machines


def load_teacher(
    teacher: SegmentationNetwork,
    cell: Cell,
    root: Path,
    classes: list[str],
    ignore_index: int,
    val: Split | Stream,
    training: Training,
) -> Record:
    """Make ``teacher`` the one of ``cell``, frozen and in eval mode, and return its record.

    ``training`` is its own schedule.

    :class:`ConfigError` unless it is exactly the recorded one.
    """
    folder, benchmark = cell.folder(root), cell.benchmark
    weights = folder / "weights.safetensors"
    remedy = (
        f"Train it again: `dvc repro -s -f train_teacher@{benchmark}`, with {benchmark} in suite.benchmarks."
    )
    absent = [name for name in (weights.name, *records.RECORD_FILES) if not (folder / name).is_file()]
    record = records.read(cell, root)
    if absent or record is None:
        raise ConfigError(f"The teacher's {', '.join(absent)} is missing in {folder}. {remedy}")
    run, metrics = record.run, record.metrics
    if run["classes"] != classes:
        raise ConfigError(
            f"The teacher in {folder} knows {len(run['classes'])} classes, the data set has "
            f"{len(classes)}: {classes}. {remedy}"
        )
    if (found := file_sha256(weights)) != run["weights_sha256"]:
        raise ConfigError(
            f"The teacher {weights} is truncated or altered: its sha256 is {found[:12]}…, its record says "
            f"{run['weights_sha256'][:12]}…. {remedy}"
        )
    state = read_state(weights)
    load_exported(teacher, state, f"The teacher {weights}", remedy)
    teacher.requires_grad_(False)
    teacher.eval().to("cuda" if torch.cuda.is_available() else "cpu").to(memory_format=torch.channels_last)
    score = summary(evaluate(teacher, val, len(classes), ignore_index, training), classes)["miou"]
    recorded = metrics["val"]["miou"]
    if abs(score - recorded) > TOLERANCE:
        raise ConfigError(
            f"The teacher in {folder} scores {score:.2f} mIoU on validation, its record says "
            f"{recorded:.2f}. {remedy}"
        )
    return record


def load_exported(
    network: SegmentationNetwork, state: dict[str, torch.Tensor], what: str, remedy: str
) -> None:
    """Load exported weights strictly: every tensor, each of the right shape, and nothing else."""
    wanted = network.exported()
    wrong = sorted(set(wanted) ^ set(state)) or [
        name for name in wanted if wanted[name].shape != state[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{what} is of another architecture or class count ({len(wrong)} tensors differ, first "
            f"{wrong[0]}). {remedy}"
        )
    network.load_state_dict(state, strict=False)
