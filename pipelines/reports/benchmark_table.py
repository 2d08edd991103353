"""What a benchmark of params.yaml will cost before anything of it has run: ``reports/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import config
from pipelines.config import OFFICIAL, ROOT, Params, Training
from pipelines.reports import speed_table
from pipelines.reports.results import HEADLINE, Results, variant
from pipelines.reports.table import Table, number, render
from pipelines.runs import counts

SUSTAINED = 40e12  # FLOP/s that a large GPU is assumed to reach here in bf16, until one was measured
COPIES = 3  # of a data set on disk: its archives, data/<benchmark>, DVC's cache
(HEIGHT, WIDTH), _ = counts.SIZES[0]  # at which the networks were counted
PARTS = ("preparation", "training", "validation", "test")  # of a cell's time, as if alone
STEPS = "steps: teacher, student"


def table(params: Params, root: Path = ROOT) -> Table:
    """One row a benchmark, for the first student of the suite."""
    counted = counts.read(root)["networks"]
    uses = {use: key for key, (_, names) in counts.networks(params).items() for use in names}

    def macs(use: str) -> float | None:
        found = counted.get(uses[use], [])
        return next((row["macs"] for row in found if tuple(row["size"]) == (HEIGHT, WIDTH)), None)

    key = params.suite.students[0]
    student = macs(key)
    seeds, cells = len(params.suite.seeds), len(params.suite_methods) * len(params.suite.seeds)
    distilled = len(params.suite_methods) - 1 - len(params.controls)
    times = 1 + sum(params.controls.values())  # of the student alone, over all that a seed trains of it
    rate, source = _rate(params, root)
    data: list[dict[str, Any]] = []
    text: list[dict[str, str]] = []
    for name, benchmark in params.benchmarks.items():
        teacher = macs(f"teacher of {name}")
        learned = alone = guided = whole = None
        if teacher is not None and student is not None:
            learned = _flops(benchmark.teacher.training, 3 * teacher)
            alone = _flops(benchmark.training, 3 * student)
            guided = _flops(benchmark.training, 3 * student + teacher)
            whole = learned + seeds * (distilled * guided + times * alone)
        row = {
            "benchmark": name,
            "crop": "×".join(map(str, benchmark.training.crop)),
            "batch_size": benchmark.training.batch_size,
            "teacher_steps": benchmark.teacher.training.steps,
            "teacher_flops": learned,
            "steps": benchmark.training.steps,
            "alone_flops": alone,
            "guided_flops": guided,
            "cells": cells,
            "suite_flops": whole,
        }
        measured = speed_table.hours(name, params, root)
        row |= dict(zip(("measured_hours", "device"), measured or (None, None), strict=True))
        data.append(row)
        hours = [_cost(flops, rate) for flops in (learned, alone, guided, whole)]
        if measured:
            hours[-1] = f"{_hours(measured[0])}, by measured steps ({measured[1]})"
        text.append(
            {
                "benchmark": name,
                "batch, crop": f"{row['batch_size']}, {row['crop']}",
                STEPS: f"{row['teacher_steps']:,}, {row['steps']:,}",
                "teacher (h)": hours[0],
                "student alone (h)": hours[1],
                "with its teacher (h)": hours[2],
                "trainings": str(cells),
                "all of them (h)": hours[3],
            }
        )
    notes = [
        "Estimated from counted operations, not measured, unless a row says so: hours of one GPU that "
        f"sustains {rate / 1e12:.3g} TFLOP/s, {source}. {speed_table.COMMAND.strip('`')} measures your own.",
        f"Student: {key}. trainings: the methods, controls and seeds of params.yaml, without the teacher.",
    ]
    return Table("benchmarks", "planned compute", data, text, notes, frozenset({STEPS}))


def write(params: Params, folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/benchmarks.{md,csv,tex}``."""
    absent = counts.missing(params, root)
    warnings = [f"not counted yet, run {counts.COMMAND}: {', '.join(absent)}."] if absent else []
    render(table(params, root), folder, "all benchmarks", warnings=warnings)


def overview(params: Params, every: Sequence[Results], root: Path = ROOT) -> str:
    """The table of benchmarks in docs/: what to download, room, time, and how to run it."""
    planned = {row["benchmark"]: row["suite_flops"] for row in table(params, root).data}
    measured = {results.benchmark: results.finished for results in every}
    rate, source = _rate(params, root)
    lines = [
        "| benchmark | what to download | disk, about | time | `make repro`, with this under `suite` |",
        "|---|---|--:|---|---|",
    ]
    estimated = []
    for name, benchmark in params.benchmarks.items():
        module = config.dataset_module(benchmark.data, name)
        if records := measured.get(name):
            # not "wall": the cells of a pack share that
            spent = sum(record.run["seconds"][part] for record in records for part in PARTS) / 3600
            devices = ", ".join(sorted({record.run["hardware"]["device"] for record in records}))
            time = f"{spent:.1f} h of one process for the {len(records)} trainings committed here ({devices})"
        elif found := speed_table.hours(name, params, root):
            time = f"{_hours(found[0])} GPU hours, from measured steps ({found[1]})"
        elif planned[name] is None:
            time = "not known"
        else:
            time = f"{_cost(planned[name], rate)} GPU hours"
            estimated.append(name)
        room = "–" if module.GIGABYTES is None else f"{max(COPIES * module.GIGABYTES, 0.1):.1f} GB"
        settings, weights = _settings(
            params, name, [s for r in every if r.benchmark == name for s in r.students]
        )
        needs = module.NEEDS + (f"; ImageNet weights {', '.join(weights)}" if weights else "")
        texts = (f"`{name}`", needs, room, time, f"`{settings}`")
        lines.append(f"| {' | '.join(texts)} |")
    whole, listed = len(estimated) == len(params.benchmarks), ", ".join(estimated)
    if estimated:
        lines += [
            "",
            f"{'All GPU hours' if whole else f'The hours of {listed}'} are **estimates**, from counted "
            f"operations at {rate / 1e12:.3g} TFLOP/s ({source}), without evaluation and without what the "
            "methods themselves compute. `streets` (minutes) and `camvid-half` (hours) run on two CPU cores.",
        ]
    for results in every:
        for student in results.students:
            made = [f"`{text}`" for text in _made_with(results, student, params)]
            begin = f"The results of {results.benchmark} with {student} are of this `suite`:"
            lines += ["", begin, f"{', and '.join(made)}."]
    return "\n".join(lines)


def _made_with(results: Results, student: str, params: Params) -> list[str]:
    """The lists of ``suite`` that give the finished cells of a student; those of an ablation with seeds of
    its own apart."""
    cells = [record.cell for record in results.finished if record.cell.student == student]
    ablation = {key for key in results.variants if key != HEADLINE}
    blocks = [[cell for cell in cells if (cell.method in ablation) == apart] for apart in (False, True)]
    seeds = [sorted({cell.seed for cell in block}) for block in blocks]
    if seeds[1] in ([], seeds[0]):
        blocks, seeds = [cells], seeds[:1]
    texts = []
    for block, own in zip(blocks, seeds, strict=True):
        done = {cell.method for cell in block}
        methods = [m for m in results.methods if m in done - {HEADLINE, *results.controls}]
        lists: dict[str, Sequence[Any]] = {
            "benchmarks": [results.benchmark],
            "students": [student],
            "seeds": own,
            "controls": [f"{factor:g}" for key, factor in results.controls.items() if key in done],
            "methods": [m for m in methods if not m.endswith(OFFICIAL)] or [results.reference],
            "official": [m.removesuffix(OFFICIAL) for m in methods if m.endswith(OFFICIAL)],
            "variants": [variant(key) for key in results.variants if key in done],
            "weights": _weights(params, student, results.benchmark),
        }
        texts.append(", ".join(f"{name}: [{', '.join(map(str, values))}]" for name, values in lists.items()))
    return texts


def _settings(params: Params, name: str, students: Sequence[str]) -> tuple[str, list[str]]:
    """What to change in ``suite`` for a benchmark that has results of ``students``, and the encoder weights
    that it needs: where its teacher starts from ImageNet, so does a student without results."""
    first, teacher = params.suite.students[0], params.benchmark(name).teacher.network
    found = f"benchmarks: [{name}]"
    if teacher.weights is None:
        return found, []
    plain = params.student(first)
    same = (plain.architecture, plain.encoder)
    tuned = params.tuning.student if name == params.tuning.benchmark else None
    alike = [k for k, n in params.students.items() if n.weights and (n.architecture, n.encoder) == same]
    student = next(filter(None, (tuned, *students, *alike, first)))
    weights = _weights(params, student, name)
    return f"{found}, students: [{student}], weights: [{', '.join(weights)}]", weights


def _weights(params: Params, student: str, benchmark: str) -> list[str]:
    """The encoder weights that a student and its teacher start from."""
    networks = (params.students.get(student), params.benchmark(benchmark).teacher.network)
    return list(dict.fromkeys(network.weights for network in networks if network and network.weights))


def _flops(training: Training, macs: float) -> float:
    """Of a whole training whose step costs ``macs`` multiply-adds an image of the counted size."""
    height, width = training.crop
    return 2 * macs * (height * width) / (HEIGHT * WIDTH) * training.batch_size * training.steps


def _rate(params: Params, root: Path) -> tuple[float, str]:
    """Operations a second of a GPU, and how that is known."""
    if found := speed_table.sustained(params, root):
        return found[0], f"measured on {found[1]}"
    return SUSTAINED, "assumed"


def _cost(flops: float | None, rate: float) -> str:
    """In hours."""
    return "–" if flops is None else _hours(flops / rate / 3600)


def _hours(spent: float) -> str:
    return "<0.1" if spent < 0.1 else number(spent, ".1f" if spent < 10 else ",.0f")
