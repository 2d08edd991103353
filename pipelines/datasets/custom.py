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
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from pipelines.config import ROOT, ConfigError, Model, Size, metric_name
from pipelines.datasets import pixels
from pipelines.datasets.folder import SPLITS, Byte, Meta, few
from pipelines.datasets.writer import Writer, mapped, painted

PHOTOS = pixels.endings(("JPEG",))
ABOUT = "images of one's own"
NEEDS = "your own"
GIGABYTES = None  # to fetch
DARK = 17  # of 255: 12 bits in a file of 16 reach 16
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
Colour = tuple[Byte, Byte, Byte]
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
    ignore_index: Byte
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
        owner: dict[Colour, str] = {}
        for name, colour in classes.items():
            if (other := owner.setdefault(colour, name)) != name:
                raise ValueError(f"{other} and {name} have one colour; figures tell classes apart by it")
        written: dict[str, str] = {}
        for name in classes:
            if (other := written.setdefault(known := metric_name(name), name)) != name:
                raise ValueError(f"{other} and {name} are both {known} in MLflow; rename one of them")
        return classes

    @field_validator("ignore_index")
    @classmethod
    def _beyond(cls, value: int, found: ValidationInfo) -> int:
        if value < (count := len(found.data.get("classes", ()))):
            raise ValueError(
                f"it must be beyond the classes 0 to {count - 1}; where masks have {value} for pixels "
                "without a label, make it a class, or give these pixels another value, such as 255"
            )
        return value

    @field_validator("ignored_colours")
    @classmethod
    def _apart(cls, colours: tuple[Colour, ...], found: ValidationInfo) -> tuple[Colour, ...]:
        if shared := [name for name, own in found.data.get("classes", {}).items() if own in colours]:
            raise ValueError(f"they hold the colour of the class {shared[0]}")
        return colours


def meta(config: Config) -> Meta:
    return Meta("custom", tuple(config.classes), tuple(config.classes.values()), config.ignore_index)


def prepare(config: Config, target: Path, mirror: Path | None) -> dict[str, str]:
    """Pair images with masks, check the masks' values, copy. The names that had to be replaced."""
    base = mirror or ROOT
    photographs, drawn = (base / path.expanduser() for path in (config.images, config.labels))
    images = _files(photographs, "images", config.image_suffix, pixels.endings())
    labels = _files(drawn, "labels", config.label_suffix, pixels.endings(pixels.LOSSLESS))
    if photographs.resolve() == drawn.resolve():  # a photograph is the image
        photos = {key: [f for f in files if f.suffix.lower() in PHOTOS] for key, files in images.items()}
        images |= {key: files for key, files in photos.items() if files}
    chosen: dict[str, tuple[str, str]] = {}  # sample: split, split file
    for split in SPLITS:
        listed = base / getattr(config.splits, split).expanduser()
        lines = _lines(listed, split)
        keys = [_sample(line, images, config.image_suffix) for line in lines]
        if missing := [line.strip() for line, key in zip(lines, keys, strict=True) if key is None]:
            raise ConfigError(
                f"{photographs} has no image (PNG, JPEG, …) for {few(map(_shown, missing))} of the split "
                f"files, where a line is the name of one image.{_hint(images, missing, 'image_suffix')}"
            )
        for line, key in zip(lines, filter(None, keys), strict=True):
            if len(own := [file for file in images[key] if line.endswith(file.suffix or "/")]) == 1:
                images[key] = own
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
                f"keep one of each, or say which by `{suffix}` in params.yaml: "
                f"{' or '.join(dict.fromkeys(file.suffix for file in found[double[0]]))}."
            )
    if missing := [key for key in chosen if not masks[key]]:
        raise ConfigError(
            f"{drawn} has no mask (PNG, TIFF or BMP) for {few(map(_shown, missing))} of the split files."
            + _lossy(drawn, config.label_suffix, missing[0])
            + _hint(labels, missing, "label_suffix", chosen)
        )
    writer = Writer(target, config.size, upright=config.orientation == "exif")
    for key, (split, _) in chosen.items():
        (image,), (mask,) = images[key], masks[key]
        writer.image(split, key, _content(image), str(image))
        writer.label(split, key, _classes(mask, config), str(mask))
    writer.close()
    if writer.turned:
        log.warning(
            "%d images are turned as their camera noted (EXIF), and their masks taken as drawn on what is "
            "seen then. If they were drawn on the pixels as stored, set `orientation: stored`: %s.",
            len(writer.turned), few(writer.turned),
        )  # fmt: skip
    if writer.transparent:
        log.warning(
            "%d images have transparent pixels, which are laid over white: %s.",
            len(writer.transparent), few(writer.transparent),
        )  # fmt: skip
    if writer.deep and max(writer.deep.values()) < DARK:
        raise ConfigError(
            f"No image of more than 8 bits ({few(writer.deep)}) is brighter than {max(writer.deep.values())} "
            "of 255 where its full range is white: if they hold 8 or 12 bits, scale them up, or save them "
            "with 8."
        )
    return writer.names


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


def _classes(file: Path, config: Config) -> np.ndarray:
    """The class of every pixel of a mask, (H, W) uint8."""
    name, upright = str(file), config.orientation == "exif"
    with pixels.opened(content := _content(file), name, pixels.LOSSLESS) as opened:
        if (count := pixels.frames(opened)) > 1:
            raise ConfigError(f"{name} holds {count} pictures: save the one that is the mask.")
        mode, found = opened.mode, pixels.samples(opened, name, upright)
    colours = found
    if mode in ("1", "L", "P") and (mode == "P" or config.masks == "colours"):
        with pixels.opened(content, name, pixels.LOSSLESS) as opened:
            opened.info.pop("transparency", None)  # it hides a colour that is a class's
            colours = np.asarray(pixels.rgb(opened, name, upright))
    if config.masks is None and found.ndim == 3 and (found == found[..., :1]).all():
        ours = {own[0] for own in _colours(config) if len({*own}) == 1}
        if not {*np.unique(found).tolist()} <= ours:
            raise ConfigError(
                f"{name} has three equal channels, whose values are not colours of `classes`: if they are "
                "the classes, set `masks: values` in params.yaml."
            )
    if config.masks == "colours" or (config.masks is None and found.ndim == 3):
        return painted(colours, _colours(config), name)
    if found.ndim == 3:
        if (found != found[..., :1]).any():
            raise ConfigError(f"{name} is in colours: take `masks: values` out, or set `masks: colours`.")
        found = found[..., 0]
    known = {value: value for value in (*range(len(config.classes)), config.ignore_index)}
    values = mapped(found, known, name)
    if mode == "P" and config.masks is None and _contradicts(colours, values, config):
        raise ConfigError(
            f"{name} shows other classes by the colours of its palette than by its values: set `masks: "
            "colours` or `masks: values` in params.yaml, whichever is right."
        )
    return values


def _contradicts(colours: np.ndarray, values: np.ndarray, config: Config) -> bool:
    """Whether a colour of ``classes`` stands where the value is of another one; other colours say nothing."""
    known = _colours(config).items()
    return any((values[(colours == own).all(axis=-1)] != value).any() for own, value in known)


def _colours(config: Config) -> dict[tuple[int, ...], int]:
    """The value of each colour."""
    colours: dict[tuple[int, ...], int] = {own: value for value, own in enumerate(config.classes.values())}
    return colours | dict.fromkeys(config.ignored_colours, config.ignore_index)


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


def _hint(found: Found, missing: Sequence[str], setting: str, known: Collection[str] = ()) -> str:
    """What files there are that begin like a missing one, or are spelt like it but for capitals."""
    names = [_cut(normalize("NFC", name.strip()))[0] for name in missing]
    name = names[0]
    others = [key for key in found if key not in known and key not in names]
    for key in sorted((key for key in others if key.startswith(name)), key=len):
        rest = key.removeprefix(name)
        if rest and all(f"{other}{rest}" in found for other in names[:2]):
            return f" There is {key}: set `{setting}: {rest}` in params.yaml."
    for key in others:
        if key.lower() == name.lower() or name.endswith(f"/{key}"):
            return f" There is {key}."
    return ""


def _lossy(folder: Path, suffix: str, name: str) -> str:
    """Whether there is a mask of a kind that keeps no values."""
    if not (other := _files(folder, "labels", suffix, pixels.endings()).get(name)):
        return ""
    return f" {other[0].name} is there, but its kind of file may change values: save it as PNG."


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
