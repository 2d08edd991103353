"""`make bench`: what the default benchmark costs from nothing, in a temporary clone. Asserts nothing.

The figures go to ``runs/bench.json``, of which `make readme` makes sentences.

``--packs``: the seconds of a step of a pack beside those of its cells alone and beside what is possible, on
random images.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import copy_repository, read_params
from suites import change

from pipelines.engine import machine
from pipelines.reports import readme

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "data": "data of .* took",
    "teacher": "/teacher done in",
    "packs": "streets: (?!.*/teacher).* done in",
    "count": "count of networks took",
    "export": "export of .* took",
    "panels": "panels of .* took",
    "figures": "figures of .* took",
    "commit": "the commit to DVC took",
    "report": "the report took",
}

# Training and inference, a core each: packs evaluate their students, the export runs and times them
BESIDE = ("packs", "panels", "export")


def busy() -> float:
    """Seconds that the cores of this machine have worked since it started."""
    return sum(map(int, Path("/proc/stat").read_text().split()[1:4])) / os.sysconf("SC_CLK_TCK")


class Run:
    """`make repro` in a clone: its lines, when they came and what the cores had done until then."""

    def __init__(self, root: Path, bin_: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
        environment.pop("OMP_NUM_THREADS", None)  # the tests' one thread is not what a user has
        environment["PATH"] = f"{bin_}{os.pathsep}{environment['PATH']}"
        command, start = [str(bin_ / "python"), "-m", "pipelines.suite.repro"], time.perf_counter()
        self.lines: list[tuple[float, float, str]] = []
        with subprocess.Popen(
            command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stderr or ():
                self.lines.append((time.perf_counter() - start, busy(), line.rstrip()))
                print(f"  {self.lines[-1][0]:6.1f} s  {self.lines[-1][2]}")
        self.seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(process.returncode)

    def part(self, pattern: str) -> float:
        """The sum of the seconds that the lines of a kind of task name."""
        found = (re.search(rf"{pattern} ([\d.]+) s", line) for _, _, line in self.lines)
        return sum(float(match[1]) for match in found if match)

    def share(self, *patterns: str) -> float:
        """Of the cores, how much worked between two lines."""
        (began, before, _), (ended, after, _) = (
            next(entry for entry in self.lines if re.search(pattern, entry[2])) for pattern in patterns
        )
        return (after - before) / (ended - began) / len(os.sched_getaffinity(0))


def suite(install: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, bin_, installing = copy_repository(Path(folder)), Path(sys.executable).parent, 0.0
        if install:
            start, bin_ = time.perf_counter(), root / ".venv" / "bin"
            subprocess.run(["make", ".venv/.installed"], cwd=root, check=True)
            installing = time.perf_counter() - start
        whole, again = Run(root, bin_), Run(root, bin_)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        runs = [json.loads(path.read_text())["seconds"] for path in root.glob("runs/streets/**/run.json")]
        (root / "baselines" / "new.py").write_bytes((root / "baselines" / "kd.py").read_bytes())
        change(root, lambda raw: raw["methods"].update(new=dict(raw["methods"]["kd"])))
        change(root, lambda raw: raw["suite"].update(methods=[*raw["suite"]["methods"], "new"]))
        added = Run(root, bin_)
        new = [json.loads(path.read_text())["seconds"] for path in root.glob("runs/*/*/new/*/run.json")]
    parts = {"installation": installing, **{name: whole.part(pattern) for name, pattern in PARTS.items()}}
    cores, seconds = len(os.sched_getaffinity(0)), installing + whole.seconds
    note(
        "suite",
        processor=machine.processor(),
        cores=cores,
        seconds=seconds,
        trainings=len(runs),
        training=(parts["teacher"] + sum(parts[name] for name in BESIDE) / cores) / seconds,
        busy=whole.share(PARTS["data"], PARTS["report"]),
        memory_mb=peak,
        again=again.seconds,
        added=added.seconds,
        added_packs=added.part(PARTS["packs"]),
        parts=parts,
    )
    print(f"\nmake repro from nothing: {seconds:.0f} s, {len(runs)} trainings")
    print(*(f"  {name:14} {took:4.0f} s" for name, took in parts.items()), sep="\n")
    print("  (data, packs, count, export and panels side by side: seconds of workers)")
    print(f"a new method, as if alone: {sum(one['wall'] for one in new):.0f} s")
    print(readme.speed(ROOT))


def note(what: str, **found: Any) -> None:
    """Put what was measured into the record, beside what is there."""
    found = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    readme.BENCH.add({"what": what, **found}, ROOT)


def packs(pair: str) -> None:
    """In the protocol of `streets`, all in this process."""
    from pipelines import config
    from pipelines.datasets import folder
    from pipelines.engine import machine, train
    from pipelines.engine.pack import plan
    from pipelines.networks import SegmentationNetwork, tap_shapes
    from pipelines.runs.records import Cell
    from pipelines.tools.speed import write_images

    raw: dict[str, Any] = read_params()
    own, name = raw["benchmarks"]["streets"], raw["suite"]["students"][0]
    for network, wanted in zip(
        (own["teacher"]["network"], raw["students"][name]), pair.split(","), strict=True
    ):
        architecture, depth = wanted.split("-R")
        network |= {"architecture": architecture, "encoder": f"tu-resnet{depth}"}
    own["training"] |= {"steps": 12, "warmup_steps": 0, "validate_every": 100, "lr": 1e-6}
    params = config.Params.model_validate(raw)
    machine.set_up(params.suite)
    planned = plan(params, Cell("streets", name, "kd", 0))
    with tempfile.TemporaryDirectory() as place:
        write_images(params.benchmark("streets"), "streets", Path(place), 32)
        data, classes = folder.load(Path(place), "train"), len(folder.describe(Path(place)).classes)
    about = plan(params, Cell("streets", "teacher", "teacher", 0)).network
    teacher = SegmentationNetwork(about, classes, True).eval().requires_grad_(False)
    crop, passes, real = planned.training.crop, list[float](), train.teacher_taps

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        taps = real(*arguments)
        passes.append(time.perf_counter() - start)
        return taps

    train.teacher_taps = timed

    def step(size: int) -> tuple[float, float]:
        """The median seconds of a step of a pack, and of its pass of the teacher."""
        trainees, stamps, states = [], list[float](), Path(tempfile.mkdtemp())
        for number in range(size):
            student = SegmentationNetwork(planned.network, classes, True)
            method = planned.method(planned.config, tap_shapes(student, crop), tap_shapes(teacher, crop))
            state = states / str(number)  # of a slow step one is written
            about = (str(number), student, method, planned.training, None, 0, state, "", lambda _: 0.0)
            trainees.append(train.Trainee(*about))

        def tell(label: str, *_: object) -> None:
            if label == "0":
                stamps.append(time.perf_counter())

        passes.clear()
        train.train(trainees, teacher.to(machine.device()), data, classes, 255, lambda _: None, tell)
        shutil.rmtree(states)
        if failed := [one.failure for one in trainees if one.failure]:
            raise failed[0]
        return statistics.median(b - a for a, b in pairwise(stamps[2:])), statistics.median(passes[3:])

    print(f"{pair}, kd, batch {planned.training.batch_size}, {crop[0]}x{crop[1]}:")
    alone, teaching = step(1)
    rows = []
    for size in (1, 5, 10):
        took, bound = step(size)[0], size * (alone - teaching) + teaching
        rows.append([size, *(round(value, 3) for value in (took, size * alone, bound))])
        print(
            f"  K = {size:2}: {took:.2f} s a step, its cells alone {size * alone:.2f} s: "
            f"{took / size / alone:.3f}; possible {bound / size / alone:.3f}, times {took / bound:.2f}"
        )
    note(f"packs {pair}", rows=rows, processor=machine.processor(), cores=len(os.sched_getaffinity(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--installed", action="store_true", help="take the environment that is there")
    parser.add_argument("--packs", action="store_true")
    parser.add_argument("--pair", default="PSPNet-R34,PSPNet-R18", help="teacher, student")
    options = parser.parse_args()
    packs(options.pair) if options.packs else suite(not options.installed)


if __name__ == "__main__":
    main()
