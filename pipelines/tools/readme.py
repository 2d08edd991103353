"""``make readme``, for maintainers: reports, and what README.md and docs/ say of the committed records.

A run of the suite writes to ``reports/`` only, so that these pages always say what their repository holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from pipelines import cli, config, files
from pipelines.config import ROOT, Params
from pipelines.place import git
from pipelines.reports import benchmark_table, readme
from pipelines.stages import report


def committed(params: Params, root: Path = ROOT) -> list[str]:
    """The benchmarks whose records are in git; without git, all that have any."""
    listed = git(root, "ls-files", "-z", "--", "runs")
    if listed is None:
        names = set(report.finished(params, root))
    else:
        names = {Path(name).parts[1] for name in listed.split("\0") if name.endswith("/run.json")}
    return [name for name in params.benchmarks if name in names]


def write(params: Params, root: Path, target: Path) -> None:
    """Renew the generated parts of README and docs below ``target`` from the committed records."""
    files.clear_parts(target, below=False)
    own = committed(params, root)
    found = {name: records for name, records in report.finished(params, root).items() if name in own}
    every = report.gather_all(params, root, found)
    texts: tuple[tuple[str, str, Callable[[], str]], ...] = (
        ("README.md", "results", lambda: readme.block(every, params, root)),
        ("README.md", "minutes", lambda: readme.minutes(root)),
        ("docs/benchmarks.md", "benchmarks", lambda: benchmark_table.overview(params, every, root)),
        ("docs/tables.md", "claims", readme.rules),
        ("docs/methods.md", "methods", lambda: readme.methods(params, root)),
        ("docs/how-it-works.md", "speed", lambda: readme.speed(root)),
    )
    for page, name, text in texts:
        if (target / page).is_file():
            readme.update(target / page, name, text())


def main() -> None:
    argparse.ArgumentParser(
        prog="make readme",
        description="For maintainers: write the reports and the generated parts of README and docs from the "
        "committed records.",
    ).parse_args()
    params = config.load()
    report.write(params, ROOT, committed(params))
    write(params, ROOT, ROOT)


if __name__ == "__main__":
    cli.run(main)
