"""Cityscapes, fine annotations: 19 classes, 2,975 training and 500 validation images of 2048×1024.

You download ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip`` from cityscapes-dataset.com
under its licence and put them, or the two folders that they extract to, where ``mirror`` or ``ACFD_MIRROR``
says, or into ``downloads/``. The labels of the 1,525 test images are not public, so as everywhere in the
field the split *test* is the published validation split. What is tuned and monitored here must not be that
one: *val* is the cities ``holdout`` of the training split, which therefore has fewer than 2,975 images.
Cordts et al., CVPR 2016.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipelines.config import ConfigError, Model, Size
from pipelines.datasets.archives import Source, locate, places
from pipelines.datasets.folder import Meta, few
from pipelines.datasets.writer import Writer, indices, mapped

ARCHIVES = (  # file, top folder
    ("leftImg8bit_trainvaltest.zip", "leftImg8bit"),
    ("gtFine_trainvaltest.zip", "gtFine"),
)
COUNTS = {"train": 2975, "val": 500, "test": 1525}  # the last without labels; they may be left out
IGNORE = 255
TEST = "val"  # what the field calls the split that is `test` here
IMAGE = re.compile(r"leftImg8bit/(train|val|test)/(\w+)/(\2_\d{6}_\d{6})_leftImg8bit\.png")

CLASSES = {  # label id: name, colour
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}

ABOUT = "street scenes of 50 cities"
NEEDS = f"{' and '.join(file for file, _ in ARCHIVES)} from cityscapes-dataset.com, with an account"
IMAGES = (2975, 1024, 2048)  # to train on, their height and width
GIGABYTES = 11.2  # to fetch, as the authors state them


class Config(Model):
    """``benchmarks.<name>.data``: ``mirror`` a folder or null; ``holdout`` the training cities that are
    validated on; ``size`` (height, width) or null for the original."""

    dataset: Literal["cityscapes"]
    mirror: Path | None
    holdout: list[str] = Field(min_length=1)
    size: Size | None


def meta(config: Config) -> Meta:
    names, colours = zip(*CLASSES.values(), strict=True)
    return Meta("cityscapes", names, colours, IGNORE)


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """Map the 34 label ids to the 19 classes that are scored, the others are ignored; images are copied."""
    images, labels = _sources(places(mirror, config.mirror, "cityscapes"))
    samples = {m[0]: (m[1], m[2], m[3]) for name in images.names() if (m := IMAGE.fullmatch(name))}
    for split, wanted in COUNTS.items():
        found = sum(sample[0] == split for sample in samples.values())
        if found != wanted and not (split == "test" and found == 0):
            raise ConfigError(
                f"{images.path} holds {found} images leftImg8bit/{split}/<city>/*_leftImg8bit.png instead of "
                f"{wanted}: it is incomplete or another package. Fetch {ARCHIVES[0][0]} again."
            )
    samples = {name: sample for name, sample in samples.items() if sample[0] != "test"}
    cities = {city for split, city, _ in samples.values() if split == "train"}
    if unknown := sorted(set(config.holdout) - cities):
        raise ConfigError(
            f"holdout names {', '.join(unknown)}; the training cities are {', '.join(sorted(cities))}."
        )
    if not cities - set(config.holdout):
        raise ConfigError("holdout names all training cities: leave some to train on.")
    annotations = {
        f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png": (split, city, stem)
        for split, city, stem in samples.values()
    }
    if missing := sorted(annotations.keys() - set(labels.names())):
        raise ConfigError(f"{labels.path} lacks {few(missing)}: fetch {ARCHIVES[1][0]} again.")

    def place(split: str, city: str) -> str:
        return "test" if split == "val" else "val" if city in config.holdout else "train"

    known = dict.fromkeys(range(34), IGNORE) | {label: value for value, label in enumerate(CLASSES)}
    writer = Writer(target, config.size)
    for name, content in images.files(samples):
        split, city, stem = samples[name]
        writer.image(place(split, city), stem, content, name)
    for name, content in labels.files(annotations):
        split, city, stem = annotations[name]
        writer.label(place(split, city), stem, mapped(indices(content, name), known, name), name)
    writer.close()


def _sources(where: list[Path]) -> tuple[Source, Source]:
    """The images and the labels."""
    images, labels = (locate(where, *archive) for archive in ARCHIVES)
    if images is None or labels is None:
        absent = [
            archive for (archive, _), found in zip(ARCHIVES, (images, labels), strict=True) if not found
        ]
        raise ConfigError(
            f"Cityscapes needs {' and '.join(absent)}: register at cityscapes-dataset.com, download, and put "
            f"the archive or its extracted folder into {where[-2]}, or where `mirror` in params.yaml or "
            f"ACFD_MIRROR says."
        )
    return images, labels
