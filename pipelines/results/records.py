"""What a finished cell leaves behind, and which cells there should be.

A cell's folder ``runs/<benchmark>/<student>/<method>/<seed>/`` (a teacher's: ``runs/<benchmark>/teacher/``)
holds ``metrics.json``, ``history.csv``, ``confusion.npz``, ``run.json`` (all in git) and
``weights.safetensors`` (DVC cache).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import PAPER, ROOT, TEACHER, Params

RECORD_FILES = ("metrics.json", "history.csv", "confusion.npz", "run.json")


@dataclass(frozen=True)
class Cell:
    """One training run: benchmark × student × method × seed. A teacher is the cell whose student is
    ``teacher``."""

    benchmark: str
    student: str
    method: str
    seed: int

    @property
    def is_teacher(self) -> bool:
        return self.student == TEACHER

    @property
    def path(self) -> str:
        """The cell's folder below ``runs/`` and ``.scratch/``."""
        parts = (
            (self.benchmark, TEACHER)
            if self.is_teacher
            else (self.benchmark, self.student, self.method, str(self.seed))
        )
        return "/".join(parts)

    def folder(self, root: Path = ROOT) -> Path:
        return root / "runs" / self.path

    def scratch(self, root: Path = ROOT) -> Path:
        """Where resume state and the note of a failure live, outside the outputs of DVC."""
        return root / ".scratch" / self.path


@dataclass(frozen=True)
class Record:
    """A finished cell as read back from its files."""

    cell: Cell
    metrics: dict[str, Any]
    run: dict[str, Any]
    history: list[dict[str, float | None]]
    folder: Path

    def confusion(self, split: str) -> np.ndarray:
        """int64 counts (images, classes, classes), rows = truth, columns = prediction."""
        with np.load(self.folder / "confusion.npz", allow_pickle=False) as file:
            return np.asarray(file[split])

    def test_names(self) -> list[str]:
        """The test images, in the order of the counts."""
        with np.load(self.folder / "confusion.npz", allow_pickle=False) as file:
            return [str(name) for name in file["test_names"]]


def teacher_cell(params: Params, benchmark: str) -> Cell:
    return Cell(benchmark, TEACHER, TEACHER, params.benchmark(benchmark).teacher.seed)


def students(params: Params, benchmark: str, root: Path = ROOT) -> list[str]:
    """The students of a benchmark's tables: the suite's, and those of params.yaml that have a record."""
    return [
        key
        for key in params.students
        if key in params.suite.students or any((root / "runs" / benchmark / key).glob("*/*/run.json"))
    ]


def seeds(params: Params, benchmark: str, student: str, method: str, root: Path = ROOT) -> list[int]:
    """The seeds of a row: those of the suite, and those beyond them that have a record."""
    found = (root / "runs" / benchmark / student / method).glob("*/run.json")
    more = {int(path.parent.name) for path in found if path.parent.name.isdigit()}
    return sorted(more.union(params.suite.seeds))


def expected_cells(params: Params, benchmark: str, root: Path = ROOT) -> Iterator[Cell]:
    """The cells of a benchmark's tables: none whose student or method is not in params.yaml."""
    for student in students(params, benchmark, root):
        for method in params.method_keys:
            for seed in seeds(params, benchmark, student, method, root):
                yield Cell(benchmark, student, method, seed)


def is_variant(method: str) -> bool:
    return method.startswith(f"{PAPER}-")


def read(cell: Cell, root: Path = ROOT) -> Record | None:
    """A cell's record, or None when it has not finished."""
    folder = cell.folder(root)
    if not all((folder / name).is_file() for name in RECORD_FILES):
        return None
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        history = [
            {key: float(value) if value else None for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    return Record(cell, read_json(folder / "metrics.json"), read_json(folder / "run.json"), history, folder)


def stale(record: Record, params: Params) -> list[str]:
    """The parts of a record's configuration that stand otherwise in params.yaml now: network, training, …"""
    cell, benchmark = record.cell, params.benchmark(record.cell.benchmark)
    if cell.is_teacher:
        own = benchmark.teacher
        wanted = {
            "network": own.network.model_dump(mode="json"),
            "training": own.training.model_dump(mode="json"),
        }
    else:
        wanted = {
            "network": params.student(cell.student).model_dump(mode="json"),
            "training": benchmark.training.model_dump(mode="json"),
            "method": params.method_values(cell.method),
            "teacher": benchmark.teacher.network.model_dump(mode="json"),
        }
    return [part for part, value in wanted.items() if record.run["config"].get(part) != value]


def failure(cell: Cell, root: Path = ROOT) -> str | None:
    """Why a cell's last attempt stopped, if it failed."""
    note = cell.scratch(root) / "failure.txt"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
