"""ImageNet weights of encoders: found, checked, loaded strictly, and named in the record."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import copy_repository, read_params, write_params
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import config
from pipelines.config import ConfigError, Network, Params, Weights
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.networks import SegmentationNetwork, check_weights, file_sha256, load_encoder
from pipelines.runs import records
from pipelines.runs.fingerprint import outdated
from pipelines.runs.records import Cell
from pipelines.stages.fetch_weights import fetch
from pipelines.suite import repro

R18 = Network(architecture="PSPNet", encoder="tu-resnet18", output_stride=8, weights="mine")
B0 = Network(architecture="Segformer", encoder="mit_b0", output_stride=32, weights="mine")


def entry(file: Path, digits: int = 64, url: str | None = None) -> Weights:
    return Weights(file=file, url=url, sha256=file_sha256(file)[:digits])


def encoder(network: SegmentationNetwork) -> nn.Module:
    found: nn.Module = getattr(network.encoder, "model", network.encoder)
    return found


@pytest.mark.parametrize("counts", [True, False], ids=["with counts", "without, as older files"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_torchvisions_resnets_fit(tmp_path: Path, name: str, counts: bool) -> None:
    """The same images give the same features in torchvision's network and in the loaded encoder."""
    torch.manual_seed(0)
    source = getattr(torchvision.models, name)(weights=None).eval()
    state = {k: v for k, v in source.state_dict().items() if counts or "num_batches" not in k}
    torch.save(state, tmp_path / "w.pth")
    network = SegmentationNetwork(R18.model_copy(update={"encoder": f"tu-{name}", "output_stride": 32}), 3)
    load_encoder(network, "mine", entry(Path(tmp_path / "w.pth")), tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = network.eval()(images)
        x = source.maxpool(source.relu(source.bn1(source.conv1(images))))
        for stage in range(1, 5):
            x = getattr(source, f"layer{stage}")(x)
            torch.testing.assert_close(ours[f"backbone.{stage}"], x)


def published(name: str) -> tuple[Network, dict[str, Tensor]]:
    """A network, and its encoder's weights with the names and the classifier of the file on the hub."""
    import timm
    from segmentation_models_pytorch.encoders import get_encoder

    torch.manual_seed(1)
    if name == "mobilenetv2":
        model = timm.create_model("mobilenetv2_100", pretrained=False)
        return R18.model_copy(update={"encoder": "tu-mobilenetv2_100"}), model.state_dict()
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    return B0, get_encoder("mit_b0", weights=None).state_dict() | head


@pytest.mark.parametrize("name", ["mobilenetv2", "mit-b0"])
def test_files_of_the_hubs_fit(tmp_path: Path, name: str) -> None:
    network_config, state = published(name)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    network = SegmentationNetwork(network_config, 3)
    load_encoder(network, "mine", entry(tmp_path / "w.safetensors", 8), tmp_path)
    loaded = encoder(network).state_dict()
    assert len(loaded) > 100
    assert all(torch.equal(state[k], v) for k, v in loaded.items())


@pytest.fixture
def r18(tmp_path: Path) -> tuple[SegmentationNetwork, dict[str, Tensor]]:
    network = SegmentationNetwork(R18, 3)
    return network, {k: v + 1 for k, v in encoder(network).state_dict().items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {k: v for k, v in s.items() if "layer4" not in k}, "another network: 25 tensors missing"),
        (lambda s: s | {"layer5.weight": torch.zeros(1)}, r"1 unknown \['layer5.weight'\]"),
        (lambda s: s | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"1 of another shape \['conv1.weight'\]"),
    ],
)
def test_weights_of_another_network_change_nothing(
    tmp_path: Path,
    r18: tuple[SegmentationNetwork, dict[str, Tensor]],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    sentence: str,
) -> None:
    network, state = r18
    before = {k: v.clone() for k, v in network.state_dict().items()}
    save_file(change(state), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=sentence):
        load_encoder(network, "mine", entry(tmp_path / "w.safetensors"), tmp_path)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_torch_file_that_runs_code_is_not_run(
    tmp_path: Path, r18: tuple[SegmentationNetwork, dict[str, Tensor]]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv1.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_encoder(r18[0], "mine", entry(tmp_path / "w.pth"), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_file_and_its_sum_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    absent = Weights(file=Path("w.pth"), url="https://example.org/w.pth", sha256="0123456789")
    with pytest.raises(ConfigError) as error:
        check_weights("mine", absent, tmp_path)
    for part in (
        "w.pth (sha256 0123456789…) are not there",
        "`python -m pipelines.stages.fetch_weights --weights mine`",
    ):
        assert part in str(error.value)
    with pytest.raises(ConfigError) as error:
        check_weights("mine", absent.model_copy(update={"url": None}), tmp_path)
    assert "fetch_weights" not in str(error.value) and "put the file there" in str(error.value)

    file.write_bytes(b"weights")
    full = file_sha256(file)
    assert check_weights("mine", entry(file, 8), tmp_path) == full
    with pytest.raises(ConfigError, match=f"sha256 {full}, params.yaml says 0123456789"):
        check_weights("mine", absent, tmp_path)
    with pytest.raises(
        ConfigError, match=rf"sha256 {full}: write it into params.yaml \(weights.mine.sha256\)"
    ):
        check_weights("mine", absent.model_copy(update={"sha256": None}), tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a web server over ``tmp_path/hub``, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "hub"))

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "hub").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def test_a_file_is_fetched_once(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    hub = tmp_path / "hub" / "w.pth"
    hub.write_bytes(bytes(range(256)) * 1000)
    full = file_sha256(hub)
    weights = Weights(file=Path("weights/w.pth"), url=f"{url}/w.pth", sha256=full[:8])
    assert fetch("mine", weights, tmp_path) == full
    assert (tmp_path / "weights" / "w.pth").read_bytes() == hub.read_bytes()
    assert fetch("mine", weights, tmp_path) == full
    assert asked == ["/w.pth"]

    (tmp_path / "weights" / "w.pth").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="delete the file and get it again"):
        fetch("mine", weights, tmp_path)
    assert asked == ["/w.pth"]


def test_a_file_with_another_sum_is_not_kept(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    (tmp_path / "hub" / "w.pth").write_bytes(b"altered")
    weights = Weights(file=Path("weights/w.pth"), url=f"{server[0]}/w.pth", sha256="0" * 8)
    with pytest.raises(ConfigError, match="instead of 00000000"):
        fetch("mine", weights, tmp_path)
    assert not list((tmp_path / "weights").glob("w.*"))


def test_a_file_without_a_known_sum_is_kept_but_refused(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    url, asked = server
    (tmp_path / "hub" / "w.pth").write_bytes(b"new")
    full = file_sha256(tmp_path / "hub" / "w.pth")
    weights = Weights(file=Path("weights/w.pth"), url=f"{url}/w.pth", sha256=None)
    with pytest.raises(ConfigError, match=f"sha256 {full}: write it into params.yaml"):
        fetch("mine", weights, tmp_path)
    assert fetch("mine", weights.model_copy(update={"sha256": full}), tmp_path) == full
    assert asked == ["/w.pth"]


def test_without_an_address_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"are not there.*: put the file there"):
        fetch("mine", Weights(file=Path("w.pth"), url=None, sha256="0" * 8), tmp_path)


def test_dvc_fetches_weights_before_anything_else(tmp_path: Path) -> None:
    """No stage names the files as a dependency: the order in dvc.yaml is all there is."""
    root = copy_repository(tmp_path)
    raw = read_params(root)
    raw["suite"]["weights"] = ["resnet18", "mit-b0"]
    write_params(root, raw)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry"], cwd=root, capture_output=True, text=True, check=False
    )
    stages = re.findall(r"Running stage '(.*?)'", done.stdout)
    assert stages[:3] == ["fetch_weights@resnet18", "fetch_weights@mit-b0", "fetch@streets"], done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r["suite"].update(weights=["vgg"]), "no file of weights 'vgg'.*resnet18, resnet34"),
        (lambda r: r["students"]["pspnet-resnet18"].update(weights="vgg"), "no file of weights 'vgg'"),
        (
            lambda r: r["benchmarks"]["camvid"]["teacher"]["network"].update(weights="vgg"),
            "no file of weights 'vgg'",
        ),
        (lambda r: r["weights"]["resnet18"].update(sha256="f37072"), r"weights\.resnet18\.sha256 = 'f37072'"),
        (lambda r: r["weights"]["resnet18"].update(sha256="F37072FD"), r"weights\.resnet18\.sha256"),
    ],
)
def test_bad_entries_are_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    raw = read_params()
    change(raw)
    write_params(tmp_path, raw)
    with pytest.raises(ConfigError, match=sentence):
        checked(config.load(tmp_path / "params.yaml"))


def test_weights_without_a_sum_stop_before_anything_is_fetched(tmp_path: Path) -> None:
    raw = read_params()
    raw["suite"].update(benchmarks=["cityscapes"], students=["pspnet-resnet18-imagenet"])
    raw["suite"]["weights"] = ["resnet18", "resnet101"]
    write_params(tmp_path, raw)
    repro.check_networks(checked(config.load(tmp_path / "params.yaml")), tmp_path)
    raw["weights"]["resnet18"]["sha256"] = None
    write_params(tmp_path, raw)
    with pytest.raises(ConfigError, match=r"no checksum of the encoder weights 'resnet18'.*fetch_weights"):
        repro.check_networks(checked(config.load(tmp_path / "params.yaml")), tmp_path)


def test_a_cell_starts_from_its_weights_and_says_which(
    place: Path, edit: Callable[[Callable[[dict[str, Any]], None]], Params]
) -> None:
    """The sum is in the record and in the fingerprint; the record is stale when the file is another."""
    cell = Cell("streets", "pspnet-resnet18", "none", 0)
    file = place / "weights" / "w.safetensors"
    file.parent.mkdir()

    def write(seed: int) -> str:
        torch.manual_seed(seed)
        network = config.load(place / "params.yaml").student(cell.student)
        save_file(encoder(SegmentationNetwork(network, 3)).state_dict(), file)
        return file_sha256(file)

    def choose(sum_: str) -> Callable[[dict[str, Any]], None]:
        def change(raw: dict[str, Any]) -> None:
            raw["weights"]["mine"] = {"file": "weights/w.safetensors", "url": None, "sha256": sum_}
            raw["students"]["pspnet-resnet18"]["weights"] = "mine"

        return change

    with pytest.raises(ConfigError, match="are not there"):
        run_cell(cell, edit(choose("0" * 8)), place)
    assert "are not there" in str(records.failure(cell, place))

    runs = []
    for seed in (0, 1):
        full = write(seed)
        params = edit(choose(full[:8]))
        run_cell(cell, params, place)
        record = records.read(cell, place)
        assert record is not None
        assert record.run["config"]["network"]["weights"] == {"key": "mine", "sha256": full[:8]}
        assert outdated([record], params) == {}
        assert outdated([record], edit(choose("0" * 64))) == {cell: ["network"]}
        runs.append(record.run)
    assert runs[0]["fingerprint"] != runs[1]["fingerprint"]
    assert runs[0]["weights_sha256"] != runs[1]["weights_sha256"]
    before = json.dumps(runs[1])
    run_cell(cell, params, place)
    kept = records.read(cell, place)
    assert kept is not None and json.dumps(kept.run) == before
