"""``make speed BENCHMARK=…``: steps a second and memory of a benchmark's protocol on the machine at hand,
before any data is there (``runs/speed.json``, of which the report makes ``reports/speed.*``).

Random images of the real size are written into the real layout, and reading one is timed. The real loop
trains on them from memory, each network in a process of its own, then methods side by side. Scores mean
nothing here, and no weights are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import cli, config, files
from pipelines.config import ROOT, TEACHER, Benchmark, ConfigError, Params
from pipelines.datasets import folder as data_folder
from pipelines.methods import checked
from pipelines.reports import speed_table

WARM = 2  # steps before those that are timed: memory is allocated, kernels are chosen
TESTS = 2  # images that evaluation is timed on
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product shows what a device can do
ABOUT = ("hardware", "versions", "ceiling_tflops")  # the same for all rows
PACK = "pack"  # the row of several methods side by side
SCALES = 32  # of the random images, coarser than their pixels, so that they compress about as photographs do

log = logging.getLogger(__name__)


def speed(
    params: Params,
    benchmark: str,
    batch_size: int | None,
    steps: int,
    root: Path = ROOT,
    size: tuple[int, int] | None = None,
) -> None:
    """Measure the teacher's training, that of the suite's first student by every method, and a pack of as
    many methods as the suite trains side by side.

    ``batch_size`` in place of the protocol's, where memory is short; ``size`` (height, width) of the images
    where the data set's own is not known. A training that fails, or does not fit into memory, is noted as
    such. :class:`ConfigError` when the size of the images is not known.
    """
    own, student = params.benchmark(benchmark), params.suite.students[0]
    batch_size = batch_size or own.training.batch_size
    entry: dict[str, Any] = {
        "benchmark": benchmark,
        "student": student,
        "batch_size": batch_size,
        "protocol": speed_table.protocol(own, params.student(student).written()),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": {},
    }
    together = methods(params)[: params.suite.pack]
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / benchmark
        count, size = write_images(own, benchmark, data, 2 * batch_size, size)
        entry |= {"images": list(size), "loading_ms": loading(own, data, count, batch_size)}
        for name in (TEACHER, *methods(params), PACK):
            log.info("%s: %s", benchmark, f"{', '.join(together)} side by side" if name == PACK else name)
            found = _apart(benchmark, name, batch_size, steps, data, root)
            about = {key: found.pop(key) for key in ABOUT if key in found}
            entry = about | entry | ({"pack": {"methods": together, **found}} if name == PACK else {})
            if name != PACK:
                entry["rows"][name] = found
            if "hardware" in entry:
                speed_table.add(entry, root)  # at once: what is measured is not lost
    if "hardware" not in entry:
        raise ConfigError(
            f"Nothing of {benchmark} ran here ({entry['rows'][TEACHER]['status']}): nothing was written. Try "
            "a smaller batch: BATCH=4."
        )


def methods(params: Params) -> list[str]:
    """The methods of the suite, as in its tables."""
    return [key for key in params.suite_methods if key not in params.controls]


def write_images(
    own: Benchmark, benchmark: str, data: Path, count: int, given: tuple[int, int] | None = None
) -> tuple[int, tuple[int, int]]:
    """Write ``count`` random images and labels in the layout of ``data/<benchmark>``. Returns how many the
    real set has for training, and their size in pixels."""
    module, settings = config.dataset(own.data, benchmark)
    # of a set of the user's own nobody has counted them
    total, *usual = getattr(module, "IMAGES", (getattr(settings, "train", 2**20),))
    usual = getattr(module, "VARIANTS", {}).get(getattr(settings, "variant", None), usual)
    size = settings.size or given or tuple(usual)
    if not size:
        raise ConfigError(
            f'The size of the images of {benchmark} is not known: give it: SIZE="HEIGHT WIDTH".'
        )
    meta, draw = module.meta(settings), np.random.default_rng(0)
    for split, number in zip(data_folder.SPLITS, (count, 1, TESTS), strict=True):
        for kind in (split, f"{split}annot"):
            (data / kind).mkdir(parents=True)
        lines = []
        for index in range(number):
            coarse = [max(2, side // SCALES) for side in size]
            pixels = draw.integers(0, 256, (*coarse, 3), np.uint8)
            picture = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            noise = draw.integers(-4, 5, (*size, 3))
            Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)).save(
                data / split / f"{index}.png"
            )
            labels = Image.fromarray(draw.integers(0, len(meta.classes), coarse, np.uint8))
            labels.resize(size[::-1], Image.Resampling.NEAREST).save(data / f"{split}annot" / f"{index}.png")
            lines.append(f"{split}/{index}.png {split}annot/{index}.png\n")
        (data / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    data_folder.write_description(data, meta)
    return total, size


def loading(own: Benchmark, data: Path, count: int, batch_size: int) -> float:
    """Milliseconds to read and augment one of ``count`` images, by one process: from disk, where a set of
    that many is too large for the memory."""
    import torch

    from pipelines.datasets.transforms import training_batches

    torch.set_num_threads(1)
    description = data_folder.describe(data)
    assert description.size is not None
    split = (
        data_folder.Stream(data, description, data_folder.read_list(data, "train"), 0)
        if data_folder.streams(count, description.size)
        else data_folder.load(data, "train")
    )
    training = own.training.model_copy(update={"steps": 2, "batch_size": batch_size})
    start = time.perf_counter()
    for _ in training_batches(split, training, description.ignore_index, 0, 0):
        pass
    return round(1000 * (time.perf_counter() - start) / (2 * batch_size), 2)


def _apart(benchmark: str, name: str, batch_size: int, steps: int, data: Path, root: Path) -> dict[str, Any]:
    """:func:`row` in a process of its own, whose memory is then that of one training."""
    command = [sys.executable, "-m", "pipelines.tools.speed", "--benchmark", benchmark, "--row", name]
    command += ["--batch-size", str(batch_size), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--data", str(data), "--params", str(root / "params.yaml")],
        check=False,
    )
    if done.returncode == 0:
        return dict(json.loads((data.parent / "row.json").read_bytes()))
    if done.returncode in (-9, speed_table.OUT_OF_MEMORY):
        return {"status": "out of memory"}
    log.warning("%s of %s could not be measured: what stopped it stands above.", name, benchmark)
    return {"status": "failed"}


def row(params: Params, benchmark: str, name: str, batch_size: int, steps: int, data: Path) -> dict[str, Any]:
    """The times of a training in milliseconds, its memory in MB, the operations of a step. ``name``: the
    teacher, a method, or PACK."""
    import torch

    from pipelines.engine import machine
    from pipelines.engine.cost import step_cost
    from pipelines.engine.evaluate import evaluate
    from pipelines.engine.pack import plan
    from pipelines.engine.train import Trainee, auxiliary_weight, train
    from pipelines.networks import SegmentationNetwork, tap_shapes
    from pipelines.runs.records import Cell, teacher_cell

    machine.set_up(params.suite)
    student, own = params.suite.students[0], params.benchmark(benchmark).teacher
    together = methods(params)[: params.suite.pack] if name == PACK else [name]
    cells = [
        teacher_cell(params, benchmark) if one == TEACHER else Cell(benchmark, student, one, 0)
        for one in together
    ]
    plans = [plan(params, cell) for cell in cells]
    changes = {"steps": WARM + steps, "batch_size": batch_size, "warmup_steps": 0, "lr": 1e-6}
    changes["validate_every"] = 2 * changes["steps"]
    training = plans[0].training.model_copy(update=changes)
    description = data_folder.describe(data)
    classes, ignore = len(description.classes), description.ignore_index
    torch.manual_seed(0)
    teacher = None
    if name != TEACHER:
        head = auxiliary_weight(own.training, own.network.recipe) > 0
        teacher = SegmentationNetwork(own.network, classes, head).eval().requires_grad_(False)
        teacher.to(machine.device()).to(memory_format=torch.channels_last)
    trainees = []
    for planned in plans:
        network = SegmentationNetwork(planned.network, classes, planned.auxiliary).to(machine.device())
        shapes = tap_shapes(network, training.crop)
        method = planned.method(
            planned.config, shapes, tap_shapes(teacher, training.crop) if teacher else shapes
        )
        about = (planned.cell.method, network, method, training, planned.recipe, 0)
        state = data.parent / f"{planned.cell.method}.pt"  # of a slow step one is written
        trainees.append(Trainee(*about, state, "", lambda _: 0.0))
    first = trainees[0]
    if not any(trainee.method.teacher_taps for trainee in trainees):
        teacher = None

    split = data_folder.load(data, "train", in_memory=True).to(machine.device())
    if machine.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stamps: list[float] = []

    def tell(label: str, *_: object) -> None:
        if label == first.label:
            stamps.append(time.perf_counter())

    train(trainees, teacher, split, classes, ignore, lambda _: None, tell)
    for trainee in trainees:
        if trainee.failure is not None:
            raise trainee.failure
    seconds = first.history.seconds[WARM:] if len(plans) == 1 else np.diff(stamps[WARM - 1 :])
    counted = {}
    if len(plans) == 1:
        cost = step_cost(first.student, teacher, first.method, classes, training, first.recipe)
        counted = {"step_flops": cost.flops}
    test = data_folder.load(data, "test")
    evaluate(first.student, test, classes, ignore, training)
    start = time.perf_counter()
    evaluate(first.student, test, classes, ignore, training)
    evaluation = 1000 * (time.perf_counter() - start) / len(test.names)
    return {
        "status": "measured",
        "step_ms": [round(1000 * float(value), 2) for value in seconds],
        **counted,
        "evaluation_ms": round(evaluation, 2),
        "memory_mb": round(machine.memory_peak_mb(), 1),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "ceiling_tflops": round(ceiling(training.precision), 3),
    }


def ceiling(precision: str) -> float:
    """TFLOP/s of the product of two large square matrices in the precision of a training, on this device: the
    best of ten."""
    import torch

    from pipelines.engine import machine

    device = machine.device()
    side, kind = SIDE[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    spent = []
    for _ in range(11):  # the first chooses a kernel
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        spent.append(time.perf_counter() - start)
    return float(2 * side**3 / min(spent) / 1e12)


def _row(params: Params, arguments: argparse.Namespace) -> None:
    import torch

    try:
        found = row(
            params,
            arguments.benchmark,
            arguments.row,
            arguments.batch_size,
            arguments.steps,
            arguments.data,
        )
    except (RuntimeError, MemoryError) as error:
        # on the CPU torch has no error of its own for it
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        log.warning("%s: %s", arguments.row, " ".join(str(error).split())[:200])
        sys.exit(speed_table.OUT_OF_MEMORY)
    files.write_bytes(arguments.data.parent / "row.json", files.json_bytes(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make speed",
        description="Measure steps a second and memory of a benchmark's protocol on this machine, on random "
        "images, without its data.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    parser.add_argument("--batch-size", type=int, help="images a batch, where memory is short")
    parser.add_argument(
        "--size", type=int, nargs=2, help="height and width of the images, for data of your own"
    )
    parser.add_argument("--steps", type=int, default=10, help="how many steps to time")
    for hidden, kind in (("--row", str), ("--data", Path), ("--params", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, variable in (("batch_size", "BATCH"), ("steps", "--steps")):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            raise ConfigError(f"{variable}={value} is not allowed: give 2 or more.")
    if arguments.size and min(arguments.size) < 1:
        raise ConfigError("SIZE: both numbers must be 1 or more.")
    params = checked(config.load(arguments.params))
    if arguments.row:
        _row(params, arguments)
    else:
        size = arguments.size and (arguments.size[0], arguments.size[1])
        speed(params, arguments.benchmark, arguments.batch_size, arguments.steps, size=size)


if __name__ == "__main__":
    cli.run(main)
