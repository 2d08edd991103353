"""What a finished cell leaves behind, and which cells there should be.

A cell's folder ``runs/<benchmark>/<student>/<method>/<seed>/`` (a teacher's: ``runs/<benchmark>/teacher/``)
holds ``metrics.json``, ``history.csv``, ``confusion.npz``, ``run.json`` (all in git) and
``weights.safetensors`` (DVC cache). ``run.json`` is written last and holds the sums of the other files and of
itself, so a record is whole or none.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import files
from pipelines.config import PAPER, ROOT, TEACHER, ConfigError, Params, known

log = logging.getLogger(__name__)

RECORD_FILES = ("metrics.json", "history.csv", "confusion.npz", "run.json")
TEACHERS = Path("teachers")  # those that are small enough for the repository


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

    def lock(self, root: Path = ROOT) -> Path:
        """The file that the process which trains the cell has locked."""
        return root / ".scratch" / "locks" / f"{self.path.replace('/', '--')}.lock"


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
        return self._array(split)

    def test_names(self) -> list[str]:
        """The test images, in the order of the counts."""
        return [str(name) for name in self._array("test_names")]

    def _array(self, name: str) -> np.ndarray:
        try:
            content = (self.folder / "confusion.npz").read_bytes()
            if (
                files.sha256(content) != self.run["files"]["confusion.npz"]
            ):  # which was right when it was read
                raise ConfigError(
                    f"The record runs/{self.cell.path} was replaced while it was read: run the same command "
                    "again."
                )
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                return np.asarray(file[name])
        except ConfigError:  # a ValueError too
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"runs/{self.cell.path}/confusion.npz is damaged ({type(error).__name__}): delete the folder "
                "and run `make repro`."
            ) from None


def check_names(cell: Cell, params: Params) -> None:
    """:class:`ConfigError` when params.yaml lacks the benchmark, student or method; it says which exist."""
    params.benchmark(cell.benchmark)
    if not cell.is_teacher:
        params.student(cell.student)
        known("method", cell.method, params.method_keys)


def teacher_cell(params: Params, benchmark: str) -> Cell:
    return Cell(benchmark, TEACHER, TEACHER, params.benchmark(benchmark).teacher.seed)


def students(params: Params, benchmark: str, root: Path = ROOT) -> list[str]:
    """The students of a benchmark's tables: those of params.yaml that have a record, and the suite's, if the
    suite runs this benchmark or there is no record."""
    have = [key for key in params.students if any((root / "runs" / benchmark / key).glob("*/*/run.json"))]
    if have and benchmark not in params.suite.benchmarks:
        return have
    return [key for key in params.students if key in params.suite.students or key in have]


def planned(params: Params, benchmark: str, student: str) -> bool:
    """Whether the suite trains a student on a benchmark; what it does not has the rows of its records."""
    return benchmark in params.suite.benchmarks and student in params.suite.students


def planned_seeds(params: Params, benchmark: str, student: str, root: Path = ROOT) -> list[int]:
    """The seeds that every row of a student should have: the suite's, or those of the records where the
    suite does not train it."""
    names = {path.parent.name for path in (root / "runs" / benchmark / student).glob("*/*/run.json")}
    found = sorted(int(name) for name in names if name.isdigit())
    return found if found and not planned(params, benchmark, student) else list(params.suite.seeds)


def expected_cells(params: Params, benchmark: str, root: Path = ROOT) -> Iterator[Cell]:
    """The cells of a benchmark's tables: the planned seeds, and those beyond them that have a record; none
    whose student or method is not in params.yaml."""
    for student in students(params, benchmark, root):
        seeds = planned_seeds(params, benchmark, student, root)
        for method in params.method_keys:
            found = (root / "runs" / benchmark / student / method).glob("*/run.json")
            more = {int(path.parent.name) for path in found if path.parent.name.isdigit()}
            for seed in sorted(more.union(seeds)):
                yield Cell(benchmark, student, method, seed)


def is_variant(method: str) -> bool:
    return method.startswith(f"{PAPER}-")


def read(cell: Cell, root: Path = ROOT) -> Record | None:
    """A cell's record, or None when it has not finished. ConfigError when a file of it is damaged."""
    folder = cell.folder(root)
    if not all((folder / name).is_file() for name in RECORD_FILES):
        return None
    run = _json(folder / "run.json", root)
    if "seal" not in run:
        place = folder.relative_to(root).as_posix()
        raise ConfigError(f"{place} is the record of an older version: delete it and run `make repro`.")
    if run["seal"] != files.seal(run):
        raise _damaged(folder / "run.json", root)
    for name in RECORD_FILES:
        if name != "run.json" and files.sha256((folder / name).read_bytes()) != run["files"].get(name):
            raise _damaged(folder / name, root)
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        history = [
            {key: float(value) if value else None for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    return Record(cell, _json(folder / "metrics.json", root), run, history, folder)


def whole(cell: Cell, root: Path = ROOT) -> Record | None:
    """A record, or None if there is none, or a damaged one."""
    try:
        return read(cell, root)
    except ConfigError:  # whoever needs it says so
        return None


def is_finished(cell: Cell, fingerprint: str, root: Path = ROOT) -> bool:
    """Whether there is a whole record of this fingerprint; its weights, if present, must be its own."""
    record = whole(cell, root)
    if record is None or record.run["fingerprint"] != fingerprint:
        return False
    weights = record.folder / "weights.safetensors"
    return not weights.is_file() or files.digest(weights, "sha256") == record.run["weights_sha256"]


def restore_teacher(params: Params, benchmark: str, root: Path = ROOT) -> None:
    """Put a teacher that is part of the repository beside its record, where its file is missing."""
    kept, cell = root / TEACHERS / f"{benchmark}.safetensors", teacher_cell(params, benchmark)
    file = cell.folder(root) / "weights.safetensors"
    if not kept.is_file() or file.is_file():
        return
    record = whole(cell, root)
    if record is not None and files.sha256(content := kept.read_bytes()) == record.run["weights_sha256"]:
        files.write_bytes(file, content)


def write(folder: Path, run: dict[str, Any], others: Mapping[str, bytes]) -> None:
    """Write a record: ``others`` are all files beside run.json, which gets their sums and goes last."""
    if sorted([*others, "run.json"]) != sorted(RECORD_FILES):
        raise ValueError(f"A record has the files {', '.join(RECORD_FILES)}, not {', '.join(others)}.")
    (folder / "run.json").unlink(missing_ok=True)  # from here on the old record is none
    for name, content in others.items():
        files.write_bytes(folder / name, content)
    run = {**run, "files": {name: files.sha256(content) for name, content in sorted(others.items())}}
    files.write_sealed(folder / "run.json", run)


def _json(path: Path, root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise _damaged(path, root) from None


def _damaged(path: Path, root: Path) -> ConfigError:
    folder = path.parent.relative_to(root).as_posix()
    return ConfigError(
        f"{folder}/{path.name} is damaged or was changed by hand: restore the record with `git checkout -- "
        f"{folder}`, or delete {folder} and run `make repro`."
    )


def failure_note(cell: Cell, root: Path = ROOT) -> Path:
    """Where it stands why a cell's last attempt stopped."""
    return cell.scratch(root) / "failure.txt"


def failure(cell: Cell, root: Path = ROOT) -> str | None:
    """Why a cell's last attempt stopped, if it failed."""
    note = failure_note(cell, root)
    return note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else None
