"""Writes a benchmark's folder, sample by sample, from images and labels as they were published."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipelines.config import ConfigError
from pipelines.datasets.folder import SPLITS, few


class Writer:
    """``image`` and ``label`` of every sample in any order, then ``close``.

    ``size`` (height, width) resizes: images by area averaging, labels by the nearest neighbour. None keeps
    8-bit RGB files byte for byte; other images become RGB PNGs. ``upright`` turns images as their EXIF
    orientation says; else it is not looked at, as by the readers that published labels were made for.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None, upright: bool = False) -> None:
        self.root, self.size, self.upright = root, size, upright
        self.images: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self.labels: dict[str, set[str]] = {split: set() for split in SPLITS}
        for split in SPLITS:
            (root / split).mkdir(parents=True)
            (root / f"{split}annot").mkdir()

    def image(self, split: str, name: str, content: bytes, origin: str) -> None:
        """Add the image ``name``; ``origin`` is what an error calls it."""
        try:
            with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as opened:
                eight_bit = opened.format == "JPEG" or content[24] == 8
                turned = self.upright and opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
                if self.size is None and opened.mode == "RGB" and eight_bit and not turned:
                    end = "jpg" if opened.format == "JPEG" else "png"
                else:
                    end, output = "png", io.BytesIO()
                    pixels = (ImageOps.exif_transpose(opened) if turned else opened).convert("RGB")
                    if self.size is not None:
                        pixels = pixels.resize(self.size[::-1], Image.Resampling.BOX)
                    pixels.save(output, "PNG")
                    content = output.getvalue()
        except Exception as error:  # Pillow has no one family of errors for broken images
            raise ConfigError(f"{origin} is no whole PNG or JPEG image{_why(error)}.") from None
        file = f"{split}/{name}.{end}"
        (self.root / file).write_bytes(content)
        self.images[split][name] = file

    def label(self, split: str, name: str, values: np.ndarray) -> None:
        """Add the label (H, W) uint8 of the image ``name``."""
        picture = Image.fromarray(values)
        if self.size is not None:
            picture = picture.resize(self.size[::-1], Image.Resampling.NEAREST)
        picture.save(self.root / f"{split}annot" / f"{name}.png")
        self.labels[split].add(name)

    def close(self) -> None:
        """Write the lists of the splits, in the order of the names."""
        for split in SPLITS:
            images, labels = self.images[split], self.labels[split]
            if lonely := sorted(images.keys() ^ labels):
                raise ConfigError(f"image or label is missing of {few(lonely)} ({split}).")
            lines = [f"{images[name]} {split}annot/{name}.png\n" for name in sorted(images)]
            (self.root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def indices(content: bytes, origin: str) -> np.ndarray:
    """The values of a label PNG with 8 bits and one channel, gray or with a palette: (H, W) uint8."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            if opened.mode not in ("L", "P"):
                raise ConfigError(
                    f"{origin} has the mode {opened.mode}; a label must have 8 bits and one channel (L or P)."
                )
            return np.asarray(opened)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise ConfigError(f"{origin} is no whole PNG file{_why(error)}.") from None


def _why(error: Exception) -> str:
    """The text of an error, unless it holds nothing but the address of a buffer."""
    text = " ".join(str(error).split())[:200]
    return f": {text}" if text and not isinstance(error, UnidentifiedImageError) else ""


def mapped(values: np.ndarray, table: np.ndarray, origin: str) -> np.ndarray:
    """``table[values]``, (H, W) uint8; a −1 in the table (256,) marks a value that no label may have."""
    found = table[values]
    if (found < 0).any():
        raise ConfigError(
            f"{origin} has the value {int(values[found < 0][0])}, which this data set does not know: correct "
            "the label, or the classes and `ignore_index` of a set of your own."
        )
    return found.astype(np.uint8)


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
