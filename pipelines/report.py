"""The last stage: records → MLflow → tables, figures and the results in the README.

Needs the small files of ``runs/`` and nothing else: no weights, no GPU, no torch.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import config
from pipelines.config import Params
from pipelines.results import figures, records, tables, tracking
from pipelines.results.records import Record


def finished(params: Params, root: Path) -> dict[str, list[Record]]:
    """The records of every benchmark that has any, teacher first, in the order of params.yaml."""
    found = {}
    for benchmark in params.benchmarks:
        cells = [records.teacher_cell(params, benchmark), *records.expected_cells(params, benchmark)]
        if have := [record for cell in cells if (record := records.read(cell, root)) is not None]:
            found[benchmark] = have
    return found


def report(params: Params, root: Path = config.ROOT) -> None:
    """Write ``reports/<benchmark>/`` for every benchmark with records, and the results in README.md."""
    found = finished(params, root)
    frames, problem = tracking.collect(root, found)
    every = [
        tables.gather(params, benchmark, frames[benchmark], root, problem, found[benchmark])
        for benchmark in found
    ]
    for results in every:
        folder = root / "reports" / results.benchmark
        tables.write(results, folder)
        figures.write(results, found[results.benchmark], folder)
    tables.update_readme(root / "README.md", every)


def main() -> None:
    report(config.load(methods=False))


if __name__ == "__main__":
    from pipelines.cli import run

    run(main)
