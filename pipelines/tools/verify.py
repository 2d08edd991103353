"""`make verify`: whether the committed run records support every number of the tables and README.

From the bottom up: a record's scores against its own confusion counts and history, its settings against
params.yaml and dvc.lock, the data and the teacher of all cells against each other, every table and the README
against tables made anew from the records, every figure against the records it names as its source. Needs no
weights, no data and no MLflow; where data or weights are present, their sums are checked too.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines import config, files
from pipelines.config import EXPORTS, OFFICIAL, ROOT, TEACHER, ConfigError, Params
from pipelines.datasets.folder import DESCRIPTION
from pipelines.reports import figures, network_table, panels, ranks
from pipelines.reports.results import Results
from pipelines.runs import budget, counts, exports
from pipelines.runs.confusion import summary
from pipelines.runs.fingerprint import outdated
from pipelines.runs.records import RECORD_FILES, Record
from pipelines.stages import report
from pipelines.suite import dvc
from pipelines.tools import readme

log = logging.getLogger(__name__)

UNREADABLE = "cannot be scored."
DIGITS = ".6g"  # of the numbers in history.csv


def problems(params: Params, root: Path = ROOT) -> list[str]:
    """Everything that does not agree, one sentence each; [] when all numbers are supported."""
    listed: list[str] = []
    try:
        for text in _problems(params, root):
            listed.append(text)
    except ConfigError as error:  # a damaged file, or unequal budgets, which are in the list already
        listed.append(str(error))
    return list(dict.fromkeys(listed))


def _problems(params: Params, root: Path) -> Iterator[str]:
    found = report.finished(params, root)
    everything = [record for own in found.values() for record in own]
    exported, scored = list(_exports(params, found, root)), list[str]()
    for record in everything:
        path = record.cell.path
        try:
            scored += [f"{path}: {text}" for text in _record(record)]
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{path}: the record has no {error}: it is of another version or damaged; rerun its cell."
            ) from None
    yield from scored
    if any(text.endswith(UNREADABLE) for text in scored):
        return  # no table can be made from these
    for own in found.values():
        for cell, parts in outdated(own, params).items():
            yield f"{cell.path}: not of today ({', '.join(parts)} differ)."
    for own in found.values():
        yield from _same_inputs(own, root)
    yield from exported
    for check in (_lock(everything, params, root), _sizes(params, root), _tuning(params, root)):
        try:
            yield from check
        except ConfigError as error:  # a damaged file
            yield str(error)
    every = report.gather_all(params, root, found)
    yield from _texts(params, every, root)
    yield from _figures(every, root)
    yield from _panels(every, root)


def _record(record: Record) -> Iterator[str]:
    """Whether the numbers of a record follow from its counts, its history and each other."""
    run, metrics, history = record.run, record.metrics, record.history
    if run["cell"] != asdict(record.cell):
        yield f"run.json belongs to another cell: {run['cell']}."
    for split in ("val", "test"):
        try:
            scores = summary(record.confusion(split), run["classes"])
        except (OSError, ValueError, KeyError) as error:
            yield f"confusion.npz, {split} ({error}): {UNREADABLE}"
            continue
        if scores != metrics[split]:
            wrong = [key for key in scores if scores[key] != metrics[split].get(key)]
            yield f"metrics.json: {split} {', '.join(wrong)} does not follow from confusion.npz."
    validated = [(row["val_miou"], row["step"]) for row in history if row.get("val_miou") is not None]
    if not validated or history[-1]["step"] != run["steps"]:
        yield f"history.csv does not end with a validation at step {run['steps']}."
    else:
        best, step = max(validated, key=lambda item: (item[0] or 0.0, -(item[1] or 0.0)))
        stated = metrics["best_val"]
        if (f"{best:{DIGITS}}", step) != (f"{stated['miou']:{DIGITS}}", stated["step"]):
            yield f"metrics.json: best_val is {stated}, history.csv has {best:g} at step {step:g}."
        if f"{validated[-1][0]:{DIGITS}}" != f"{metrics['val']['miou']:{DIGITS}}":
            yield "history.csv ends with another validation mIoU than metrics.json has."
    compute = run["compute"]
    if compute["flops"] != compute["step_flops"] * run["steps"]:
        yield "run.json: compute.flops is not step_flops × steps."
    if run["images_seen"] != run["steps"] * run["config"]["training"]["batch_size"]:
        yield "run.json: images_seen is not steps × batch_size."
    if run["steps"] != run["config"]["training"]["steps"]:
        yield "run.json: trained for another number of steps than its own settings say."


def _same_inputs(own: Sequence[Record], root: Path) -> Iterator[str]:
    """Whether the cells of a benchmark had the same data and the teacher whose record is beside them."""
    benchmark = own[0].cell.benchmark
    if len({record.run["data_sha256"] for record in own}) > 1:
        yield f"{benchmark}: the cells were trained on different versions of the data."
    description = root / "data" / benchmark / DESCRIPTION
    if description.is_file() and {r.run["data_sha256"] for r in own} != {files.digest(description, "sha256")}:
        yield f"{benchmark}: data/{benchmark} is not the data of the records."
    teacher = next((record for record in own if record.cell.is_teacher), None)
    yield from _alike(own)
    for record in own:
        run, cell = record.run, record.cell
        if (used := run["teacher"]) is not None and teacher is not None:
            wanted = {"sha256": teacher.run["weights_sha256"]}
            wanted |= {f"{split}_miou": teacher.metrics[split]["miou"] for split in ("val", "test")}
            if used != wanted:
                yield f"{cell.path}: its teacher is not the one of runs/{benchmark}/{TEACHER}."
        weights = record.folder / "weights.safetensors"
        if weights.is_file() and files.digest(weights, "sha256") != run["weights_sha256"]:
            yield f"{cell.path}: weights.safetensors is not the file of the record."


def _alike(own: Sequence[Record]) -> Iterator[str]:
    """Whether what must be equal over the cells of a benchmark is, and what must differ does."""
    first: dict[Any, tuple[str, Any]] = {}
    seen: dict[str, tuple[str, Any]] = {}
    for record in own:
        run, cell = record.run, record.cell
        truth = record.confusion("test").sum(axis=2)
        parts = [
            ("test images", "test", record.test_names()),
            ("labelled test pixels", "pixels", truth.tolist()),
            ("FLOPs of a step", (cell.student, cell.method), run["compute"]["step_flops"]),
        ]
        if not cell.is_teacher:
            size = (run["student"]["parameters"], run["student"]["flops"])
            parts.append(("parameters or FLOPs of the student", ("size", cell.student), size))
        for what, key, value in parts:
            known = first.setdefault((what, key), (cell.path, value))
            if known[1] != value:
                yield f"{cell.path}: has other {what} than {known[0]}."
        for what, total in (
            ("weights", run["weights_sha256"]),
            ("confusion.npz", run["files"]["confusion.npz"]),
        ):
            # a method with its authors' weights, where these are its own
            twin = (cell.student, cell.seed, cell.method.removesuffix(OFFICIAL), run["config"]["method"])
            other, same = seen.setdefault(total, (cell.path, twin))
            if other != cell.path and same != twin:
                yield f"{cell.path}: has the same {what} as {other}, and no two trainings end alike."


def _exports(params: Params, found: Mapping[str, list[Record]], root: Path) -> Iterator[str]:
    """Whether the records of exports agree with themselves and with the cells whose students they measured.

    ConfigError when one is damaged.
    """
    for path in _export_files(root):
        benchmark, student = path.parent.parent.name, path.stem
        own = {r.cell.method: r for r in found.get(benchmark, ()) if r.cell.student == student}
        name = path.relative_to(root).as_posix()
        if student not in params.students or not own:
            yield f"{name} is the export of a student without records: delete it."
            continue
        record = exports.read(benchmark, student, root) or {}
        cells = {
            r.cell.method: r.run
            for r in found[benchmark]
            if r.cell.student == student and r.cell.seed == record.get("seed")
        }
        try:
            yield from (f"{name}: {text}" for text in exports.problems(record, params.suite.reference))
            for method, measured in record["methods"].items():
                if method not in params.method_keys:  # since then taken out, and in no table
                    continue
                run = cells.get(method)
                if run is None or run["weights_sha256"] != measured["weights_sha256"]:
                    yield f"{name}: {method} has other weights than its cell now: run `make repro`."
                elif run["data_sha256"] != record["data_sha256"]:
                    yield f"{name}: {method} was compared on other data than that of its cell."
                elif run["student"]["input"] == record["input"] and "ms" in measured:
                    for key in ("parameters", "flops"):
                        if run["student"][key] != measured[key]:
                            yield f"{name}: {method} has other {key} than its cell."
        except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            raise ConfigError(f"{name} has no {error}: it is of another version; delete it.") from None


def _export_files(root: Path) -> list[Path]:
    return sorted((root / "runs").glob(f"*/{EXPORTS}/*.json"))


def _planned(path: str, params: Params) -> bool:
    """Whether a run.json is that of a cell of params.yaml, and not of a student or method taken out since."""
    _, benchmark, student, *rest = Path(path).parent.parts
    if benchmark not in params.benchmarks:
        return False
    return student == TEACHER or (student in params.students and rest[0] in params.method_keys)


def _lock(everything: Sequence[Record], params: Params, root: Path) -> Iterator[str]:
    """Whether dvc.lock has every record, as it is now, made with the parameters that params.yaml has now."""
    stages = dvc.locked(root)
    if not stages:
        if everything:
            yield "dvc.lock is missing or empty: restore it with git, or run `dvc commit`."
        return
    made = {out.path: (name, out) for name, stage in stages.items() for out in stage.outs}
    raw = config.read_yaml(root / "params.yaml")
    used: set[str] = set()
    for path, (name, _) in made.items():
        if path.endswith("/run.json") and not (root / path).is_file() and _planned(path, params):
            yield (
                f"{path} is missing, while dvc.lock says that {name} has run: restore it with git, or take "
                "the stage out of dvc.lock too."
            )
    groups = [[f"runs/{record.cell.path}/{name}" for name in RECORD_FILES] for record in everything]
    groups += [[file.relative_to(root).as_posix()] for file in _export_files(root)]
    for paths in groups:
        for path in paths:
            if path not in made:
                yield f"{path} is not in dvc.lock: run `dvc repro`, or `dvc commit` what was run elsewhere."
                break
            used.add(made[path][0])
            if _md5(root / path) != made[path][1].md5:
                yield f"{path} is not the file that dvc.lock has."
    for name in (queue := sorted(used)):  # grows by the stages that made what these were run with
        queue += sorted({made[dep.path][0] for dep in stages[name].deps if dep.path in made} - set(queue))
        for key, value in stages[name].params.get("params.yaml", {}).items():
            if _look_up(raw, key) != value:
                yield f"{name}: was run with another {key} than params.yaml has now."
        for dep in stages[name].deps:
            _, out = made.get(dep.path, (None, None))
            if out is not None and out.md5 != dep.md5:
                yield f"{name}: was run with another {dep.path} than dvc.lock has now."


def _sizes(params: Params, root: Path) -> Iterator[str]:
    """Whether every network of params.yaml was counted, and dvc.lock has these counts."""
    if not (root / network_table.PUBLISHED).is_file():
        return
    name = counts.COUNTS.as_posix()
    for network in counts.missing(params, root):
        yield f"{name} lacks {network}: run {counts.COMMAND}."
    made = [out for stage in dvc.locked(root).values() for out in stage.outs if out.path == name]
    if not made or made[0].md5 != _md5(root / counts.COUNTS):
        yield f"{name} is not the file that dvc.lock has: run {counts.COMMAND}."


def _tuning(params: Params, root: Path) -> Iterator[str]:
    """Whether the log of tuning gave every method as much, and the chosen trials are those of its rule."""
    path = budget.path(params, root)
    rows = budget.read(path)
    try:
        budget.trials(params, root)
    except ConfigError as error:
        yield str(error)
    tuning, name = params.tuning, path.relative_to(root)
    if not rows:  # nothing was tuned here, and no table says so
        return
    if {(int(row["steps"]), int(row["seed"])) for row in rows} != {(tuning.steps, tuning.seed)}:
        yield f"{name}: trials of other lengths or seeds than tuning.steps and tuning.seed of params.yaml."
    if {row["method"] for row in rows} != set(tuning.methods):
        yield f"{name}: has not the methods of tuning.methods of params.yaml."
    done = tuning.trials if budget.finished(rows) else max(int(row["trial"]) for row in rows) + 1
    for method in tuning.methods:
        if [int(row["trial"]) for row in rows if row["method"] == method] != [*range(done)]:
            yield f"{name}: has not the {done} trials (tuning.trials of params.yaml) of {method}."
    if not budget.finished(rows):  # `make tune` goes on from there, and no table counts them
        return
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        scores = [float(row["val_miou"]) if row["val_miou"] else None for row in own]
        chosen = [number for number, row in enumerate(own) if row["chosen"]]
        if not any(score is not None for score in scores) or chosen != [budget.choose(scores, tuning.margin)]:
            yield f"{name}: the chosen trial of {method} is not the one that tuning.margin leads to."


def _texts(params: Params, every: Sequence[Results], root: Path) -> Iterator[str]:
    """Every table and the README against what the records give now. The pages of docs/ tell of the committed
    settings and methods, which a user's own need not be: `make readme` renews them, for maintainers."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        if (root / "README.md").is_file():
            shutil.copy(root / "README.md", target)
        report.write_texts(params, every, root, target)
        readme.write(params, root, target)
        wanted = {p.relative_to(target): p.read_bytes() for p in sorted(target.rglob("*")) if p.is_file()}
    kinds = (".md", ".csv", ".tex", ".html")
    have = {p.relative_to(root) for p in (root / "reports").rglob("*") if p.suffix in kinds}
    logs = {path for path in have if path.name == budget.path(params, root).name}  # of tuning
    for path in sorted(have - wanted.keys() - logs):
        yield f"{path} is no table of today's records: delete it."
    for path, content in wanted.items():
        if not (root / path).is_file():
            yield f"{path} is missing: run `make tables`."
        elif (found := (root / path).read_bytes()) != content:
            yield f"{path}, {_first_difference(found.decode(errors='replace'), content.decode())}."


def _figures(every: Sequence[Results], root: Path) -> Iterator[str]:
    """Every figure against the records that it says it was drawn from."""
    wanted = {
        root / "reports" / results.benchmark / f"{name}.png": figures.source([results])
        for results in every
        for name in figures.NAMES
    }
    if ranks.rank(every):
        wanted[root / "reports" / "ranks.png"] = figures.source(every)
    for path in sorted({*(root / "reports").rglob("*.png"), *wanted}):
        name = path.relative_to(root)
        if path not in wanted:
            yield f"{name} is no figure of today's records: delete it."
        elif not path.is_file():
            yield f"{name} is missing: run `make tables`."
        elif _origin(path) != wanted[path]:
            yield f"{name} was drawn from other records, or changed: run `make tables`."


def _panels(every: Sequence[Results], root: Path) -> Iterator[str]:
    """Every image of the panels against its sum and against the weights and images of the records."""
    wanted = {path for results in every for path in panels.right(results, root)}
    for path in sorted(
        path for path in (root / "reports").glob(f"*/{panels.FOLDER}/*") if path not in wanted
    ):
        yield f"{path.relative_to(root)} is no panel of today's records: run `make tables`."


def _origin(path: Path) -> str | None:
    """The records that a figure says it was drawn from; None where its pixels are not what was drawn."""
    try:
        with Image.open(path) as image:
            same = figures.pixels(image) == image.info.get(figures.PIXELS)
            return image.info.get(figures.SOURCE) if same else None
    except Exception:  # a broken file: Pillow has no one family of errors for it
        return None


def _first_difference(found: str, wanted: str) -> str:
    have, want = found.splitlines(), wanted.splitlines()
    for number, (left, right) in enumerate(zip(have, want, strict=False), 1):
        if left != right:
            same = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
            start = max(0, next(same, 0) - 20)
            shown = [text[start : start + 60] for text in (left, right)]
            return f"line {number}: has {shown[0]!r} where the records give {shown[1]!r}"
    return f"has {len(have)} lines where the records give {len(want)}"


def _look_up(raw: Mapping[str, Any], key: str) -> Any:
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _md5(path: Path) -> str | None:
    return files.digest(path, "md5") if path.is_file() else None


def main() -> None:
    argparse.ArgumentParser(
        prog="make verify",
        description="Check that the records support every number of the reports and README. Needs no "
        "weights, no data and no MLflow.",
    ).parse_args()
    params = config.load()
    found = problems(params)
    if found:
        last = f"{len(found)} problem{'s' * (len(found) > 1)}: the records do not support the reports."
        raise ConfigError("\n".join(["", *found, last]))
    cells = sum(len(own) for own in report.finished(params, ROOT).values())
    log.info(
        "verified: all tables, figures and the README follow from %d run record%s.", cells, "s" * (cells != 1)
    )


if __name__ == "__main__":
    from pipelines.cli import run

    run(main)
