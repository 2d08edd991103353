"""Writes a benchmark's folder, sample by sample, from images and labels as they were published."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.config import ConfigError
from pipelines.datasets import pixels
from pipelines.datasets.folder import PART, SPLITS, few

ENDS = {"JPEG": "jpg", "PNG": "png"}  # of files that are kept
LONGEST = 200  # bytes of a file's name, of the 255 that file systems allow


class Writer:
    """``image`` and ``label`` of every sample in any order, then ``close``.

    ``size`` (height, width) resizes: images by area averaging, labels by the nearest neighbour. None keeps
    8-bit RGB files byte for byte; other images become RGB PNGs. ``upright`` turns images as their EXIF
    orientation says, and reads each file whole; else it is not looked at, as by the readers that published
    labels were made for. A name that lists cannot hold gets one of ours; ``names`` says which is whose.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None, upright: bool = False) -> None:
        self.root, self.size, self.upright = root, size, upright
        self.images: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self.labels: dict[str, set[str]] = {split: set() for split in SPLITS}
        self.names: dict[str, str] = {}
        self.turned: list[str] = []
        self.transparent: list[str] = []
        self.deep: dict[str, int] = {}  # the largest value, of 255, of images with more than 8 bits
        self._given: dict[str, str] = {}
        self._taken: set[str] = set()
        self._sizes: dict[tuple[str, str], tuple[tuple[int, int], str, int]] = {}
        for split in SPLITS:
            (root / split).mkdir(parents=True)
            (root / f"{split}annot").mkdir()

    def image(self, split: str, name: str, content: bytes, origin: str) -> None:
        """Add the image ``name``; ``origin`` is what an error calls it."""
        with pixels.opened(content, origin) as opened:
            if (count := pixels.frames(opened)) > 1:
                raise ConfigError(f"{origin} holds {count} pictures: save the one that its label is for.")
            deep = pixels.bits(opened) > 8 or opened.mode in ("I", "F")  # known until it is decoded
            plain = opened.mode == "RGB" and not opened.has_transparency_data and not deep
            plain, picture = plain and opened.format in ENDS, None
            if self.upright or self.size or not plain:
                picture = pixels.rgb(opened, origin, self.upright)
                if deep:
                    self.deep[origin] = int(np.asarray(picture).max())
                if opened.mode in ("RGBA", "LA") and np.asarray(opened.getchannel("A")).min() < 255:
                    self.transparent.append(origin)
            held = pixels.orientation(opened) if self.upright else 1
            shape, end = (picture or opened).size, ENDS.get(opened.format or "", "png")
        if picture and (self.size or held != 1 or not plain):
            if self.size is not None:
                picture = picture.resize(self.size[::-1], Image.Resampling.BOX)
            end, content = "png", pixels.encoded(picture)
        elif end == "png":
            content = content[: pixels.whole_png(content, origin)]
        self._one_size(split, name, shape, origin, held)
        self.turned += [origin] * (held != 1)
        file = f"{split}/{self._internal(name)}.{end}"
        (self.root / file).write_bytes(content)
        self.images[split][name] = file
        if self._internal(name) != name.replace("/", "__"):
            readable = f"{split}/{name}{Path(origin).suffix}".encode("utf-8", "surrogateescape")
            self.names[file] = readable.decode("utf-8", "replace")

    def label(self, split: str, name: str, values: np.ndarray, origin: str) -> None:
        """Add the label (H, W) uint8 of the image ``name``."""
        picture = Image.fromarray(values)
        self._one_size(split, name, picture.size, origin, 0)
        if self.size is not None:
            picture = picture.resize(self.size[::-1], Image.Resampling.NEAREST)
        picture.save(self.root / f"{split}annot" / f"{self._internal(name)}.png")
        self.labels[split].add(name)

    def close(self) -> None:
        """Write the lists of the splits, in the order of the names."""
        for split in SPLITS:
            images, labels = self.images[split], self.labels[split]
            if lonely := sorted(images.keys() ^ labels):
                raise ConfigError(f"image or label is missing of {few(lonely)} ({split}).")
            lines = [f"{images[name]} {split}annot/{self._internal(name)}.png\n" for name in sorted(images)]
            (self.root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")

    def _one_size(self, split: str, name: str, size: tuple[int, int], origin: str, held: int) -> None:
        """Compare an image (``held`` as its EXIF says) and its label (0) before any resizing."""
        first = self._sizes.setdefault((split, name), (size, origin, held))
        if first[0] == size:
            return
        image, label = sorted((first, (size, origin, held)), key=lambda found: not found[2])
        why = ""
        if image[2] > 4 and image[0] == label[0][::-1]:  # those that swap the sides
            why = (
                f" The image is turned as the camera noted (EXIF orientation {image[2]}), its label was "
                "drawn on the picture as it is stored: set `orientation: stored`."
            )
        elif not self.upright and image[0] == label[0][::-1]:
            why = " A label that was drawn on the picture turned upright needs `orientation: exif`."
        shape = "{0[0]}x{0[1]}".format
        raise ConfigError(
            f"{image[1]} is {shape(image[0])} but its label {label[1]} is {shape(label[0])}.{why}"
        )

    def _internal(self, name: str) -> str:
        """The name without folders, or one of ours where lists cannot hold it or another sample has it."""
        if name not in self._given:
            flat = name.replace("/", "__")
            if not re.fullmatch(PART, flat) or len(flat.encode()) > LONGEST or flat.casefold() in self._taken:
                total = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
                flat = f"{re.sub('[^A-Za-z0-9]+', '_', flat)[:40]}-{total[:12]}"
            self._taken.add(flat.casefold())
            self._given[name] = flat
        return self._given[name]


def indices(content: bytes, origin: str) -> np.ndarray:
    """The values of a label with one channel, gray or with a palette: (H, W) of whole numbers."""
    with pixels.opened(content, origin, pixels.LOSSLESS) as opened:
        found = pixels.samples(opened, origin, upright=False)
        if found.ndim == 3:
            raise ConfigError(
                f"{origin} has the mode {opened.mode}; a label must have one channel (L or P) here."
            )
    return found


def mapped(values: np.ndarray, known: Mapping[int, int], origin: str) -> np.ndarray:
    """``known[value]`` of every pixel, (H, W) uint8; a label may have no other values."""
    table = np.full(256, -1, np.int16)
    table[[*known]] = [*known.values()]
    found = np.where((values >= 0) & (values < len(table)), table[np.clip(values, 0, len(table) - 1)], -1)
    if (found < 0).any():
        raise ConfigError(
            f"{origin} has the value {int(values[found < 0][0])}, which this data set does not know: correct "
            "the label, or `classes` and `ignore_index` of a set of your own; masks in the colours of the "
            "classes, black and white too, need `masks: colours`."
        )
    return found.astype(np.uint8)


def painted(colours: np.ndarray, table: Mapping[tuple[int, ...], int], origin: str) -> np.ndarray:
    """The values (H, W) uint8 of a label in colours (H, W, 3) uint8, by an exact ``table``."""
    if colours.ndim != 3:
        raise ConfigError(
            f"{origin} has one channel; here a label must hold the colours of the classes, in RGB."
        )
    codes = colours.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    known = {red * 65536 + green * 256 + blue: value for (red, green, blue), value in table.items()}
    found, pixel = np.unique(codes, return_inverse=True)
    if unknown := [int(code) for code in found if int(code) not in known]:
        named = few((str([code >> 16, code >> 8 & 255, code & 255]) for code in unknown), 3)
        raise ConfigError(
            f"{origin} has colours that are in no class: {named}. Correct `classes`, list what is to be "
            "ignored in `ignored_colours`, or save the mask without smooth edges and without JPEG."
        )
    return np.array([known[int(code)] for code in found], np.uint8)[pixel].reshape(codes.shape)


def held_out(names: Sequence[str], count: int) -> set[str]:
    """``count`` of the names, evenly spaced in their sorted order."""
    if not 0 < count < len(names):
        raise ConfigError(
            f"holdout = {count} of {len(names)} training images: hold out at least one image and leave at "
            f"least one."
        )
    ordered = sorted(names)
    return {ordered[number * len(ordered) // count] for number in range(count)}


def colour_map(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC: bits 0, 3, 6, … of the class make red, 1, 4, 7, … green, 2, 5, 8, … blue,
    from the highest bit down."""
    return tuple(
        (
            sum((label >> (3 * bit) & 1) << (7 - bit) for bit in range(8)),
            sum((label >> (3 * bit + 1) & 1) << (7 - bit) for bit in range(8)),
            sum((label >> (3 * bit + 2) & 1) << (7 - bit) for bit in range(8)),
        )
        for label in range(count)
    )
