"""README and docs: links lead somewhere, commands exist and are run by a test, examples are accepted."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from conftest import ROOT, read_params, write_params
from PIL import Image

from pipelines import config
from pipelines.datasets import custom, voc
from pipelines.methods import checked

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "acfd" / "README.md"]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# The commands that are not run as they stand, and the test that runs the like. The blocks of shell without
# them are run by test_end_to_end.
ELSEWHERE = {
    r"make (test|lint|smoke|browser)": ".ci/run: make",
    r"make show": "README.md: make show",  # opens a browser
    r"make (torture|bench|lock|clean|ui|readme)": "Makefile: torture",  # for developers, or without an end
    r"make tables": "tests/test_end_to_end.py: pipelines.stages.report",
    r"make verify": "tests/test_end_to_end.py: pipelines.tools.verify",
    r"make tune": "tests/test_tune.py: tune",
    r"make speed( .*)?": "tests/test_speed.py: def test_every_training_is_measured",
    r"make spread( .*)?": "tests/test_spread.py: pipelines.tools.spread",
    r"ACFD_MIRROR=\S+ make repro": "tests/test_datasets.py: ACFD_MIRROR",
    r"make repro (SCHEDULER|JOBS)=.*|(?:CUDA_VISIBLE_DEVICES=0 )?dask .*|cd /shared/checkout.*": (
        "tests/test_suite.py: def test_a_running_cluster_gives_the_bytes_of_a_serial_run"
    ),
    r"make repro DRY=1": "tests/test_suite.py: def test_a_dry_run_says_what_is_due_and_does_nothing",
    r"make repro (CLUSTER|DASHBOARD)=.*": (
        "tests/test_suite.py: def test_a_cluster_that_is_not_there_is_one_sentence"
    ),
    r"dvc (remote add|push|pull).*": (
        "tests/test_extend.py: def test_a_clone_gets_a_student_from_the_remote"
    ),
    r"python -m pipelines.stages.fetch_weights .*": "tests/test_weights.py: def test_a_file_is_fetched_once",
}


def shell(page: Path) -> list[list[str]]:
    """The commands of each block of shell, without comments."""
    blocks = [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "sh"]
    return [[line for raw in block.splitlines() if (line := raw.split(" #")[0].strip())] for block in blocks]


def inline(page: Path) -> list[str]:
    """The commands in running text and tables."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`((?:\w+=\S+ )*(?:make|dvc|dask|python) [^`]+)`", text)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for line in (*inline(page), *(line for block in shell(page) for line in block)):
            yield page.name, line


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if path.startswith("https://"):
                continue
            file = (page.parent / path) if path else page
            assert file.exists() or "/index.html" in path, (page.name, target)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, (page.name, target)


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:-1] if f"(docs/{page.name})" not in text] == []


def test_the_readme_counts_the_methods_and_those_with_a_fixture() -> None:
    text, rivals = (ROOT / "README.md").read_text(encoding="utf-8"), config.load().methods.keys() - {"none"}
    held = {file.stem for file in (ROOT / "tests" / "parity").glob("*.npz")}
    assert len(rivals) == 20 and "[twenty other methods]" in text
    assert held <= rivals and f"gradients of {len(held)} of them are tested" in text
    assert rivals - held == {"kd", "cwd", "skd"} and "those of KD, CWD and SKD" in text


def test_every_file_that_is_named_exists() -> None:
    made = {"baselines/mymethod.py", "reports/index.html"}
    for page in PAGES:
        for name in re.findall(
            r"`((?:acfd|baselines|pipelines|reports|runs|tests|teachers)/[\w/.-]+\.\w+)`",
            page.read_text("utf-8"),
        ):
            assert name in made or (ROOT / name).exists(), (page.name, name)


def test_every_make_command_exists_with_its_variables() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    used = set()
    for page, line in commands():
        words = shlex.split(line)
        if "make" in words:
            target, *variables = words[words.index("make") + 1 :]
            used.add(target)
            assert target in targets, (page, line)
            for name in (variable.split("=")[0] for variable in variables):
                assert f"$({name})" in makefile, (page, line)
    assert {"repro", "test", "verify", "tables", "ui", "lint", "clean", "tune", "bench"} <= used


class AcceptedError(Exception):
    """The arguments of a command are right."""


MODULES = sorted({line for _, line in commands() if line.startswith("python -m pipelines.")})


@pytest.mark.parametrize("line", MODULES)
def test_every_module_takes_its_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: Any, *arguments: Any) -> NoReturn:
        parse(parser, *arguments)
        raise AcceptedError

    _, _, name, *arguments = shlex.split(line)
    module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if arguments:
        with pytest.raises(AcceptedError):
            module.main()


def test_every_command_is_run_by_a_test() -> None:
    """Here, in test_end_to_end (which runs the blocks of shell), or where ELSEWHERE says."""
    for pattern, place in ELSEWHERE.items():
        file, _, part = place.partition(": ")
        assert part in (ROOT / file).read_text(encoding="utf-8"), (pattern, place)
        assert any(re.fullmatch(pattern, line) for _, line in commands()), pattern
    known = "|".join(f"(?:{pattern})" for pattern in ELSEWHERE)
    here = (
        r"source \.venv/bin/activate|export PYTHONPATH=\$PWD|make repro|dvc repro.*|python -m pipelines\..*"
    )
    for page, line in commands():
        assert re.fullmatch(f"{known}|{here}", line), (page, line)


def test_the_student_and_the_method_that_are_added_are_accepted(tmp_path: Path) -> None:
    student = re.search(r"`(pspnet-resnet34: \{.*?\})`", (ROOT / "docs" / "extend.md").read_text("utf-8"))
    method = re.search(r"`(mymethod: \{.*?\})`", (ROOT / "README.md").read_text("utf-8"))
    assert student and method
    raw = read_params()
    added = yaml.safe_load(student[1])
    assert not added.keys() & raw["students"].keys()  # a key may stand only once
    raw["students"] |= added
    write_params(tmp_path, raw)
    params = checked(config.load(tmp_path / "params.yaml"))
    assert params.student("pspnet-resnet34").encoder == "tu-resnet34"
    assert yaml.safe_load(method[1]) == {"mymethod": {"weight": 0.1}}


def own_data() -> dict[str, Any]:
    """The entry that the page on one's own data shows, with the protocol of `streets`."""
    ((_, text),) = [
        part
        for part in FENCE.findall((ROOT / "docs" / "own-data.md").read_text("utf-8"))
        if part[0] == "yaml"
    ]
    entry = yaml.safe_load(text)["benchmarks"]["mine"]
    streets = read_params()["benchmarks"]["streets"]
    assert entry["training"] == entry["teacher"] == "…"
    return {**streets, "data": entry["data"]}


def test_every_setting_of_ones_own_data_is_explained() -> None:
    text = (ROOT / "docs" / "own-data.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == custom.Config.model_fields.keys() - {"dataset"}
    custom.Config(**own_data()["data"])


def test_two_classes_of_0_and_255_are_read_as_the_page_says(tmp_path: Path) -> None:
    settings = own_data()["data"] | {"masks": "colours"}
    settings["classes"] = {"ground": [0, 0, 0], "plant": [255, 255, 255]}
    file = tmp_path / "mask.png"
    mask = Image.new("L", (4, 4))
    mask.putpixel((1, 2), 255)
    mask.save(file)
    found = custom._classes(file, custom.Config(**settings))
    assert found[2, 1] == 1 and found.sum() == 1


def test_the_variants_of_published_sets_are_accepted() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    kaggle = re.search(r"`data: (\{dataset: camvid, variant.*?\})`", text)
    assert kaggle
    module, found = config.dataset(yaml.safe_load(kaggle[1]), "kaggle")
    assert found.variant == "kaggle" and module.__name__.endswith("camvid")
    assert voc.AUG[0] in text and voc.VOC[1] in text


def test_estimates_are_said_once() -> None:
    """That hours are estimates is one generated sentence."""
    found = [page.name for page in PAGES for _ in re.findall(r"\*\*estimates\*\*", page.read_text("utf-8"))]
    assert found == ["benchmarks.md"]


def test_make_is_right_about_what_it_runs() -> None:
    """Each target that runs a module runs one that exists."""
    names = re.findall(r"python -m (pipelines[\w.]+)", (ROOT / "Makefile").read_text())
    assert names
    for name in names:
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
