"""Make the teacher of a benchmark part of the repository: ``teachers/<benchmark>.safetensors``.

For maintainers. With it and the committed records anyone can add a method to the committed table by training
that method's cells alone.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from pipelines import cli, config, files
from pipelines.config import ROOT, ConfigError, Params
from pipelines.runs import records
from pipelines.runs.records import TEACHERS, teacher_cell

MOST = 16 * 2**20  # bytes: every clone has them for ever

log = logging.getLogger(__name__)


def keep(benchmark: str, params: Params, root: Path = ROOT) -> Path:
    """Copy the teacher's weights. :class:`ConfigError` when there are none, when they are not those of the
    record, and when they are too large for a repository."""
    cell = teacher_cell(params, benchmark)
    record, file = records.read(cell, root), cell.folder(root) / "weights.safetensors"
    if record is None or not file.is_file():
        raise ConfigError(f"There is no trained teacher of {benchmark}: run `make repro` first.")
    content = file.read_bytes()
    if files.sha256(content) != record.run["weights_sha256"]:
        raise ConfigError(
            f"runs/{cell.path}/weights.safetensors is not the file of its record: delete it and run `make "
            "repro`."
        )
    if len(content) > MOST:
        raise ConfigError(
            f"The teacher of {benchmark} has {len(content) / 2**20:.1f} MB, too many for a repository "
            f"({MOST // 2**20} MB): share it by a remote of DVC instead."
        )
    target = root / TEACHERS / f"{benchmark}.safetensors"
    files.write_bytes(target, content)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tools.keep",
        description="For maintainers: copy the teacher of a benchmark into teachers/, to commit it.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    kept = keep(parser.parse_args().benchmark, config.load())
    log.info("%s is there: commit it with the records of runs/.", kept.relative_to(ROOT))


if __name__ == "__main__":
    cli.run(main)
