"""Stages `distill` and `acfd`: train one cell, a student by a method with a seed."""

from __future__ import annotations

import argparse

from pipelines import cli, config
from pipelines.place import check_links
from pipelines.runs.records import Cell, check_names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stages.distill",
        description="Train one cell: a student on a benchmark, by a method, with a seed.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    parser.add_argument("--student", required=True, help="an entry of `students` in params.yaml")
    parser.add_argument("--method", required=True, help="a key of `methods`, or acfd-<variant>")
    parser.add_argument(
        "--seed", required=True, type=int, help="of initial weights, batches and augmentation"
    )
    options = parser.parse_args()
    check_links()
    params = config.load()
    cell = Cell(options.benchmark, options.student, options.method, options.seed)
    check_names(cell, params)  # before torch is imported

    from pipelines.engine.pack import run_cell
    from pipelines.methods import checked

    with cli.bar() as tell:
        run_cell(cell, checked(params), tell=tell)


if __name__ == "__main__":
    cli.run(main)
