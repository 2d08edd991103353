"""The pixels of all kinds of files: what is trained on is what is predicted for, and a label keeps its "
"values."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import ConfigError
from pipelines.datasets import folder, pixels, writer
from pipelines.tools import predict

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
KINDS = [
    *((GRAY, depth) for depth in (1, 2, 4, 8, 16)),
    *((PALETTE, depth) for depth in (1, 2, 4, 8)),
    *((colour, depth) for colour in (RGB, GRAY_ALPHA, RGBA) for depth in (8, 16)),
]  # all that PNG has (3rd edition, table 8)
COLOURS = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, colour: int, depth: int, clear: bytes = b"") -> bytes:
    """A PNG of samples (H, W, C) by the standard, without Pillow."""
    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1) & 1).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in bits)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [(b"PLTE", COLOURS[: 2**depth].tobytes())] if colour == PALETTE else []
    parts += [(b"tRNS", clear)] if clear else []
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return pixels.PNG_START + b"".join(chunk(*part) for part in parts)


def shown(samples: np.ndarray, colour: int, depth: int) -> np.ndarray:
    """What they look like over white, in floats of 0 to 255."""
    if colour == PALETTE:
        return COLOURS[samples[..., 0]].astype(float)
    values = samples * (255 / (2**depth - 1))
    colours = values[..., :1] if colour in (GRAY, GRAY_ALPHA) else values[..., :3]
    alpha = values[..., -1:] / 255 if colour in (GRAY_ALPHA, RGBA) else 1
    return np.broadcast_to(colours * alpha + 255 * (1 - alpha), (*samples.shape[:2], 3))


def trained_on(content: bytes, end: str, place: Path) -> np.ndarray:
    """The pixels in ``data/`` of a photograph of one's own."""
    made = writer.Writer(place / "data", None, upright=True)
    made.image("train", "x", content, f"x.{end}")
    path = made.images["train"]["x"]
    return folder.decode((place / "data" / path).read_bytes(), path, "RGB")


def predicted_for(content: bytes, end: str, place: Path) -> np.ndarray:
    (place / f"x.{end}").write_bytes(content)
    count, found = predict.frames(place / f"x.{end}")
    assert count == 1
    return np.asarray(next(found))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.booleans())
@example((4, 16), 3371, False)
def test_every_png(
    tmp_path_factory: pytest.TempPathFactory, kind: tuple[int, int], seed: int, clear: bool
) -> None:
    colour, depth = kind
    draw, place = np.random.default_rng(seed), tmp_path_factory.mktemp("png")
    samples = draw.integers(0, 2**depth, (*draw.integers(1, 12, 2), CHANNELS[colour]))
    wanted, trns = shown(samples >> 8 if depth == 16 else samples, colour, min(depth, 8)), b""
    if clear and colour == GRAY:  # one value is transparent
        trns = struct.pack(">H", samples[0, 0, 0])
        wanted = np.where(samples == samples[0, 0], 255, wanted)
    elif clear and colour == RGB and depth == 8:
        trns = struct.pack(">3H", *samples[0, 0])
        wanted = np.where((samples == samples[0, 0]).all(-1, keepdims=True), 255, wanted)
    elif clear and colour == PALETTE:  # its first entry is half transparent
        trns = b"\x80"
        wanted = np.where(samples == 0, wanted * 128 / 255 + 255 * 127 / 255, wanted)
    content = png(samples, colour, depth, trns)
    found = trained_on(content, "png", place)
    assert np.array_equal(found, predicted_for(content, "png", place))
    assert np.abs(found - wanted).max() <= 1  # of rounding
    if colour in (GRAY, PALETTE):
        with pixels.opened(content, "mask") as opened:
            assert np.array_equal(pixels.samples(opened, "mask"), samples[..., 0])


MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
ENDS = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp", "GIF": "gif", "PPM": "ppm"}
ENDS |= {"TGA": "tga", "PCX": "pcx", "SGI": "sgi"}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_every_mode_that_pillow_writes(kind: str, orientation: int, tmp_path: Path) -> None:
    """The same array, or the same sentence."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    done = 0
    for mode in MODES:
        wide = Image.fromarray(np.arange(126, dtype=np.uint16).reshape(9, 14) * 500)
        out = io.BytesIO()
        try:
            image = wide if mode == "I;16" else colours.convert("L" if mode in "IF" else "RGB")
            image = colours if mode == "RGBA" else image if mode == "I;16" else image.convert(mode)
            image.save(out, kind, exif=exif)
        except (OSError, ValueError, KeyError):  # no such conversion, or no such file
            continue
        (tmp_path / mode).mkdir()
        answers = []
        for read in (trained_on, predicted_for):
            try:
                answers.append(read(out.getvalue(), ENDS[kind], tmp_path / mode))
            except ConfigError as error:
                answers.append(str(error))
        if isinstance(answers[0], str):
            assert answers[0] == answers[1]
        else:
            assert np.array_equal(*answers), mode
            turned = orientation == 6 and kind in ("PNG", "JPEG", "TIFF", "WEBP")
            assert answers[0].shape == ((14, 9, 3) if turned else (9, 14, 3)), mode
            done += 1
    assert done >= 2


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "BMP"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_labels_keep_their_values(kind: str, mode: str) -> None:
    wanted = np.random.default_rng(0).integers(0, 2, (5, 11), np.uint8)
    image = Image.fromarray(wanted.astype(bool) if mode == "1" else wanted)
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 0, 0])
    out = io.BytesIO()
    image.save(out, kind)
    with pixels.opened(out.getvalue(), "mask", pixels.LOSSLESS) as opened:
        assert np.array_equal(pixels.samples(opened, "mask"), wanted)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.float32([[0.5, 1.5]]), r"x.tif has values from 0.5 to 1.5: scale them to 0 to 1 \(floats\)"),
        (np.float32([[0.5, np.nan]]), "x.tif has values from nan to nan"),
        (np.int32([[-1, 70_000]]), "x.tif has values from -1 to 70000: scale them to 0 to 65535"),
    ],
)
def test_values_without_a_scale_are_refused(values: np.ndarray, said: str, tmp_path: Path) -> None:
    """Scaled by its own largest value, an image would depend on one bright pixel."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    for read in (trained_on, predicted_for):
        with pytest.raises(ConfigError, match=said):
            read(out.getvalue(), "tif", tmp_path)
