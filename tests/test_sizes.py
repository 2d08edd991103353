"""Parameters and multiply-adds: counted right, explained beside published ones, covered by `make verify`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, read_params, write_params
from torch import nn

from baselines import kd
from pipelines import config, files
from pipelines.config import ConfigError, Network, Params
from pipelines.networks import SegmentationNetwork
from pipelines.reports import network_table
from pipelines.runs import counts
from pipelines.stages import count, report
from pipelines.tools import verify

R18 = Network(architecture="PSPNet", encoder="tu-resnet18", output_stride=8, weights=None)
B0 = Network(architecture="Segformer", encoder="mit_b0", output_stride=32, weights=None)


@pytest.mark.parametrize("network", [R18, B0], ids=["convolutions", "attention"])
def test_macs_are_those_of_the_layers(network: Network) -> None:
    """By hand from the shapes that every layer sees; attention: two products of queries and keys."""
    size, classes = counts.SIZES[0]
    built, total, hooks = SegmentationNetwork(network, classes).eval().to("meta"), 0, []

    def see(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            height, width = layer.kernel_size
            total += output.numel() * height * width * layer.in_channels // layer.groups
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        else:  # SegFormer's attention: keys and values are reduced by sr_ratio in both directions
            positions, width = inputs[0].shape[1:]
            total += 2 * positions * (positions // layer.sr_ratio**2) * width

    for layer in built.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) or hasattr(layer, "sr_ratio"):
            hooks.append(layer.register_forward_hook(see))
    with torch.no_grad():
        built(torch.zeros(1, 3, *size, device="meta"))
    (row,) = [row for row in count.measure(network) if tuple(row["size"]) == size]
    assert row["macs"] == pytest.approx(total, rel=1e-6) and len(hooks) > 20
    assert row["parameters"] == built.deployed_parameters()
    known = counts.networks(config.load())
    assert row in counts.read()["networks"][next(key for key in known if known[key][0] == network)]


def rows() -> list[dict[str, str]]:
    with (ROOT / "reports" / "networks.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("network", "parameters", "gmacs"),  # as counted when the suite was planned
    [
        ("PSPNet-resnet18, stride 8", 12.05, 101),
        ("PSPNet-resnet101, stride 8", 48.9, 372),
        ("PSPNet-mobilenetv2_100, stride 8", 2.3, 19),
    ],
)
def test_the_dilated_pspnets_have_their_size(network: str, parameters: float, gmacs: float) -> None:
    row = next(row for row in rows() if row["network"] == network)
    assert float(row["parameters"]) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert float(row["macs"]) / 1e9 == pytest.approx(gmacs, abs=0.5)


def test_what_differs_from_publications_is_explained() -> None:
    """To 0.1 million parameters, to 1 % of the multiply-adds."""
    compared = 0
    for row in filter(lambda row: row["source"], rows()):
        explained = float(row["parameters_with_differences"]) / 1e6
        assert explained == pytest.approx(float(row["published_parameters_m"]), abs=0.1), row
        if row["published_size"]:
            explained = float(row["macs_with_differences"]) / 1e9
            assert explained == pytest.approx(float(row["published_gmacs"]), rel=0.01), row
            compared += 1
    assert compared >= 8


def test_a_network_is_counted_once_and_again_by_other_code(tmp_path: Path) -> None:
    raw = read_params()
    raw["students"] = {
        name: raw["students"][name] for name in ("pspnet-resnet18", "pspnet-resnet18-imagenet")
    }
    raw["benchmarks"] = {"streets": raw["benchmarks"]["streets"]}
    raw["benchmarks"]["streets"]["teacher"]["network"]["encoder"] = "tu-resnet18"
    raw["tuning"] |= {"benchmark": "streets", "student": "pspnet-resnet18", "methods": ["kd"]}
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd")}
    raw["suite"]["methods"], raw["official"] = ["none", "kd"], {}
    write_params(tmp_path, raw)
    params = config.load(tmp_path / "params.yaml")
    assert counts.missing(params, tmp_path) == ["PSPNet-resnet18, stride 8"]
    count.count(params, tmp_path)
    assert counts.missing(params, tmp_path) == []
    file = tmp_path / counts.COUNTS
    first = json.loads(file.read_text())
    (found,) = first["networks"].values()
    assert found[0]["parameters"] == 12_052_435
    assert {key for key in first["methods"] if not key.startswith("acfd")} == {"kd"}
    found[0]["parameters"] = 1  # shows whether it is counted again
    del first["seal"]
    files.write_sealed(file, first)
    count.count(params, tmp_path)
    assert json.loads(file.read_text())["networks"] == first["networks"]
    files.write_sealed(file, first | {"mark": "of other code"})
    count.count(params, tmp_path)
    assert next(iter(json.loads(file.read_text())["networks"].values()))[0]["parameters"] == 12_052_435


def test_the_committed_counts_are_of_this_code() -> None:
    """Else everybody who adds a method counts all of them again."""
    have = counts.read()
    if have["versions"] == {name: version(name) for name in count.LIBRARIES}:
        assert have["mark"] == count._mark(), "run `dvc repro -s -f count` and commit runs/networks.json"


def test_a_method_that_looks_at_values_is_not_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains all the same, so its neighbours are counted and the table says why it has no row."""

    def losses(_: Any, student: dict[str, torch.Tensor], *__: Any) -> dict[str, torch.Tensor]:
        positive = student["logits"] > 0
        return {"kd": student["logits"][positive].mean()}

    monkeypatch.setattr(kd.Method, "losses", losses)
    have = counts.read(root)
    found = have["methods"] | count.measure_methods(load(root), ["kd", "cwd"])
    assert found["cwd"] == {k: v for k, v in have["methods"]["cwd"].items() if k != "code"}
    assert set(found["kd"]) == {"failure"}
    files.write_sealed(root / counts.COUNTS, have | {"methods": found})
    report.write_texts(load(root), [], root, root)
    text = (root / "reports" / "methods.md").read_text()
    assert "kd cannot be counted without values: NotImplementedError" in text
    assert "| cwd |" in text and "| kd |" not in text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the table is made from, and the table."""
    for name in ("params.yaml", "dvc.lock", "reports/networks.yaml", "runs/networks.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    report.write_texts(load(tmp_path), [], tmp_path, tmp_path)
    return tmp_path


def load(root: Path) -> Params:
    return config.load(root / "params.yaml")


def problems(root: Path) -> list[str]:
    return [text for text in verify.problems(load(root), root) if "networks" in text]


def test_the_committed_table_is_verified(root: Path) -> None:
    assert problems(root) == []
    for kind in ("md", "csv", "tex"):
        path = Path("reports") / f"networks.{kind}"
        assert (root / path).read_bytes() == (ROOT / path).read_bytes()


def another_network(root: Path) -> None:
    raw = read_params(root)
    raw["students"]["new"] = R18.written() | {"encoder": "tu-resnet26"}
    write_params(root, raw)


def another_count(root: Path) -> None:
    file = root / counts.COUNTS
    file.write_text(file.read_text().replace("12052435", "12052436"))


@pytest.mark.parametrize(
    ("damage", "sentences"),
    [
        (
            another_network,
            [
                "runs/networks.json lacks PSPNet-resnet26, stride 8: run `dvc repro -s count`.",
                "reports/networks.md, line ",
            ],
        ),
        (
            another_count,
            ["runs/networks.json is not the file that dvc.lock has", "reports/networks.csv, line "],
        ),
        (
            lambda root: (root / counts.COUNTS).unlink(),
            ["runs/networks.json lacks PSPNet-resnet34, stride 8"],
        ),
        (
            lambda root: (root / counts.COUNTS).write_text("{"),
            ["runs/networks.json lacks PSPNet-resnet18"],
        ),
        (lambda root: (root / "reports/networks.md").unlink(), ["reports/networks.md is missing"]),
    ],
)
def test_what_does_not_agree_is_named(
    root: Path, damage: Callable[[Path], object], sentences: list[str]
) -> None:
    damage(root)
    found = problems(root)
    for sentence in sentences:
        assert [text for text in found if text.startswith(sentence)], found


def test_a_network_without_a_count_has_a_row_and_a_warning(root: Path) -> None:
    another_network(root)
    report.write_texts(load(root), [], root, root)
    text = (root / "reports" / "networks.md").read_text()
    assert "**Warning:** not counted yet, run \\`dvc repro -s count\\`: PSPNet-resnet26, stride 8." in text
    assert "| PSPNet-resnet26, stride 8 | new | – | – | – |" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda raw: raw["networks"][0].update(source="nobody"),
            "names the source 'nobody'.*: kt, segformer",
        ),
        (lambda raw: raw["networks"][0].update(parameter=1), "parameter is not a known setting"),
        (lambda raw: raw["networks"][0].update(counts=[]), r"networks\.0\.counts"),
    ],
)
def test_a_mistake_in_what_is_published_is_one_sentence(
    root: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    raw = yaml.safe_load((root / network_table.PUBLISHED).read_text())
    change(raw)
    (root / network_table.PUBLISHED).write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=sentence) as error:
        report.write_texts(load(root), [], root, root)
    assert "networks.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_changed_digit_of_a_count_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    whole = (ROOT / counts.COUNTS).read_text()
    place = tmp_path / counts.COUNTS
    place.write_text(whole)
    params = config.load()
    assert counts.missing(params, tmp_path) == []
    place.write_text(whole.replace('"macs": 1', '"macs": 2', 1))
    assert len(counts.missing(params, tmp_path)) == len(counts.networks(params))
    rows = [{"size": [1, 1], "classes": 1, "parameters": 1, "macs": 1}]
    monkeypatch.setattr(count, "measure", lambda network: rows)
    count.count(params, tmp_path)
    assert all(own == rows for own in counts.read(tmp_path)["networks"].values())
