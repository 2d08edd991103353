"""Measured steps of the protocols (``runs/speed.json``, by ``make speed``) and what follows from them: the
table ``reports/speed.*`` and the hours of a benchmark.

There is one entry for a benchmark, student, device and batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import ROOT, TEACHER, Benchmark, Params
from pipelines.reports.results import label
from pipelines.reports.table import Table, number, render
from pipelines.runs.journal import Journal, device, on_gpu

FILE = Path("runs") / "speed.json"
COMMAND = "`make speed BENCHMARK=<name>`"
JOURNAL = Journal(FILE, COMMAND, lambda e: (e["benchmark"], e["student"], device(e), e["batch_size"]))
read, add = JOURNAL.read, JOURNAL.add
OUT_OF_MEMORY = 3  # the exit status of a measurement that did not fit
WIDE = frozenset({"device", "status"})


def is_current(entry: Mapping[str, Any], params: Params) -> bool:
    """Whether what was measured is what params.yaml says now, as far as it decides the time of a step."""
    own = params.benchmarks.get(entry["benchmark"])
    student = params.students.get(entry["student"])
    return own is not None and student is not None and entry["protocol"] == protocol(own, student.written())


def protocol(own: Benchmark, student: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the time of a step."""

    def of(training: dict[str, Any], network: dict[str, Any]) -> dict[str, Any]:
        kept = ("crop", "precision", "augmentation", "auxiliary_weight", "sliding")
        plain = {key: value for key, value in network.items() if key != "weights"}
        return {key: training[key] for key in kept if key in training} | {"network": plain}

    return {
        TEACHER: of(own.teacher.training.written(), own.teacher.network.written()),
        "student": of(own.training.written(), student),
    }


def hours(benchmark: str, params: Params, root: Path = ROOT) -> tuple[float, str] | None:
    """Hours of the teacher and of all methods and seeds of the suite on the fastest GPU that a benchmark was
    measured on, and its name. None where no GPU was, or not everything fitted.

    Time goes by images: an entry of a smaller batch than the protocol's counts for as many images.
    """
    found = []
    for entry in read(root):
        gpu = on_gpu(entry)
        same = (entry["benchmark"], entry["student"]) == (benchmark, params.suite.students[0])
        if gpu and same and is_current(entry, params) and (spent := _hours(entry, params)) is not None:
            found.append((spent, device(entry)))
    return min(found, default=None)


def _hours(entry: Mapping[str, Any], params: Params) -> float | None:
    own, rows = params.benchmark(entry["benchmark"]), entry["rows"]
    trained = {  # a control takes the steps of the reference, more of them
        name: params.suite.reference if name in params.controls else name for name in params.suite_methods
    }
    if any(rows.get(name, {}).get("status") != "measured" for name in (TEACHER, *trained.values())):
        return None
    seconds = own.teacher.training.steps * _step(rows[TEACHER]) * own.teacher.training.batch_size
    for name, row in trained.items():
        steps = params.schedule(entry["benchmark"], name).steps
        seconds += len(params.suite.seeds) * steps * _step(rows[row]) * own.training.batch_size
    return float(seconds / entry["batch_size"] / 3600)


def _step(row: Mapping[str, Any]) -> float:
    """Seconds of a step, the median."""
    return float(np.median(row["step_ms"])) / 1000


def sustained(params: Params, root: Path = ROOT) -> tuple[float, str] | None:
    """Operations a second of the GPU that did most, over all that was measured on it. None without a GPU."""
    work: dict[str, list[float]] = {}
    for entry in read(root):
        if on_gpu(entry) and is_current(entry, params):
            for row in (row for row in entry["rows"].values() if row["status"] == "measured"):
                total = work.setdefault(device(entry), [0.0, 0.0])
                total[0] += row["step_flops"]
                total[1] += _step(row)
    return max(((flops / seconds, name) for name, (flops, seconds) in work.items()), default=None)


def table(params: Params, root: Path = ROOT) -> Table:
    """One row for everything that was measured."""
    data: list[dict[str, Any]] = []
    text: list[dict[str, str]] = []
    for entry in read(root):
        reference = entry["rows"].get(params.suite.reference, {})
        for name, own in entry["rows"].items():
            if name not in (TEACHER, *params.method_keys):  # of another time
                continue
            row = {
                "benchmark": entry["benchmark"],
                "device": device(entry),
                "batch_size": entry["batch_size"],
                "trained": name if name == TEACHER else f"{entry['student']}, {label(name)}",
            }
            row |= _times(own, reference if name != TEACHER else {}, entry)
            row["status"] = own["status"] if is_current(entry, params) else "other settings than params.yaml"
            data.append(row)
            text.append(_text(row))
    notes = [
        f"By {COMMAND.strip('`')}: the real loop and evaluation on random images of the real size in memory, "
        "from random weights; a step holds the student, its teacher and the method's terms.",
        "MFU: operations a second over those of the product of two large square matrices, in the same "
        "precision on the same device.",
        *filter(None, map(_side_by_side, read(root))),
    ]
    return Table("speed", "measured steps", data, text, notes, WIDE)


def _side_by_side(entry: Mapping[str, Any]) -> str | None:
    """What a step of a pack takes beside those of its cells alone."""
    pack = entry.get("pack", {"methods": [], "status": "not measured"})
    rows = [entry["rows"].get(name, {}) for name in pack["methods"]]
    if any(row.get("status") != "measured" for row in (pack, *rows)):
        return None
    together, alone = _step(pack), sum(map(_step, rows))
    names = ", ".join(label(name) for name in pack["methods"])
    return (
        f"{entry['benchmark']} on {device(entry)}, methods side by side ({names}): {1000 * together:,.0f} ms "
        f"a step, {pack['memory_mb']:,.0f} MB; one by one {1000 * alone:,.0f} ms, {alone / together:.2f} "
        "times as long."
    )


def _times(own: Mapping[str, Any], reference: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    names = ["step_ms", "step_ms_low", "step_ms_high", "ratio", "steps_per_s", "tflops", "mfu", "memory_mb"]
    names += ["evaluation_ms", "loading_ms", "processes"]
    if own["status"] != "measured":
        return dict.fromkeys(names)
    low, median, high = (float(value) for value in np.percentile(own["step_ms"], [25, 50, 75]))
    base = 1000 * _step(reference) if reference.get("status") == "measured" else None
    loading = entry.get("loading_ms")
    tflops = own["step_flops"] / median / 1e9
    values = (
        median,
        low,
        high,
        base and median / base,
        1000 / median,
        tflops,
        100 * tflops / entry["ceiling_tflops"] if "ceiling_tflops" in entry else None,
        own.get("memory_mb"),
        own.get("evaluation_ms"),
        loading,
        loading and math.ceil(loading * entry["batch_size"] / median),
    )
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in zip(names, values, strict=True)
    }


def _text(row: Mapping[str, Any]) -> dict[str, str]:
    step = number(row["step_ms"], ",.0f")
    if row["step_ms"] is not None:
        step += f" ({row['step_ms_low']:,.0f} to {row['step_ms_high']:,.0f})"
    return {
        "benchmark (batch)": f"{row['benchmark']} ({row['batch_size']})",
        "device": str(row["device"]),
        "what is trained": str(row["trained"]),
        "ms a step": step,
        "× reference": number(row["ratio"], ".2f"),
        "MFU": number(row["mfu"], ".0f") + ("" if row["mfu"] is None else "%"),
        "memory (MB)": number(row["memory_mb"], ",.0f"),
        "status": str(row["status"]),
    }


def write(params: Params, folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/speed.{md,csv,tex}``, if anything was measured."""
    if read(root):
        render(table(params, root), folder, "all benchmarks")
