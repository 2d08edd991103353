"""A data set of your own: a folder of images, a folder of masks, a list of classes, three split files.

Masks are PNG, TIFF or BMP. With one channel, gray or with a palette, the value is the class, in the order of
``classes``, or ``ignore_index``; three channels are the colours of ``classes``, and so are all with
``masks: colours``. Images are turned as their camera noted (EXIF), which is how they were seen when they were
labelled, or not, with ``orientation: stored``. A split file has one sample a line: the name of its image,
with or without folders below ``images`` and with or without its ending; the mask has the same name below
``labels``. What follows that name in the files is said by ``image_suffix`` and ``label_suffix`` (``_mask``,
``.jpg``, ``_rgb.png``). Any name will do that a line can hold.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
from pathlib import Path
from typing import Annotated, Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipelines.config import ROOT, ConfigError, Model, Size
from pipelines.datasets import pixels
from pipelines.datasets.folder import SPLITS, Meta, few
from pipelines.datasets.writer import Writer, mapped, painted

PHOTOS = pixels.endings(("JPEG",))
NEEDS = "your own"
GIGABYTES = None  # to fetch
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
log = logging.getLogger(__name__)
Found = dict[str, list[Path]]  # the files of each sample


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
    classes: dict[str, Colour] = Field(max_length=255)
    ignore_index: Channel
    splits: Splits
    size: Size | None
    image_suffix: str = ""
    label_suffix: str = ""
    masks: Literal["values", "colours"] | None = None  # by the number of channels
    ignored_colours: tuple[Colour, ...] = ()
    orientation: Literal["exif", "stored"] = "exif"

    @field_validator("classes")
    @classmethod
    def _several(cls, classes: dict[str, Colour]) -> dict[str, Colour]:
        if len(classes) < 2:
            raise ValueError("one class leaves nothing to tell apart; name the background as a class too")
        return classes

    @model_validator(mode="after")
    def _ignored(self) -> Config:
        if self.ignore_index < len(self.classes):
            raise ValueError(f"ignore_index must be beyond the classes 0 to {len(self.classes) - 1}")
        return self


def meta(config: Config) -> Meta:
    return Meta("custom", tuple(config.classes), tuple(config.classes.values()), config.ignore_index)


def prepare(config: Config, target: Path, mirror: Path | None) -> dict[str, str]:
    """Pair images with masks, check the masks' values, copy. The names that had to be replaced."""
    base = mirror or ROOT
    images = _files(base / config.images, "images", config.image_suffix, pixels.endings())
    labels = _files(base / config.labels, "labels", config.label_suffix, pixels.endings(pixels.LOSSLESS))
    if (base / config.images).resolve() == (base / config.labels).resolve():  # a photograph is the image
        photos = {key: [f for f in files if f.suffix.lower() in PHOTOS] for key, files in images.items()}
        images |= {key: files for key, files in photos.items() if files}
    chosen: dict[str, tuple[str, str]] = {}  # sample: split, split file
    for split in SPLITS:
        listed = base / getattr(config.splits, split)
        lines = _lines(listed, split)
        keys = [_sample(line, images, config.image_suffix) for line in lines]
        if missing := [line.strip() for line, key in zip(lines, keys, strict=True) if key is None]:
            raise ConfigError(
                f"{base / config.images} has no image (PNG, JPEG, …) for {few(map(_shown, missing))} of "
                f"the split files.{_hint(images, missing[0], 'image_suffix')}"
            )
        for key in filter(None, keys):
            if key in chosen:
                raise ConfigError(
                    f"{_shown(key)} stands twice in the split files ({chosen[key][1]}, {listed.name}): a "
                    f"sample belongs to one split, once."
                )
            chosen[key] = split, listed.name
    # in one folder, an image is not its own mask
    masks = {key: [file for file in labels.get(key, []) if file not in images[key][:1]] for key in chosen}
    for kind, found, suffix in (("image", images, "image_suffix"), ("mask", masks, "label_suffix")):
        if double := [_shown(key) for key in chosen if len(found[key]) > 1]:
            raise ConfigError(
                f"There are several {kind}s for {few(double)} "
                f"({few(file.name for file in found[double[0]])}): "
                f"keep one of each, or say which by `{suffix}: {found[double[0]][0].suffix}` in params.yaml."
            )
    if missing := [key for key in chosen if not masks[key]]:
        raise ConfigError(
            f"{base / config.labels} has no mask (PNG, TIFF or BMP) for {few(map(_shown, missing))} of the "
            f"split files.{_hint(labels, missing[0], 'label_suffix')}"
        )
    writer = Writer(target, config.size, upright=config.orientation == "exif")
    for key, (split, _) in chosen.items():
        (image,), (mask,) = images[key], masks[key]
        writer.image(split, key, image.read_bytes(), str(image))
        writer.label(split, key, _classes(mask, config), str(mask))
    writer.close()
    if writer.turned:
        log.warning(
            "%d images are turned as their camera noted (EXIF), and their masks taken as drawn on what is "
            "seen then. If they were drawn on the pixels as stored, set `orientation: stored`: %s.",
            len(writer.turned), few(writer.turned),
        )  # fmt: skip
    return writer.names


def _classes(file: Path, config: Config) -> np.ndarray:
    """The class of every pixel of a mask, (H, W) uint8."""
    name, upright = str(file), config.orientation == "exif"
    with pixels.opened(content := file.read_bytes(), name, pixels.LOSSLESS) as opened:
        mode, found = opened.mode, pixels.samples(opened, name, upright)
    colours = found
    if mode in ("1", "L", "P") and (mode == "P" or config.masks == "colours"):
        with pixels.opened(content, name, pixels.LOSSLESS) as opened:
            colours = np.asarray(pixels.rgb(opened, name, upright))
    if config.masks == "colours" or (config.masks is None and found.ndim == 3):
        return painted(colours, _colours(config, name), name)
    if found.ndim == 3:
        if (found != found[..., :1]).any():
            raise ConfigError(f"{name} is in colours: take `masks: values` out, or set `masks: colours`.")
        found = found[..., 0]
    table = np.full(256, -1, np.int16)
    table[: len(config.classes)] = range(len(config.classes))
    table[config.ignore_index] = config.ignore_index
    values, other = mapped(found, table, name), False
    with contextlib.suppress(ConfigError):  # a palette of other colours says nothing
        if mode == "P" and config.masks is None:
            other = bool((painted(colours, _colours(config, name), name) != values).any())
    if other:
        raise ConfigError(
            f"{name} shows other classes by the colours of its palette than by its values: set `masks: "
            "colours` or `masks: values` in params.yaml, whichever is right."
        )
    return values


def _colours(config: Config, name: str) -> dict[tuple[int, ...], int]:
    """The value of each colour. ConfigError, which names a mask in colours, where one has two."""
    colours: dict[tuple[int, ...], int] = {own: value for value, own in enumerate(config.classes.values())}
    colours |= dict.fromkeys(config.ignored_colours, config.ignore_index)
    if len(colours) < len(config.classes) + len(set(config.ignored_colours)):
        raise ConfigError(
            f"{name} is a mask in colours, and one colour stands for two of `classes` and "
            "`ignored_colours`: give each its own in params.yaml."
        )
    return colours


def _files(folder: Path, setting: str, suffix: str, endings: tuple[str, ...]) -> Found:
    """The files with these endings, in any case, by their names (NFC) without folder, ending and suffix."""
    if not folder.is_dir():
        raise ConfigError(f"The folder {folder} does not exist: correct `{setting}` in params.yaml.")
    text, end = _cut(suffix)
    found: Found = {}
    for file in sorted(folder.rglob("*")):
        name, own = _cut(normalize("NFC", file.relative_to(folder).as_posix()))
        if own in endings and own.endswith(end) and name.lower().endswith(text.lower()) and file.is_file():
            found.setdefault(name[: len(name) - len(text)], []).append(file)
    return found


def _cut(name: str) -> tuple[str, str]:
    """A name without its ending, and that in lower case, if it is one of images."""
    end = Path(f"_{name}").suffix
    return (name.removesuffix(end), end.lower()) if end.lower() in pixels.endings() else (name, "")


def _sample(line: str, images: Found, suffix: str) -> str | None:
    """Which of the samples a line names."""
    for text in (line, line.strip(), line.strip().replace("\\", "/")):
        name = normalize("NFC", text).removeprefix("./")
        for key in (name, _cut(name)[0], _cut(name)[0].removesuffix(_cut(suffix)[0])):
            if key in images:
                return key
    return None


def _hint(found: Found, name: str, setting: str) -> str:
    """What files there are that begin like a missing one."""
    name = _cut(normalize("NFC", name))[0]
    rests = sorted((key.removeprefix(name) for key in found if key.startswith(name) and key != name), key=len)
    return f" There is {name}{rests[0]}: set `{setting}: {rests[0]}` in params.yaml." if rests else ""


def _lines(path: Path, split: str) -> list[str]:
    try:
        content = path.read_bytes()
        encoding = next((name for bom, name in BOMS.items() if content.startswith(bom)), "utf-8")
        # names of another encoding are found by their bytes
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"The split file {path} cannot be read: correct `splits.{split}` in params.yaml, or save it as "
            "UTF-8."
        ) from None
    named = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not named:
        raise ConfigError(f"The split file {path} names no sample: write one name a line.")
    if wrong := [line for line in named if ".." in Path(line).parts or line.startswith("/")]:
        raise ConfigError(f"The split file {path} has {wrong[0]!r}: a name lies below `images`.")
    return named


def _shown(name: str) -> str:
    """A name for a sentence: what cannot be seen is written out."""
    return name if name.isprintable() else ascii(name)
