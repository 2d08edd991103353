"""Stage `train_teacher`: train a benchmark's teacher, by its own, longer schedule."""

from __future__ import annotations

import argparse

from pipelines import cli, config
from pipelines.methods import checked
from pipelines.place import check_links


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stages.train_teacher", description="Train the teacher of a benchmark."
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    options = parser.parse_args()
    check_links()
    params = checked(config.load())

    from pipelines.engine.pack import run_cell
    from pipelines.runs.records import teacher_cell

    with cli.bar() as tell:
        run_cell(teacher_cell(params, options.benchmark), params, tell=tell)


if __name__ == "__main__":
    cli.run(main)
