"""Measured steps: the real loop on random images, and the hours that follow from its times."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_params, tiny, write_params
from suites import slow

from pipelines import config
from pipelines.config import TEACHER, ConfigError, Params
from pipelines.datasets import folder as data_folder
from pipelines.methods import checked
from pipelines.reports import benchmark_table, speed_table
from pipelines.tools import speed

GPU = {"device": "a GPU", "processor": "a processor", "threads": 1, "cores": 8}
STEP = {
    TEACHER: 0.5,
    "none": 0.25,
    "kd": 0.375,
    "skd": 0.5,
    "cwd": 0.5,
    "acfd-full": 1.0,
}
FLOPS = {TEACHER: 9, "none": 100, "kd": 130, "skd": 170, "cwd": 130, "acfd-full": 150}


def load() -> Params:
    """params.yaml with the methods of STEP."""
    params = checked(config.load())
    wanted = {"methods": ["kd", "skd", "cwd"], "official": [], "variants": ["full"], "controls": [1.5, 3]}
    return params.model_copy(update={"suite": params.suite.model_copy(update=wanted)})


def entry(params: Params, benchmark: str = "cityscapes", **changes: Any) -> dict[str, Any]:
    """As a GPU would have left it; steps have these seconds."""
    student = params.suite.students[0]
    rows = {
        name: {
            "status": "measured",
            "step_ms": [1000 * seconds] * 3,
            "step_flops": FLOPS[name],
            "evaluation_ms": 40.0,
            "memory_mb": 20_000.0,
        }
        for name, seconds in STEP.items()
    }
    protocol = speed_table.protocol(params.benchmark(benchmark), params.student(student).written())
    about = {
        "benchmark": benchmark,
        "student": student,
        "images": [1024, 2048],
        "batch_size": 16,
        "loading_ms": 125.0,
    }
    return {**about, "protocol": protocol, "workers": 4, "hardware": GPU, "rows": rows} | changes


@slow
def test_every_training_is_measured_and_a_second_time_replaces_the_first(tmp_path: Path) -> None:
    raw = tiny(read_params())
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd")}
    raw["suite"].update(methods=["none", "kd"], variants=[])
    raw["official"] = {}
    raw["tuning"]["methods"] = ["kd"]
    write_params(tmp_path, raw)
    params = checked(config.load(tmp_path / "params.yaml"))
    speed.speed(params, "streets", None, 2, tmp_path)
    (found,) = speed_table.read(tmp_path)
    speed_table.add(found | {"workers": 1}, tmp_path)
    assert speed_table.read(tmp_path) == [found | {"workers": 1}]
    assert list(found["rows"]) == [TEACHER, *speed.methods(params)]
    for row in found["rows"].values():
        assert row["status"] == "measured" and len(row["step_ms"]) == 2
        assert min(*row["step_ms"], row["evaluation_ms"]) > 0
        assert row["memory_mb"] > 100  # torch alone
    assert found["loading_ms"] > 0 and found["ceiling_tflops"] > 0
    pack, rows = found["pack"], found["rows"]
    assert pack["methods"] == ["none", "kd"] and len(pack["step_ms"]) == 2 and pack["memory_mb"] > 100
    assert rows["none"]["step_flops"] < rows["kd"]["step_flops"]
    assert found["images"] == [32, 48] and found["batch_size"] == 2
    assert speed_table.hours("streets", params, tmp_path) is None or found["hardware"]["device"] != "cpu"
    speed_table.write(params, tmp_path / "reports", tmp_path)
    lines = (tmp_path / "reports" / "speed.md").read_text().splitlines()
    assert sum("| measured |" in line for line in lines) == len(rows)


def test_what_was_measured_is_kept_when_a_row_fails_or_the_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny(read_params())
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd", "cwd")}
    raw["suite"].update(methods=["none", "kd", "cwd"], variants=[])
    raw["official"] = {}
    raw["tuning"]["methods"] = ["kd"]
    write_params(tmp_path, raw)
    params = checked(config.load(tmp_path / "params.yaml"))

    def apart(_: str, name: str, *__: object) -> dict[str, Any]:
        if name == "cwd":
            raise KeyboardInterrupt
        if name == "kd":
            return {"status": "failed"}
        row = entry(params, "streets")["rows"]["none"]
        return row | {"hardware": GPU, "versions": {}, "ceiling_tflops": 1.0}

    monkeypatch.setattr(speed, "_apart", apart)
    with pytest.raises(KeyboardInterrupt):
        speed.speed(params, "streets", None, 2, tmp_path)
    (found,) = speed_table.read(tmp_path)
    status = {name: row["status"] for name, row in found["rows"].items()}
    assert status == {TEACHER: "measured", "none": "measured", "kd": "failed"}
    speed_table.write(params, tmp_path / "reports", tmp_path)
    text = (tmp_path / "reports" / "speed.md").read_text()
    assert text.count("| measured |") == 2 and text.count("| failed |") == 1
    assert speed_table.hours("streets", params, tmp_path) is None


def test_a_pack_stands_beside_its_methods_one_by_one(tmp_path: Path) -> None:
    params = load()
    pack = {"methods": ["none", "kd"], "status": "measured", "step_ms": [500.0] * 3, "memory_mb": 9000.0}
    speed_table.add(entry(params) | {"pack": pack, "ceiling_tflops": 1e-9}, tmp_path)
    speed_table.write(params, tmp_path / "reports", tmp_path)
    text = (tmp_path / "reports" / "speed.md").read_text()
    assert "side by side (none, kd): 500 ms a step, 9,000 MB; one by one 625 ms, 1.25 times as long" in text
    assert "| 1.50 | 35% |" in text  # of kd: 130 operations in 0.375 s, of 1000 a second
    rows = speed_table.read(tmp_path)[0]["rows"]
    speed_table.add(entry(params) | {"pack": pack, "rows": rows | {"kd": {"status": "failed"}}}, tmp_path)
    speed_table.write(params, tmp_path / "reports", tmp_path)
    assert "side by side" not in (tmp_path / "reports" / "speed.md").read_text()


@slow
def test_what_does_not_fit_into_memory_is_noted(tmp_path: Path) -> None:
    raw = tiny(read_params())
    raw["benchmarks"]["streets"]["training"]["crop"] = [4096, 4096]
    write_params(tmp_path, raw)
    params = checked(config.load(tmp_path / "params.yaml"))
    speed.write_images(params.benchmark("streets"), "streets", tmp_path / "streets", 4)
    usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, usual[1]))  # the process inherits it
    try:
        row = speed._apart("streets", "none", 2, 2, tmp_path / "streets", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)
    assert row == {"status": "out of memory"}


@pytest.mark.parametrize("name", ["streets", "camvid-half", "camvid", "cityscapes", "voc", "ade20k"])
def test_random_images_are_in_the_layout_and_size_of_the_real_ones(name: str, tmp_path: Path) -> None:
    own = config.load().benchmark(name)
    count, size = speed.write_images(own, name, tmp_path / name, 1)
    description = data_folder.describe(tmp_path / name)
    assert description.size == size and description.splits["train"] == 1
    module, settings = config.dataset(own.data, name)
    assert description.classes == module.meta(settings).classes
    assert data_folder.streams(count, size) == name.startswith(("cityscapes", "voc", "ade20k"))


def test_a_given_size_goes_before_that_of_the_whole_set(tmp_path: Path) -> None:
    own = config.load().benchmark("cityscapes")
    speed.write_images(own, "cityscapes", tmp_path / "cityscapes", 1, (64, 128))
    assert data_folder.describe(tmp_path / "cityscapes").size == (64, 128)


def test_the_form_on_kaggle_has_a_size_of_its_own(tmp_path: Path) -> None:
    own = config.load().benchmark("camvid")
    own = own.model_copy(update={"data": own.data | {"variant": "kaggle"}})
    assert speed.write_images(own, "camvid", tmp_path / "camvid", 1) == (367, (720, 960))


def test_images_of_no_pixels_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", "--benchmark", "streets", "--size", "0", "100"])
    monkeypatch.setattr(speed, "speed", None)
    with pytest.raises(ConfigError, match="SIZE: both numbers must be 1 or more"):
        speed.main()


def test_images_of_no_known_size_are_one_sentence(tmp_path: Path) -> None:
    raw = read_params()
    files = {key: f"{key}.txt" for key in ("train", "val", "test")}
    classes = {"a": [0, 0, 0], "b": [1, 1, 1]}
    raw["benchmarks"]["mine"] = raw["benchmarks"]["voc"] | {
        "data": {
            "dataset": "custom", "images": "images", "labels": "labels", "classes": classes,
            "ignore_index": 255, "size": None, "splits": files,
        }
    }  # fmt: skip
    write_params(tmp_path, raw)
    params = checked(config.load(tmp_path / "params.yaml"))
    with pytest.raises(ConfigError, match=r"mine is not known: give it: SIZE="):
        speed.speed(params, "mine", None, 2, tmp_path)


def test_the_hours_are_those_of_all_steps(tmp_path: Path) -> None:
    params = load()
    speed_table.add(entry(params), tmp_path)
    own = params.benchmark("cityscapes")
    alone = 0.25 * (1 + 1.5 + 3)  # the reference and its controls
    cells = (alone + 0.375 + 0.5 + 0.5 + 1.0) * own.training.steps
    wanted = (0.5 * own.teacher.training.steps + len(params.suite.seeds) * cells) / 3600
    spent, device = speed_table.hours("cityscapes", params, tmp_path) or (0.0, "")
    assert spent == pytest.approx(wanted, rel=1e-12) and device == "a GPU"
    # half of the images a step: twice the steps
    half = entry(params, batch_size=8, hardware=GPU | {"device": "another"})
    speed_table.add(half, tmp_path)
    assert speed_table.hours("cityscapes", params, tmp_path) == (
        pytest.approx(wanted),
        "a GPU",
    )  # the faster one
    (tmp_path / speed_table.FILE).unlink()
    speed_table.add(half, tmp_path)
    assert speed_table.hours("cityscapes", params, tmp_path) == (pytest.approx(2 * wanted), "another")


def _slow(params: Params) -> dict[str, Any]:
    return entry(params, hardware=GPU | {"device": "cpu"})


def _too_large(params: Params) -> dict[str, Any]:
    found = entry(params)
    return found | {"rows": found["rows"] | {"skd": {"status": "out of memory"}}}


def _other_crop(params: Params) -> dict[str, Any]:
    found = entry(params)
    found["protocol"]["student"]["crop"] = [256, 256]
    return found


def test_a_method_that_is_gone_has_no_row(tmp_path: Path) -> None:
    params = load()
    found = entry(params)
    found["rows"]["gone"] = found["rows"]["kd"]
    speed_table.add(found, tmp_path)
    status = {row["trained"].split(", ")[-1]: row["status"] for row in _rows(params, tmp_path)}
    assert "gone" not in status and "kd" in status and {*status.values()} == {"measured"}


def _rows(params: Params, root: Path) -> list[dict[str, Any]]:
    return speed_table.table(params, root).data


@pytest.mark.parametrize("change", [_slow, _too_large, _other_crop])
def test_no_hours_follow_from_other_settings_or_half_a_measurement(
    change: Callable[[Params], dict[str, Any]], tmp_path: Path
) -> None:
    params = load()
    speed_table.add(change(params), tmp_path)
    assert speed_table.hours("cityscapes", params, tmp_path) is None
    text = speed_table.table(params, tmp_path).rows
    assert len(text) == len(STEP)
    if change is _other_crop:
        assert {row[-1] for row in text} == {"other settings than params.yaml"}
    if change is _too_large:
        assert [row[-1] for row in text].count("out of memory") == 1


def test_the_plans_follow_what_was_measured(tmp_path: Path) -> None:
    params = load()
    for name in ("params.yaml", "runs/networks.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    before = benchmark_table.overview(params, [], tmp_path)
    assert "assumed" in before and "a GPU" not in before
    speed_table.add(entry(params), tmp_path)
    lines = benchmark_table.overview(params, [], tmp_path).splitlines()
    after = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    spent, _ = speed_table.hours("cityscapes", params, tmp_path) or (0.0, "")
    assert f"| {spent:,.0f} GPU hours, from measured steps (a GPU) |" in after["cityscapes"]
    # the others by what this GPU sustains: all operations over all seconds
    rate = sum(FLOPS.values()) / sum(STEP.values())
    (row,) = (row for row in benchmark_table.table(params, tmp_path).data if row["benchmark"] == "voc")
    assert f"| {row['suite_flops'] / rate / 3600:,.0f} GPU hours |" in after["voc"]
    assert "**estimates**" in lines[-1] and "measured on a GPU" in lines[-1] and "voc" in lines[-1]
    assert "cityscapes," not in lines[-1]


@pytest.mark.parametrize("content", [b"", b"{", b'{"entries": []}', b"[1]"])
def test_a_damaged_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / speed_table.FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"runs/speed\.json is damaged .*git checkout"):
        speed_table.read(tmp_path)
