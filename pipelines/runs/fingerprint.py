"""The fingerprint of a cell: a hash of everything that decides what a training computes.

It holds the version of the engine (``engine`` in params.yaml), the sum of the method's own files, the
resolved settings, the data, the teacher, threads and mode. The sum of a file is that of its syntax tree
without docstrings, so that a comment or a docstring makes no record stale. Libraries, device and processor
are recorded beside it and shown: they move the last digits, not the meaning. torch is not imported here.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.config import PAPER, ROOT, ConfigError, Network, Params
from pipelines.runs.records import Cell, Record

PLACES = ("mirror", "images", "labels", "splits")  # of `data`: where files lie; what they hold has a sum
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprint(params: Params, cell: Cell, data: str, teacher: str | None) -> str:
    """The hash for a cell on the data of the sha256 ``data``, with the teacher whose weights have the sha256
    ``teacher``. A teacher, the reference and its controls learn from none: they have the same hash with any.
    """
    own = {"path": cell.path, "seed": cell.seed, "engine": params.engine, "data": data}
    own |= {"strict": params.suite.strict, "settings": settings(params, cell)}
    if cell.is_teacher:  # it may use all cores; their number is recorded
        return _hash(own)
    module = params.module_key(cell.method)
    own |= {"method": method_sum(module), "threads": params.suite.threads}
    own |= {"teacher": None if module == params.suite.reference else teacher}
    return _hash(own)


def settings(params: Params, cell: Cell) -> dict[str, Any]:
    """The resolved settings of a cell as they stand in params.yaml; in the record, ``config``. Where the
    files of a data set lay is none of them."""
    benchmark = params.benchmark(cell.benchmark)
    if cell.is_teacher:
        network, training, method, teacher = benchmark.teacher.network, benchmark.teacher.training, {}, None
    else:
        network, training = params.student(cell.student), params.schedule(cell.benchmark, cell.method)
        method, teacher = params.method_values(cell.method), _network(params, benchmark.teacher.network)
    return {
        "data": {key: None if key in PLACES else value for key, value in benchmark.data.items()},
        "network": _network(params, network),
        "training": training.written(),
        "method": dict(method),
        "teacher": teacher,
    }


def outdated(own: Sequence[Record], params: Params) -> dict[Cell, list[str]]:
    """Of the records of a benchmark those that are none of today's, with what differs: a part of the
    settings, the engine, the method's file, or the data or teacher of which the record is beside them. No
    table counts them in."""
    teacher = next((record for record in own if record.cell.is_teacher), None)
    found = {record.cell: _differences(record, teacher, params) for record in own}
    if teacher is not None and found[teacher.cell]:
        for record in own:
            if record.run["teacher"] and "teacher" not in found[record.cell]:
                found[record.cell].append("weights of the teacher")
    return {cell: parts for cell, parts in found.items() if parts}


def same_settings(params: Params, cell: Cell, recorded: Mapping[str, Any]) -> bool:
    """Whether a recorded configuration is that of params.yaml."""
    return bool(_canonical(recorded) == _canonical(settings(params, cell)))


def _differences(record: Record, teacher: Record | None, params: Params) -> list[str]:
    run, today = record.run, settings(params, record.cell)
    parts = [
        part for part, value in today.items() if _canonical(run["config"].get(part)) != _canonical(value)
    ]
    if run.get("engine") != params.engine:
        parts.append("version of the engine")
    beside = (teacher or record).run
    if run["data_sha256"] != beside["data_sha256"]:
        parts.append("data")
    if teacher and run["teacher"] and run["teacher"]["sha256"] != teacher.run["weights_sha256"]:
        parts.append("weights of the teacher")
    if parts:
        return parts
    used = teacher.run["weights_sha256"] if teacher else (run["teacher"] or {}).get("sha256")
    if fingerprint(params, record.cell, run["data_sha256"], used) != run["fingerprint"]:
        return ["code of the method, suite.threads or suite.strict"]
    return []


def _network(params: Params, network: Network) -> dict[str, Any]:
    """A network with the sum of the weights that its encoder starts from."""
    written = network.written()
    if (key := network.weights) is not None:
        written["weights"] = {"key": key, "sha256": params.encoder_weights(key).sha256}
    return written


def method_sum(module: str, values: Mapping[str, Any] | None = None) -> str:
    """The sum of the files of a method, ``baselines/<module>.py`` or all of the paper's, and of settings."""
    if module.startswith(f"{PAPER}-"):
        paths = tuple(sorted((ROOT / PAPER).glob("*.py")))
    else:
        paths = (ROOT / "baselines" / f"{module}.py",)
    return _hash([*(code_sum(path) for path in paths), *([] if values is None else [values])])


def code_sum(path: Path) -> str:
    """The sum of what a file of Python computes: equal for another layout, comment or docstring."""
    try:
        return _code_sum(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no method file {path.parent.name}/{path.name}: write it, or take its entry out of "
            "params.yaml."
        ) from None


@cache
def _code_sum(text: str, name: str) -> str:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{name} cannot be imported ({error}): correct it.") from None
    return _hash(_plain(tree))


def _plain(node: Any) -> Any:
    """A syntax tree as lists, the same for every version of Python: no positions, no empty fields."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = fields["body"][1:]
        kept = sorted((key, value) for key, value in fields.items() if key not in ("kind", "type_comment"))
        return [
            type(node).__name__,
            *([key, _plain(value)] for key, value in kept if value not in (None, [])),
        ]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return [type(node).__name__, repr(node)]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """1 and 1.0 are one value, a tuple is a list."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else value
    return value
