"""The last stage: records → MLflow → tables, figures, claims and the page.

Needs the small files of ``runs/`` and nothing else: no weights, no GPU, no torch. Where weights and data are
present too, it makes the panels of images.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipelines import config, files
from pipelines.config import Params
from pipelines.reports import (
    benchmark_table,
    claims,
    figures,
    method_table,
    network_table,
    page,
    panels,
    published,
    ranks,
    speed_table,
    spread_table,
    tables,
)
from pipelines.reports.results import Results, gather
from pipelines.reports.table import render
from pipelines.runs import records, tracking
from pipelines.runs.records import Record

log = logging.getLogger(__name__)


def finished(params: Params, root: Path, only: Collection[str] | None = None) -> dict[str, list[Record]]:
    """The records of every benchmark, or of those of ``only``, that has any: teacher first, in the order of
    params.yaml."""
    found = {}
    for benchmark in params.benchmarks if only is None else [b for b in params.benchmarks if b in only]:
        cells = [records.teacher_cell(params, benchmark), *records.expected_cells(params, benchmark, root)]
        if have := [record for cell in cells if (record := records.read(cell, root)) is not None]:
            found[benchmark] = have
    return found


def report(params: Params, root: Path = config.ROOT, mirrored: Collection[str] | None = None) -> None:
    """Mirror the records of all benchmarks, or of those ``mirrored``, to MLflow; then write ``reports/``."""
    mirror(params, root, mirrored)
    write(params, root)


def prepare(root: Path) -> None:
    """Begin what takes seconds and needs no record: import MLflow and make its store."""
    with contextlib.suppress(Exception):  # the report says what is wrong
        tracking.connect(root)


def mirror(params: Params, root: Path, only: Collection[str] | None = None) -> None:
    """Mirror the records of all benchmarks, or of those of ``only``, to the checkout's MLflow, and to that of
    a team."""
    with _hold(root):
        found = finished(params, root, only)
        tracking.collect(root, found)
        if server := os.environ.get("MLFLOW_TRACKING_URI"):
            trouble = tracking.publish(server, [record for own in found.values() for record in own])
            if trouble:
                log.warning("%s: the reports are made all the same.", trouble)


def make_figures(params: Params, benchmark: str, root: Path) -> None:
    """The figures of a benchmark, ahead of the report."""
    with _hold(root, f"figures--{benchmark}"):
        for results in gather_all(params, root, finished(params, root, [benchmark])):
            figures.write(results, root / "reports" / benchmark)


def make_panels(params: Params, benchmark: str, root: Path) -> None:
    """The panels of a benchmark, ahead of the report, where its networks can be run."""
    with _hold(root, f"panels--{benchmark}"):
        for results in gather_all(params, root, finished(params, root, [benchmark])):
            panels.update(results, root)


def write(
    params: Params, root: Path, only: Collection[str] | None = None, drawn: Collection[str] = ()
) -> None:
    """Write everything that is made from the records, ``reports/``; from those of the benchmarks ``only``, if
    given. Of the benchmarks ``drawn``, the figures are there."""
    with _hold(root):
        files.clear_parts(root / "reports")
        found = finished(params, root, only)
        every = gather_all(params, root, found)
        for results in every:
            if results.benchmark not in drawn:
                figures.write(results, root / "reports" / results.benchmark)
            panels.update(results, root)
        if ranked := ranks.rank(every):
            figures.write_ranks(ranked, every, root / "reports")
        write_texts(params, every, root, root)


def _hold(root: Path, name: str = "report") -> contextlib.AbstractContextManager[None]:
    return files.hold(root / ".scratch" / "locks" / f"{name}.lock", "The report")


def gather_all(params: Params, root: Path, found: Mapping[str, list[Record]]) -> list[Results]:
    """The results of every benchmark of which a student was trained, or failed."""
    return [
        gather(params, name, tracking.frame(map(tracking.entry, own)), root, own)
        for name, own in found.items()
        if any(not record.cell.is_teacher for record in own)
        or any(records.failure(cell, root) for cell in records.expected_cells(params, name, root))
    ]


def write_texts(params: Params, every: Sequence[Results], root: Path, target: Path) -> None:
    """Write all tables and the page below ``target``; what is published is read in ``root``, and so are the
    figures and panels that the page shows."""
    folder = target / "reports"
    for results in every:
        tables.write(results, folder / results.benchmark)
    if ranked := ranks.rank(every):
        render(ranks.table(ranked), folder, "all benchmarks and students", warnings=ranks.warnings(ranked))
    else:
        for path in folder.glob("ranks.*"):  # of more benchmarks
            path.unlink()
    if (root / published.FILE).is_file():
        found = published.load(root / published.FILE)
        claims.write(found, every, params, folder)
    if (root / network_table.PUBLISHED).is_file():
        network_table.write(network_table.load(root / network_table.PUBLISHED), params, folder, root)
        method_table.write(params, folder, root)
        speed_table.write(params, folder, root)
        benchmark_table.write(params, folder, root)
    if (repeated := spread_table.table(params, every, root)).rows:
        render(repeated, folder, "all benchmarks")
    if every or (root / published.FILE).is_file():
        page.write(params, every, folder, root)


def main() -> None:
    argparse.ArgumentParser(
        prog="make tables",
        description="Make the tables, figures and pages of reports/ from the records in runs/. Needs no "
        "weights, no data and no GPU.",
    ).parse_args()
    report(config.load())


if __name__ == "__main__":
    from pipelines.cli import run

    run(main)
