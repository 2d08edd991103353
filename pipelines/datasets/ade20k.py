"""ADE20K as in the scene parsing challenge of 2016: 150 classes, 20,210 and 2,000 images of many sizes.

*test* is the published validation split (2,000 images), on which the field reports, as the labels of the test
images are not public. ``holdout`` of the training images, evenly spaced in the sorted list, are *val*, on
which is tuned and monitored. Label 0 ("other") is ignored, 1 to 150 are the classes 0 to 149. The colours are
those of PASCAL VOC's scheme, not the challenge's. Zhou et al., CVPR 2017.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.config import ConfigError, Model, Positive, Size
from pipelines.datasets.archives import obtain
from pipelines.datasets.folder import Meta, few
from pipelines.datasets.writer import Writer, colour_map, held_out, indices, mapped

ARCHIVE = ("ADEChallengeData2016.zip", "ADEChallengeData2016")
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
MD5 = "7328b3957e407ddae1d3cbf487f149ef"
COUNTS = {"training": 20210, "validation": 2000}
IGNORE = 255
TEST = "val"  # what the field calls the split that is `test` here
IMAGE = re.compile(r"ADEChallengeData2016/images/(training|validation)/(ADE_(?:train|val)_\d{8})\.jpg")
NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
    machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
"""  # the first word for each in objectInfo150.txt of the archive
CLASSES = tuple(" ".join(name.split()) for name in NAMES.split(","))

NEEDS = "nothing by hand (ADEChallengeData2016)"
IMAGES = (20210, 512, 683)  # to train on, their usual height and width
GIGABYTES = 0.9  # to fetch, as the authors state them


class Config(Model):
    """``benchmarks.<name>.data``: ``mirror`` a folder or null; ``holdout`` how many training images are
    validated on; ``size`` (height, width) or null for the original ones, which differ."""

    dataset: Literal["ade20k"]
    mirror: Path | None
    holdout: Positive
    size: Size | None


def meta(config: Config) -> Meta:
    return Meta("ade20k", CLASSES, colour_map(len(CLASSES)), IGNORE)


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """From the archive or its folder; it is downloaded when it is nowhere."""
    source = obtain(mirror, config.mirror, "ade20k", ARCHIVE, URL, MD5)
    names = source.names()
    images = {m[0]: (m[1], m[2]) for name in names if (m := IMAGE.fullmatch(name))}
    for part, wanted in COUNTS.items():
        if (found := sum(sample[0] == part for sample in images.values())) != wanted:
            raise ConfigError(
                f"{source.path} holds {found} images ADEChallengeData2016/images/{part}/*.jpg instead of "
                f"{wanted}: it is incomplete or another package. Fetch {URL} again."
            )
    labels = {
        f"ADEChallengeData2016/annotations/{part}/{name}.png": (part, name) for part, name in images.values()
    }
    if missing := sorted(labels.keys() - set(names)):
        raise ConfigError(f"{source.path} lacks {few(missing)}: it is incomplete. Fetch {URL} again.")
    val = held_out([name for part, name in images.values() if part == "training"], config.holdout)

    table = np.full(256, -1, np.int16)
    table[0] = IGNORE
    table[1 : len(CLASSES) + 1] = range(len(CLASSES))
    writer = Writer(target, config.size)
    for file, content in source.files({**images, **labels}):
        part, name = images.get(file) or labels[file]
        split = "test" if part == "validation" else "val" if name in val else "train"
        if file in images:
            writer.image(split, name, content, file)
        else:
            writer.label(split, name, mapped(indices(content, file), table, file))
    writer.close()
