"""The large data sets, on a few files in their real layouts and archives; downloads from a real server."""

from __future__ import annotations

import hashlib
import http.server
import io
import itertools
import os
import shutil
import ssl
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from unicodedata import normalize

import numpy as np
import pytest
from conftest import read_params, tiny, write_params
from PIL import Image
from scipy.io import savemat

from pipelines import config
from pipelines.config import Benchmark, ConfigError
from pipelines.datasets import ade20k, archives, cityscapes, folder, voc, writer
from pipelines.datasets import pixels as image_pixels
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages.fetch import fetch

Files = dict[str, bytes]
draw = np.random.default_rng(0)


def png(values: np.ndarray, palette: bool = False) -> bytes:
    image, out = Image.fromarray(values), io.BytesIO()
    if palette:
        image.putpalette(list(range(256)) * 3)  # gray on purpose: only the indices count
    image.save(out, "PNG")
    return out.getvalue()


def jpeg(height: int, width: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, "JPEG")
    return out.getvalue()


def labels(height: int, width: int, values: list[int]) -> np.ndarray:
    return draw.choice(np.array(values, np.uint8), (height, width))


# ---- the real layouts


def cityscapes_files() -> Files:
    files: Files = {"leftImg8bit/README": b"-", "gtFine/license.txt": b"-"}
    number = itertools.count()
    for split, cities in (
        ("train", ("aachen", "ulm", "zurich")),
        ("val", ("frankfurt",)),
        ("test", ("berlin",)),
    ):
        for city in cities:
            for _ in range(2):
                stem = f"{city}_{next(number):06d}_000019"
                pixels = draw.integers(0, 255, (32, 64, 3), dtype=np.uint8)
                files[f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = png(pixels)
                ids = labels(32, 64, list(range(34)) if split != "test" else [0])
                files[f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"] = png(ids)
                files[f"gtFine/{split}/{city}/{stem}_gtFine_polygons.json"] = b"{}"
    return files


def voc_files() -> Files:
    train, val = ["2007_000032", "2007_000039"], ["2007_000033", "2011_000003"]
    extra = ["2008_000008", "2008_000015", "2009_000001"]
    files: Files = {
        "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": "".join(f"{n}\n" for n in train).encode(),
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": "".join(f"{n}\n" for n in val).encode(),
        # SBD has images of VOC's validation split too
        "benchmark_RELEASE/dataset/train.txt": "".join(f"{n}\n" for n in [*extra[:2], val[1]]).encode(),
        "benchmark_RELEASE/dataset/val.txt": "".join(f"{n}\n" for n in [extra[2], train[0]]).encode(),
    }
    for index, name in enumerate([*train, *val, *extra]):
        size = (40 + 4 * index, 60 - 4 * index)
        files[f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg"] = jpeg(*size)
        values = labels(*size, list(range(21)))
        if name in train + val:
            values[0] = 255
            files[f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"] = png(values, palette=True)
        if name in [*extra, val[1], train[0]]:
            out = io.BytesIO()
            savemat(out, {"GTcls": {"Segmentation": labels(*size, [1, 2]), "Boundaries": np.zeros(2)}})
            files[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = out.getvalue()
    files["VOCdevkit/VOC2012/JPEGImages/2012_004331.jpg"] = jpeg(8, 8)  # of another task
    return files


def ade20k_files() -> Files:
    top = "ADEChallengeData2016"
    files: Files = {f"{top}/objectInfo150.txt": b"-", f"{top}/sceneCategories.txt": b"-"}
    for part, short, count in (("training", "train", 6), ("validation", "val", 2)):
        for index in range(1, count + 1):
            size, name = (36 + 4 * index, 50), f"ADE_{short}_{index:08d}"
            files[f"{top}/images/{part}/{name}.jpg"] = jpeg(*size, "L" if index == 2 else "RGB")
            files[f"{top}/annotations/{part}/{name}.png"] = png(labels(*size, list(range(151))))
    return files


class Kind:
    """How one data set is shipped, and what its settings are."""

    def __init__(self, module: Any, files: Callable[[], Files], packed: dict[str, str], **data: Any) -> None:
        self.module, self.files, self.packed = module, files, packed
        self.name = module.__name__.rsplit(".", 1)[1]
        self.data = {"dataset": self.name, "mirror": None, "size": None} | data


KINDS = {
    kind.name: kind
    for kind in (
        Kind(cityscapes, cityscapes_files, {a: f for a, f in cityscapes.ARCHIVES}, holdout=["ulm"]),
        Kind(voc, voc_files, dict((voc.VOC, voc.SBD)), holdout=1),
        Kind(ade20k, ade20k_files, dict((ade20k.ARCHIVE,)), holdout=2),
    )
}
COUNTS = {
    "cityscapes": {"train": 6, "val": 2, "test": 2},
    "voc": {"train_aug": 5, "val": 2},
    "ade20k": {"training": 6, "validation": 2},
}
SPLITS = {
    "cityscapes": {"train": 4, "val": 2, "test": 2},
    "voc": {"train": 4, "val": 1, "test": 2},
    "ade20k": {"train": 4, "val": 2, "test": 2},
}


def pack(place: Path, kind: Kind, files: Files, form: str) -> None:
    """Ship files as the authors do, or as the folders that one gets by extracting; the published sums become
    those of the archives."""
    place.mkdir(parents=True, exist_ok=True)
    if form == "folders":
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return
    for archive, top in kind.packed.items():
        own = {
            name: content
            for name, content in files.items()
            if not name.startswith(tuple(other for other in kind.packed.values() if other != top))
        }
        if archive.endswith(".zip"):
            with zipfile.ZipFile(place / archive, "w", zipfile.ZIP_DEFLATED) as opened:
                for name, content in own.items():
                    opened.writestr(name, content)
        else:
            with tarfile.open(place / archive, "w:gz" if archive.endswith("gz") else "w") as opened:
                link = tarfile.TarInfo(f"{top}/latest")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                opened.addfile(link)
                for name, content in own.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    opened.addfile(info, io.BytesIO(content))
        publish(kind, place / archive)


def publish(kind: Kind, archive: Path) -> None:
    """Let the sum that is published of an archive be that of this file."""
    sums = getattr(kind.module, "DOWNLOAD", {})
    if found := sums.get(archive.name):
        sums[archive.name] = found[0], hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    found = KINDS[request.param]
    monkeypatch.setattr(found.module, "COUNTS", COUNTS[found.name])
    if hasattr(found.module, "DOWNLOAD"):
        monkeypatch.setattr(found.module, "DOWNLOAD", dict(found.module.DOWNLOAD))
    monkeypatch.setattr(archives, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "mirror"))
    return found


def build(tmp_path: Path, data: dict[str, Any]) -> folder.Description:
    return fetch(tmp_path / "data", "large", Benchmark.model_construct(data=data))


def pixels(root: Path, split: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / f"{split}annot" / f"{name}.png"))


# ---- fetching


@pytest.mark.parametrize("form", ["archives", "folders"])
@pytest.mark.parametrize("below", [True, False])
def test_a_set_is_fetched_from_its_archives_or_folders(
    kind: Kind, tmp_path: Path, form: str, below: bool
) -> None:
    files = kind.files()
    pack(tmp_path / "mirror" / (kind.name if below else ""), kind, files, form)
    description = build(tmp_path, kind.data)
    root = tmp_path / "data" / "large"
    assert description.splits == SPLITS[kind.name]
    assert description == folder.check(root)
    assert len(description.palette) == len(description.classes)
    assert len(set(description.palette)) == len(description.classes) - (kind.name == "ade20k")  # as published
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["large"]
    originals = {hashlib.sha256(content).hexdigest() for content in files.values()}
    for split in folder.SPLITS:
        for image, _ in folder.read_list(root, split):
            content = (root / image).read_bytes()
            kept = hashlib.sha256(content).hexdigest() in originals
            assert kept or image.endswith("00000002.png")  # byte for byte, but for the gray JPEGs


@pytest.mark.parametrize("kind", ["cityscapes"], indirect=True)
def test_label_ids_of_cityscapes(kind: Kind, tmp_path: Path) -> None:
    """By an independent list of the 19 classes."""
    files = kind.files()
    pack(tmp_path / "mirror", kind, files, "archives")
    description = build(tmp_path, kind.data)
    scored = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert description.classes[scored.index(26)] == "car" and description.classes[18] == "bicycle"
    name = next(n for n in files if n.startswith("gtFine/val/") and n.endswith("labelIds.png"))
    ids = np.asarray(Image.open(io.BytesIO(files[name])))
    found = pixels(tmp_path / "data" / "large", "test", Path(name).name.removesuffix("_gtFine_labelIds.png"))
    assert set(np.unique(ids)) == set(range(34))
    for label in range(34):
        assert set(found[ids == label]) == {scored.index(label) if label in scored else 255}
    held = [image for image, _ in folder.read_list(tmp_path / "data" / "large", "val")]
    assert all(image.startswith("val/ulm_") for image in held)


@pytest.mark.parametrize("kind", ["voc"], indirect=True)
def test_labels_of_voc(kind: Kind, tmp_path: Path) -> None:
    files = kind.files()
    pack(tmp_path / "mirror", kind, files, "archives")
    build(tmp_path, kind.data)
    root = tmp_path / "data" / "large"
    split = {Path(i).stem: s for s in folder.SPLITS for i, _ in folder.read_list(root, s)}
    assert {name for name, where in split.items() if where == "test"} == {"2007_000033", "2011_000003"}
    for name in ("2007_000032", "2011_000003"):  # in both: VOC's own label, with its border
        original = Image.open(io.BytesIO(files[f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"]))
        assert np.array_equal(pixels(root, split[name], name), np.asarray(original))
    assert set(np.unique(pixels(root, split["2008_000008"], "2008_000008"))) == {1, 2}
    assert voc.CLASSES[15] == "person" and writer.colour_map(21)[15] == (192, 128, 128)


@pytest.mark.parametrize("kind", ["ade20k"], indirect=True)
def test_labels_of_ade20k(kind: Kind, tmp_path: Path) -> None:
    files = kind.files()
    pack(tmp_path / "mirror", kind, files, "archives")
    description = build(tmp_path, kind.data)
    root, name = tmp_path / "data" / "large", "ADE_val_00000001"
    original = np.asarray(
        Image.open(io.BytesIO(files[f"ADEChallengeData2016/annotations/validation/{name}.png"]))
    )
    assert np.array_equal(pixels(root, "test", name), original - 1)  # of uint8: 0 becomes 255
    assert (len(description.classes), description.classes[12], description.size) == (150, "person", None)
    assert len(set(ade20k.CLASSES)) == 150
    colours = dict(zip(description.classes, description.palette, strict=True))
    assert colours["wall"] == (120, 120, 120) and colours["sky"] == (6, 230, 230)
    assert colours["animal"] == (255, 0, 122) and colours["flag"] == (92, 0, 255)
    assert colours["road"] == colours["skyscraper"] == (140, 140, 140)


def test_a_size_resizes_images_and_labels(kind: Kind, tmp_path: Path) -> None:
    pack(tmp_path / "mirror", kind, kind.files(), "archives")
    assert build(tmp_path, kind.data | {"size": [16, 24]}).size == (16, 24)


@pytest.mark.parametrize("form", ["archives", "folders", "inside"])
@pytest.mark.parametrize("kind", ["voc"], indirect=True)
def test_voc_with_the_augmented_masks_of_others(kind: Kind, tmp_path: Path, form: str) -> None:
    """The same data as with SBD."""
    files, place = kind.files(), tmp_path / "mirror"
    pack(place, kind, files, "archives")
    build(tmp_path, kind.data)
    root = tmp_path / "data" / "large"
    wanted = {s: [pixels(root, s, Path(i).stem) for i, _ in folder.read_list(root, s)] for s in folder.SPLITS}
    (place / voc.SBD[0]).unlink()
    masks = {}
    for name in [name for name in files if name.startswith("benchmark_RELEASE")]:
        content = files.pop(name)
        if name.endswith(".mat"):
            masks[f"SegmentationClassAug/{Path(name).stem}.png"] = png(voc._segmentation(content, name))
    if form == "archives":
        with zipfile.ZipFile(place / voc.AUG[0], "w") as opened:
            for name, content in masks.items():
                opened.writestr(name, content)
    else:
        above = place / "VOCdevkit" / "VOC2012" if form == "inside" else place
        if form == "inside":
            (place / voc.VOC[0]).unlink()
            pack(place, kind, files, "folders")
        (above / "SegmentationClassAug").mkdir()
        for name, content in masks.items():
            (above / name).write_bytes(content)
    build(tmp_path, kind.data)
    for split, found in wanted.items():
        again = [pixels(root, split, Path(i).stem) for i, _ in folder.read_list(root, split)]
        assert len(again) == len(found) and all(map(np.array_equal, again, found))


# ---- what is wrong is said


def damage(kind: Kind, files: Files, how: str) -> tuple[Files, str]:
    """Files with one thing wrong, and what the sentence must name."""
    image = next(n for n in files if n.endswith(("leftImg8bit.png", ".jpg")))
    label = next(
        n for n in files if n.endswith(("labelIds.png", "Class/2007_000032.png")) or "annotations" in n
    )
    if how == "an image is missing":
        del files[image]
        return files, "Fetch"
    if how == "a label is missing":
        del files[label]
        return files, label
    if how == "an unknown value":
        size = np.asarray(Image.open(io.BytesIO(files[label]))).shape
        files[label] = png(np.full(size, 200, np.uint8))
        return files, f"{label} has the value 200"
    if how == "colours as labels":
        files[label] = png(np.zeros((8, 8, 3), np.uint8))
        return files, f"{label} has the mode RGB"
    if how == "a broken image":
        files[image] = files[image][:40]
        return files, Path(image).stem.removesuffix("_leftImg8bit")
    if how == "an evil member":
        top = next(iter(kind.packed.values()))
        return {f"{top}/../../evil": b"x"} | files, r"(zip|tar) holds .*, a path outside of the archive"
    return {f"other/{name}": content for name, content in files.items()}, "Fetch|Could|could|needs|holds"


@pytest.mark.parametrize(
    "how",
    [
        "an image is missing",
        "a label is missing",
        "an unknown value",
        "colours as labels",
        "a broken image",
        "an evil member",
        "another layout",
    ],
)
def test_what_is_wrong_is_one_sentence(kind: Kind, tmp_path: Path, how: str) -> None:
    files, named = damage(kind, kind.files(), how)
    pack(tmp_path / "mirror", kind, files, "archives")
    with pytest.raises(ConfigError, match=named) as caught:
        build(tmp_path, kind.data)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []  # nothing half
    assert not (tmp_path.parent / "evil").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_truncated_archive_is_named(kind: Kind, tmp_path: Path, keep: float) -> None:
    pack(tmp_path / "mirror", kind, kind.files(), "archives")
    archive = tmp_path / "mirror" / next(iter(kind.packed))
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * keep)])
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{archive.name}.*([Ff]etch)"):
            build(tmp_path, kind.data)
        assert list((tmp_path / "data").iterdir()) == []
        publish(kind, archive)  # then the reader alone has to see it


@pytest.mark.parametrize("kind", ["voc", "ade20k"], indirect=True)
def test_an_archive_of_another_sum_is_refused_but_not_its_folder(kind: Kind, tmp_path: Path) -> None:
    files = kind.files()
    pack(tmp_path / "mirror", kind, files, "archives")
    archive = tmp_path / "mirror" / next(iter(kind.packed))
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match=rf"{archive.name} has the md5 \w+ instead of \w+: .* the folder"):
        build(tmp_path, kind.data)
    archive.unlink()
    pack(tmp_path / "mirror", kind, files, "folders")
    assert build(tmp_path, kind.data).splits == SPLITS[kind.name]


def test_links_in_a_circle_pipes_and_devices_end(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    for name in ("a/x", "a/b/y", "else/z"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "else")
    (tmp_path / "a" / "endless").symlink_to("/dev/zero")
    (tmp_path / "a" / "nothing").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "a" / "pipe")
    assert archives.Folder(tmp_path / "a").names() == ["again/z", "b/y", "linked/z", "x"]


@pytest.mark.parametrize("ending", ["xz", "bz2"])
def test_damaged_compression_is_one_sentence(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.tar.{ending}"
    with tarfile.open(file, f"w:{ending}") as opened:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a/x")
        info.size = 50_000
        opened.addfile(info, io.BytesIO(draw.bytes(50_000)))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.tar.{ending} is truncated or damaged") as caught:
        list(archives.Tar(file).files(["a/x"]))
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a/x", bytes(1000))
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        list(archives.Zip(file).files(["a/x"]))


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST", 1000)
    for place, make in ((tmp_path / "a.zip", archives.Zip), (tmp_path / "a.tgz", archives.Tar)):
        kind = Kind(ade20k, ade20k_files, {place.name: "a"})
        pack(tmp_path, kind, {"a/x": bytes(1001), "a/y": bytes(1000)}, "archives")
        with pytest.raises(ConfigError, match=r"a/x in .* has more than 1000 bytes"):
            list(make(place).files(["a/x"]))
        assert [len(content) for _, content in make(place).files(["a/y"])] == [1000]


def test_absent_cityscapes_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "nothing"))
    with pytest.raises(
        ConfigError, match=r"leftImg8bit_trainvaltest.zip and gtFine_.*cityscapes-dataset.com"
    ):
        build(tmp_path, KINDS["cityscapes"].data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"holdout": ["berlin"]}, "holdout names berlin; the training cities are aachen, ulm, zurich"),
        ({"holdout": ["aachen", "ulm", "zurich"]}, "leave some to train on"),
        ({"holdout": []}, "holdout = .* is not allowed"),
    ],
)
@pytest.mark.parametrize("kind", ["cityscapes"], indirect=True)
def test_cities_to_hold_out(kind: Kind, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    pack(tmp_path / "mirror", kind, kind.files(), "archives")
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, kind.data | change)


@pytest.mark.parametrize("kind", ["cityscapes"], indirect=True)
def test_the_images_without_labels_are_counted_or_left_out(kind: Kind, tmp_path: Path) -> None:
    files = kind.files()
    names = [name for name in files if name.startswith("leftImg8bit/test/")]
    del files[names[0]]
    pack(tmp_path / "mirror", kind, files, "archives")
    with pytest.raises(ConfigError, match=r"holds 1 images leftImg8bit/test/.* instead of 2"):
        build(tmp_path, kind.data)
    del files[names[1]]
    pack(tmp_path / "mirror", kind, files, "archives")
    assert build(tmp_path, kind.data).splits == SPLITS["cityscapes"]


def test_published_splits_that_share_an_image_are_fetched_with_a_warning(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody here can change them."""
    files = kind.files()
    ade, voc_ = "ADEChallengeData2016/{}/{}/ADE_{}_00000001.{}", "VOCdevkit/VOC2012/{}/2007_0000{}.{}"
    pairs = {  # image of training, image of test
        "cityscapes": [
            next((n for n in files if n.startswith(f"leftImg8bit/{s}/")), "") for s in ("train", "val")
        ],
        "ade20k": [
            ade.format("images", *part, "jpg") for part in (("training", "train"), ("validation", "val"))
        ],
        "voc": [voc_.format("JPEGImages", number, "jpg") for number in (32, 33)],
    }
    train, test = pairs[kind.name]
    files[test] = files[train]
    if kind.name == "voc":  # where sizes differ, with its label
        train, test = (voc_.format("SegmentationClass", number, "png") for number in (32, 33))
        files[test] = files[train]
    pack(tmp_path / "mirror", kind, files, "archives")
    assert build(tmp_path, kind.data).splits == SPLITS[kind.name]
    assert "data/large: the published splits share 1 images, byte for byte: " in caplog.text


def test_held_out_images_are_spread_evenly() -> None:
    names = [f"{number:03d}" for number in range(100)]
    assert sorted(writer.held_out(names[::-1], 4)) == ["000", "025", "050", "075"]
    assert len(writer.held_out(names, 99)) == 99
    with pytest.raises(ConfigError, match="holdout = 100 of 100"):
        writer.held_out(names, 100)


# ---- a data set of one's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "own"))
    root = tmp_path / "own"
    for index in range(6):
        place = "a" if index % 2 else "b"
        for kind in ("photos", "masks"):
            (root / kind / place).mkdir(parents=True, exist_ok=True)
        size = (32, 40 + 4 * index)
        if index % 2:
            (root / "photos" / place / f"{index}.jpg").write_bytes(jpeg(*size))
        else:
            content = png(draw.integers(0, 255, (*size, 3), dtype=np.uint8))
            (root / "photos" / place / f"{index}.PNG").write_bytes(content)
        mask = png(labels(*size, [0, 1, 2, 9]), palette=index == 2)
        (root / "masks" / place / f"{index}.png").write_bytes(mask)
    (root / "train.txt").write_text("b/0\na/1.jpg\n\nb/2.PNG\n")
    (root / "val.txt").write_text("a/3\n")
    (root / "test.txt").write_text("b/4\na/5\n")
    return root


OWN = {
    "dataset": "custom",
    "images": "photos",
    "labels": "masks",
    "classes": {"ground": [0, 0, 0], "plant": [0, 255, 0], "stone": [90, 90, 90]},
    "ignore_index": 9,
    "splits": {"train": "train.txt", "val": "val.txt", "test": "test.txt"},
    "size": None,
}


def test_a_set_of_ones_own(own: Path, tmp_path: Path) -> None:
    description = build(tmp_path, OWN)
    assert description.classes == ("ground", "plant", "stone") and description.ignore_index == 9
    assert description.splits == {"train": 3, "val": 1, "test": 2}
    root = tmp_path / "data" / "large"
    assert np.array_equal(pixels(root, "train", "b__2"), np.asarray(Image.open(own / "masks/b/2.png")))
    assert (root / "train" / "a__1.jpg").read_bytes() == (own / "photos/a/1.jpg").read_bytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, [32, 44]])
def test_ones_own_photographs_are_turned_as_they_were_seen(
    own: Path, tmp_path: Path, orientation: int, size: list[int] | None
) -> None:
    """As a camera held any way would have stored the scene: by an independent list of the eight turns."""
    seen = np.zeros((32, 44, 3), np.uint8)
    seen[:16, :22], seen[:16, 22:], seen[16:, :22] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = own / "photos/a/1.jpg"
    Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif, quality=100, subsampling=0)
    build(tmp_path, OWN | {"size": size})
    (found,) = (tmp_path / "data" / "large" / "train").glob("a__1.*")
    assert (found.suffix == ".jpg") == (orientation == 1 and size is None)  # byte for byte where it can be
    assert np.abs(np.asarray(Image.open(found)).astype(int) - seen).max() <= 6


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("masks/a/1.png", None, r"has no mask .* for a/1 of the split files\.$"),
        ("photos/a/1.jpg", None, r"has no image \(PNG, JPEG, …\) for a/1"),
        ("photos/a/3.png", b"", r"several images for a/3 .*`image_suffix` in params.yaml: .jpg or .png"),
        ("masks/a/1.png", png(np.full((32, 44), 3, np.uint8)), "masks/a/1.png has the value 3"),
        (
            "masks/a/1.png",
            png(np.zeros((32, 40), np.uint8)),
            "a/1.jpg is 44x32 but its label .*masks/a/1.png is 40x32",
        ),
        ("masks/a/1.png", b"GIF89a", r"masks/a/1.png is no image that can be read \(PNG, TIFF, BMP\), or it"),
        ("photos/a/1.jpg", b"GIF89a", "photos/a/1.jpg is no image that can be read"),
        ("photos/a/1.jpg", b"", r"photos/a/1.jpg is empty: put a whole image in its place\.$"),
        ("masks/a/1.png", jpeg(32, 44), "1.png is a JPEG by its content: save it as PNG, TIFF or BMP"),
        ("masks/a/1.png", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS .*`git lfs pull`"),
        ("val.txt", b"a/1\n", "a/1 stands twice in the split files"),
        ("val.txt", b"\n", "val.txt names no sample"),
        ("val.txt", b"../masks/a/1\n", "has '../masks/a/1'"),
        ("val.txt", b"\xff\xfe", "val.txt names no sample"),
        ("val.txt", b"\xff\xfea", "val.txt cannot be read: correct `splits.val`"),
        ("val.txt", None, "val.txt cannot be read"),
    ],
)
def test_what_is_wrong_with_ones_own(
    own: Path, tmp_path: Path, path: str, content: bytes | None, said: str
) -> None:
    if content is None:
        (own / path).unlink()
    else:
        (own / path).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, OWN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ignore_index": 2}, "ignore_index = 2 is not allowed: it must be beyond the classes 0 to 2; where"),
        ({"classes": {"a": [0] * 3, "b": [0] * 3, "c": [9] * 3}}, "a and b have one colour"),
        (
            {"classes": {"car (1)": [0] * 3, "car [1]": [9] * 3}},
            r"car \(1\) and car \[1\] are both car _1_ in",
        ),
        ({"ignored_colours": [[90, 90, 90]]}, "they hold the colour of the class stone"),
        ({"images": "fotos"}, "fotos does not exist: correct `images`"),
        ({"classes": {"a": [0, 0, 256], "b": [0, 0, 0]}}, "classes.a.2 = 256"),
    ],
)
def test_bad_settings_of_ones_own(own: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, OWN | change)


# ---- layouts, names and masks of one's own

SCENE = np.arange(32 * 44).reshape(32, 44) // 470 % 3  # all classes in three bands


def layout(root: Path, names: list[str], **change: Any) -> dict[str, Any]:
    """Four samples under any names; what is to be changed is ``image`` or ``mask`` (name, index → file and
    content), ``lists`` (the text of a list → its bytes) or a setting."""
    image = change.pop("image", lambda name, index: (f"photos/{name}.png", png(pictures[index])))
    mask = change.pop("mask", lambda name, index: (f"masks/{name}.png", png(SCENE.astype(np.uint8))))
    lists = change.pop("lists", str.encode)
    pictures = np.random.default_rng(3).integers(0, 256, (4, 32, 44, 3), np.uint8)
    for index, name in enumerate(names):
        for path, content in (image(name, index), mask(name, index)):
            file = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(path))))  # noqa: PTH118
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for split, own in (("train", names[:2]), ("val", names[2:3]), ("test", names[3:])):
        (root / f"{split}.txt").write_bytes(lists("".join(f"{name}\n" for name in own)))
    return OWN | change


PLAIN = [f"img{index}" for index in range(4)]
COLOURED = {"ground": [0, 0, 0], "plant": [0, 255, 0], "stone": [90, 90, 90]}


def in_colours(values: np.ndarray) -> np.ndarray:
    return np.array(list(COLOURED.values()), np.uint8)[values]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_with_palette(values: np.ndarray, palette: list[int]) -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(palette)
    return saved(image, "PNG")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "mine"))
    return tmp_path / "mine"


def scenes_of(tmp_path: Path) -> list[np.ndarray]:
    root = tmp_path / "data" / "large"
    return [
        np.asarray(Image.open(root / label))
        for split in folder.SPLITS
        for _, label in folder.read_list(root, split)
    ]


MASKS: dict[str, tuple[dict[str, Any], Callable[[str, int], tuple[str, bytes]]]] = {
    "colours": ({}, lambda name, _: (f"masks/{name}.png", png(in_colours(SCENE)))),
    "colours, opaque": (
        {},
        lambda name, _: (
            f"masks/{name}.png",
            saved(Image.fromarray(in_colours(SCENE)).convert("RGBA"), "PNG"),
        ),
    ),
    "gray colours": (
        {"masks": "colours", "classes": {"a": [0, 0, 0], "b": [128] * 3, "c": [255] * 3}},
        lambda name, _: (f"masks/{name}.png", png(np.array([0, 128, 255], np.uint8)[SCENE])),
    ),
    "gray colours, of which one is hidden": (
        {"masks": "colours", "classes": {"a": [0, 0, 0], "b": [128] * 3, "c": [255] * 3}},
        lambda name, _: (
            f"masks/{name}.png",
            saved(Image.fromarray(np.array([0, 128, 255], np.uint8)[SCENE]), "PNG", transparency=0),
        ),
    ),
    "a palette of colours, of which one is hidden": (
        {"masks": "colours"},
        lambda name, _: (
            f"masks/{name}.png",
            saved(Image.fromarray(in_colours(SCENE)).quantize(8), "PNG", transparency=0),
        ),
    ),
    "a palette of colours": (
        {"masks": "colours"},
        lambda name, _: (f"masks/{name}.png", saved(Image.fromarray(in_colours(SCENE)).quantize(8), "PNG")),
    ),
    "16 bits": ({}, lambda name, _: (f"masks/{name}.png", png(SCENE.astype(np.uint16)))),
    "values in three channels": (
        {"masks": "values"},
        lambda name, _: (f"masks/{name}.png", png(np.repeat(SCENE[..., None], 3, 2).astype(np.uint8))),
    ),
    "TIFF": (
        {},
        lambda name, _: (f"masks/{name}.TIF", saved(Image.fromarray(SCENE.astype(np.uint8)), "TIFF")),
    ),
    "BMP": ({}, lambda name, _: (f"masks/{name}.bmp", saved(Image.fromarray(SCENE.astype(np.uint8)), "BMP"))),
    "a suffix": (
        {"label_suffix": "_mask"},
        lambda name, _: (f"masks/{name}_Mask.PNG", png(SCENE.astype(np.uint8))),
    ),
    "a suffix in the folder of images": (
        {"label_suffix": "_mask.png", "labels": "photos"},
        lambda name, _: (f"photos/{name}_mask.png", png(SCENE.astype(np.uint8))),
    ),
    "bytes behind its end": (
        {},
        lambda name, _: (f"masks/{name}.png", png(SCENE.astype(np.uint8)) + bytes(64)),
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_layout(kind: str, mine: Path, tmp_path: Path) -> None:
    change, mask = MASKS[kind]
    build(tmp_path, layout(mine, PLAIN, mask=mask, **change))
    for found in scenes_of(tmp_path):
        assert np.array_equal(found, SCENE)


@pytest.mark.parametrize("size", [None, [32, 44]])
@pytest.mark.parametrize(
    ("change", "mask", "said"),
    [
        (
            {},
            lambda name, _: (f"masks/{name}.png", png(in_colours(SCENE) + np.uint8(1))),
            r"img0.png has colours that are in no class: \[1, 0, 1\], .*`classes`.*`ignored_colours`",
        ),
        (
            {},
            lambda name, _: (f"masks/{name}.png", png(np.repeat(SCENE[..., None], 3, 2).astype(np.uint8))),
            "three equal channels, whose values are not colours of `classes`: .*set `masks: values`",
        ),
        (
            {},  # a palette of each file's own, and a colour that is in no class
            lambda name, _: (
                f"masks/{name}.png",
                png_with_palette((SCENE + 1) % 3, [90, 90, 90, 255, 255, 255, 0, 255, 0]),
            ),
            "other classes by the colours of its palette than by its values",
        ),
        (
            {},
            lambda name, _: (
                f"masks/{name}.tif",
                saved(
                    Image.fromarray(SCENE.astype(np.uint8)),
                    "TIFF",
                    save_all=True,
                    append_images=[Image.fromarray(SCENE.astype(np.uint8))],
                ),
            ),
            r"img0.tif holds 2 pictures: save the one that is the mask",
        ),
        (
            {},
            lambda name, _: (
                f"masks/{name}.png",
                png(np.dstack([in_colours(SCENE), SCENE * 90]).astype(np.uint8)),
            ),
            "has transparent pixels",
        ),
        (
            {},
            lambda name, _: (f"masks/{name}.png", png(SCENE.astype(np.uint16) + 300)),
            "has the value 300, which this data set does not know",
        ),
        (
            {},  # the order of the palette is not that of the classes
            lambda name, _: (
                f"masks/{name}.png",
                png_with_palette(2 - SCENE, in_colours(np.array([2, 1, 0])).ravel().tolist()),
            ),
            "other classes by the colours of its palette than by its values: set `masks: colours` or "
            "`masks: values`",
        ),
        (
            {"masks": "values"},
            lambda name, _: (f"masks/{name}.png", png(in_colours(SCENE))),
            "img0.png is in colours: take `masks: values` out",
        ),
        (
            {},
            lambda name, _: (f"masks/{name}_gt.png", png(SCENE.astype(np.uint8))),
            "There is img0_gt: set `label_suffix: _gt` in params.yaml",
        ),
        (
            {"labels": "photos"},
            lambda name, _: (f"photos/{name}_gt.png", png(SCENE.astype(np.uint8))),
            "There is img0_gt: set `label_suffix: _gt` in params.yaml",
        ),
        (
            {},
            lambda name, i: (f"masks/{name}.{'png' if i else 'jpg'}", jpeg(32, 44)),
            r"has no mask \(PNG, TIFF or BMP\) for img0.* img0.jpg is there, but its kind of file may change",
        ),
        (
            {},
            lambda name, _: (f"masks/{name}.png", png(SCENE[:20].astype(np.uint8))),
            "photos/img0.png is 44x32 but its label .*masks/img0.png is 44x20",
        ),
    ],
)
def test_what_is_wrong_with_masks_of_ones_own(
    change: dict[str, Any], mask: Any, said: str, size: Any, mine: Path, tmp_path: Path
) -> None:
    """The same answer with and without resizing."""
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, layout(mine, PLAIN, mask=mask, size=size, **change))


@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_a_turn_that_keeps_the_size_is_said(
    orientation: str, mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = layout(mine, PLAIN, orientation=orientation)
    Image.open(mine / "photos/img1.png").save(mine / "photos/img1.png", exif=exif)
    build(tmp_path, data)
    said = "1 images are turned as their camera noted (EXIF)"
    assert (said in caplog.text and "set `orientation: stored`" in caplog.text) == (orientation == "exif")


@pytest.mark.parametrize("size", [None, [16, 22]])
@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_masks_drawn_on_the_stored_pixels(orientation: str, size: Any, mine: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.random.default_rng(0).integers(0, 256, (32, 44, 3), np.uint8)
    data = layout(
        mine,
        PLAIN,
        image=lambda name, i: (
            f"photos/{name}.jpg",
            saved(Image.fromarray(picture + np.uint8(i)), "JPEG", exif=exif),
        ),
        orientation=orientation,
        size=size,
    )
    if orientation == "stored":
        assert build(tmp_path, data).size == ((16, 22) if size else (32, 44))
    else:
        with pytest.raises(ConfigError, match=r"EXIF orientation 6\).*set `orientation: stored`"):
            build(tmp_path, data)


NAMES = [
    *("l'arbre", "plot#0", "IMG 0 (copy)", "Mu\u0308ller", "道路", "a&b;$(id)", "x%20y", 'q"uote', "-dash"),
    *("tab\there", " edge ", "[x]", "back\\slash", "a__b", "..dots", "emoji 🌳", "n" * 240, "\udce4lt"),
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_a_file_can_have(name: str, mine: Path, tmp_path: Path) -> None:
    """Also one in another encoding than UTF-8; what the user calls it is what records and panels call it."""
    names = [f"{name}{index}" if len(name) < 200 else f"{index}{name}" for index in range(4)]
    data = layout(mine, names, lists=lambda text: text.encode("utf-8", "surrogateescape"))
    description = build(tmp_path, data)
    root = tmp_path / "data" / "large"
    assert description == folder.check(root)
    (called,) = folder.load(root, "test").names
    readable = names[3].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert called == f"test/{normalize('NFC', readable)}.png"
    assert np.array_equal(scenes_of(tmp_path)[0], SCENE)


def test_names_that_would_be_one(mine: Path, tmp_path: Path) -> None:
    names = ["a/b", "a__b", "A__B", "c"]
    build(tmp_path, layout(mine, names))
    root = tmp_path / "data" / "large"
    found = [name for split in folder.SPLITS for name in folder.load(root, split).names]
    assert found == ["train/a__b.png", "train/a__b.png", "val/A__B.png", "test/c.png"]
    assert len({i.casefold() for s in folder.SPLITS for i, _ in folder.read_list(root, s)}) == 4


@pytest.mark.parametrize(
    "written",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: normalize("NFC", text).encode(),
        lambda text: normalize("NFD", text).encode(),
        lambda text: text.replace("\n", ".PNG \n").encode(),
        lambda text: text.replace("/", "\\").encode(),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_lists_of_every_editor(written: Any, form: Any, mine: Path, tmp_path: Path) -> None:
    names = [normalize(form, f"é/Müller {index}") for index in range(4)]
    build(tmp_path, layout(mine, names, lists=written))
    assert np.array_equal(scenes_of(tmp_path)[3], SCENE)


def test_a_list_in_another_encoding_names_what_it_lacks(mine: Path, tmp_path: Path) -> None:
    data = layout(mine, [f"ä{index}" for index in range(4)], lists=lambda text: text.encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"has no image .* for '\\udce40', '\\udce41' of the split files"
    ) as found:
        build(tmp_path, data)
    str(found.value).encode()


def test_photographs_and_masks_in_one_folder(mine: Path, tmp_path: Path) -> None:
    data = layout(
        mine,
        PLAIN,
        image=lambda name, _: (f"all/{name}.JPG", jpeg(32, 44)),
        mask=lambda name, _: (f"all/{name}.png", png(SCENE.astype(np.uint8))),
        images="all",
        labels="all",
    )
    build(tmp_path, data)
    assert all(np.array_equal(found, SCENE) for found in scenes_of(tmp_path))


def test_a_suffix_of_images(mine: Path, tmp_path: Path) -> None:
    data = layout(mine, PLAIN, image=lambda name, _: (f"photos/{name}_rgb.jpg", jpeg(32, 44)))
    with pytest.raises(ConfigError, match=r"There is img0_rgb: set `image_suffix: _rgb` in params\.yaml"):
        build(tmp_path, data)
    build(tmp_path, data | {"image_suffix": "_rgb.jpg"})


def test_a_list_says_which_of_two_files(mine: Path, tmp_path: Path) -> None:
    data = layout(mine, PLAIN, lists=lambda text: text.replace("\n", ".png\n").encode())
    (mine / "photos/img0.jpg").write_bytes(jpeg(32, 44))
    build(tmp_path, data)
    assert (tmp_path / "data/large/train/img0.png").is_file()


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace("img", "photos/img")])
def test_a_name_that_is_nearly_one_is_shown(change: Any, mine: Path, tmp_path: Path) -> None:
    data = layout(mine, PLAIN, lists=lambda text: change(text).encode())
    with pytest.raises(ConfigError, match=r"a line is the name of one image\. There is img0\.$"):
        build(tmp_path, data)


def test_transparent_images_are_said(mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (4, 32, 44, 4), np.uint8)
    shown[..., 3] = 255
    shown[1, 0, 0, 3] = 0
    data = layout(mine, PLAIN, image=lambda name, index: (f"photos/{name}.png", png(shown[index])))
    build(tmp_path, data)
    assert "1 images have transparent pixels, which are laid over white" in caplog.text
    assert "img1.png" in caplog.text.split("laid over white")[1].splitlines()[0]


def test_a_mask_of_another_sample_is_no_hint(mine: Path, tmp_path: Path) -> None:
    data = layout(mine, ["img1", "img10", "img2", "img3"])
    (mine / "masks/img1.png").unlink()
    with pytest.raises(ConfigError, match=r"for img1 of the split files\.$"):
        build(tmp_path, data)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_tiff_is_read_as_it_is_stored(orientation: int, mine: Path, tmp_path: Path) -> None:
    """Pillow turns one whenever it decodes it."""
    exif, picture = Image.Exif(), np.random.default_rng(0).integers(0, 256, (4, 32, 44, 3), np.uint8)
    exif[0x0112] = orientation
    image = [saved(Image.fromarray(p), "TIFF", exif=exif) for p in picture]
    data = layout(mine, PLAIN, image=lambda name, index: (f"photos/{name}.tif", image[index]))
    build(tmp_path, data | {"orientation": "stored"})
    found = np.asarray(Image.open(tmp_path / "data/large/train/img0.png"))
    assert np.array_equal(found, picture[0])


def test_deep_images_that_would_be_black_are_refused(mine: Path, tmp_path: Path) -> None:
    """12 bits in files of 16, and 8."""
    for most in (4095, 255):
        dark = np.random.default_rng(0).integers(0, most + 1, (4, 32, 44), np.uint16)
        data = layout(mine, PLAIN, image=lambda name, i, dark=dark: (f"photos/{name}.png", png(dark[i])))
        with pytest.raises(ConfigError, match=r"No image of more than 8 bits .* is brighter than \d+ of 255"):
            build(tmp_path, data)
    dark[3, 0, 0] = 65535
    build(tmp_path, layout(mine, PLAIN, image=lambda name, i: (f"photos/{name}.png", png(dark[i]))))


def test_planes_of_deep_samples_are_refused() -> None:
    """Pillow reads them with the bytes of the machine, whatever the file says."""
    samples = struct.pack("<4H", 1, 2, 3, 4) * 3
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 3, 210), (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 3, 224), (284, 3, 1, 2)]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = content.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)
    content = content.ljust(210, b"\0") + struct.pack("<3I", 300, 308, 316)
    content = content.ljust(224, b"\0") + struct.pack("<3I", 8, 8, 8)
    with pytest.raises(ConfigError, match=r"x\.tif is a TIFF with a plane for each channel"):
        image_pixels.opened(content.ljust(300, b"\0") + samples, "x.tif")


def test_one_picture_in_two_encodings_leaks(mine: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 44, 3), np.uint8))
    data = layout(mine, ["é 1", "img1", "img2", "道 2"])
    picture.save(mine / "photos/é 1.png", compress_level=0)
    picture.save(mine / "photos/道 2.png", compress_level=9)
    with pytest.raises(ConfigError, match=r"train/é 1.png and test/道 2.png are the same image"):
        build(tmp_path, data)


def test_an_image_without_permission_is_named(mine: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data, real = layout(mine, PLAIN), Path.read_bytes

    def refused(path: Path) -> bytes:  # tests may run as root, whom nothing is refused
        if path.name == "img1.png" and path.parent.name == "photos":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ConfigError, match=r"photos/img1.png cannot be read: Permission denied\.$"):
        build(tmp_path, data)


def test_a_stack_is_no_photograph(mine: Path, tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((32, 44), shade, np.uint8)) for shade in (1, 2)]
    stack = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ConfigError, match=r"img0\.tif holds 2 pictures"):
        build(tmp_path, layout(mine, PLAIN, image=lambda name, _: (f"photos/{name}.tif", stack)))


# ---- masks without meaning


def void(value: int, *which: int) -> Callable[[str, int], tuple[str, bytes]]:
    """Masks of which some hold one value alone."""
    return lambda name, index: (
        f"masks/{name}.png",
        png((np.full_like(SCENE, value) if index in which else SCENE).astype(np.uint8)),
    )


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (void(9, 3), r"No pixel has a label in test of data/large, .* values 9 \(9 is ignored\): correct"),
        (void(9, 2), "No pixel has a label in val"),
        (void(9, 0, 1), "No pixel has a label in train"),
        (void(1, 0, 1), r"No pixel is of ground, stone in train .* values 1 \(9 is ignored\)"),
    ],
)
def test_a_split_without_meaning_is_refused(mask: Any, said: str, mine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, layout(mine, PLAIN, mask=mask))
    assert list((tmp_path / "data").iterdir()) == []


def test_black_and_white_masks(mine: Path, tmp_path: Path) -> None:
    def mask(name: str, _: int) -> tuple[str, bytes]:
        return f"masks/{name}.png", png(np.where(SCENE == 1, 255, 0).astype(np.uint8))

    data = layout(mine, PLAIN, mask=mask, ignore_index=255)
    data["classes"] = {"ground": [0, 0, 0], "plant": [255, 255, 255]}
    with pytest.raises(
        ConfigError, match=r"No pixel is of plant in train .*\[255, 255, 255\].*`masks: colours`"
    ):
        build(tmp_path, data)
    build(tmp_path, data | {"masks": "colours"})
    assert np.array_equal(scenes_of(tmp_path)[0], SCENE == 1)


def test_a_class_without_a_pixel_is_said_and_kept(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    description = build(tmp_path, layout(mine, PLAIN, mask=void(1, 3)))
    assert description.absent == {"test": ["ground", "stone"]}
    assert (
        description
        == folder.describe(tmp_path / "data" / "large")
        == folder.check(tmp_path / "data" / "large")
    )
    assert "data/large: the split test has no pixel of ground, stone: no score there" in caplog.text


def test_an_image_that_a_transformer_cannot_see(mine: Path, tmp_path: Path) -> None:
    params = config.load()
    data, small = layout(mine, PLAIN), params.student("segformer-b0")
    settings = Benchmark.model_construct(data=data | {"size": [28, 64]})
    with pytest.raises(ConfigError, match=r"val/img2\.png is 64x28, .* below 29 pixels a side"):
        fetch(tmp_path / "data", "large", settings, [small])
    fetch(tmp_path / "data", "large", Benchmark.model_construct(data=data), [small])


# ---- through the whole pipeline


@pytest.mark.parametrize("name", [*sorted(KINDS), "custom"])
def test_fetch_train_evaluate(name: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny(read_params())
    if name == "custom":
        data: dict[str, Any] = OWN
    else:
        kind = KINDS[name]
        monkeypatch.setattr(kind.module, "COUNTS", COUNTS[name])
        pack(own, kind, kind.files(), "archives")
        data = kind.data
    entry = raw["benchmarks"]["streets"]
    entry["data"] = data
    schedule = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "validate_every": 2, "crop": [32, 32]}
    entry["training"] |= schedule
    entry["teacher"]["training"] |= schedule
    root = tmp_path / "suite"
    root.mkdir()
    write_params(root, raw)
    params = checked(config.load(root / "params.yaml"))
    fetch(root / "data", "streets", params.benchmark("streets"))
    run_cell(teacher_cell(params, "streets"), params, root)
    cell = Cell("streets", "pspnet-resnet18", "kd", 0)
    run_cell(cell, params, root)
    record = records.read(cell, root)
    assert record is not None
    description = folder.describe(root / "data" / "streets")
    classes = len(description.classes)
    assert record.confusion("test").shape == (description.splits["test"], classes, classes)
    scored = sum(
        int((np.asarray(Image.open(root / "data/streets" / label)) != description.ignore_index).sum())
        for _, label in folder.read_list(root / "data" / "streets", "test")
    )
    assert record.confusion("test").sum() == scored


# ---- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``body`` at /file; cuts a transfer after ``cut`` bytes while there is one in the list."""

    body: ClassVar[bytes] = draw.bytes(3_000_000)
    cuts: ClassVar[list[int]] = []
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        if self.path != "/file":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if asked and self.ranges and start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if asked and self.ranges else 200)
        content = self.body[start:]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.cuts.pop(0)] if self.cuts else content)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    Server.cuts, Server.ranges, Server.asked = [], True, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/file"
        running.shutdown()


MD5 = hashlib.md5(Server.body).hexdigest()


def test_a_download_goes_on_where_it_was_cut(server: str, tmp_path: Path) -> None:
    Server.cuts = [1_200_000, 700_000]
    target = archives.download(server, tmp_path / "a" / "file", "md5", MD5)
    assert target.read_bytes() == Server.body
    assert Server.asked == [None, "bytes=1200000-", "bytes=1900000-"]
    assert archives.download("http://127.0.0.1:1/", target, "md5", MD5) == target  # it is there
    assert sorted(path.name for path in target.parent.iterdir()) == ["file"]


def test_a_connection_that_breaks_below_http_is_tried_again(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, transfer = [ssl.SSLError(1, "[SSL] record layer failure")], archives._transfer

    def once(url: str, part: Path) -> None:
        if broken:
            raise broken.pop()
        transfer(url, part)

    monkeypatch.setattr(archives, "_transfer", once)
    assert archives.download(server, tmp_path / "file", "md5", MD5).read_bytes() == Server.body


def test_two_who_want_one_file_fetch_it_once(server: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        wanted = [pool.submit(archives.download, server, tmp_path / "file", "md5", MD5) for _ in range(4)]
        assert {future.result() for future in wanted} == {tmp_path / "file"}
    assert (tmp_path / "file").read_bytes() == Server.body and Server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_server_without_ranges_begins_again(server: str, tmp_path: Path) -> None:
    Server.cuts, Server.ranges = [1_000_000], False
    sha = hashlib.sha256(Server.body).hexdigest()
    target = archives.download(server, tmp_path / "file", "sha256", sha[:8])
    assert target.read_bytes() == Server.body


def test_a_wrong_sum_is_never_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"md5 {MD5} instead of 0123"):
        archives.download(server, tmp_path / "file", "md5", "0123")
    assert [path.name for path in tmp_path.iterdir()] == [".file.lock"]


def test_a_whole_part_file_is_not_fetched_again(server: str, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(Server.body)
    assert archives.download(server, tmp_path / "file", "md5", MD5).read_bytes() == Server.body


def test_what_a_download_says(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "TRIES", 2)
    with pytest.raises(ConfigError, match="the server answered 404"):
        archives.download(server.replace("file", "none"), tmp_path / "file", "md5", MD5)
    with pytest.raises(ConfigError, match=r"could not be fetched \(.*refused.*by hand"):
        archives.download("http://127.0.0.1:9/file", tmp_path / "file", "md5", MD5)
    with pytest.raises(ConfigError, match="must begin with http"):
        archives.download("file:///etc/passwd", tmp_path / "file", "md5", MD5)
    Server.cuts = [1000, 1000]
    with pytest.raises(ConfigError, match="goes on where it stopped"):
        archives.download(server, tmp_path / "file", "md5", MD5)
    assert (tmp_path / "file.part").stat().st_size == 2000


def test_a_set_is_downloaded_once(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADE20K from a server, without a mirror."""
    place = tmp_path / "there"
    monkeypatch.setattr(ade20k, "DOWNLOAD", dict(ade20k.DOWNLOAD))
    pack(place, KINDS["ade20k"], ade20k_files(), "archives")
    content = (place / ade20k.ARCHIVE[0]).read_bytes()
    monkeypatch.setattr(Server, "body", content)
    monkeypatch.setattr(ade20k, "COUNTS", COUNTS["ade20k"])
    ade20k.DOWNLOAD[ade20k.ARCHIVE[0]] = server, ade20k.DOWNLOAD[ade20k.ARCHIVE[0]][1]
    monkeypatch.setattr(archives, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.delenv("ACFD_MIRROR", raising=False)
    for _ in range(2):
        assert build(tmp_path, KINDS["ade20k"].data).splits == SPLITS["ade20k"]
        shutil.rmtree(tmp_path / "data")
    assert len(Server.asked) == 1
