"""Export of students: what the files compute, when they are refused, what the tables make of the record."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, read_params, rewrite, write_params
from PIL import Image
from safetensors.torch import load_file, save_file
from suites import slow

from pipelines import config
from pipelines.config import ConfigError
from pipelines.engine import deploy
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.networks import SegmentationNetwork
from pipelines.runs import exports
from pipelines.runs.records import Cell
from pipelines.stages import export, report
from pipelines.tools import verify

BENCHMARK, STUDENT = "streets", "pspnet-resnet18"
RECORD = f"runs/{BENCHMARK}/exports/{STUDENT}.json"
KD = Cell(BENCHMARK, STUDENT, "kd", 0)
SIZE = (32, 48)


def load(root: Path) -> config.Params:
    return checked(config.load(root / "params.yaml"))


@pytest.fixture(scope="module")
def done(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of none, kd and acfd-full, of which the last was not run, with its export record. Do not change
    it."""
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny_root, root, dirs_exist_ok=True)
    raw = read_params(root)
    raw["methods"] = {key: raw["methods"][key] for key in ("none", "kd")}
    raw["official"], raw["tuning"]["methods"] = {}, ["kd"]
    raw["suite"].update(methods=["none", "kd"], controls=[])
    write_params(root, raw)
    (root / "reports").mkdir()
    shutil.copy(ROOT / "reports" / "claims.yaml", root / "reports")
    (root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    for method in ("none", "kd"):
        run_cell(Cell(BENCHMARK, STUDENT, method, 0), load(root), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "ROUNDS", 15)
        export.check(BENCHMARK, STUDENT, load(root), root)
    return root


@pytest.fixture
def suite(done: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the weights, which are large, are not in it."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


@pytest.fixture(scope="module")
def student(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files of kd's student. Do not change them."""
    output = tmp_path_factory.mktemp("student")
    export.export_student(KD, load(done), output, root=done)
    return output


@pytest.fixture
def network(done: Path) -> SegmentationNetwork:
    """kd's student, put together without any code of the export."""
    built = SegmentationNetwork(load(done).students[STUDENT], 12)
    built.load_state_dict(load_file(KD.folder(done) / "weights.safetensors"), strict=False)
    return built.eval()


def pixels(done: Path, count: int) -> np.ndarray:
    """Test images as student.json says that they go in."""
    files = sorted((done / "data" / BENCHMARK / "test").glob("*.png"))[:count]
    about = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = [(np.asarray(Image.open(file)) / 255 - about[0]) / about[1] for file in files]
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)


def test_both_forms_compute_what_the_network_does(
    done: Path, student: Path, network: SegmentationNetwork
) -> None:
    images = pixels(done, 3)
    with torch.no_grad():
        logits = network(torch.from_numpy(images))["logits"]
        wanted = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False).numpy()
    session = onnxruntime.InferenceSession(student / "student.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(student / "student.pt2").module()
    near = {"rtol": 0, "atol": 1e-4 * np.abs(wanted).max()}
    for batch in (1, 3):
        part = images[:batch]
        np.testing.assert_allclose(session.run(["logits"], {"images": part})[0], wanted[:batch], **near)
        np.testing.assert_allclose(program(torch.from_numpy(part)), wanted[:batch], **near)
    np.testing.assert_array_equal(
        session.run(None, {"images": images})[0].argmax(1), network.predict(torch.from_numpy(images))
    )


def test_a_size_that_must_be_padded_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = config.Network(architecture="FPN", encoder="tu-test_resnet", output_stride=32, weights=None)
    network, size = SegmentationNetwork(own, 5).eval(), (36, 50)
    deploy.export(deploy.Deployed(network), size, tmp_path)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = network(images)["logits"]
        wanted = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    assert tuple(logits.shape[-2:]) == (9, 13)
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "student.pt2").module()
    near = {"rtol": 0, "atol": 1e-4 * float(wanted.abs().max())}
    for found in (torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), program(images)):
        torch.testing.assert_close(found, wanted, **near)


def test_the_files_hold_the_student_alone(done: Path, student: Path, network: SegmentationNetwork) -> None:
    model = onnx.load(student / "student.onnx")
    onnx.checker.check_model(model)
    values = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    alone = sum(v.numel() for name, v in network.named_parameters() if not name.startswith("auxiliary"))
    assert alone < 1.01 * values < 1.02 * alone + 1000  # folding changes a few, the auxiliary head is 5 %
    program = torch.export.load(student / "student.pt2")
    parameters = {n for n, _ in network.named_parameters() if not n.startswith("auxiliary")}
    assert {name for name, _ in program.named_parameters()} == parameters
    for file in ("student.onnx", "student.pt2"):  # where they were made is nobody's business
        content = (student / file).read_bytes()
        assert str(ROOT).encode() not in content and str(Path(torch.__file__).parent).encode() not in content


def test_student_json_says_what_goes_in_and_out(done: Path, student: Path) -> None:
    about = json.loads((student / "student.json").read_text())
    run = json.loads((KD.folder(done) / "run.json").read_text())
    data = json.loads((done / "data" / BENCHMARK / "dataset.json").read_text())
    assert about["cell"] == run["cell"] and about["weights_sha256"] == run["weights_sha256"]
    assert about["classes"] == data["classes"] and about["palette"] == data["palette"]
    assert (about["parameters"], about["flops"]) == (run["student"]["parameters"], run["student"]["flops"])
    model = onnx.load(student / "student.onnx").graph
    for side, value in (("input", model.input), ("output", model.output)):
        (entry,) = value
        shape = [d.dim_value or "batch" for d in entry.type.tensor_type.shape.dim]
        assert (about[side]["name"], about[side]["shape"]) == (entry.name, shape)
    for name, total in about["files"].items():
        assert hashlib.sha256((student / name).read_bytes()).hexdigest() == total
    assert 0 < about["largest_difference"]["onnxruntime"] < 1e-4 * about["largest_difference"]["scale"]


def test_disturbed_weights_are_noticed(
    done: Path, student: Path, network: SegmentationNetwork, tmp_path: Path
) -> None:
    images = torch.from_numpy(pixels(done, 2))
    deployed = deploy.Deployed(network)
    found = deploy.differences(deployed, student, images, 1)
    assert found["torch.export"] <= found["onnxruntime"] + 1e-6
    with torch.no_grad():
        network.head.bias[3] += 3e-4 * found["scale"]
    with pytest.raises(ConfigError, match=r"torch\.export differs .* more than 0\.0001 of their scale"):
        deploy.differences(deployed, student, images, 1)
    model = onnx.load(student / "student.onnx")  # the same the other way round, in the ONNX file alone
    bias = next(t for t in model.graph.initializer if t.name == "head.bias")
    bias.raw_data = network.head.bias.detach().numpy().tobytes()
    onnx.save(model, tmp_path / "student.onnx")
    shutil.copy(student / "student.pt2", tmp_path)
    with torch.no_grad():
        network.head.bias[3] -= 3e-4 * found["scale"]
        with pytest.raises(ConfigError, match="onnxruntime differs"):
            deploy.differences(deployed, tmp_path, images, 1)
        network.head.bias[3] = torch.nan
    with pytest.raises(ConfigError, match="differs"):
        deploy.differences(deployed, student, images, 1)


@slow
def test_what_was_measured_is_kept_while_it_would_be_measured_alike(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    params, before = load(tmp_path), (tmp_path / RECORD).read_bytes()
    monkeypatch.setattr(deploy, "ROUNDS", 7)
    export.check(BENCHMARK, STUDENT, params, tmp_path)
    assert (tmp_path / RECORD).read_bytes() == before
    others = [("tolerance", 1.0), ("versions", {"torch": "0"}), ("hardware", {"processor": "another"})]
    for key, value in others:
        record = exports.read(BENCHMARK, STUDENT, done)
        assert record is not None
        exports.write(record | {key: value}, tmp_path)
        again = export.check(BENCHMARK, STUDENT, params, tmp_path)
        assert again["rounds"] == 7 and again[key] == record[key]


def test_wrong_weights_are_refused(done: Path, suite: Path) -> None:
    output, params, before = suite / "out", load(suite), (suite / RECORD).read_bytes()
    export.check(BENCHMARK, STUDENT, params, suite)  # a clone has no weights: what was measured is kept
    assert (suite / RECORD).read_bytes() == before
    (suite / RECORD).unlink()
    with pytest.raises(ConfigError, match=r"no file .*none.*make repro"):
        export.check(BENCHMARK, STUDENT, params, suite)
    (suite / RECORD).write_bytes(before)
    state = load_file(KD.folder(done) / "weights.safetensors")
    state["head.bias"] += 1e-6
    save_file(state, KD.folder(suite) / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"truncated or altered.*make repro"):
        export.export_student(KD, params, output, root=suite)
    with pytest.raises(ConfigError, match="kd/7 has not finished"):
        export.export_student(Cell(BENCHMARK, STUDENT, "kd", 7), params, output, root=suite)
    with pytest.raises(ConfigError, match="no method 'kt' in params"):
        export.export_student(Cell(BENCHMARK, STUDENT, "kt", 0), params, output, root=suite)
    shutil.rmtree(suite / "runs" / BENCHMARK / STUDENT / "none")
    with pytest.raises(ConfigError, match="none/0 has not finished"):
        export.check(BENCHMARK, STUDENT, params, suite)
    assert not output.exists() and (suite / RECORD).read_bytes() == before


def test_the_record_has_every_finished_method(done: Path) -> None:
    record = exports.read(BENCHMARK, STUDENT, done)
    assert record is not None and list(record["methods"]) == ["none", "kd"]  # acfd-full has not finished
    assert record["hardware"]["threads"] == load(done).suite.threads and record["input"] == list(SIZE)
    for method, own in record["methods"].items():
        run = json.loads((done / f"runs/{BENCHMARK}/{STUDENT}/{method}/0/run.json").read_text())
        assert own["weights_sha256"] == run["weights_sha256"]
        assert {"parameters": own["parameters"], "flops": own["flops"]}.items() <= run["student"].items()
        assert {len(times) for times in own["ms"].values()} == {record["rounds"]}
    assert exports.problems(record, "none") == []


def test_every_round_runs_every_student_once(
    done: Path, student: Path, network: SegmentationNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    students = {}
    for name in "abc":
        deployed = deploy.Deployed(network)
        deployed.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        students[name] = deployed, student
    monkeypatch.setattr(deploy, "ROUNDS", 12)
    image = torch.from_numpy(pixels(done, 1))
    times = deploy.latencies(students, image, 1)
    assert {len(t) for own in times.values() for t in own.values()} == {12}
    rounds = [tuple(calls[at : at + 3]) for at in range(0, len(calls), 3)][deploy.WARM_UP :]
    assert len(rounds) == 12 and {frozenset(order) for order in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1  # nobody is always first
    monkeypatch.setattr(deploy, "SECONDS", 0)
    times = deploy.latencies(students, image, 1)
    assert len(times["a"]["torch"]) == deploy.FEWEST_ROUNDS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: m.update(parameters=m["parameters"] + 1),
            r"kd: parameters ([\d,]+), none has (?!\1)[\d,]+\.$",
        ),
        (lambda m: m.update(flops=m["flops"] - 2), "kd: flops "),
        (lambda m: m.update(graph_sha256="0"), "kd: its ONNX graph is another"),
        (
            lambda m: m["logits"].update(onnxruntime=2e-4 * m["logits"]["scale"]),
            "kd: logits differ by 0.0002",
        ),
        (lambda m: m["logits"].update(onnxruntime=float("nan")), "kd: logits differ by nan"),
        (lambda m: m["ms"]["torch"].pop(), "not every method has the time of every round"),
        (lambda m: m.update(tensors_sha256="0"), "kd: its student has other tensors than that of none"),
    ],
)
def test_unequal_students_are_named(done: Path, change: Callable[[Any], Any], sentence: str) -> None:
    record = copy.deepcopy(exports.read(BENCHMARK, STUDENT, done))
    assert record is not None
    change(record["methods"]["kd"])
    (found,) = exports.problems(record, "none")
    assert re.match(sentence, found)


def tables(root: Path) -> None:
    """The tables and claims of the report; figures and MLflow have no part in this."""
    params = load(root)
    found = report.finished(params, root)
    report.write_texts(params, report.gather_all(params, root, found), root, root)


def test_the_cost_table_shows_the_record(suite: Path) -> None:
    tables(suite)
    table = pd.read_csv(suite / "reports" / BENCHMARK / "cost.csv").set_index("method")
    methods = json.loads((suite / RECORD).read_text())["methods"]
    for name in ("none", "kd"):
        for runtime in ("onnxruntime", "torch"):
            low, median, high = np.quantile(methods[name]["ms"][runtime], [0.25, 0.5, 0.75])
            found = table.loc[name, [f"{runtime}_ms{end}" for end in ("_q1", "", "_q3")]].tolist()
            assert found == pytest.approx([low, median, high], abs=1e-6)
    kd, none = (np.median(methods[name]["ms"]["onnxruntime"]) for name in ("kd", "none"))
    row = table.loc["kd"]
    assert row["onnxruntime_ratio"] == pytest.approx(kd / none, abs=1e-6)
    assert 0 < row["largest_difference"] < 1e-4
    assert pd.isna(table.loc["acfd", "onnxruntime_ms"]) and pd.isna(table.loc["none", "onnxruntime_ratio"])
    text = (suite / "reports" / BENCHMARK / "cost.md").read_text()
    assert "| parameters (M) | GFLOPs | latency (× none) | GFLOPs a step |" in text
    line = next(line for line in text.splitlines() if f"| {STUDENT} | kd |" in line)
    assert f"| {kd / none:.2f} |" in line and "latency: pspnet-resnet18: seed 0, " in text
    beside = pd.read_csv(suite / "reports" / BENCHMARK / "comparison.csv").set_index("method").loc["kd"]
    shared = ["parameters", "flops", "onnxruntime_ms", "torch_ms", "onnxruntime_ratio", "largest_difference"]
    assert beside[shared].tolist() == row[shared].tolist()

    (suite / RECORD).unlink()
    tables(suite)
    for name in ("cost", "comparison"):
        page = suite / "reports" / BENCHMARK / ("conditions.md" if name == "comparison" else "cost.md")
        assert "not measured" in page.read_text()
        found = pd.read_csv(suite / f"reports/{BENCHMARK}/{name}.csv")
        assert found["onnxruntime_ms"].isna().all() and found["parameters"].notna().any()


def reseal(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record as someone would who knows its seal."""
    record = exports.read(BENCHMARK, STUDENT, root)
    assert record is not None
    change(record)
    exports.write(record, root)


def one_digit(root: Path) -> None:
    text = (root / RECORD).read_text()
    at = text.index(".", text.index('"torch": [')) - 1
    (root / RECORD).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def retrained(root: Path) -> None:
    run = {"weights_sha256": "0" * 64}
    rewrite(KD.folder(root), run)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a digit": (one_digit, f"{RECORD} is damaged or was changed by hand"),
    "half a file": (
        lambda r: (r / RECORD).write_text((r / RECORD).read_text()[:500]),
        f"{RECORD} is damaged",
    ),
    "a digit with a right seal": (
        lambda r: reseal(r, lambda c: c["methods"]["kd"]["ms"]["torch"].__setitem__(0, 1.5)),
        f"{RECORD} is not the file that dvc.lock has.",
    ),
    "other parameters": (
        lambda r: reseal(r, lambda c: [m.update(parameters=5) for m in c["methods"].values()]),
        f"{RECORD}: kd has other parameters than its cell.",
    ),
    "a lacking part": (lambda r: reseal(r, lambda c: c.pop("rounds")), f"{RECORD} has no 'rounds'"),
    "a retrained student": (
        retrained,
        f"{RECORD}: kd has other weights than its cell now: run `make repro`.",
    ),
    "no student": (
        lambda r: shutil.copy(r / RECORD, (r / RECORD).with_name("vgg.json")),
        f"runs/{BENCHMARK}/exports/vgg.json is the export of a student without records: delete it.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_a_changed_record(suite: Path, fault: str) -> None:
    locked(suite)
    change, sentence = FAULTS[fault]
    change(suite)
    assert [text for text in verify.problems(load(suite), suite) if text.startswith(sentence)]


def test_verify_has_nothing_to_say_of_an_export_as_it_is(suite: Path) -> None:
    locked(suite)
    assert not [text for text in verify.problems(load(suite), suite) if "exports" in text]
    (suite / "dvc.lock").unlink()
    raw = read_params(suite)
    del raw["methods"]["kd"]  # its row is gone, its record may stay
    raw["suite"]["methods"], raw["tuning"]["methods"] = ["none"], ["acfd-full"]
    write_params(suite, raw)
    assert not [text for text in verify.problems(load(suite), suite) if "exports" in text]


def locked(suite: Path) -> None:
    """dvc.lock as it is after the stage."""
    outs = [{"path": RECORD, "md5": hashlib.md5((suite / RECORD).read_bytes()).hexdigest()}]
    (suite / "dvc.lock").write_text(yaml.safe_dump({"stages": {"export": {"outs": outs}}}))


def test_a_record_of_other_weights_is_not_shown(suite: Path) -> None:
    retrained(suite)
    tables(suite)
    table = pd.read_csv(suite / "reports" / BENCHMARK / "cost.csv").set_index("method")
    assert pd.isna(table.loc["kd", "onnxruntime_ms"]) and not pd.isna(table.loc["none", "onnxruntime_ms"])


@pytest.mark.parametrize(
    "arguments",
    [["--method", "kd"], ["--method", "kd", "--seed", "0"], ["--size", "32", "32"], ["--output", "x"]],
)
def test_half_an_order_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--benchmark", BENCHMARK, "--student", STUDENT, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2 and "belong together" in capsys.readouterr().err
