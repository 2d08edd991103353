"""How far a training moves when it is run again with the same seed: ``runs/spread.json``, by ``make spread``,
and the table ``reports/spread.*``.

There is one entry for a benchmark, student, method, seed and device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import ROOT, Params
from pipelines.reports import statistics
from pipelines.reports.results import Results, label
from pipelines.reports.table import Table, number, plus_minus, rounded
from pipelines.runs.fingerprint import same_settings
from pipelines.runs.journal import Journal, device, on_gpu
from pipelines.runs.records import Cell, Record

FILE = Path("runs") / "spread.json"
COMMAND = "`make spread BENCHMARK=<name>`"
JOURNAL = Journal(FILE, COMMAND, lambda entry: (_cell(entry).path, device(entry)))
read, add = JOURNAL.read, JOURNAL.add
FAST, STRICT = MODES = ("fast", "strict")  # suite.strict: false, true
TABLES = "in the tables"
WIDE = frozenset({"device", "status"})


def _cell(entry: Mapping[str, Any]) -> Cell:
    return Cell(**entry["cell"])


def is_current(entry: Mapping[str, Any], params: Params) -> bool:
    """Whether what was trained is what params.yaml says now."""
    cell = _cell(entry)
    known = cell.benchmark in params.benchmarks and cell.student in params.students
    if not known or cell.method not in params.method_keys:
        return False
    return same_settings(params, cell, entry["config"])


def table(params: Params, every: Sequence[Results], root: Path = ROOT) -> Table:
    """One row for every mode of what was repeated."""
    data: list[dict[str, Any]] = []
    text: list[dict[str, str]] = []
    seeds = {results.benchmark: results for results in every}
    rounded_apart: dict[str, list[float]] = {}  # by cell of today's settings, the scores of modes and CPUs
    entries = read(root)
    for entry in entries:
        cell, current = _cell(entry), is_current(entry, params)
        own = seeds.get(cell.benchmark) if current else None
        over_seeds = statistics.sd(own.by_seed(cell.student, cell.method).values()) if own else None
        trained = {mode: (entry, entry["repeats"][mode]) for mode in MODES}
        cells = [r for r in own.finished if r.cell == cell] if own else []
        if record := next((r for r in cells if device(r.run) != device(entry)), None):
            trained[TABLES] = (record.run, [outcome(record)])
        for mode, (run, repeats) in trained.items():
            scores = [repeat["test_miou"] for repeat in repeats]
            what = f"{cell.student}, {label(cell.method, params.controls)}"
            if current and not on_gpu(run):
                rounded_apart.setdefault(f"{cell.benchmark}, {what}", []).extend(scores)
            row = {
                "benchmark": cell.benchmark,
                "device": device(run),
                "trained": what,
                "seed": cell.seed,
                "mode": mode,
                "repeats": len(repeats),
                "weights": len({repeat["weights_sha256"] for repeat in repeats}),
                "test_miou": statistics.mean(scores),
                "sd": statistics.sd(scores),
                "range": max(scores) - min(scores),
                "sd_over_seeds": over_seeds,
                "training_s": statistics.mean([repeat["training_s"] for repeat in repeats]),
                "kernels": ", ".join(entry["kernels"]) if mode == STRICT else None,
                "status": "measured" if current else "other settings than params.yaml",
            }
            data.append(rounded(row))
            text.append(_text(row))
    notes = [
        f"By {COMMAND.strip('`')}: one cell, the same seed, trained again and again on one machine. What "
        "differs is the arithmetic of the device alone.",
    ]
    apart = [f"{max(found) - min(found):.2f} ({cell})" for cell, found in rounded_apart.items()]
    if apart:
        notes.append(
            "How far apart rounding alone put the scores of a cell of today's settings, over the modes and "
            "the kinds of CPU: "
            f"{'; '.join(apart)}."
        )
    if any(row["mode"] == TABLES for row in data):
        notes[0] += f' "{TABLES}": the record of the same cell and seed, from another kind of machine.'
    if not any(on_gpu(entry) for entry in entries):
        notes[0] += " No GPU has been measured yet."
    return Table("spread", "trainings repeated", data, text, notes, WIDE)


def outcome(record: Record) -> dict[str, Any]:
    """What a repeat leaves in an entry."""
    return {
        "weights_sha256": record.run["weights_sha256"],
        "val_miou": record.metrics["val"]["miou"],
        "test_miou": record.metrics["test"]["miou"],
        "training_s": record.run["seconds"]["training"],
    }


def _text(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "benchmark": str(row["benchmark"]),
        "device": str(row["device"]),
        "what is trained": f"{row['trained']}, seed {row['seed']}",
        "mode": str(row["mode"]),
        "distinct weights": f"{row['weights']} in {row['repeats']}",
        "test mIoU": plus_minus(row["test_miou"], row["sd"]),
        "largest difference": number(row["range"] if row["repeats"] > 1 else None, ".3f"),
        "status": str(row["status"]),
    }
