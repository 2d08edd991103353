"""Prediction for images of one's own: masks, colours, odd images and wrong inputs."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rewrite
from PIL import Image, ImageFile
from safetensors.torch import load_file

from pipelines import cli, config
from pipelines.config import ConfigError
from pipelines.datasets import streets
from pipelines.engine.evaluate import slide
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.networks import SegmentationNetwork
from pipelines.runs.records import Cell
from pipelines.tools import predict

CELL = Cell("streets", "pspnet-resnet18", "none", 0)
SMALL = (24, 40)  # height, width of odd images


@pytest.fixture(scope="module")
def trained(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny benchmark with a trained student. Do not change it."""
    root = tmp_path_factory.mktemp("predict")
    shutil.copytree(tiny_root / "data", root / "data")
    shutil.copy(tiny_root / "params.yaml", root)
    run_cell(CELL, checked(config.load(root / "params.yaml")), root)
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Predict for a file or folder into ``tmp_path/out``."""

    def predicted(images: Path, size: Any = None) -> list[str]:
        weights = CELL.folder(trained) / "weights.safetensors"
        return predict.predict(weights, images, tmp_path / "out", size, trained)

    return predicted


@pytest.fixture
def network(trained: Path) -> SegmentationNetwork:
    built = SegmentationNetwork(checked(config.load(trained / "params.yaml")).students[CELL.student], 12)
    built.load_state_dict(load_file(CELL.folder(trained) / "weights.safetensors"), strict=False)
    return built.eval().to(memory_format=torch.channels_last)


def normalised(image: Image.Image) -> torch.Tensor:
    values = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    tensor = torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32))
    return tensor.contiguous(memory_format=torch.channels_last)


def scene(trained: Path, size: tuple[int, int] = SMALL) -> Image.Image:
    file = trained / "data" / "streets" / "test" / "00000.png"
    return Image.open(file).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)


def mask(tmp_path: Path, name: str = "image") -> np.ndarray:
    return np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png"))


def test_masks_are_the_network_s_own(
    run: Callable[..., list[str]], trained: Path, tmp_path: Path, network: SegmentationNetwork
) -> None:
    images = trained / "data" / "streets" / "test"
    assert run(images) == []
    for file in images.iterdir():
        wanted = network.predict(normalised(Image.open(file)))[0].numpy()
        assert len(np.unique(wanted)) > 1
        np.testing.assert_array_equal(mask(tmp_path, file.stem), wanted)
    made = {p.name for p in (tmp_path / "out").iterdir()}
    kinds = ("mask", "overlay")
    assert made == {f"{p.stem}_{kind}.png" for p in images.iterdir() for kind in kinds} | {"legend.png"}


def test_colours_are_the_data_set_s(run: Callable[..., list[str]], trained: Path, tmp_path: Path) -> None:
    palette = json.loads((trained / "data" / "streets" / "dataset.json").read_text())["palette"]
    scene(trained).save(tmp_path / "image.png")
    assert run(tmp_path / "image.png") == []
    image = Image.open(tmp_path / "out" / "image_mask.png")
    assert image.mode == "P" and np.asarray(image.getpalette()).reshape(-1, 3)[:12].tolist() == palette
    classes = mask(tmp_path)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(palette)[classes])
    overlay = np.asarray(Image.open(tmp_path / "out" / "image_overlay.png"), float)
    inner = np.ones(classes.shape, bool)  # away from outlines
    inner[1:] &= classes[1:] == classes[:-1]
    inner[:, 1:] &= classes[:, 1:] == classes[:, :-1]
    mixed = 0.45 * np.asarray(scene(trained), float) + 0.55 * np.asarray(palette)[classes]
    assert inner.any() and np.abs(overlay - mixed)[inner].max() <= 0.51
    assert (~inner).any() and (overlay[~inner] >= 127).all()
    legend = {color for _, color in Image.open(tmp_path / "out" / "legend.png").getcolors(1 << 20) or []}
    assert {tuple(colour) for colour in palette} <= legend


def test_the_network_may_see_another_size(
    run: Callable[..., list[str]], trained: Path, tmp_path: Path, network: SegmentationNetwork
) -> None:
    image = scene(trained, (50, 70))
    image.save(tmp_path / "image.png")
    assert run(tmp_path / "image.png", (32, 48)) == []
    with torch.no_grad():
        logits = network(normalised(image.resize((48, 32), Image.Resampling.BILINEAR)))["logits"]
    up = torch.nn.functional.interpolate(logits, (50, 70), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(mask(tmp_path), up.argmax(1)[0].numpy())


def test_exif_orientation(run: Callable[..., list[str]], trained: Path, tmp_path: Path) -> None:
    upright = scene(trained)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise, so it was stored turned the other way
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name in ("upright", "turned"):
        assert run(tmp_path / f"{name}.png") == []
    assert mask(tmp_path, "turned").shape == SMALL
    np.testing.assert_array_equal(mask(tmp_path, "turned"), mask(tmp_path, "upright"))


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


RAMP = np.linspace(0, 255, SMALL[0] * SMALL[1]).round().astype(np.uint8).reshape(SMALL)
ALPHA = Image.fromarray(np.dstack([gray(RAMP), np.where(RAMP < 100, 0, 255).astype(np.uint8)]))
MODES: dict[str, tuple[str, Image.Image, np.ndarray]] = {
    "gray": ("png", Image.fromarray(RAMP), gray(RAMP)),
    "16-bit gray": ("png", Image.fromarray(RAMP.astype(np.uint16) * 257), gray(RAMP)),
    "dark 16-bit gray": ("png", Image.fromarray(RAMP.astype(np.uint16)), gray((RAMP > 128).astype(np.uint8))),
    "32-bit gray": ("tiff", Image.fromarray(RAMP.astype(np.int32) * 257), gray(RAMP)),
    "float in 0 to 1": ("tiff", Image.fromarray((RAMP / 255).astype(np.float32)), gray(RAMP)),
    "black and white": ("png", Image.fromarray(RAMP > 99), gray(np.where(RAMP > 99, 255, 0))),
    "palette": ("gif", Image.fromarray(RAMP), gray(RAMP)),
    "alpha": ("png", ALPHA, gray(np.where(RAMP < 100, 255, RAMP))),
    "gray and alpha": ("png", ALPHA.convert("LA"), gray(np.where(RAMP < 100, 255, RAMP))),
    "CMYK": ("tiff", Image.fromarray(gray(RAMP)).convert("CMYK"), gray(RAMP)),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode(tmp_path: Path, mode: str) -> None:
    kind, image, wanted = MODES[mode]
    image.save(tmp_path / f"image.{kind}")
    count, frames = predict.frames(tmp_path / f"image.{kind}")
    found = next(frames)
    assert (count, found.mode) == (1, "RGB")
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_bad_files_are_named_and_the_others_done(
    run: Callable[..., list[str]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    scene(trained).save(folder / "a.png")
    scene(trained).save(folder / "a.jpg")  # would have the same mask
    scene(trained, (1, 1)).save(folder / "dot.png")
    scene(trained).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:500])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("no image by its name")
    scene(trained, (60, 60)).save(folder / "large.png")
    scene(trained, (200, 200)).save(folder / "absurd.png")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(predict, "_most", lambda: 10_000)
    failed = run(folder)
    assert len(failed) == 3 and all(text.endswith(".") for text in failed)
    for text, part in zip(
        failed,
        (
            "absurd.png has more than 10,000 pixels by its header: scale it down, or",
            "half.png is damaged or cut off: image file is truncated.",
            "text.jpg is no image that can be read",
        ),
        strict=True,
    ):
        assert text.startswith(part)
    done = {p.name for p in (tmp_path / "out").glob("*_mask.png")}
    assert done == {"a.png_mask.png", "a.jpg_mask.png", "dot_mask.png", "large_mask.png"}
    monkeypatch.setattr(predict, "LOGITS", 12 * 2_000)
    assert (
        "large.png: it is too large for one pass: give a smaller --size, or none, for sliding windows."
        in run(folder, (32, 32))
    )


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="needs /proc")
def test_memory_that_holds_cached_files_counts_as_free() -> None:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    assert predict._most() * predict.BYTES == pytest.approx(available, rel=0.1)


@pytest.mark.parametrize("block", [12 * 64 * 64, 12 * 17 * 17])
def test_a_large_image_is_seen_through_windows(
    block: int,
    run: Callable[..., list[str]],
    trained: Path,
    tmp_path: Path,
    network: SegmentationNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit as evaluation by these windows, whatever part of the logits is in memory."""
    image = scene(trained, (50, 61))
    image.save(tmp_path / "image.png")
    monkeypatch.setattr(predict, "PIXELS", 2_000)
    monkeypatch.setattr(predict, "WINDOW", 32)
    monkeypatch.setattr(predict, "BLOCK", block)
    assert run(tmp_path / "image.png") == []
    with torch.inference_mode():
        sliding = config.Sliding(window=(32, 32), stride=(24, 24))
        wanted = slide(network, normalised(image), sliding)[0].numpy()
    np.testing.assert_array_equal(mask(tmp_path), wanted)


def test_the_windows_are_those_of_the_benchmark(
    trained: Path, tmp_path: Path, network: SegmentationNetwork
) -> None:
    sliding = {"window": [24, 32], "stride": [16, 20]}
    cell = tmp_path / "cell"
    shutil.copytree(CELL.folder(trained), cell)
    run = json.loads((cell / "run.json").read_text())
    rewrite(cell, {"config": run["config"] | {"training": run["config"]["training"] | {"sliding": sliding}}})
    image = scene(trained)
    image.save(tmp_path / "image.png")
    weights = cell / "weights.safetensors"
    assert predict.predict(weights, tmp_path / "image.png", tmp_path / "out", None, trained) == []
    with torch.inference_mode():
        wanted = slide(network, normalised(image), config.Sliding.model_validate(sliding))[0].numpy()
    np.testing.assert_array_equal(mask(tmp_path), wanted)
    # with a size of the user's own the image is seen whole
    for place, given in (("without", CELL.folder(trained) / "weights.safetensors"), ("with", weights)):
        out = tmp_path / place / "out"
        assert predict.predict(given, tmp_path / "image.png", out, (16, 20), trained) == []
    np.testing.assert_array_equal(mask(tmp_path / "with"), mask(tmp_path / "without"))


@pytest.mark.parametrize("kind", ["tif", "gif"])
def test_every_page_of_a_stack(
    kind: str, run: Callable[..., list[str]], trained: Path, tmp_path: Path, network: SegmentationNetwork
) -> None:
    pages = [scene(trained), scene(trained).transpose(Image.Transpose.FLIP_LEFT_RIGHT).quantize(64)]
    pages[0].save(tmp_path / f"stack.{kind}", save_all=True, append_images=pages[1:])
    assert run(tmp_path / f"stack.{kind}") == []
    with Image.open(tmp_path / f"stack.{kind}") as opened:
        for index in range(2):
            opened.seek(index)
            wanted = network.predict(normalised(opened.convert("RGB")))[0].numpy()
            np.testing.assert_array_equal(mask(tmp_path, f"stack_{index:05d}"), wanted)


def test_a_video_without_its_library_is_one_sentence(
    run: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.MP4").write_bytes(b"-")
    assert run(tmp_path / "film.MP4") == [
        "film.MP4 is a video, which needs PyAV: `.venv/bin/python -m uv pip install av`, or save its "
        "frames as images."
    ]


def test_every_frame_of_a_video(run: Callable[..., list[str]], trained: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.height, stream.width = SMALL
        stream.pix_fmt = "yuv420p"
        for frame in [av.VideoFrame.from_image(scene(trained))] * 3:
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    assert run(tmp_path / "film.mp4") == []
    assert [mask(tmp_path, f"film_0000{index}").shape for index in range(3)] == [SMALL] * 3
    (tmp_path / "half.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:300])
    (failed,) = run(tmp_path / "half.mp4")
    assert failed.startswith("half.mp4 is damaged or cut off: ")


def test_any_name_of_a_file(run: Callable[..., list[str]], trained: Path, tmp_path: Path) -> None:
    names = ["l'arbre #1", "Mu\u0308ller", "道路", "n" * 250, "\udce4lt", "-x"]
    (tmp_path / "in").mkdir()
    for name in names:
        scene(trained, (8, 8)).save(tmp_path / "in" / f"{name}.png")
    assert run(tmp_path / "in") == []
    made = {file.name for file in (tmp_path / "out").glob("*_mask.png")}
    assert made >= {f"{name}_mask.png" for name in names if len(name) < 200} and len(made) == len(names)


def test_the_command_ends_with_the_bad_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    scene(trained).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    weights = CELL.folder(trained) / "weights.safetensors"
    places = ["--images", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["predict", "--weights", str(weights), *places])
    monkeypatch.setattr(predict.predict, "__defaults__", (None, trained))  # where data/ is
    with pytest.raises(SystemExit) as stop:
        cli.run(predict.main)
    text = str(stop.value.code)
    assert "\nbad.png is empty: put a whole image in its place.\n" in text
    assert text.endswith("1 image could not be done; the others are.")
    assert mask(tmp_path, "good").shape == SMALL


def test_without_data_the_palette_is_the_module_s(trained: Path, tmp_path: Path) -> None:
    run = predict.read_run(CELL.folder(trained) / "weights.safetensors")
    shutil.copy(trained / "params.yaml", tmp_path)
    meta = predict.read_meta(run, tmp_path)
    assert (meta.classes, meta.palette) == (streets.META.classes, streets.META.palette)
    with pytest.raises(ConfigError, match="know 2 classes, which are not the 12 of the data set of streets"):
        predict.read_meta({**run, "classes": ["road", "sky"]}, tmp_path)


def test_wrong_orders_are_one_sentence(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cell"
    shutil.copytree(CELL.folder(trained), folder)
    scene(trained).save(tmp_path / "image.png")
    weights, image, out = folder / "weights.safetensors", tmp_path / "image.png", tmp_path / "out"

    def refused(sentence: str, weights: Path = weights, images: Path = image, output: Path = out) -> None:
        with pytest.raises(ConfigError, match=sentence):
            predict.predict(weights, images, output, None, trained)
        assert not out.exists()

    (tmp_path / "empty").mkdir()
    refused("no weights .*other.safetensors", weights=folder / "other.safetensors")
    refused("no image or folder .*missing", images=tmp_path / "missing")
    refused("holds no image", images=tmp_path / "empty")
    refused("is the folder of the images", images=tmp_path, output=tmp_path / "empty" / "..")
    refused("is a file: name a folder", output=weights)
    rewrite(folder, {"config": {"network": {"architecture": "UNet"}}})
    refused("describes no known network")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("truncated or altered")
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"steps": 6', '"steps": 7'))
    refused("run.json is damaged or was changed by hand")
    (folder / "run.json").unlink()
    refused("no run.json beside")


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "streets", "voc"])
def test_every_data_set_has_a_legend(name: str) -> None:
    """A class name is one line, and there is one of each."""
    module = importlib.import_module(f"pipelines.datasets.{name}")
    meta = next(
        module.meta(config.dataset(own.data, key)[1])
        for key, own in config.load().benchmarks.items()
        if own.data["dataset"] == name
    )
    assert len(set(meta.classes)) == len(meta.classes) == len(meta.palette)
    assert all(text == " ".join(text.split()) and text for text in meta.classes)
    assert Image.open(io.BytesIO(predict.legend_png(meta))).size[0] > 100


def test_no_output_is_written_twice() -> None:
    names = predict._names(map(Path, ["a.png", "a.jpg", "a.png.bmp", "s.tif", "s_00001.png", "b.png"]))
    assert names == ["a.png", "a.jpg", "a.png.bmp", "s.tif", "s_00001", "b"]


def test_photographs_are_turned_as_in_training(trained: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    scene(trained).save(tmp_path / "in" / "a.png", exif=exif)
    folder = Path(shutil.copytree(CELL.folder(trained), tmp_path / "cell"))
    sizes = []
    for orientation in ("exif", "stored"):
        run = json.loads((folder / "run.json").read_text())
        run["config"]["data"]["orientation"] = orientation
        rewrite(folder, run)
        assert not predict.predict(
            folder / "weights.safetensors", tmp_path / "in", tmp_path / "out", root=trained
        )
        sizes.append(mask(tmp_path, "a").shape)
    assert sizes == [SMALL[::-1], SMALL]
