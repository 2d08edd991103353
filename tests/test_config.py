"""Bad input is one clear sentence before any training."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from conftest import ROOT, read_params, write_params
from pydantic import Field, ValidationError

from pipelines import config
from pipelines.config import ConfigError
from pipelines.methods import checked

Change = Callable[[dict[str, Any]], Any]


MINE: dict[str, Any] = {
    "dataset": "custom",
    "images": "photos",
    "labels": "masks",
    "ignore_index": 255,
    "splits": {"train": "a", "val": "b", "test": "c"},
    "size": None,
}


def loaded(tmp_path: Path, change: Change) -> config.Params:
    raw = read_params()
    change(raw)
    write_params(tmp_path, raw)
    return checked(config.load(tmp_path / "params.yaml"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: r["suite"]["benchmarks"].append("moon"),
            "no benchmark 'moon'.*streets, camvid-half, camvid",
        ),
        (lambda r: r["suite"]["students"].append("vgg"), "no student 'vgg'.*pspnet-resnet18"),
        (lambda r: r["suite"]["variants"].append("abc"), "no variant 'abc'.*full, afd"),
        (
            lambda r: r["methods"].update(fancy={}),
            r"baselines/fancy\.py; the methods that exist: .*\bcwd, .*none\b",
        ),
        (lambda r: r["methods"].update({"acfd-x": {}}), "acfd-x takes a name"),
        *(
            (lambda r, name=name: r["methods"].update({name: {}}), rf"methods\.{name} takes a name")
            for name in ("acfd", "teacher", "photos", "truth")
        ),
        (lambda r: r["acfd"].update(official=r["acfd"]["full"]), r"acfd\.official takes a name"),
        (
            lambda r: r["suite"].update(reference="kd", controls=[]),
            r"suite\.reference = kd learns from a teacher",
        ),
        *(
            (lambda r, seed=seed: r["suite"].update(seeds=[seed]), r"suite\.seeds\.0 = .* is not allowed")
            for seed in ("0", True, 1e3)
        ),
        (
            lambda r: r["suite"].update(controls=[1.5, 1.51]),
            r"of the 24 steps of benchmarks\.streets\.training, suite\.controls make trainings of equal "
            r"length \(24, 36, 36 steps\)",
        ),
        (lambda r: r.pop("official"), "official is missing"),
        (
            lambda r: r["students"].update(exports=r["students"]["pspnet-resnet18"]),
            "no student may be called 'exports'",
        ),
        (
            lambda r: r["students"].update(teacher=r["students"]["pspnet-resnet18"]),
            "no student may be called",
        ),
        (
            lambda r: r["methods"]["kd"].update(temprature=2.0),
            r"methods\.kd\.temprature is not a known setting",
        ),
        (lambda r: r["methods"]["kd"].pop("temperature"), r"methods\.kd\.temperature is missing"),
        (lambda r: r["methods"]["kd"].update(temperature=0), r"methods\.kd\.temperature = 0 is not allowed"),
        (lambda r: r["methods"]["kd"].update(weight=float("inf")), r"methods\.kd\.weight = inf is"),
        (lambda r: r["methods"]["cwd"].update(tau="warm"), r"methods\.cwd\.tau = 'warm' is not allowed"),
        (lambda r: r["official"]["dist"].update(weight=-1), r"official\.dist\.weight = -1 is not allowed"),
        (lambda r: r["official"]["dist"].update(wieght=1), r"official\.dist\.wieght is not a known setting"),
        (lambda r: r["methods"]["dist"].update(beta=-1), r"methods\.dist\.beta = -1 is not allowed"),
        (lambda r: r["acfd"]["csd"].update(stages=[7]), r"acfd\.csd\.stages\.0 = 7 is not allowed"),
        (
            lambda r: r["benchmarks"]["camvid"]["training"].update(lr=-1),
            r"benchmarks\.camvid\.training\.lr = -1",
        ),
        (
            lambda r: r["benchmarks"]["camvid"]["data"].update(dataset="mars"),
            r"no data set 'mars'.*camvid.*streets",
        ),
        (
            lambda r: r["benchmarks"]["streets"]["data"].update(size=[0, 5]),
            r"benchmarks\.streets\.data\.size",
        ),
        (lambda r: r.update(extra=1), "extra is not a known setting"),
        (lambda r: r["tuning"]["methods"].append("kdd"), "no method 'kdd'"),
        (lambda r: r["suite"]["controls"].append("2"), r"suite\.controls\.3 = '2' is not allowed"),
        (lambda r: r["suite"]["controls"].append(2.0), r"an entry stands there twice"),
        (lambda r: r["suite"]["controls"].append(1), r"suite\.controls\.3 = 1 is not allowed"),
        (
            lambda r: r["tuning"]["methods"].append("kd-official"),
            r"tuning\.methods must not hold kd-official, whose weights are given: take it out\.",
        ),
        (lambda r: r["tuning"]["methods"].append("none-x2"), "must not hold none-x2,"),
        (
            lambda r: r["methods"].pop("skd"),
            r"no method 'skd' .* named in suite.methods and tuning.methods: take it out there, or add it to "
            "`methods`",
        ),
        (
            lambda r: r["weights"].pop("mobilenetv2"),
            r"named in students.pspnet-mobilenetv2-imagenet.weights: take it out there",
        ),
        (
            lambda r: r["benchmarks"]["cityscapes-segformer"]["teacher"].update(
                training=r["benchmarks"]["streets"]["training"] | {"crop": [28, 64]}
            ),
            r"cityscapes-segformer.teacher.training has a crop or a window below 29 pixels .* mit_b2",
        ),
        (
            lambda r: r["benchmarks"]["streets"].update(
                data=MINE | {"classes": {0: [0, 0, 0], 1: [9, 9, 9]}}
            ),
            r"data\.classes\.0 is a name and must be text: write it in quotes",
        ),
        (
            lambda r: r["benchmarks"]["streets"].update(data=MINE | {"classes": {"plant": [0, 0, 0]}}),
            "one class leaves nothing to tell apart; name the background as a class too",
        ),
    ],
)
def test_bad_params_are_one_sentence(tmp_path: Path, change: Change, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        loaded(tmp_path, change)
    assert "\n" not in str(error.value)


def test_unreadable_params(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        checked(config.load(file))
    file.write_text("suite: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        checked(config.load(file))
    file.write_text("just words")
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        checked(config.load(file))
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"^params\.yaml is empty: restore it with git\.$"):
        config.load(file)
    file.write_bytes("suite: [é]".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^params\.yaml is not UTF-8 text: save it as UTF-8\.$"):
        config.load(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--benchmark", "moon", "--student", "pspnet-resnet18", "--method", "kd"], "no benchmark 'moon'"),
        (["--benchmark", "streets", "--student", "vgg", "--method", "kd"], "no student 'vgg'"),
        (["--benchmark", "streets", "--student", "pspnet-resnet18", "--method", "kdd"], "no method 'kdd'"),
    ],
)
def test_a_stage_says_what_exists_and_fails(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.stages.distill", *arguments, "--seed", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and sentence in done.stderr and "exist:" in done.stderr
    assert "Traceback" not in done.stderr
    for rest in (ROOT / ".scratch" / "moon", ROOT / ".scratch" / "streets" / "vgg"):
        assert not rest.exists()


def test_the_paper_has_all_its_variants_and_seven_names_safe_in_paths() -> None:
    params = checked(config.load())
    seven = ["full", "afd", "ccd", "csd", "afd-ccd", "afd-csd", "ccd-csd"]
    full = params.acfd["full"]
    for name in seven:
        values = params.acfd[name]
        parts = {"afd", "ccd", "csd"} if name == "full" else set(name.split("-"))
        for part in ("afd", "ccd", "csd"):
            assert values[f"weight_{part}"] == (full[f"weight_{part}"] if part in parts else 0)


def test_stage_list_is_the_matrix_of_params() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    suite = raw["suite"]
    expected = [f"{stage}@{b}" for stage in ("fetch", "train_teacher") for b in suite["benchmarks"]]
    expected += [f"fetch_weights@{key}" for key in suite["weights"]]
    for stage, keys in (
        ("distill", suite["methods"]),
        ("control", suite["controls"]),
        ("official", suite["official"]),
        ("acfd", suite["variants"]),
    ):
        expected += [
            f"{stage}@{b}-{s}-{k}-{seed}"
            for b in suite["benchmarks"]
            for s in suite["students"]
            for k in keys
            for seed in suite["seeds"]
        ]
    expected += [f"export@{b}-{s}" for b in suite["benchmarks"] for s in suite["students"]]
    assert sorted(listed) == sorted([*expected, "count", "report"])


def test_yaml_is_read_as_dvc_reads_and_writes_it() -> None:
    """DVC writes small numbers into dvc.lock as 6e-05, which is a text in YAML 1.1."""
    assert config.parse_yaml("lr: 6e-05", "dvc.lock") == {"lr": 0.00006}
    with pytest.raises(ConfigError, match=r'dvc.lock is not valid YAML: .*duplicate key "a".* \(line 2\)'):
        config.parse_yaml("a: 1\na: 2", "dvc.lock")


PYDANTIC = re.compile(
    r"[Ii]nput should|[Vv]alue error|[Ff]ield required|validation|Extra inputs|unable to parse"
)


class Every(config.Model):
    """A field of each kind that a ``Config`` can have."""

    number: Annotated[float, Field(gt=0, lt=9)] = 1
    count: Annotated[int, Field(ge=1, le=9)] = 1
    flag: bool = True
    text: Annotated[str, Field(pattern="^a+$", max_length=5)] = "a"
    word: Annotated[str, Field(min_length=2)] = "aa"
    choice: Literal["a", "b"] = "a"
    pair: tuple[int, int] = (1, 2)
    many: list[int] = Field([1], min_length=1, max_length=2)
    names: dict[str, int] = Field({"a": 1}, min_length=1)
    path: Path | None = None
    inner: config.Sliding | None = None
    either: int | bool | None = None


VALUES: list[Any] = [
    *(
        None,
        True,
        "b",
        "",
        "aaaaaaaaa",
        0,
        -1,
        10,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        b"x",
        [],
        [1, 2, 3],
    ),
    *(["x"], {}, {1: 1}, {"a": "b"}, {"window": [1, 1], "stride": [2, 2]}, datetime.date(2020, 1, 1)),
]


@pytest.mark.parametrize("name", Every.model_fields)
def test_no_word_of_pydantic_s_reaches_a_user(name: str) -> None:
    said = 0
    for value in VALUES:
        try:
            Every.model_validate({name: value})
        except ValidationError as error:
            said += 1
            text = config.explain("methods.x", error)
            assert text.startswith(f"In params.yaml: methods.x.{name}") and not PYDANTIC.search(text), text
            assert "another kind" not in text or name == "either", text
    assert said >= 5


def test_git_changes_no_byte(tmp_path: Path) -> None:
    """A checkout with CRLF for line ends has the bytes whose sums are in the records."""
    content = b"one\ntwo\r\nthree\n"

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.autocrlf=true"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    shutil.copy(ROOT / ".gitattributes", tmp_path)
    names = ["run.json", "history.csv", "table.md", "figure.png", "code.py"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "start")
    for name in names:
        (tmp_path / name).unlink()
    git("checkout", "--", ".")
    assert all((tmp_path / name).read_bytes() == content for name in names)
