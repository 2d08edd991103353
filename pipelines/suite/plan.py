"""What is due, and how cells are cut into packs. Reads records and settings; no torch, no DVC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.config import ROOT, ConfigError, Params
from pipelines.datasets import folder as data_folder
from pipelines.runs import records
from pipelines.runs.fingerprint import fingerprint
from pipelines.runs.records import Cell, teacher_cell

GUIDED = 1.4  # of a step of the student alone: what one with a teacher takes, before any has been measured


def suite_cells(params: Params, benchmark: str) -> list[Cell]:
    """The cells of the suite on a benchmark, seed by seed: a seed is a block."""
    return [
        Cell(benchmark, student, method, seed)
        for student in params.suite.students
        for seed in params.suite.seeds
        for method in params.suite_methods
    ]


@dataclass(frozen=True)
class Due:
    """What of a benchmark has to be trained; ``data`` and ``teacher`` are the sums that it is trained with,
    None while they are not known."""

    data: str | None
    teacher: str | None
    train_teacher: bool
    cells: list[Cell]


def due(params: Params, benchmark: str, root: Path = ROOT) -> Due:
    """Compare the records with what would be trained now. A clone without data takes the data of the
    teacher's record for today's, if its settings are."""
    own, cells = teacher_cell(params, benchmark), suite_cells(params, benchmark)
    record = records.whole(own, root)
    data = _data_sha256(root / "data" / benchmark)
    if data is None and record is not None:
        data = str(record.run["data_sha256"])
    if data is None:
        return Due(None, None, True, cells)
    if record is None or record.run["fingerprint"] != fingerprint(params, own, data, None):
        return Due(data, None, True, cells)
    teacher = str(record.run["weights_sha256"])
    marks = [fingerprint(params, cell, data, teacher) for cell in cells]
    with ThreadPoolExecutor() as pool:  # the sums of their weights take seconds
        whole = pool.map(lambda cell, mark: records.is_finished(cell, mark, root), cells, marks)
        left = [cell for cell, done in zip(cells, whole, strict=True) if not done]
    missing = bool(left) and not (record.folder / "weights.safetensors").is_file()
    return Due(data, teacher, missing, left)


def _data_sha256(folder: Path) -> str | None:
    try:
        return data_folder.describe(folder).sha256
    except ConfigError:
        return None


def unfinished(params: Params, benchmark: str, root: Path) -> list[Cell]:
    """The cells of a benchmark without a record of today."""
    own = due(params, benchmark, root)
    return [*own.cells, *([teacher_cell(params, benchmark)] if own.train_teacher else [])]


@dataclass
class Needs:
    """What has to be done before the commit."""

    weights: list[str] = field(default_factory=list)
    count: bool = False
    fetch: list[str] = field(default_factory=list)
    due: dict[str, Due] = field(default_factory=dict)
    exports: list[tuple[str, str]] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.weights or self.count or self.fetch or self.due or self.exports)

    def told(self) -> list[str]:
        """What would be done, a line each."""
        lines = [f"would fetch the encoder weights {name}" for name in self.weights]
        lines += [f"would fetch the data of {name}" for name in self.fetch]
        for name, own in self.due.items():
            lines += [f"would train the teacher of {name}"] if own.train_teacher else []
            rows = Counter(f"{cell.student}/{cell.method}" for cell in own.cells)
            lines += [
                f"would train {name}/{row}, {count} seed{'s' * (count > 1)}" for row, count in rows.items()
            ]
        lines += [f"would measure the export of {student} of {name}" for name, student in self.exports]
        lines += ["would count networks and methods"] if self.count else []
        return lines or ["nothing is to be done but the report, if that"]


def trainings(params: Params, root: Path = ROOT) -> dict[str, Due]:
    """What is to be trained, by benchmark."""
    found = {benchmark: due(params, benchmark, root) for benchmark in params.suite.benchmarks}
    return {benchmark: own for benchmark, own in found.items() if own.train_teacher or own.cells}


def needs(
    params: Params, due: Mapping[str, Due], changed: set[str], stages: Collection[str], root: Path = ROOT
) -> Needs:
    """What has to be done beside the trainings that are ``due``, by what is there and by what DVC, which has
    ``stages``, calls changed."""
    found = Needs(count="count" in changed, due=dict(due))
    found.weights = [
        key for key in params.suite.weights if not (root / params.encoder_weights(key).file).is_file()
    ]
    for benchmark in params.suite.benchmarks:
        have = (root / "data" / benchmark).is_dir()
        stale, own = f"fetch@{benchmark}" in changed, found.due.get(benchmark)
        if (stale and have) or (own and not have):
            found.fetch.append(benchmark)
        for student in params.suite.students:
            stage = f"export@{benchmark}-{student}"
            cell = Cell(benchmark, student, params.suite.reference, params.suite.seeds[0])
            there = have and (cell.folder(root) / "weights.safetensors").is_file()
            trained = own is not None and cell in own.cells
            # a clone that adds a method to committed records has no weights of the student alone
            if stage in stages and (trained or (there and (stage in changed or benchmark in found.due))):
                found.exports.append((benchmark, student))
    return found


def cut(cells: Sequence[Cell], params: Params, workers: int, root: Path = ROOT) -> list[list[Cell]]:
    """Cut cells into packs of one seed and at most ``suite.pack`` trainees, so that ``workers`` are busy to
    the end: equal parts of the whole work, cut between cells and between seeds. Of a seed the longest cells
    come first: the shorter the cells at a cut, the more equal are the parts.

    The work of a cell is its number of steps, times the seconds that a step of its method took with another
    seed where that is on record. Every cut costs one more pass of the teacher.
    """
    if not cells:
        return []
    seconds = _step_seconds(cells, params, root)
    usual = sum(seconds.values()) / len(seconds) if seconds else None
    work = {}
    for cell in cells:
        alone = params.module_key(cell.method) == params.suite.reference
        guess = usual or (1.0 if alone else GUIDED)
        steps = params.schedule(cell.benchmark, cell.method).steps
        work[cell] = steps * seconds.get(_of(cell), guess)
    rounds = -(-len(cells) // (workers * params.suite.pack))
    parts = workers * rounds
    blocks = list(dict.fromkeys((cell.benchmark, cell.seed) for cell in cells))
    cells = sorted(cells, key=lambda cell: (blocks.index((cell.benchmark, cell.seed)), -work[cell]))
    share = sum(work.values()) / parts
    packs: list[list[Cell]] = []
    spent, key = 0.0, None
    for cell in cells:
        # a cell belongs to the part in which its middle lies
        now = (cell.benchmark, cell.seed, min(parts - 1, int((spent + work[cell] / 2) / share)))
        if now != key or len(packs[-1]) == params.suite.pack:
            packs.append([])
        packs[-1].append(cell)
        spent, key = spent + work[cell], now
    return sorted(packs, key=lambda pack: -sum(work[cell] for cell in pack))


def _of(cell: Cell) -> tuple[str, str, str]:
    return cell.benchmark, cell.student, cell.method


def _step_seconds(cells: Sequence[Cell], params: Params, root: Path) -> dict[tuple[str, str, str], float]:
    """The seconds of a step as if alone, by the first seed on record, of each method that has one."""
    wanted, found = {_of(cell) for cell in cells}, dict[tuple[str, str, str], float]()
    for benchmark in {cell.benchmark for cell in cells}:
        for cell in records.expected_cells(params, benchmark, root):
            key = _of(cell)
            if key in wanted and key not in found and (record := records.whole(cell, root)) is not None:
                found[key] = record.run["seconds"]["step_median"]
    return found
