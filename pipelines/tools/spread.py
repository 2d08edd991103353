"""``make spread BENCHMARK=…``: one cell trained again and again with the same seed on the machine at hand, in
the fast and in the strict mode (``runs/spread.json``, of which the report makes ``reports/spread.*``).

Each repeat is a process of its own that trains by the code of every other cell, in a folder of its own below
``.scratch/``: a killed one resumes, and no record of the tables is touched.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from pipelines import cli, config, files
from pipelines.config import ROOT, ConfigError, Params
from pipelines.methods import checked, configured
from pipelines.reports import spread_table
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell

KERNELS = "kernels.json"
# how torch's warning of an operation begins that has no deterministic kernel
WARNING = re.compile(r"(\S+) does not have a deterministic implementation")

log = logging.getLogger(__name__)


def spread(params: Params, benchmark: str, method: str, repeats: int, root: Path = ROOT) -> None:
    """Repeat the cell of the suite's first student and seed. What has been trained before a kill is kept."""
    cell = Cell(benchmark, params.suite.students[0], method, params.suite.seeds[0])
    params.benchmark(benchmark)
    configured(params, method)
    place = root / ".scratch" / "spread" / cell.path
    with files.hold(
        root / ".scratch" / "locks" / f"spread--{cell.path.replace('/', '--')}.lock", "The spread"
    ):
        found: dict[str, list[Path]] = {mode: [] for mode in spread_table.MODES}
        for number in range(repeats):
            for mode in spread_table.MODES:
                log.info("%s: repeat %d of %d, %s", cell.path, number + 1, repeats, mode)
                own = place / f"{mode}-{number}"
                _link(cell, params, own, root)
                _apart(cell, mode, own, root)
                found[mode].append(own)
        spread_table.add(_entry(cell, found, root), root)
        shutil.rmtree(place)


def _link(cell: Cell, params: Params, place: Path, root: Path) -> None:
    """Give a repeat what a cell reads: the data, the teacher's record, the encoder's weights."""
    names = [Path("data") / cell.benchmark, teacher_cell(params, cell.benchmark).folder(Path())]
    if key := params.student(cell.student).weights:
        names.append(Path(params.encoder_weights(key).file))
    for name in names:  # one that is absolute is found from everywhere
        if not name.is_absolute() and not (place / name).is_symlink():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to((root / name).resolve())


def _apart(cell: Cell, mode: str, place: Path, root: Path) -> None:
    """:func:`repeat` in a process of its own."""
    command = [sys.executable, "-m", "pipelines.tools.spread"]
    command += ["--benchmark", cell.benchmark, "--method", cell.method]
    command += ["--mode", mode, "--place", str(place), "--params", str(root / "params.yaml")]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(
            f"A repeat of {cell.path} did not finish: what stopped it stands above. The same command goes on "
            "from here."
        )


def repeat(params: Params, benchmark: str, method: str, mode: str, place: Path) -> None:
    """Train the cell once, with its record below ``place``, and note which kernels torch warned of."""
    from pipelines.engine.pack import run_cell

    suite = params.suite.model_copy(update={"strict": mode == spread_table.STRICT})
    cell = Cell(benchmark, suite.students[0], method, suite.seeds[0])
    kernels: set[str] = set()
    usual = warnings.showwarning

    def note(message: Warning | str, *rest: Any, **named: Any) -> None:
        if (found := WARNING.match(str(message))) is None:
            usual(message, *rest, **named)
        elif found[1] not in kernels:
            kernels.add(found[1])
            # at once: a killed repeat that has its record already does not train again
            files.write_bytes(place / KERNELS, files.json_bytes({"kernels": sorted(kernels)}))

    warnings.showwarning = note
    run_cell(cell, params.model_copy(update={"suite": suite}), place)


def _entry(cell: Cell, found: dict[str, list[Path]], root: Path) -> dict[str, Any]:
    repeats: dict[str, list[dict[str, Any]]] = {}
    kernels: set[str] = set()
    runs = []
    for mode, places in found.items():
        repeats[mode] = []
        for place in places:
            record = records.read(cell, place)
            assert record is not None
            runs.append(record.run)
            repeats[mode].append(spread_table.outcome(record))
            if (place / KERNELS).is_file():
                kernels.update(json.loads((place / KERNELS).read_bytes())["kernels"])
    same = ("config", "data_sha256", "steps", "hardware", "versions")
    if differ := [name for name in same if any(run[name] != runs[0][name] for run in runs)]:
        raise ConfigError(
            f"The repeats of {cell.path} differ in {', '.join(differ)}: delete "
            f"{found[spread_table.FAST][0].parent.relative_to(root)} and run the same command again."
        )
    known = {name: runs[-1][name] for name in ("cell", *same, "teacher", "started", "git")}
    return {**known, "repeats": repeats, "kernels": sorted(kernels)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make spread",
        description="Train one cell again and again with the same seed, in the fast and the strict mode, to "
        "see how far it moves on this machine. No record of the tables is touched.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    parser.add_argument("--method", help="a key of `methods`, or acfd-<variant>; default: the student alone")
    parser.add_argument("--repeats", type=int, default=3, help="trainings in each mode")
    for hidden, kind in (("--mode", str), ("--place", Path), ("--params", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        raise ConfigError(f"REPEATS={arguments.repeats} is not allowed: give 2 or more.")
    params = checked(config.load(arguments.params))
    method = arguments.method or params.suite.reference
    if arguments.place:
        repeat(params, arguments.benchmark, method, arguments.mode, arguments.place)
    else:
        spread(params, arguments.benchmark, method, arguments.repeats)


if __name__ == "__main__":
    cli.run(main)
