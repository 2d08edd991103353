"""The pixels of image files as people have them: one conversion for training and prediction, one for labels.

Images become 8-bit RGB: samples of 16 bits are scaled to 8, floats from 0 to 1 likewise, transparency is laid
over white, and a picture is turned as its EXIF orientation says. How one pixel is scaled never depends on the
others. Labels keep the values of their samples, whatever their depth: 1 is 1 in a mask of 1, 2, 4, 8 or 16
bits, the index in one with a palette.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipelines.config import ConfigError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI")
LOSSLESS = ("PNG", "TIFF", "BMP")  # what a label may be
PIXELS = 2**26  # of one image: a damaged header may claim any size, which would be allocated
PNG_START = b"\x89PNG\r\n\x1a\n"
WHITE = 255  # what lies behind transparent pixels

Image.MAX_IMAGE_PIXELS = None  # `opened` says how many are too many, before one is decoded


@functools.cache
def endings(formats: tuple[str, ...] = FORMATS) -> tuple[str, ...]:
    """The endings of files of these formats, in lower case."""
    return tuple(end for end, kind in Image.registered_extensions().items() if kind in formats)


def opened(
    source: bytes | Path,
    origin: str,
    formats: tuple[str, ...] = FORMATS,
    most: int = PIXELS,
    exact: bool = False,
) -> Image.Image:
    """An image of at most ``most`` pixels that is not decoded yet; with ``exact``, nothing may follow the end
    of a PNG. ConfigError, which calls it ``origin``."""
    if isinstance(source, bytes) and source.startswith(PNG_START) and "PNG" in formats:
        end = whole_png(source, origin)
        if exact and end < len(source):
            raise broken(origin, f"{len(source) - end} bytes follow its end")
        source = source[:end]
    with reading(origin):
        # not by its path: Pillow would map the file, and read one that is turned as if it were not
        file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise _unknown(file, origin, formats) from None
        if image.format == "TIFF" and _planar(image):
            raise ConfigError(
                f"{origin} is a TIFF with a plane for each channel, deep samples and no compression, which "
                "Pillow misreads: save it with compression, or as PNG."
            )
    if image.width * image.height > most:
        raise too_large(origin, most)
    return image


@contextlib.contextmanager
def reading(origin: str) -> Iterator[None]:
    """What Pillow raises for broken pixels, as one sentence: it has no one family of errors for them."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise broken(origin, error) from None


def rgb(image: Image.Image, origin: str, upright: bool = True) -> Image.Image:
    """The frame that an opened image shows as 8-bit RGB; ``upright`` turns it as its EXIF says."""
    depth, clear = bits(image), image.info.get("transparency")
    with reading(origin):
        image = _turned(image, upright)
        if image.mode in ("P", "PA") and not (image.palette and image.palette.palette):
            raise ValueError("it has no palette")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            values = np.asarray(image, np.float64)
            white = 1 if image.mode == "F" else 4095 if depth == 12 else 65535
            if not (values.min() >= 0 and values.max() <= white):  # so is NaN
                raise ConfigError(
                    f"{origin} has values from {values.min():g} to {values.max():g}: scale them to 0 to "
                    f"{white} ({'floats' if white == 1 else 'whole numbers'}), or save it with 8 bits."
                )
            gray = (values / white * 255).round().astype(np.uint8)
            if isinstance(clear, int):
                gray[values == clear] = WHITE
            return Image.fromarray(gray).convert("RGB")
        if image.has_transparency_data:
            # it is in the file's bits
            if depth != 8 and isinstance(clear, int | tuple) and image.mode != "P":
                known = clear if isinstance(clear, tuple) else (clear,)
                eight = tuple(value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in known)
                image.info["transparency"] = eight if isinstance(clear, tuple) else eight[0]
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 3), image)
        return image.convert("RGB")


def samples(image: Image.Image, origin: str, upright: bool = True) -> np.ndarray:
    """The values of an opened label, (H, W), or its colours (H, W, 3) uint8 where it has three channels."""
    depth = bits(image)
    with reading(origin):
        image = _turned(image, upright)
        if image.mode in ("RGBA", "LA", "PA") and depth == 8:
            if image.getchannel("A").getextrema() != (255, 255):
                raise ConfigError(
                    f"{origin} has transparent pixels, whose class is not known: save it without "
                    "transparency."
                )
            image = image.convert("RGB")
        if image.mode in ("1", "L") and depth <= 8:
            return np.asarray(image).astype(np.uint8) // (1 if depth == 1 else 255 // (2**depth - 1))
        if image.mode in ("P", "I") or image.mode.startswith("I;") or (image.mode == "RGB" and depth == 8):
            return np.asarray(image)
    raise ConfigError(
        f"{origin} has the mode {image.mode} with {depth} bits; a label must have one channel, its values "
        "or a palette, or the colours of the classes in RGB with 8 bits."
    )


def _turned(image: Image.Image, upright: bool) -> Image.Image:
    """The image decoded, as its EXIF says or as it is stored: Pillow turns a TIFF whenever it decodes it."""
    held = orientation(image) if image.format == "TIFF" and not upright else 1
    image = ImageOps.exif_transpose(image) if upright else image
    image.load()
    if held == 1:
        return image
    image.getexif()[ExifTags.Base.Orientation] = {6: 8, 8: 6}.get(held, held)  # what undoes it
    return ImageOps.exif_transpose(image)


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8: 1 is upright. Asked last: a PNG may be decoded for it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, which nothing else needs
        return 1


def frames(image: Image.Image) -> int:
    """How many pictures a file shows; the preview that cameras add to a JPEG is none."""
    try:
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    except Exception:  # damaged behind the first, which is all that there is to show
        return 1


def _unknown(file: IO[bytes], origin: str, formats: tuple[str, ...]) -> ConfigError:
    """What a file is that is none of ``formats``, or that Pillow has no mode for."""
    file.seek(0)
    head = file.read(100)
    if not head:
        return ConfigError(f"{origin} is empty: put a whole image in its place.")
    if head.startswith(b"version https://git-lfs"):
        return ConfigError(f"{origin} is a pointer of Git LFS and not the image: run `git lfs pull`.")
    file.seek(0)
    with contextlib.suppress(Exception), Image.open(file) as other:
        if other.format not in formats:
            return ConfigError(
                f"{origin} is a {other.format} by its content: save it as "
                f"{', '.join(formats[:-1])}{' or ' * (len(formats) > 1)}{formats[-1]}."
            )
    kind = "PNG" if head.startswith(PNG_START) else "TIFF" if head[:4] in (b"II*\0", b"MM\0*") else None
    if kind:
        return ConfigError(
            f"{origin} is a {kind} that cannot be read: its samples are of an unusual depth or number, or it "
            "is damaged. Save it with 8 or 16 bits and 1 or 3 channels."
        )
    known = f"{', '.join(formats[:3])}{', …' * (len(formats) > 3)}"
    return ConfigError(f"{origin} is no image that can be read ({known}), or it is damaged.")


def _planar(image: Image.Image) -> bool:
    """Whether a TIFF holds planes of deep samples, uncompressed."""
    tags = getattr(image, "tag_v2", {})
    depth = tags.get(258, (8,))
    return tags.get(284) == 2 and max(depth) > 8 and tags.get(259, 1) == 1 and len(depth) > 1


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as the content of a file."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def whole_png(content: bytes, origin: str) -> int:
    """The length of a PNG file without what may follow it, after its chunks were checked by their lengths and
    sums, which Pillow checks in part only (PNG, 3rd edition, section 5)."""
    at, kinds = len(PNG_START), list[bytes]()
    while at < len(content) and kinds[-1:] != [b"IEND"]:
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")  # length, kind, data, sum
        if end > len(content):
            raise broken(origin, "it is truncated")
        if zlib.crc32(content[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise broken(origin, "a checksum in it is wrong")
        kinds.append(content[at + 4 : at + 8])
        at = end
    if kinds[:1] != [b"IHDR"] or kinds[-1:] != [b"IEND"] or content[8:12] != b"\0\0\0\r":
        raise broken(origin, "it is truncated")
    width, height = (int.from_bytes(content[first : first + 4], "big") for first in (16, 20))
    if width * height > PIXELS:
        raise too_large(origin, PIXELS)
    return at


def broken(origin: str, error: Exception | str) -> ConfigError:
    """What is said of a file that cannot be read, with the reason where there is more than an address."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    return ConfigError(f"{origin} is damaged or cut off{': ' if text else ''}{text}.")


def too_large(origin: str, most: int) -> ConfigError:
    return ConfigError(
        f"{origin} has more than {most:,} pixels by its header: scale it down, or mend it if it is damaged."
    )


def bits(image: Image.Image) -> int:
    """The bits of a sample in the file. Pillow opens 16-bit colour as 8-bit RGB and 4-bit gray as L."""
    # how samples lie in the file, ``L;4`` or ``RGB;16B``: known as long as it is not decoded
    tiles: Any = getattr(image, "tile", None)
    raw = (tiles[0].args if tiles else "") or ""
    found = re.search(r";(\d+)", raw if isinstance(raw, str) else str(raw[0]))
    return 1 if image.mode == "1" else int(found[1]) if found else 8
