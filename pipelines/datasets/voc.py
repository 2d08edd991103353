"""PASCAL VOC 2012 with the Semantic Boundaries Dataset (SBD): 21 classes, images of about 500×375.

*test* is VOC's segmentation validation split (1,449 images), on which the field reports, as the labels of the
test images are not public. The usual training set ("train_aug", 10,582 images) is all of SBD and VOC's
training split without those 1,449; VOC's own label is taken where there is one, else SBD's, which has no
ignored border. Where SBD is nowhere, SegmentationClassAug will do, in which others ship the same labels as
PNGs: its .zip or folder, beside VOC's archive or in ``VOC2012``. ``holdout`` of the images, evenly spaced in
the sorted list, are *val*, on which is tuned and monitored. Everingham et al., IJCV 2015; Hariharan et al.,
ICCV 2011.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.config import ConfigError, Model, Positive, Size
from pipelines.datasets.archives import Source, locate, obtain, places, read
from pipelines.datasets.folder import Meta, few
from pipelines.datasets.writer import Writer, colour_map, held_out, indices, mapped

VOC = ("VOCtrainval_11-May-2012.tar", "VOCdevkit")
SBD = ("benchmark.tgz", "benchmark_RELEASE")
AUG = ("SegmentationClassAug.zip", "SegmentationClassAug")
DOWNLOAD = {  # as in torchvision.datasets.voc and .sbd
    VOC[0]: (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    SBD[0]: (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
}
COUNTS = {"train_aug": 10582, "val": 1449}
NAMES = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
    person pottedplant sheep sofa train tvmonitor
"""
CLASSES = tuple(NAMES.split())
IGNORE = 255
TEST = "val"  # what the field calls the split that is `test` here
NAME = re.compile(r"\d{4}_\d{6}")

ABOUT = "objects of 20 kinds in everyday photographs"
NEEDS = "nothing by hand (PASCAL VOC 2012, SBD)"
IMAGES = (10582, 375, 500)  # to train on, their usual height and width
GIGABYTES = 3.4  # to fetch, as the authors state them


class Config(Model):
    """``benchmarks.<name>.data``: ``mirror`` a folder or null; ``holdout`` how many training images are
    validated on; ``size`` (height, width) or null for the original ones, which differ."""

    dataset: Literal["voc"]
    mirror: Path | None
    holdout: Positive
    size: Size | None


def meta(config: Config) -> Meta:
    return Meta("voc", CLASSES, colour_map(len(CLASSES)), IGNORE)


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """From the two archives or their folders; both are downloaded when they are nowhere."""
    where = places(mirror, config.mirror, "voc")
    voc = obtain(mirror, config.mirror, "voc", VOC, *DOWNLOAD[VOC[0]])
    inside = voc.path / "VOC2012" / AUG[1]
    aug = None if locate(where, *SBD) else locate([*where, inside.parent], *AUG)
    sbd = aug or obtain(mirror, config.mirror, "voc", SBD, *DOWNLOAD[SBD[0]])
    lists = "VOCdevkit/VOC2012/ImageSets/Segmentation/{}.txt"
    train, test = (_list(voc, lists.format(split)) for split in ("train", "val"))
    if aug:
        extra = [
            Path(name).stem for name in aug.names() if re.fullmatch(rf"{AUG[1]}/{NAME.pattern}\.png", name)
        ]
    else:
        extra = [name for split in ("train", "val") for name in _list(sbd, f"{SBD[1]}/dataset/{split}.txt")]
    training = sorted({*train, *extra} - set(test))
    for what, found in (("train_aug", training), ("val", test)):
        if len(found) != COUNTS[what]:
            raise ConfigError(
                f"{voc.path} and {sbd.path} make {len(found)} images {what} instead of {COUNTS[what]}: they "
                f"are other versions. Fetch them again."
            )
    val = held_out(training, config.holdout)
    split = dict.fromkeys(training, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")

    images = {f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg": name for name in split}
    labels = {f"VOCdevkit/VOC2012/SegmentationClass/{name}.png": name for name in {*train, *test}}
    form = f"{AUG[1]}/{{}}.png" if aug else f"{SBD[1]}/dataset/cls/{{}}.mat"
    others = {form.format(name): name for name in split.keys() - {*train, *test}}
    for source, wanted in ((voc, {**images, **labels}), (sbd, others)):
        if missing := sorted(wanted.keys() - set(source.names())):
            raise ConfigError(f"{source.path} lacks {few(missing)}: it is incomplete. Fetch it again.")

    known = {value: value for value in (*range(len(CLASSES)), IGNORE)}
    writer = Writer(target, config.size)
    for file, content in voc.files({**images, **labels}):
        if file in images:
            writer.image(split[images[file]], images[file], content, file)
        else:
            name = labels[file]
            writer.label(split[name], name, mapped(indices(content, file), known, file), file)
    for file, content in sbd.files(others):
        name = others[file]
        values = indices(content, file) if aug else _segmentation(content, file)
        writer.label(split[name], name, mapped(values, known, file), file)
    writer.close()


def _list(source: Source, name: str) -> list[str]:
    found = read(source, name).decode("utf-8", "replace").split()
    if wrong := [line for line in found if not NAME.fullmatch(line)]:
        raise ConfigError(f"{name} in {source.path} is not a list of VOC images: it has {wrong[0]!r}.")
    return found


def _segmentation(content: bytes, origin: str) -> np.ndarray:
    """The classes (H, W) uint8 of an annotation of SBD."""
    from scipy.io import loadmat

    try:
        values = np.asarray(loadmat(io.BytesIO(content))["GTcls"][0]["Segmentation"][0])
        if values.ndim != 2 or values.dtype != np.uint8:
            raise ValueError(f"{values.shape} {values.dtype}")
    except Exception as error:  # a damaged MATLAB file fails in many ways
        raise ConfigError(
            f"{origin} is not an annotation of SBD ({type(error).__name__}): fetch it again."
        ) from None
    return values
