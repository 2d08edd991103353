"""A data set of your own: a folder of images, a folder of labels, a list of classes, three split files.

Labels are PNGs with 8 bits and one channel, gray or with a palette: the value is the class, in the order of
``classes``, or ``ignore_index``. Images are turned as their camera noted (EXIF), which is how they were seen
when they were labelled. A split file has one sample a line: the name of its image, with or without
folders below ``images`` and with or without its ending; the label has the same name below ``labels``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from pipelines.config import ROOT, ConfigError, Model, Size
from pipelines.datasets.folder import SPLITS, Meta, few
from pipelines.datasets.writer import Writer, indices, mapped

ENDINGS = (".png", ".jpg", ".jpeg")
NEEDS = "your own"
GIGABYTES = None  # to fetch
Channel = Annotated[int, Field(ge=0, le=255)]


class Splits(Model):
    """The three split files."""

    train: Path
    val: Path
    test: Path


class Config(Model):
    """``benchmarks.<name>.data``. Paths are relative to the repository, or to ``ACFD_MIRROR`` where that is
    set; ``classes`` maps names to colours; ``size`` (height, width) or null for the original ones."""

    dataset: Literal["custom"]
    images: Path
    labels: Path
    classes: dict[str, tuple[Channel, Channel, Channel]] = Field(min_length=2, max_length=255)
    ignore_index: Channel
    splits: Splits
    size: Size | None

    @model_validator(mode="after")
    def _ignored(self) -> Config:
        if self.ignore_index < len(self.classes):
            raise ValueError(f"ignore_index must be beyond the classes 0 to {len(self.classes) - 1}")
        return self


def meta(config: Config) -> Meta:
    return Meta("custom", tuple(config.classes), tuple(config.classes.values()), config.ignore_index)


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """Pair images with labels, check the labels' values, copy."""
    base = mirror or ROOT
    images, labels = _folder(base / config.images, "images"), _folder(base / config.labels, "labels")
    stems: dict[str, list[Path]] = {}
    for file in sorted(images.rglob("*")):
        if file.suffix.lower() in ENDINGS and file.is_file():
            stems.setdefault(file.relative_to(images).with_suffix("").as_posix(), []).append(file)

    table = np.full(256, -1, np.int16)
    table[: len(config.classes)] = range(len(config.classes))
    table[config.ignore_index] = config.ignore_index
    chosen: dict[str, tuple[str, str]] = {}  # sample: split, split file
    for split in SPLITS:
        listed = base / getattr(config.splits, split)
        for line in _lines(listed, split):
            stem = Path(line).with_suffix("").as_posix() if line.lower().endswith(ENDINGS) else line
            if stem in chosen:
                raise ConfigError(
                    f"{stem} stands twice in the split files ({chosen[stem][1]}, {listed.name}): a sample "
                    f"belongs to one split, once."
                )
            chosen[stem] = split, listed.name
    if missing := [stem for stem in chosen if stem not in stems]:
        raise ConfigError(f"{images} has no image (PNG or JPEG) for {few(missing)} of the split files.")
    if double := [stem for stem in chosen if len(stems[stem]) > 1]:
        raise ConfigError(f"{images} has several images for {few(double)}: keep one of each.")
    if missing := [stem for stem in chosen if not (labels / f"{stem}.png").is_file()]:
        raise ConfigError(f"{labels} has no label PNG for {few(missing)} of the split files.")
    flat = {stem: stem.replace("/", "__") for stem in chosen}
    if len(set(flat.values())) < len(flat):
        raise ConfigError("Two samples have one name when '/' is written '__': rename one of them.")

    writer = Writer(target, config.size, upright=True)
    for stem, (split, _) in chosen.items():
        writer.image(split, flat[stem], stems[stem][0].read_bytes(), str(stems[stem][0]))
        file = labels / f"{stem}.png"
        writer.label(split, flat[stem], mapped(indices(file.read_bytes(), str(file)), table, str(file)))
    writer.close()


def _folder(path: Path, setting: str) -> Path:
    if not path.is_dir():
        raise ConfigError(f"The folder {path} does not exist: correct `{setting}` in params.yaml.")
    return path


def _lines(path: Path, split: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"The split file {path} cannot be read: correct `splits.{split}` in params.yaml."
        ) from None
    if not (named := [line for line in lines if line]):
        raise ConfigError(f"The split file {path} names no sample: write one name a line.")
    if wrong := [line for line in named if ".." in Path(line).parts or line.startswith("/") or " " in line]:
        raise ConfigError(
            f"The split file {path} has {wrong[0]!r}: a name has no spaces and lies below `images`."
        )
    return named
