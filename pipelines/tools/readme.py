"""``make readme``, for maintainers: reports and the results in README.md from the committed records alone.

A run of the suite writes to ``reports/`` only, so that the README always says what its own repository holds.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from pipelines import cli, config, files
from pipelines.config import ROOT, Params
from pipelines.reports import benchmark_table, claims, ranks, readme, spread_table
from pipelines.runs import tracking
from pipelines.stages import report


def committed(params: Params, root: Path = ROOT) -> list[str]:
    """The benchmarks whose records are in git; without git, all that have any."""
    try:
        command = ["git", "ls-files", "-z", "--", "runs"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
        names = {Path(name).parts[1] for name in listed.split("\0") if name.endswith("/run.json")}
    except (OSError, subprocess.CalledProcessError):
        names = set(report.finished(params, root))
    return [name for name in params.benchmarks if name in names]


def write(params: Params, root: Path, target: Path) -> None:
    """Bring the generated parts of ``target/README.md`` up to the committed records."""
    files.clear_parts(target, below=False)
    own = committed(params, root)
    found = {name: records for name, records in report.finished(params, root).items() if name in own}
    frames = {name: tracking.frame(map(tracking.entry, records)) for name, records in found.items()}
    every = report.gather_all(params, root, found, frames)
    said = []
    if (root / claims.FILE).is_file():
        said = claims.sentences(claims.load(root / claims.FILE), every, params)
    text = readme.block(every, ranks.rank(every), said, spread_table.rounding(params, root))
    readme.update(target / "README.md", readme.RESULTS, text)
    readme.update(target / "README.md", readme.PLANS, benchmark_table.overview(params, every, root))


def main() -> None:
    argparse.ArgumentParser(prog="make readme", description=__doc__).parse_args()
    params = config.load()
    report.report(params, ROOT, committed(params))
    write(params, ROOT, ROOT)


if __name__ == "__main__":
    cli.run(main)
