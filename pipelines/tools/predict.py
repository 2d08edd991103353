"""Coloured masks for images of one's own: weights + an image or a folder → mask, overlay and legend as PNG.

``<image>_mask.png`` holds class indices with the data set's palette, in the size of the image;
``<image>_overlay.png`` the image under these colours; ``legend.png`` says which colour is which class. Of a
stack or a video every frame: ``<image>_00000_mask.png``, … Images are read as those that are trained on
(:mod:`pipelines.datasets.pixels`). One that is too large to be seen whole is seen through windows that
overlap: those of the benchmark's ``sliding``, else of ``WINDOW`` pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFont

from pipelines import cli, config, files, fonts
from pipelines.config import ROOT, ConfigError, Size, Sliding
from pipelines.datasets import folder, pixels
from pipelines.datasets.folder import Meta
from pipelines.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.networks import SegmentationNetwork

PIXELS = 2**24  # that the network sees at once at most: its feature maps take some 100 values a pixel
LOGITS = 2**30  # values at most, classes × pixels of an image that is seen at once
WINDOW = 1024  # pixels a side, of which a quarter overlaps
BLOCK = 2**27  # values of the logits that are in memory where there are windows
BYTES = 16  # of a pixel: the image, its mask and overlay, and what encoding them takes
ROWS = 256
LONGEST = 200  # bytes of a file's name, to which something is added, of the 255 that are possible
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
STRENGTH = 0.55  # of the colours in an overlay
OUTLINE = 500  # of the image's shorter side: 1/OUTLINE is the width of a class's outline
LEGEND_ROWS = 20

log = logging.getLogger(__name__)


def read_run(weights: Path) -> dict[str, Any]:
    """run.json beside the weights. ConfigError if there is none, or it is damaged."""
    file = weights.parent / "run.json"
    if not weights.is_file():
        raise ConfigError(
            f"There are no weights {weights}: run `make repro`, which trains what is missing, or name "
            "another file."
        )
    try:
        return files.unseal(file.read_bytes())
    except OSError:
        raise ConfigError(
            f"There is no run.json beside {weights}, which says what network it is: use the weights of a "
            "cell in its own folder, or copy both."
        ) from None
    except ValueError:
        raise ConfigError(f"{file} is damaged or was changed by hand: restore it with git.") from None


def read_meta(run: dict[str, Any], root: Path = ROOT) -> Meta:
    """Classes and palette of the data set that the weights were trained on: of ``data/<benchmark>``, else of
    the data set's module. ConfigError where neither has these classes."""
    benchmark = run["cell"]["benchmark"]
    if (root / "data" / benchmark / folder.DESCRIPTION).is_file():
        meta: Meta = folder.describe(root / "data" / benchmark)
    else:
        settings = config.load(root / "params.yaml").benchmark(benchmark)
        module, checked = config.dataset(settings.data, benchmark)
        meta = module.meta(checked)
    if list(meta.classes) != run["classes"]:
        raise ConfigError(
            f"The weights know {len(run['classes'])} classes, which are not the {len(meta.classes)} of the "
            f"data set of {benchmark}: use weights that were trained on it, or fetch its data again."
        )
    return meta


def listed(images: Path) -> list[Path]:
    """The file, or all images and videos in the folder (not below it) by name. ConfigError if there is
    none."""
    if images.is_file():
        return [images]
    known = (*pixels.endings(), *VIDEOS)
    if images.is_dir():
        found = sorted(
            file
            for file in images.iterdir()
            if file.is_file() and file.suffix.lower() in known and not file.name.startswith(".")
        )
        if found:
            return found
        raise ConfigError(f"The folder {images} holds no image: name a folder with images, or one image.")
    raise ConfigError(f"There is no image or folder {images}: correct --images.")


def frames(file: Path, upright: bool = True) -> tuple[int, Iterator[Image.Image]]:
    """How many frames a file has (0: not known), and each as 8-bit RGB, ``upright`` by EXIF. ConfigError, one
    sentence, when it cannot be read or has an absurd size, at the first frame or at the one that is damaged.
    """
    if file.suffix.lower() in VIDEOS:
        return 0, _video(file)
    opened = pixels.opened(file, file.name, most=_most())
    count = pixels.frames(opened)
    return count, _pages(opened, count, file.name, upright)


def _pages(opened: Image.Image, count: int, name: str, upright: bool) -> Iterator[Image.Image]:
    with opened:
        for index in range(count):
            try:
                opened.seek(index)
            except Exception as error:  # Pillow has no one family of errors
                raise pixels.broken(f"Frame {index} of {name}", error) from None
            if opened.width * opened.height > (most := _most()):
                raise pixels.too_large(f"Frame {index} of {name}", most)
            yield pixels.rgb(opened, name, upright)


def _video(file: Path) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError:
        raise ConfigError(
            f"{file.name} is a video, which needs PyAV: `.venv/bin/python -m uv pip install av`, or save "
            "its frames as images."
        ) from None
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                image = frame.to_image()
                yield image.rotate(turn, expand=True) if (turn := getattr(frame, "rotation", 0)) else image
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ConfigError(f"{file.name} is damaged or cut off: {error}.") from None


def _most() -> int:
    """Pixels of an image that this machine can hold, in some copies, with what its file cache would give."""
    return int(psutil.virtual_memory().available) // BYTES


def segment(
    network: SegmentationNetwork, image: Image.Image, size: Size | None, sliding: Sliding | None = None
) -> np.ndarray:
    """Class of every pixel of an RGB image, (H, W) uint8.

    The network sees the image resized to ``size`` (H, W) if that is given, in one pass, and its logits are
    upsampled to the image's own size; else whole, or through the windows of ``sliding``. Without a ``size``
    a large image is seen through windows in any case. ConfigError when a ``size`` would need too much memory.
    """
    import torch

    from pipelines.datasets.transforms import normalise
    from pipelines.engine.evaluate import slide
    from pipelines.networks import upsample

    classes, shape = int(network.head.out_channels), (image.height, image.width)
    height, width = size or shape
    large = height * width > PIXELS or shape[0] * shape[1] > LOGITS // classes
    if size and large:
        raise ConfigError("it is too large for one pass: give a smaller --size, or none, for sliding windows")
    if size:
        sliding = None
    elif large:
        sliding = sliding or Sliding(window=(WINDOW, WINDOW), stride=(WINDOW * 3 // 4, WINDOW * 3 // 4))
    device = next(network.parameters()).device
    seen = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR) if size else image)

    def images(part: np.ndarray) -> Tensor:
        found = torch.from_numpy(part.transpose(2, 0, 1)[None].copy()).to(device)
        return normalise(found).contiguous(memory_format=torch.channels_last)

    with torch.inference_mode():
        try:
            if sliding is not None:
                return _windows(seen, classes, sliding, lambda part: slide(network, images(part), sliding))
            logits = upsample(network(images(seen))["logits"].float(), shape)[0]
            return np.asarray(logits.argmax(0).to(torch.uint8).cpu())
        except RuntimeError as error:  # out of memory, or too small for the network
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"the network failed on it ({reason}): give a size by --size HEIGHT WIDTH"
            ) from None


def _windows(
    image: np.ndarray, classes: int, sliding: Sliding, see: Callable[[np.ndarray], Tensor]
) -> np.ndarray:
    """As :func:`pipelines.engine.evaluate.slide`, block by block: the logits of a block and of the windows on
    its borders alone are in memory."""
    from tqdm import tqdm

    from pipelines.engine.evaluate import windows

    (height, width), starts = windows(image.shape[:2], sliding)
    side = max(1, int((BLOCK / classes) ** 0.5))
    blocks = [(top, left) for top in range(0, len(image), side) for left in range(0, image.shape[1], side)]
    mask = np.empty(image.shape[:2], np.uint8)
    for top, left in tqdm(blocks, unit="block", leave=False, disable=len(blocks) == 1):
        part = mask[top : top + side, left : left + side]
        ys = [y for y in starts[0] if top - height < y < top + len(part)]
        xs = [x for x in starts[1] if left - width < x < left + part.shape[1]]
        found = see(image[ys[0] : ys[-1] + height, xs[0] : xs[-1] + width])[0, top - ys[0] :, left - xs[0] :]
        part[:] = found[: len(part), : part.shape[1]].cpu().numpy()
    return mask


def mask_png(mask: np.ndarray, meta: Meta) -> bytes:
    """The mask as an 8-bit PNG whose palette is the data set's."""
    image = Image.fromarray(mask)
    image.putpalette([value for colour in meta.palette for value in colour])
    return pixels.encoded(image, optimize=True)


def overlay_png(image: Image.Image, mask: np.ndarray, meta: Meta) -> bytes:
    """The image under the colours of its mask, with the outlines of the classes."""
    edge = np.zeros(mask.shape, bool)
    for step in range(1, max(1, round(min(mask.shape) / OUTLINE)) + 1):
        edge[step:] |= mask[step:] != mask[:-step]
        edge[:, step:] |= mask[:, step:] != mask[:, :-step]
    palette, seen = np.asarray(meta.palette, np.float32), np.array(image)
    for top in range(0, len(mask), ROWS):  # floats of some rows at a time
        rows = slice(top, top + ROWS)
        mixed = (1 - STRENGTH) * seen[rows].astype(np.float32) + STRENGTH * palette[mask[rows]]
        mixed[edge[rows]] = (mixed[edge[rows]] + 255) / 2
        seen[rows] = mixed.round()
    return pixels.encoded(Image.fromarray(seen), optimize=True)


def legend_png(meta: Meta) -> bytes:
    """Colour, index and name of every class, in columns."""
    font, *own = (ImageFont.truetype(fonts.best(text), 22) for text in ("0", *meta.classes))
    columns = -(-len(meta.classes) // LEGEND_ROWS)
    rows = -(-len(meta.classes) // columns)
    numbers, swatch, line, margin = int(font.getlength("000")), 44, 40, 24
    before = swatch + 10 + numbers + 14  # of a name
    width = max(shape.getlength(name) for shape, name in zip(own, meta.classes, strict=True))
    each = before + int(width) + 2 * margin
    image = Image.new("RGB", (columns * each, rows * line + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    for index, (name, colour) in enumerate(zip(meta.classes, meta.palette, strict=True)):
        left, top = margin + index // rows * each, margin + index % rows * line
        draw.rectangle((left, top + 5, left + swatch, top + line - 5), fill=colour, outline="silver")
        middle, end = top + line // 2, left + swatch + 10 + numbers
        draw.text((end, middle), str(index), fill="gray", font=font, anchor="rm")
        draw.text((left + before, middle), name, fill="black", font=own[index], anchor="lm")
    return pixels.encoded(image, optimize=True)


def predict(
    weights: Path, images: Path, output: Path, size: Size | None = None, root: Path = ROOT
) -> list[str]:
    """Write masks, overlays and the legend into ``output``; one sentence for every image that failed."""
    run = read_run(weights)
    meta, files = read_meta(run, root), listed(images)
    if output.resolve() == (images if images.is_dir() else images.parent).resolve():
        raise ConfigError("--output is the folder of the images: name another one, so that they stay apart.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: name a folder as --output.")

    import torch
    from tqdm import tqdm

    from pipelines.engine import deploy

    network = deploy.load(run, weights).to(memory_format=torch.channels_last)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    write_bytes(output / "legend.png", legend_png(meta))
    window = run["config"]["training"].get("sliding")
    sliding = Sliding.model_validate(window) if window else None
    upright = run["config"]["data"].get("orientation") != "stored"  # as in training
    failed = []
    for file, name in tqdm(list(zip(files, _names(files), strict=True)), unit="image"):
        try:
            count, images_of = frames(file, upright)
            for index, image in enumerate(
                tqdm(images_of, file.name, count or None, False, disable=count == 1)
            ):
                one = name if count == 1 else f"{name}_{index:05d}"
                mask = segment(network, image, size, sliding)
                write_bytes(output / f"{one}_mask.png", mask_png(mask, meta))
                write_bytes(output / f"{one}_overlay.png", overlay_png(image, mask, meta))
        except ConfigError as error:
            text = str(error)
            failed.append(text if file.name in text else f"{file.name}: {text}.")
    log.info("%d of %d images done, in %s.", len(files) - len(failed), len(files), output)
    return failed


def _names(files: Iterable[Path]) -> list[str]:
    """What the output of each file is called: its name without the extension, unless another file, or a frame
    of one, would be called so. A name to which nothing can be added is cut."""
    files = list(files)
    stems = Counter(file.stem for file in files)
    taken = {file.name for file in files} | {
        found[1] for stem in stems if (found := re.fullmatch(r"(.*)_\d{5,}", stem))
    }
    names = [file.stem if stems[file.stem] == 1 and file.stem not in taken else file.name for file in files]
    return [name if len(os.fsencode(name)) <= LONGEST else _cut(name) for name in names]


def _cut(name: str) -> str:
    raw = os.fsencode(name)
    return f"{raw[: LONGEST // 2].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tools.predict",
        description="Segment your own images: for each a mask (the value of a pixel is its class) and an "
        "overlay, and one legend, as PNG. Of a stack or a video every frame.",
    )
    parser.add_argument("--weights", required=True, type=Path, help="weights.safetensors of a cell")
    parser.add_argument("--images", required=True, type=Path, help="an image, or a folder of images")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="resize images to this for the network; masks keep their size",
    )
    options = parser.parse_args()
    if options.size and min(options.size) < 1:
        parser.error("--size: both numbers must be 1 or more.")
    size = tuple(options.size) if options.size else None
    if failed := predict(options.weights, options.images, options.output, size):
        count = f"{len(failed)} image{'s' * (len(failed) > 1)} could not be done; the others are."
        raise ConfigError("\n".join(["", *failed, count]))


if __name__ == "__main__":
    cli.run(main)
