"""ADE20K as in the scene parsing challenge of 2016: 150 classes, 20,210 and 2,000 images of many sizes.

*test* is the published validation split (2,000 images), on which the field reports, as the labels of the test
images are not public. ``holdout`` of the training images, evenly spaced in the sorted list, are *val*, on
which is tuned and monitored. Label 0 ("other") is ignored, 1 to 150 are the classes 0 to 149. Zhou et al.,
CVPR 2017.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pipelines.config import ConfigError, Model, Positive, Size
from pipelines.datasets.archives import obtain
from pipelines.datasets.folder import Meta, few
from pipelines.datasets.writer import Writer, held_out, indices, mapped

ARCHIVE = ("ADEChallengeData2016.zip", "ADEChallengeData2016")
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
DOWNLOAD = {ARCHIVE[0]: (URL, "7328b3957e407ddae1d3cbf487f149ef")}
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
COLOURS = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846
    08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc
    ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14
    ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff
    ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00
    008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
    ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900
    00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff
    ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff
    4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""  # RGB in hexadecimal: color150.mat of the challenge's development kit, in the order of the classes

ABOUT = "scenes of all kinds, 150 classes"
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
    colours = [tuple(bytes.fromhex(colour)) for colour in COLOURS.split()]
    return Meta("ade20k", CLASSES, tuple((red, green, blue) for red, green, blue in colours), IGNORE)


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """From the archive or its folder; it is downloaded when it is nowhere."""
    source = obtain(mirror, config.mirror, "ade20k", ARCHIVE, *DOWNLOAD[ARCHIVE[0]])
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

    known = {0: IGNORE} | {value + 1: value for value in range(len(CLASSES))}
    writer = Writer(target, config.size)
    for file, content in source.files({**images, **labels}):
        part, name = images.get(file) or labels[file]
        split = "test" if part == "validation" else "val" if name in val else "train"
        if file in images:
            writer.image(split, name, content, file)
        else:
            writer.label(split, name, mapped(indices(content, file), known, file), file)
    writer.close()
