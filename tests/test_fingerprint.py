"""What makes a record stale, and what does not."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import files
from pipelines.config import ConfigError, Params
from pipelines.datasets import folder as data_folder
from pipelines.runs import fingerprint as module
from pipelines.runs import records
from pipelines.runs.fingerprint import code_sum, fingerprint, outdated
from pipelines.runs.records import Cell, teacher_cell
from pipelines.suite import plan

STUDENT = "pspnet-resnet18"
DATA, TEACHER = "d" * 64, "e" * 64


def cell(method: str, seed: int = 0) -> Cell:
    return Cell("streets", STUDENT, method, seed)


def sums(params: Params, data: str = DATA, teacher: str | None = TEACHER) -> dict[str, str]:
    """The fingerprints of all methods and of the teacher."""
    found = {key: fingerprint(params, cell(key), data, teacher) for key in params.method_keys}
    return found | {"teacher": fingerprint(params, teacher_cell(params, "streets"), data, None)}


def moved(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if one[key] != other[key]}


@cache
def _text() -> str:
    return json.dumps(tiny(read_params()))


def small() -> dict[str, Any]:
    """The settings of the tiny benchmark. To read and write YAML takes most of the time of a test here."""
    return dict(json.loads(_text()))


def load(raw: dict[str, Any]) -> Params:
    return Params.model_validate(raw)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, of which fingerprints are now taken."""
    for name in ("baselines", "acfd", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def suite(code: Path) -> Path:
    """Records of a whole suite that are today's; nothing was trained for them."""
    raw = small()
    raw["suite"]["variants"] = [*raw["acfd"]]
    raw["suite"]["methods"], raw["suite"]["official"] = [*raw["methods"]], [*raw["official"]]
    (code / "params.yaml").write_text(json.dumps(raw))
    params = load(raw)
    write_records(params, code)
    assert not plan.due(params, "streets", code).cells
    return code


def write_records(params: Params, root: Path) -> None:
    image = Image.new("L", (8, 8))
    for split in data_folder.SPLITS:
        for kind, mode in ((split, "RGB"), (f"{split}annot", "L")):
            (root / "data" / "streets" / kind).mkdir(parents=True)
            image.convert(mode).save(root / "data" / "streets" / kind / "0.png")
        (root / "data" / "streets" / f"{split}.txt").write_text(f"{split}/0.png {split}annot/0.png\n")
    meta = data_folder.Meta("streets", ("a", "b"), ((0, 0, 0), (1, 1, 1)), 255)
    data_folder.write_description(root / "data" / "streets", meta)
    data = data_folder.describe(root / "data" / "streets").sha256
    own, weights = teacher_cell(params, "streets"), files.sha256(b"teacher")
    for each in (own, *plan.suite_cells(params, "streets")):
        mark = fingerprint(params, each, data, None if each.is_teacher else weights)
        run = {"fingerprint": mark, "data_sha256": data, "weights_sha256": weights}
        others = {name: b"" for name in records.RECORD_FILES if name != "run.json"}
        records.write(each.folder(root), run, others | {"metrics.json": b"{}", "history.csv": b"step\n1\n"})
    (own.folder(root) / "weights.safetensors").write_bytes(b"teacher")


def today(root: Path) -> Params:
    return load(json.loads((root / "params.yaml").read_text()))


def due(root: Path) -> set[str]:
    """The methods that are due, and the teacher."""
    found = plan.due(today(root), "streets", root)
    return {own.method for own in found.cells} | ({"teacher"} if found.train_teacher else set())


def reformatted(text: str) -> str:
    """The same code in another layout: no comment, another line length, other quotes and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, module.DOCUMENTED):
            if ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant("Another text."))
            else:
                node.body.insert(0, ast.Expr(ast.Constant("It had none.")))
    return "# another head\n\n\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n\n# another end\n"


# ---- the code


def test_another_layout_of_any_file_makes_nothing_due(suite: Path) -> None:
    changed = 0
    parts = ("baselines", "acfd", "pipelines/engine", "pipelines/datasets")
    for path in (path for part in parts for path in (suite / part).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        path.write_text(reformatted(text), encoding="utf-8")
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
        changed += path.read_text(encoding="utf-8") != text
    assert changed > 40
    assert due(suite) == set()


def test_engine_and_data_sets_count_by_the_version_of_the_engine_alone(suite: Path) -> None:
    for path in (suite / "pipelines").rglob("*.py"):
        path.write_text("raise SystemExit\n", encoding="utf-8")
    assert due(suite) == set()
    raw = json.loads((suite / "params.yaml").read_text())
    raw["engine"] += 1
    params = load(raw)
    every = [own.method for own in plan.suite_cells(params, "streets")]
    assert plan.due(params, "streets", suite).train_teacher
    assert sorted(plan.due(params, "streets", suite).cells, key=str) == sorted(
        plan.suite_cells(params, "streets"), key=str
    )
    assert {*every} == {*params.method_keys}


@pytest.mark.parametrize("key", ["none", "kd", "cwd", "at"])
def test_a_changed_formula_makes_exactly_its_cells_due(suite: Path, key: str) -> None:
    file = suite / "baselines" / f"{key}.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nHALF = 0.5\n", encoding="utf-8")
    params = today(suite)
    assert due(suite) == {method for method in params.method_keys if params.module_key(method) == key}
    assert len(due(suite)) == {"none": 2, "kd": 2, "cwd": 2, "at": 2}[key]
    file.write_text(file.read_text(encoding="utf-8").replace("\nHALF = 0.5\n", ""), encoding="utf-8")
    assert due(suite) == set()


@pytest.mark.parametrize("name", ["losses", "method"])
def test_a_changed_formula_of_the_paper_makes_all_its_variants_due(suite: Path, name: str) -> None:
    file = suite / "acfd" / f"{name}.py"
    text = file.read_text(encoding="utf-8")
    number = re.search(r"(?<=[ (])(?:0\.5|1e-\d+|2|1)(?=[,)\s])", text)
    assert number is not None
    file.write_text(f"{text[: number.start()]}7{text[number.end() :]}", encoding="utf-8")
    variants = {key for key in today(suite).method_keys if key.startswith("acfd-")}
    assert due(suite) == variants and len(variants) == 7


def test_a_new_method_makes_its_own_cells_due(suite: Path) -> None:
    (suite / "baselines" / "mine.py").write_text((suite / "baselines" / "kd.py").read_text())
    raw = json.loads((suite / "params.yaml").read_text())
    raw["methods"]["mine"] = raw["methods"]["kd"]
    raw["suite"]["methods"].append("mine")
    (suite / "params.yaml").write_text(json.dumps(raw))
    assert due(suite) == {"mine"}


def test_a_method_without_a_file_or_with_one_that_is_no_code_is_one_sentence(code: Path) -> None:
    params = load(small())
    (code / "baselines" / "kd.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"kd\.py cannot be imported .*: correct it"):
        fingerprint(params, cell("kd"), DATA, TEACHER)
    (code / "baselines" / "kd.py").unlink()
    with pytest.raises(ConfigError, match=r"no method file baselines/kd\.py: write it"):
        fingerprint(params, cell("kd"), DATA, TEACHER)


@given(st.sampled_from(sorted((ROOT / "baselines").glob("*.py"))), st.data())
@settings(max_examples=15, deadline=None)
def test_the_sum_is_that_of_the_statements(path: Path, data: st.DataObject) -> None:
    """Blank lines and comments anywhere between statements leave it, any other number in it does not."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    firsts = sorted({node.lineno for node in tree.body})
    line = data.draw(st.sampled_from(firsts)) - 1
    lines = text.splitlines(keepends=True)
    noted = "".join([*lines[:line], "\n# a remark\n\n", *lines[line:]])
    assert module._code_sum(noted, "x") == module._code_sum(text, "x") == code_sum(path)
    numbers = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    ]
    if numbers:
        chosen = data.draw(st.sampled_from(numbers))
        chosen.value = not chosen.value if isinstance(chosen.value, bool) else chosen.value + 1
        assert module._code_sum(ast.unparse(tree), "x") != code_sum(path)


def test_only_a_docstring_is_a_docstring() -> None:
    def of(text: str) -> str:
        return module._code_sum(text, "x")

    assert of('def f():\n    "a"\n    return 1\n') == of("def f():\n    return 1\n")
    assert of('def f():\n    return "a"\n') != of('def f():\n    return "b"\n')
    assert of('x = """a"""\n') != of('x = """b"""\n')
    assert of("x = 0\n") != of("x = None\n") != of("x = False\n")
    assert of("x = 1\n") != of("x = True\n")
    assert of("f(a, b)\n") == of("f(\n    a,  # first\n    b,\n)\n")
    assert of("x = 1e-3\n") == of("x = 0.001\n")
    assert of("x = u'a'\n") == of('x = "a"\n')
    assert of("x = a - b - c\n") != of("x = a - (b - c)\n")


# ---- the settings


def test_numbers_are_equal_however_they_are_written() -> None:
    raw = small()
    before = sums(load(raw))
    assert isinstance(raw["methods"]["kd"]["temperature"], float)
    raw["methods"]["kd"]["temperature"] = 1
    raw["methods"]["skd"]["gradient_penalty"] = 10
    raw["acfd"]["full"]["grid"] = 8.0
    training = raw["benchmarks"]["streets"]["training"]
    training["steps"] = float(training["steps"])
    raw["benchmarks"]["streets"]["data"]["train"] = 8.0
    assert moved(before, sums(load(raw))) == set()
    raw["methods"]["kd"]["temperature"] = 1.0000001
    assert moved(before, sums(load(raw))) == {"kd", "kd-official"}


def test_true_is_no_number() -> None:
    raw = small()
    before = sums(load(raw))
    raw["acfd"]["full"]["redundancy_weighting"] = 1
    assert moved(before, sums(load(raw))) == {"acfd-full"}


def every(params: Params) -> set[str]:
    return {*params.method_keys, "teacher"}


def students(params: Params) -> set[str]:
    return {*params.method_keys}


def taught(params: Params) -> set[str]:
    return {key for key in params.method_keys if params.module_key(key) != "none"}


def nothing(params: Params) -> set[str]:
    return set()


Change = Callable[[dict[str, Any]], Any]


def of_streets(name: str, **values: Any) -> Change:
    return lambda raw: raw["benchmarks"]["streets"][name].update(values)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda raw: raw.update(engine=raw["engine"] + 1), every),
        (lambda raw: raw["suite"].update(strict=True), every),
        (of_streets("data", seed=1), every),
        (lambda raw: raw["suite"].update(threads=2), students),  # a teacher may use all cores
        (of_streets("training", lr=0.5), students),
        (of_streets("training", steps=7), students),
        (lambda raw: raw["students"][STUDENT].update(output_stride=16), students),
        (of_streets("teacher", seed=1), lambda params: {"teacher"}),
        (
            lambda raw: raw["benchmarks"]["streets"]["teacher"]["training"].update(lr=0.5),
            lambda params: {"teacher"},
        ),
        (lambda raw: raw["methods"]["kd"].update(weight=0.5), lambda params: {"kd"}),  # official has its own
        (lambda raw: raw["official"]["kd"].update(weight=0.5), lambda params: {"kd-official"}),
        (lambda raw: raw["acfd"]["full"].update(weight_afd=0.7), lambda params: {"acfd-full"}),
        # of what is run, and where, a training knows nothing
        (
            lambda raw: raw["suite"].update(seeds=[0, 1], methods=["none"], variants=[], official=["kd"]),
            nothing,
        ),
        (lambda raw: raw["suite"].update(pack=1, workers=0, weights=["resnet18"]), nothing),
        (lambda raw: raw["tuning"].update(trials=3), nothing),
        (lambda raw: raw["benchmarks"]["camvid"]["training"].update(lr=0.5), nothing),
    ],
)
def test_what_moves_a_fingerprint(change: Change, wanted: Callable[[Params], set[str]]) -> None:
    raw = small()
    before = sums(load(raw))
    change(raw)
    params = load(raw)
    assert moved(before, sums(params)) == wanted(params)


def test_where_the_files_of_a_data_set_lie_moves_nothing() -> None:
    raw = read_params()
    cells = [Cell("camvid-half", "fpn-mobilenetv2", "kd", 0), teacher_cell(load(raw), "camvid-half")]
    before = [fingerprint(load(raw), cell, DATA, TEACHER) for cell in cells]
    raw["benchmarks"]["camvid-half"]["data"]["mirror"] = "/my/disk"
    assert [fingerprint(load(raw), cell, DATA, TEACHER) for cell in cells] == before
    raw["benchmarks"]["camvid-half"]["data"]["size"] = [90, 120]
    assert not set(before) & {fingerprint(load(raw), cell, DATA, TEACHER) for cell in cells}
    own = {"dataset": "custom", "images": "a", "labels": "b", "classes": {"x": [0, 0, 0], "y": [9, 9, 9]}}
    own |= {"splits": dict.fromkeys(("train", "val", "test"), "list.txt"), "ignore_index": 255, "size": None}
    found = set()
    for images, colour in (("a", 0), ("./a/", 0), ("a", 1)):
        raw["benchmarks"]["camvid-half"]["data"] = own | {"images": images}
        own["classes"]["x"][0] = colour
        found.add(fingerprint(load(raw), cells[0], DATA, TEACHER))
    assert len(found) == 2  # another spelling of a path is no other, another colour is


def test_the_network_of_the_teacher_moves_the_students() -> None:
    raw = small()
    before = sums(load(raw))
    raw["benchmarks"]["streets"]["teacher"]["network"]["output_stride"] = 16
    params = load(raw)
    assert moved(before, sums(params)) == every(params)


def test_only_who_learns_from_the_teacher_depends_on_its_weights() -> None:
    params = load(small())
    before = sums(params)
    assert moved(before, sums(params, teacher="f" * 64)) == taught(params)
    assert "none" not in taught(params) and "none-x1.5" not in taught(params)
    assert moved(before, sums(params, data="f" * 64)) == every(params)
    assert fingerprint(params, cell("kd", 1), DATA, TEACHER) != before["kd"]


def test_the_encoders_weights_count_by_their_sum() -> None:
    raw = small()
    raw["students"][STUDENT]["weights"] = "resnet18"
    before = sums(load(raw))
    raw["weights"]["resnet18"].update(url=None, file="weights/elsewhere.pth")
    assert moved(before, sums(load(raw))) == set()
    raw["weights"]["resnet18"]["sha256"] = "0" * 8
    params = load(raw)
    assert moved(before, sums(params)) == students(params)


# ---- the parts that a table names


def test_what_differs_is_named(suite: Path) -> None:
    params = today(suite)
    record = records.read(cell("kd"), suite)
    own = records.read(teacher_cell(params, "streets"), suite)
    assert record is not None and own is not None
    for each, teacher in ((own, None), (record, {"sha256": own.run["weights_sha256"]})):
        each.run.update(config=module.settings(params, each.cell), engine=params.engine, teacher=teacher)
    assert outdated([own, record], params) == {}
    older = records.Record(cell("kd"), {}, record.run | {"engine": params.engine + 1}, [], record.folder)
    assert outdated([own, older], params) == {cell("kd"): ["version of the engine"]}
    other = records.Record(cell("kd"), {}, record.run | {"fingerprint": "x"}, [], record.folder)
    assert outdated([own, other], params) == {
        cell("kd"): ["code of the method, suite.threads or suite.strict"]
    }
    raw = json.loads((suite / "params.yaml").read_text())
    raw["methods"]["kd"]["weight"] = 0.7
    assert outdated([own, record], load(raw)) == {cell("kd"): ["method"]}
    stale = records.Record(own.cell, {}, own.run | {"engine": 0}, [], own.folder)
    assert outdated([stale, record], params) == {
        own.cell: ["version of the engine"],
        cell("kd"): ["weights of the teacher"],
    }
