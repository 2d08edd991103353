"""The teacher gate: a teacher is loaded strictly and must score what its record says, before anything learns
from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.config import ROOT, ConfigError, Params
from pipelines.datasets.folder import Description, Split, Stream
from pipelines.engine import machine
from pipelines.engine.evaluate import evaluate
from pipelines.engine.train import auxiliary_weight
from pipelines.method import Shapes
from pipelines.networks import SegmentationNetwork, file_sha256, read_state, tap_shapes
from pipelines.runs import records
from pipelines.runs.confusion import summary
from pipelines.runs.records import Record, teacher_cell

TOLERANCE = 0.5  # mIoU between the teacher's recorded and measured score: rounding differs between machines


@dataclass(frozen=True)
class Teacher:
    """A checked teacher: frozen, in eval mode, on the device."""

    network: SegmentationNetwork
    sha256: str  # of its file
    scores: dict[str, float]  # val_miou, test_miou, as recorded
    state: str  # a hash of all its weights and buffers

    def shapes(self, crop: tuple[int, int]) -> Shapes:
        return tap_shapes(self.network, crop)


_KEPT: dict[tuple[str, ...], Teacher] = {}


def forget_teacher() -> None:
    """The next one is read from its file, and checked again."""
    _KEPT.clear()


def checked_teacher(
    params: Params, benchmark: str, val: Split | Stream, description: Description, root: Path = ROOT
) -> Teacher:
    """The teacher of a benchmark, read and checked once a process. One whose weights are in the repository is
    put beside its record.

    :class:`ConfigError` unless its file is exactly the recorded one, of the network in params.yaml, trained
    on this data, and scores on ``val`` what its record says.
    """
    records.restore_teacher(params, benchmark, root)
    own, folder = params.benchmark(benchmark).teacher, teacher_cell(params, benchmark).folder(root)
    weights, classes = folder / "weights.safetensors", list(description.classes)
    remedy = f"Train it again: `dvc repro -s -f train_teacher@{benchmark}`."
    record = _record(params, benchmark, root, remedy)
    run = record.run
    key = (str(weights), run["weights_sha256"], description.sha256, own.model_dump_json())
    if (found := _KEPT.get(key)) is not None:
        return found
    if run["classes"] != classes:
        raise ConfigError(
            f"The teacher in {folder} knows {len(run['classes'])} classes, the data set has "
            f"{len(classes)}: {classes}. {remedy}"
        )
    if (sha256 := file_sha256(weights)) != run["weights_sha256"]:
        raise ConfigError(
            f"The teacher {weights} is truncated or altered: its sha256 is {sha256[:12]}…, its record says "
            f"{run['weights_sha256'][:12]}…. {remedy}"
        )
    if run["data_sha256"] != description.sha256:
        raise ConfigError(
            f"The teacher of {benchmark} was trained on other data than data/{benchmark} holds now: run "
            "`make repro`, which makes both anew."
        )
    auxiliary = auxiliary_weight(own.training, own.network.recipe) > 0
    network = SegmentationNetwork(own.network, len(classes), auxiliary)
    load_state(network, network.state_dict(), read_state(weights), f"The teacher {weights}", remedy)
    network.requires_grad_(False)
    network.eval().to(machine.device()).to(memory_format=torch.channels_last)
    counts = evaluate(network, val, len(classes), description.ignore_index, own.training)
    score, recorded = summary(counts, classes)["miou"], record.metrics["val"]["miou"]
    if abs(score - recorded) > TOLERANCE:
        raise ConfigError(
            f"The teacher in {folder} scores {score:.2f} mIoU on validation, its record says "
            f"{recorded:.2f}. {remedy}"
        )
    scores = {f"{split}_miou": record.metrics[split]["miou"] for split in ("val", "test")}
    _KEPT.clear()  # one at a time: they may be large
    _KEPT[key] = Teacher(network, sha256, scores, state_sha256(network))
    return _KEPT[key]


def _record(params: Params, benchmark: str, root: Path, remedy: str) -> Record:
    cell = teacher_cell(params, benchmark)
    folder = cell.folder(root)
    absent = [n for n in ("weights.safetensors", *records.RECORD_FILES) if not (folder / n).is_file()]
    record = records.read(cell, root)
    if absent or record is None:
        raise ConfigError(f"The teacher's {', '.join(absent)} is missing in {folder}. {remedy}")
    return record


def load_state(
    network: SegmentationNetwork,
    wanted: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    what: str,
    remedy: str,
) -> None:
    """Load the tensors ``wanted`` of a network strictly: every one, each of the right shape, and nothing
    else."""
    wrong = sorted(set(wanted) ^ set(state)) or [
        name for name in wanted if wanted[name].shape != state[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{what} is of another architecture or class count ({len(wrong)} tensors differ, first "
            f"{wrong[0]}). {remedy}"
        )
    network.load_state_dict(state, strict=False)


def state_sha256(network: torch.nn.Module) -> str:
    """A hash of all parameters and buffers."""
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
