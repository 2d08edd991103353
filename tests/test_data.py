"""The data: what fetch leaves on disk, which faults it and the reader find, and the purity of training
batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from pipelines.config import ROOT, Benchmark, ConfigError, Training
from pipelines.datasets import archives, camvid, folder, streets, transforms
from pipelines.stages.fetch import fetch

STREETS = {"dataset": "streets", "size": [32, 48], "train": 6, "val": 2, "test": 2, "seed": 0}
STILL = {"scale": (1.0, 1.0), "flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
LIVELY = {"scale": (0.5, 2.0), "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.3, "hue": 0.1}
IGNORE = 255


def benchmark(data: dict) -> Benchmark:
    """A benchmark of which only the data matters here."""
    return Benchmark.model_construct(data=data)


def training(batch_size: int = 4, crop: tuple[int, int] = (24, 40), **augmentation) -> Training:
    return Training.model_validate(
        {
            "steps": 10,
            "batch_size": batch_size,
            "crop": crop,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "power": 0.9,
            "auxiliary_weight": 0.4,
            "precision": "fp32",
            "validate_every": 10,
            "augmentation": STILL | augmentation,
        }
    )


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tree(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A small fetched benchmark, ``data/small``."""
    data = tmp_path_factory.mktemp("pristine") / "data"
    fetch(data, "small", benchmark(STREETS))
    return data / "small"


@pytest.fixture
def root(pristine, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(pristine, tmp_path / "data" / "small"))


# --- what fetch leaves on disk ---------------------------------------------------------------------------


def test_fetched_folder_is_complete_and_described(pristine):
    description = folder.check(pristine)
    assert entries(pristine.parent) == {"small"}
    assert description.classes == streets.META.classes and len(description.palette) == len(
        description.classes
    )
    assert description.size == (32, 48) and description.splits == {"train": 6, "val": 2, "test": 2}
    on_disk = tree(pristine)
    assert description.sha256 == on_disk.pop("dataset.json")
    assert description.files == on_disk
    text = (pristine / "dataset.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_load_gives_the_pixels_of_the_files(pristine):
    split = folder.load(pristine, "train")
    assert split.images.shape == (6, 3, 32, 48) and split.images.dtype == torch.uint8
    assert split.labels.shape == (6, 32, 48) and split.labels.dtype == torch.uint8
    assert split.names == [f"train/{i:05d}.png" for i in range(6)]
    for index, name in enumerate(split.names):
        assert np.array_equal(split.images[index].permute(1, 2, 0), np.asarray(Image.open(pristine / name)))
        assert np.array_equal(
            split.labels[index], np.asarray(Image.open(pristine / name.replace("/", "annot/")))
        )


def test_fetch_and_checks_start_without_torch():
    """Importing torch takes seconds, which the data stage has no use for."""
    modules = "pipelines.stages.fetch, pipelines.datasets.camvid, pipelines.datasets.streets"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_failure_leaves_nothing_new_and_keeps_the_old(root, monkeypatch):
    data, before = root.parent, tree(root)

    def half(config, target, mirror):
        (target / "train").mkdir()
        (target / "train" / "x.png").write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(streets, "prepare", half)
    for name in ("small", "fresh"):
        with pytest.raises(RuntimeError, match=r"killed"):
            fetch(data, name, benchmark(STREETS))
    assert entries(data) == {"small"} and tree(root) == before


def test_leftovers_of_killed_runs_are_cleared(root):
    data = root.parent
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (
        f"small.part-{dead.pid}",
        f"small.part-{dead.pid}-old",
        f"other.part-{dead.pid}",
        f"small.part-{os.getppid()}",
    ):
        (data / name / "train").mkdir(parents=True)
    (root / "train.txt").unlink()  # an older, damaged folder is replaced whole
    fetch(data, "small", benchmark(STREETS))
    # another benchmark's leftovers and those of a live process are not this run's to clear
    assert entries(data) == {"small", f"other.part-{dead.pid}", f"small.part-{os.getppid()}"}
    folder.check(root)


def test_data_that_fail_the_check_are_not_left_behind(tmp_path, monkeypatch):
    original = streets.scene

    def wrong(*args):
        image, label = original(*args)
        label[3, 4] = 77
        return image, label

    monkeypatch.setattr(streets, "scene", wrong)
    with pytest.raises(ConfigError, match=r"train(annot)?/00000.png has the unknown value 77"):
        fetch(tmp_path / "data", "small", benchmark(STREETS))
    assert entries(tmp_path / "data") == set()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "steets"}, "There is no data set 'steets' .*camvid, cityscapes, custom, streets, voc"),
        ({"sead": 1}, "benchmarks.small.data.sead is not a known setting"),
        ({"train": 0}, "benchmarks.small.data.train = 0"),
        ({"size": [32]}, "benchmarks.small.data.size"),
    ],
)
def test_bad_settings_are_named(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        fetch(tmp_path / "data", "small", benchmark(STREETS | change))
    assert not (tmp_path / "data").exists()


# --- faults in the files ---------------------------------------------------------------------------------


def test_missing_truncated_and_altered_files_are_named(root):
    (root / "train/00001.png").unlink()
    image = root / "train/00002.png"
    image.write_bytes(image.read_bytes()[:-40])
    label = root / "trainannot/00003.png"
    pixels = np.asarray(Image.open(label)).copy()
    pixels[0, 0] = (pixels[0, 0] + 1) % 12
    Image.fromarray(pixels).save(label)
    said = (
        r"missing: train/00001.png; truncated: train/00002.png; altered: trainannot/00003.png"
        r".*Delete .* and run `python -m pipelines.stages.fetch --benchmark "
    )
    for use in (lambda: folder.load(root, "train"), lambda: folder.check(root)):
        with pytest.raises(ConfigError, match=said):
            use()
    folder.load(root, "val")  # the other splits are whole


def test_many_missing_files_are_counted(root):
    shutil.rmtree(root / "train")
    with pytest.raises(ConfigError, match=r"train/00000.png, .*, … \(6 in all\)"):
        folder.load(root, "train")


def test_altered_list_is_named(root):
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"altered: train.txt"):
        folder.load(root, "train")


@pytest.mark.parametrize("content", [None, "", "{}", '{"name": 3'])
def test_absent_or_damaged_description(root, content):
    if content is None:
        (root / "dataset.json").unlink()
    else:
        (root / "dataset.json").write_text(content)
    with pytest.raises(ConfigError, match=r"dataset.json .*`python -m pipelines.stages.fetch --benchmark "):
        folder.load(root, "train")


def redescribed(root: Path) -> None:
    """Accept the files as they are now, so that only their content can be at fault."""
    description = folder.describe(root)
    (root / "dataset.json").unlink()
    folder.write_description(
        root,
        folder.Meta(description.name, description.classes, description.palette, description.ignore_index),
    )


def put(root: Path, path: str, array: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(root / path)
    redescribed(root)


@pytest.mark.parametrize("value", [12, 254])
def test_unknown_label_value(root, value):
    label = np.zeros((32, 48), np.uint8)
    label[31, 47] = value
    put(root, "testannot/00001.png", label)
    with pytest.raises(
        ConfigError, match=rf"testannot/00001.png has the unknown value {value}; .* 0 to 11 and 255"
    ):
        folder.check(root)


def test_known_label_values_pass(root):
    label = np.full((32, 48), IGNORE, np.uint8)
    label[0, :12] = range(12)
    put(root, "testannot/00001.png", label)
    folder.check(root)


def test_image_and_label_of_different_size(root):
    put(root, "valannot/00000.png", np.zeros((32, 47), np.uint8))
    with pytest.raises(
        ConfigError, match=r"val/00000.png is 48x32 but its label valannot/00000.png is 47x32"
    ):
        folder.check(root)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("test/00000.png", "RGBA"),
        ("test/00000.png", "P"),
        ("test/00000.png", "L"),
        ("testannot/00000.png", "RGBA"),
    ]
    + [("testannot/00000.png", mode) for mode in ("P", "RGB", "1")],
)
def test_wrong_modes(root, path, mode):
    put(root, path, np.zeros((32, 48, 3), np.uint8), mode)
    with pytest.raises(ConfigError, match=f"{path} has the mode {mode}"):
        folder.check(root)


def test_sixteen_bit_label(root):
    put(root, "testannot/00000.png", np.zeros((32, 48), np.uint16))
    with pytest.raises(ConfigError, match=r"testannot/00000.png has the mode .* with 16 bits"):
        folder.check(root)


def test_file_that_is_no_image(root):
    (root / "test/00000.png").write_text("not a picture")
    with pytest.raises(ConfigError, match=r"test/00000.png is no image that can be read"):
        redescribed(root)


def test_file_named_twice(root):
    lines = (root / "val.txt").read_text().splitlines(keepends=True)
    (root / "val.txt").write_text(lines[0] * 2)
    redescribed(root)
    with pytest.raises(ConfigError, match=r"val/00000.png is named twice"):
        folder.check(root)


def test_leak_between_splits(root):
    shutil.copy(root / "train/00004.png", root / "test/00000.png")
    redescribed(root)
    with pytest.raises(ConfigError, match=r"train/00004.png and test/00000.png are the same image"):
        folder.check(root)


@pytest.mark.parametrize(
    "line", ["train/00000.png", "test/00000.png testannot/00000.png", "../x.png trainannot/00000.png", ""]
)
def test_list_line_of_another_form(root, line):
    (root / "train.txt").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"Line 1 of data/small/train.txt"):
        redescribed(root)


# --- streets ---------------------------------------------------------------------------------------------


def test_streets_have_the_same_bytes_twice(pristine, tmp_path):
    fetch(tmp_path / "data", "again", benchmark(STREETS))
    assert tree(tmp_path / "data" / "again") == tree(pristine)


def test_streets_differ_by_seed_split_and_index():
    scenes = [(0, "train", 0), (1, "train", 0), (0, "test", 0), (0, "train", 1)]
    images = [streets.scene((32, 48), *which)[0] for which in scenes]
    assert len({image.tobytes() for image in images}) == len(scenes)


def test_streets_scene_does_not_depend_on_how_many_there_are(pristine, tmp_path):
    fetch(tmp_path / "data", "fewer", benchmark(STREETS | {"train": 2}))
    fewer = tmp_path / "data" / "fewer"
    assert (fewer / "train/00001.png").read_bytes() == (pristine / "train/00001.png").read_bytes()


def test_streets_show_every_class_rare_ones_rarely():
    labels = np.stack([streets.scene((64, 96), 0, "train", index)[1] for index in range(60)])
    counts = np.bincount(labels.ravel(), minlength=256)
    assert set(np.flatnonzero(counts)) == {*range(12), IGNORE}
    share = counts[:12] / counts[:12].sum()
    assert share.max() < 0.5, "no class may be most of the picture"
    assert share[streets.CYCLIST] < 0.01 and share[streets.SIGN] < 0.02
    assert 0.01 < counts[IGNORE] / counts.sum() < 0.15
    poles = labels == streets.POLE
    runs = (
        poles[:, :, 1:-1] & ~poles[:, :, :-2] & ~poles[:, :, 2:]
    )  # pole pixels alone in their row: one pixel wide
    assert runs.sum() > 0.3 * poles.sum()


def test_streets_cannot_be_told_by_colour_alone():
    """The best possible lookup from colour to class, fitted on the very images it is scored on, stays far
    from right.
    """
    scenes = [streets.scene((64, 96), 0, "train", index) for index in range(24)]
    image, label = (
        np.concatenate([scene[part].reshape(-1, *scene[part].shape[2:]) for scene in scenes])
        for part in (0, 1)
    )
    code = (image // 32).astype(int) @ np.array([64, 8, 1])
    table = np.zeros((512, 12))
    known = label != IGNORE
    np.add.at(table, (code[known], label[known]), 1)
    guess = table.argmax(1)[code[known]]
    ious = [
        ((guess == c) & (label[known] == c)).sum() / ((guess == c) | (label[known] == c)).sum()
        for c in range(12)
    ]
    assert np.mean(ious) < 0.35


# --- CamVid ----------------------------------------------------------------------------------------------


@pytest.fixture
def little_camvid(tmp_path, monkeypatch) -> Path:
    """A stand-in of the original's form (3 samples of 24×18, a manifest of its own) as ``mirror/CamVid``."""
    source = tmp_path / "mirror" / "CamVid"
    rng = np.random.default_rng(0)
    for index, split in enumerate(folder.SPLITS):
        (source / split).mkdir(parents=True)
        (source / f"{split}annot").mkdir()
        Image.fromarray(rng.integers(0, 256, (18, 24, 3), np.uint8)).save(source / split / f"{index}.png")
        Image.fromarray(rng.integers(0, 12, (18, 24), np.uint8)).save(
            source / f"{split}annot" / f"{index}.png"
        )
        (source / f"{split}.txt").write_text(
            f"/SegNet/CamVid/{split}/{index}.png /SegNet/CamVid/{split}annot/{index}.png\n"
        )
    manifest = tmp_path / "camvid.sha256"
    manifest.write_text("".join(f"{known}  {path}\n" for path, known in tree(source).items()))
    monkeypatch.setattr(camvid, "MANIFEST", manifest)
    monkeypatch.delenv("ACFD_MIRROR", raising=False)
    return source


def camvid_data(**change) -> Benchmark:
    return benchmark({"dataset": "camvid", "size": None, "mirror": None} | change)


@pytest.mark.parametrize("inner", [True, False])
def test_camvid_mirror_contains_the_folder_or_is_it(little_camvid, tmp_path, inner):
    fetch(tmp_path / "data", "c", camvid_data(mirror=str(little_camvid if inner else little_camvid.parent)))
    copied = tmp_path / "data" / "c"
    assert (copied / "train.txt").read_text() == "train/0.png trainannot/0.png\n"
    for path in ("train/0.png", "testannot/2.png"):
        assert (copied / path).read_bytes() == (little_camvid / path).read_bytes()


def test_camvid_resizing_averages_images_and_takes_the_centre_of_labels(little_camvid, tmp_path):
    fetch(tmp_path / "data", "c", camvid_data(mirror=str(little_camvid), size=[6, 8]))
    split = folder.load(tmp_path / "data" / "c", "val")
    image, label = (np.asarray(Image.open(little_camvid / path)) for path in ("val/1.png", "valannot/1.png"))
    blocks = image.reshape(6, 3, 8, 3, 3).mean((1, 3))
    assert (
        np.abs(split.images[0].permute(1, 2, 0).numpy() - blocks).max() <= 1
    )  # Pillow rounds along each axis
    assert np.array_equal(split.labels[0], label[1::3, 1::3])


def test_a_mirror_may_begin_at_home_or_in_the_checkout(little_camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(little_camvid.parent))
    fetch(tmp_path / "data", "c", camvid_data(mirror=f"~/{little_camvid.name}"))
    assert archives.places(None, Path("~"), "voc")[1] == little_camvid.parent
    monkeypatch.setattr(archives, "ROOT", little_camvid.parent)
    monkeypatch.chdir(tmp_path)
    fetch(tmp_path / "data", "d", camvid_data(mirror=little_camvid.name))


def test_camvid_environment_goes_before_the_setting(little_camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFD_MIRROR", str(little_camvid.parent))
    fetch(tmp_path / "data", "c", camvid_data(mirror="/nowhere"))
    monkeypatch.setenv("ACFD_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"nowhere holds no CamVid folder"):
        fetch(tmp_path / "data", "c", camvid_data(mirror=str(little_camvid)))


def test_camvid_missing_and_altered_originals_are_named(little_camvid, tmp_path):
    (little_camvid / "train/0.png").unlink()
    (little_camvid / "val.txt").write_text("")
    with pytest.raises(ConfigError, match=r"missing: train/0.png; altered: val.txt"):
        fetch(tmp_path / "data", "c", camvid_data(mirror=str(little_camvid)))
    assert entries(tmp_path / "data") == set()


def test_camvid_as_on_kaggle(little_camvid, tmp_path):
    """The split by the names, wherever the files lie; the classes by an independent list of some colours."""
    grouped = {
        (0, 128, 64): "building",  # bridge
        (0, 0, 64): "pole",  # traffic cone
        (192, 0, 64): "road",  # lane marking
        (128, 128, 192): "pavement",  # road shoulder
        (192, 192, 0): "tree",  # vegetation
        (0, 64, 64): "sign symbol",  # traffic light
        (192, 64, 128): "car",  # train
        (64, 128, 64): "pedestrian",  # animal
        (192, 0, 192): "bicyclist",  # motorcycle
        (128, 128, 128): "sky",
        (64, 64, 128): "fence",
        (0, 0, 0): None,
    }
    mirror, rng = tmp_path / "kaggle", np.random.default_rng(0)
    colours = np.array([*grouped], np.uint8)
    drawn = {}
    for name, place in (("0", "val"), ("1", "train"), ("2", "test")):
        drawn[name] = rng.integers(0, len(colours), (36, 48))
        for kind, file, array in (
            ("", f"{name}.png", rng.integers(0, 256, (36, 48, 3), np.uint8)),
            ("_labels", f"{name}_L.png", colours[drawn[name]]),
        ):
            (mirror / "CamVid" / f"{place}{kind}").mkdir(parents=True)
            Image.fromarray(array).save(mirror / "CamVid" / f"{place}{kind}" / file)
    with pytest.raises(ConfigError, match=r"holds no CamVid .* `variant: kaggle` is to be set"):
        fetch(tmp_path / "data", "c", camvid_data(mirror=str(mirror)))
    with pytest.raises(ConfigError, match=r"is not in .*train_labels; it is not downloaded"):
        fetch(tmp_path / "data", "c", camvid_data(mirror=str(little_camvid), variant="kaggle"))
    found = fetch(tmp_path / "data", "c", camvid_data(mirror=str(mirror), variant="kaggle"))
    assert (found.classes, found.size) == (camvid.META.classes, (36, 48))
    numbers = [camvid.META.classes.index(name) if name else 11 for name in grouped.values()]
    for name, split in (("0", "train"), ("1", "val"), ("2", "test")):
        label = np.asarray(Image.open(tmp_path / "data" / "c" / f"{split}annot" / f"{name}.png"))
        assert np.array_equal(label, np.array(numbers)[drawn[name]])
    assert len({colour for own in camvid.GROUPS for colour in own.split()}) == 32
    (mirror / "CamVid" / "test_labels" / "2_L.png").unlink()
    with pytest.raises(ConfigError, match=r"lacks 2_L.png"):
        fetch(tmp_path / "data", "c", camvid_data(mirror=str(mirror), variant="kaggle"))


def git(*arguments: str, cwd: Path) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.autocrlf=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_camvid_from_git_at_a_commit(little_camvid, tmp_path, monkeypatch):
    repository = little_camvid.parent
    (repository / "Models").mkdir()
    (repository / "Models" / "large.bin").write_bytes(b"x")
    git("init", "--quiet", cwd=repository)
    git("config", "uploadpack.allowFilter", "true", cwd=repository)
    git("config", "uploadpack.allowAnySHA1InWant", "true", cwd=repository)
    git("add", ".", cwd=repository)
    git("commit", "--quiet", "-m", "one", cwd=repository)
    monkeypatch.setattr(camvid, "COMMIT", git("rev-parse", "HEAD", cwd=repository))
    monkeypatch.setattr(camvid, "REPOSITORY", repository.as_uri())
    git("rm", "-rq", "CamVid", cwd=repository)
    git("commit", "--quiet", "-m", "two", cwd=repository)
    fetch(tmp_path / "data", "c", camvid_data())
    assert folder.check(tmp_path / "data" / "c").splits == {"train": 1, "val": 1, "test": 1}
    assert not (tmp_path / "data" / "c" / ".clone").exists()


def test_camvid_without_network_says_what_to_do(little_camvid, tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, "REPOSITORY", (tmp_path / "no-such-repository").as_uri())
    with pytest.raises(ConfigError, match=r"could not be fetched from .* set ACFD_MIRROR"):
        fetch(tmp_path / "data", "c", camvid_data())
    assert entries(tmp_path / "data") == set()


def test_real_camvid_from_the_mirror(tmp_path, monkeypatch):
    mirror = Path(os.environ.get("ACFD_MIRROR") or ROOT.parent / "shared" / "mirrors")
    if not any((at / "train.txt").is_file() for at in (mirror, mirror / "CamVid")):
        pytest.skip("no CamVid mirror: set ACFD_MIRROR")
    monkeypatch.setenv("ACFD_MIRROR", str(mirror))
    description = fetch(tmp_path / "data", "camvid-small", camvid_data(size=[120, 160]))
    assert description.splits == {"train": 367, "val": 101, "test": 233}
    assert (len(description.classes), description.ignore_index, description.size) == (11, 11, (120, 160))
    counts = torch.bincount(
        folder.load(tmp_path / "data" / "camvid-small", "val").labels.flatten().long(), minlength=256
    )
    assert (counts[:12] > 0).all() and counts[12:].sum() == 0
    road, sign = counts[3] / counts.sum(), counts[6] / counts.sum()
    assert 0.2 < road < 0.4 and sign < 0.02


# --- training batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded() -> folder.Split:
    """Seven images whose red and green tell where a pixel comes from and whose blue the sample; labels tell
    the sample.
    """
    count, height, width = 7, 32, 48
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    images[:, 0] = (torch.arange(height) * 8)[:, None].to(torch.uint8)
    images[:, 1] = (torch.arange(width) * 5).to(torch.uint8)
    images[:, 2] = (torch.arange(count) * 30)[:, None, None].to(torch.uint8)
    labels = (
        (torch.arange(height)[:, None] // 8 * 6 + torch.arange(width) // 8)
        .expand(count, height, width)
        .to(torch.uint8)
    )
    return folder.Split(images, labels, [f"train/{i}.png" for i in range(count)])


def restored(images: torch.Tensor) -> torch.Tensor:
    """Normalised images back in 0 … 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (transforms.MEAN, transforms.STD))
    return (images * std + mean) * 255


def samples(split, steps, *, batch_size, seed=0) -> list[int]:
    """The samples of some steps, read off the blue channel."""
    plain = training(batch_size, (32, 48))
    batches = [transforms.training_batch(split, plain, IGNORE, seed, step)[0] for step in steps]
    return [round(float(x) / 30) for batch in batches for x in restored(batch)[:, 2, 0, 0]]


def test_batch_is_a_pure_function_of_seed_and_step(coded):
    lively = training(**LIVELY)
    torch.manual_seed(0)
    images, labels = transforms.training_batch(coded, lively, IGNORE, 3, 5)
    state = torch.get_rng_state()
    assert images.shape == (4, 3, 24, 40) and images.dtype == torch.float32
    assert labels.shape == (4, 24, 40) and labels.dtype == torch.int64
    transforms._order.cache_clear()
    for step in (9, 0, 6):
        transforms.training_batch(coded, lively, IGNORE, 3, step)
    assert torch.equal(torch.get_rng_state(), state), "drawing a batch must leave the global generator alone"
    for reseed in (torch.manual_seed, random.seed, np.random.seed):
        reseed(123)
    again = transforms.training_batch(coded, lively, IGNORE, 3, 5)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(images, transforms.training_batch(coded, lively, IGNORE, seed, step)[0])


def test_batch_is_the_same_under_autocast(coded):
    """The engine may draw batches with bf16 switched on; pixels must not be rounded by it."""
    lively = training(**LIVELY)
    plain = transforms.training_batch(coded, lively, IGNORE, 0, 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, transforms.training_batch(coded, lively, IGNORE, 0, 1)[0])


def test_every_sample_once_per_epoch_across_batch_borders(coded):
    order = samples(
        coded, range(7), batch_size=3
    )  # 21 positions = 3 epochs of 7, whose ends lie inside of batches
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"
    assert order != samples(coded, range(7), batch_size=3, seed=1)


def test_order_of_samples_does_not_know_the_batch_size(coded):
    """A batch larger than the data set, too."""
    assert samples(coded, range(2), batch_size=9) == samples(coded, range(9), batch_size=2)


def test_augmentation_belongs_to_the_position_not_the_batch(coded):
    """The second half of a batch of four is the next batch of two: what lets processes share a step between
    them.
    """
    whole = transforms.training_batch(coded, training(4, **LIVELY), IGNORE, 0, 1)
    halves = [transforms.training_batch(coded, training(2, **LIVELY), IGNORE, 0, step) for step in (2, 3)]
    torch.testing.assert_close(whole[0], torch.cat([half[0] for half in halves]), rtol=0, atol=1e-5)
    assert torch.equal(whole[1], torch.cat([half[1] for half in halves]))


def test_without_augmentation_a_batch_is_the_normalised_image(coded):
    images, labels = transforms.training_batch(coded, training(7, (32, 48)), IGNORE, 0, 0)
    which = torch.tensor(samples(coded, [0], batch_size=7))
    torch.testing.assert_close(images, transforms.normalise(coded.images[which]), rtol=0, atol=1e-5)
    assert torch.equal(labels, coded.labels[which].long())


def test_normalise_by_hand():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(transforms.normalise(image).flatten(), torch.tensor(expected))


def test_scaled_images_equal_torch_interpolation(coded):
    """The same scale, without a crop: bilinear with antialiasing, and nearest at pixel centres."""
    for size in ((16, 24), (20, 30), (48, 72), (63, 94)):
        scale = size[0] / 32
        if round(48 * scale) != size[1]:
            continue
        images, labels = transforms.training_batch(
            coded, training(3, size, scale=(scale, scale)), IGNORE, 0, 0
        )
        which = torch.tensor(samples(coded, [0], batch_size=3))
        expected = F.interpolate(
            coded.images[which].float(), size, mode="bilinear", antialias=True, align_corners=False
        )
        torch.testing.assert_close(restored(images), expected, rtol=0, atol=2e-3)
        nearest = F.interpolate(coded.labels[which, None].float(), size, mode="nearest-exact")[:, 0].long()
        assert torch.equal(labels, nearest)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 10**6), low=st.sampled_from([0.5, 0.8, 1.0]), high=st.sampled_from([1.0, 1.6, 2.0])
)
def test_labels_stay_on_their_pixels(coded, step, low, high):
    """Red and green say where a pixel was, the label in which 8×8 block: both must agree under scale, crop
    and flip.
    """
    images, labels = transforms.training_batch(coded, training(scale=(low, high), flip=0.5), IGNORE, 0, step)
    pixels, known = restored(images), labels != IGNORE
    row, column = pixels[:, 0] / 8, pixels[:, 1] / 5
    expected = labels.div(6, rounding_mode="floor") * 8 + 3.5, labels % 6 * 8 + 3.5
    tolerance = 4.5 + 0.5 / low  # half a block, and half an output pixel for nearest against bilinear
    assert ((row - expected[0]).abs()[known] <= tolerance).all()
    assert ((column - expected[1]).abs()[known] <= tolerance).all()


def test_flips_happen_in_half_of_the_samples_and_mirror_both(coded):
    directions = []
    for step in range(40):
        images, labels = transforms.training_batch(coded, training(4, (32, 48), flip=0.5), IGNORE, 0, step)
        column = restored(images)[:, 1, 0]
        assert torch.equal(labels[:, 0, 0] > labels[:, 0, -1], column[:, 0] > column[:, -1])
        directions += (column[:, 0] > column[:, -1]).tolist()
    assert 55 <= sum(directions) <= 105  # of 160


def test_crops_reach_every_border(coded):
    rows, columns = set(), set()
    for step in range(100):
        pixels = restored(transforms.training_batch(coded, training(4, (24, 40)), IGNORE, 0, step)[0])
        rows |= set((pixels[:, 0, 0, 0] / 8).round().int().tolist())
        columns |= set((pixels[:, 1, 0, 0] / 5).round().int().tolist())
    assert rows == set(range(9)) and columns == set(range(9))


def test_padding_is_ignored_and_holds_the_mean(coded):
    images, labels = transforms.training_batch(
        coded, training(4, (40, 60), **(LIVELY | {"scale": (0.5, 0.75)})), IGNORE, 0, 0
    )
    outside = labels == IGNORE
    for index in range(4):
        assert 16 * 24 <= (~outside[index]).sum() <= 24 * 36
        rows, columns = (~outside[index]).nonzero().unbind(1)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert area == (~outside[index]).sum(), "the sample is one rectangle"
    assert (images.permute(0, 2, 3, 1)[outside] == 0).all()
    assert (images.permute(0, 2, 3, 1)[~outside] != 0).any(-1).float().mean() > 0.99


def test_photometric_jitter_changes_images_and_leaves_labels(coded):
    colours = {key: LIVELY[key] for key in ("brightness", "contrast", "saturation", "hue")}
    geometry = {"scale": (0.8, 1.5), "flip": 0.5}
    plain = transforms.training_batch(coded, training(**geometry), IGNORE, 0, 0)
    for which in colours:
        jittered = transforms.training_batch(
            coded, training(**geometry, **{which: colours[which]}), IGNORE, 0, 0
        )
        assert torch.equal(plain[1], jittered[1])
        assert (plain[0] - jittered[0]).abs().amax((1, 2, 3)).gt(0.05).all(), (
            f"{which} must change every image"
        )


def test_photometric_functions_equal_torchvision():
    reference = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(6, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    images[0] = images[0, :1]  # gray: no hue
    images[1, :, :4] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)  # saturated, with ties of two channels
    images[2] = 0
    factors = torch.tensor([0.3, 0.7, 1.0, 1.2, 1.9, 0.0])
    for name in ("brightness", "contrast", "saturation"):
        expected = torch.stack(
            [getattr(reference, f"adjust_{name}")(x, float(f)) for x, f in zip(images, factors, strict=True)]
        )
        torch.testing.assert_close(getattr(transforms, name)(images, factors), expected, rtol=0, atol=1e-5)
    shifts = torch.tensor([0.2, -0.4, 0.1, 0.5, -0.05, 0.0])
    expected = torch.stack([reference.adjust_hue(x, float(f)) for x, f in zip(images, shifts, strict=True)])
    torch.testing.assert_close(transforms.hue(images, shifts), expected, rtol=0, atol=1e-5)


def test_ignored_crop_is_possible_and_whole():
    """A crop without a single label is a valid batch; the loss has to cope, not the data."""
    split = folder.Split(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.full((2, 8, 8), IGNORE, dtype=torch.uint8),
        ["a", "b"],
    )
    images, labels = transforms.training_batch(split, training(2, (8, 8), **LIVELY), IGNORE, 0, 0)
    assert (labels == IGNORE).all() and images.isfinite().all()
