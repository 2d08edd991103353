"""Coloured masks for images of one's own: weights + an image or a folder → mask, overlay and legend as PNG.

``<image>_mask.png`` holds class indices with the data set's palette, in the size of the image;
``<image>_overlay.png`` the image under these colours; ``legend.png`` says which colour is which class.
"""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines import cli, config, files
from pipelines.config import ROOT, ConfigError, Size
from pipelines.datasets import folder
from pipelines.datasets.folder import Meta
from pipelines.files import write_bytes

if TYPE_CHECKING:
    from pipelines.networks import SegmentationNetwork

PIXELS = 2**24  # that the network sees at most: its feature maps take some 100 values a pixel
LOGITS = 2**30  # values at most, classes × pixels of the image
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
            f"The weights know {len(run['classes'])} classes, the data set of {benchmark} has "
            f"{len(meta.classes)} or others: use weights that were trained on it, or fetch its data again."
        )
    return meta


def listed(images: Path) -> list[Path]:
    """The file, or all images in the folder (not below it) by name. ConfigError if there is none."""
    if images.is_file():
        return [images]
    known = Image.registered_extensions()
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


def read_image(file: Path) -> Image.Image:
    """An image as 8-bit RGB, upright as its EXIF orientation says, transparency over white.

    The first frame of several. Values of more than 8 bits are scaled from 16 bits (floats from 0 to 1 where
    none is above 1). ConfigError, one sentence, when it cannot be read or claims an absurd size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image: Image.Image = ImageOps.exif_transpose(opened)
                image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            values = np.nan_to_num(np.asarray(image, np.float64))
            white = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
            white = 65535 if image.mode.startswith("I;") else white
            return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8)).convert(
                "RGB"
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ConfigError(
            f"{file.name} claims more than {limit:.0f} million pixels: cut it into smaller images."
        ) from None
    except Exception as error:  # each format has its own family of errors for a damaged file
        reason = "not an image that can be read" if "cannot identify" in str(error) else str(error)
        raise ConfigError(f"{file.name} cannot be read: {reason.rstrip('.')}.") from None


def segment(network: SegmentationNetwork, image: Image.Image, size: Size | None) -> np.ndarray:
    """Class of every pixel of an RGB image, (H, W) uint8.

    The network sees the image resized to ``size`` (H, W) if that is given; its logits are upsampled to the
    image's own size. ConfigError when that would need too much memory.
    """
    import torch

    from pipelines.datasets.transforms import normalise
    from pipelines.networks import upsample

    height, width = size or (image.height, image.width)
    classes = int(network.head.out_channels)
    if image.height * image.width > LOGITS // classes:
        raise ConfigError(
            f"it has {image.width}×{image.height} pixels, at most {LOGITS / classes / 1e6:.1f} million fit "
            f"with {classes} classes: make it smaller"
        )
    if height * width > PIXELS:
        raise ConfigError(
            f"the network would see {width}×{height} pixels, at most {PIXELS / 1e6:.1f} million fit: give a "
            "smaller --size H W"
        )
    device = next(network.parameters()).device
    seen = image.resize((width, height), Image.Resampling.BILINEAR) if size else image
    pixels = torch.from_numpy(np.array(seen).transpose(2, 0, 1)[None]).to(device)
    images = normalise(pixels).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        try:
            logits = upsample(network(images)["logits"].float(), (image.height, image.width))
            return np.asarray(logits.argmax(1)[0].to(torch.uint8).cpu())
        except RuntimeError as error:  # out of memory, or too small for the network
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"the network failed on it ({reason}): try --size H W") from None


def mask_png(mask: np.ndarray, meta: Meta) -> bytes:
    """The mask as an 8-bit PNG whose palette is the data set's."""
    image = Image.fromarray(mask)
    image.putpalette([value for colour in meta.palette for value in colour])
    return _png(image)


def overlay_png(image: Image.Image, mask: np.ndarray, meta: Meta) -> bytes:
    """The image under the colours of its mask, with the outlines of the classes."""
    colours = np.asarray(meta.palette, np.float32)[mask]
    mixed = (1 - STRENGTH) * np.asarray(image, np.float32) + STRENGTH * colours
    edge = np.zeros(mask.shape, bool)
    for step in range(1, max(1, round(min(mask.shape) / OUTLINE)) + 1):
        edge[step:] |= mask[step:] != mask[:-step]
        edge[:, step:] |= mask[:, step:] != mask[:, :-step]
    mixed[edge] = (mixed[edge] + 255) / 2
    return _png(Image.fromarray(mixed.round().astype(np.uint8)))


def legend_png(meta: Meta) -> bytes:
    """Colour, index and name of every class, in columns."""
    font = ImageFont.truetype(_font(), 22)
    columns = -(-len(meta.classes) // LEGEND_ROWS)
    rows = -(-len(meta.classes) // columns)
    numbers, swatch, line, margin = int(font.getlength("000")), 44, 40, 24
    before = swatch + 10 + numbers + 14  # of a name
    each = before + int(max(map(font.getlength, meta.classes))) + 2 * margin
    image = Image.new("RGB", (columns * each, rows * line + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    for index, (name, colour) in enumerate(zip(meta.classes, meta.palette, strict=True)):
        left, top = margin + index // rows * each, margin + index % rows * line
        draw.rectangle((left, top + 5, left + swatch, top + line - 5), fill=colour, outline="silver")
        middle, end = top + line // 2, left + swatch + 10 + numbers
        draw.text((end, middle), str(index), fill="gray", font=font, anchor="rm")
        draw.text((left + before, middle), name, fill="black", font=font, anchor="lm")
    return _png(image)


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
    failed = []
    for file, name in tqdm(list(zip(files, _names(files), strict=True)), unit="image"):
        try:
            image = read_image(file)
            try:
                mask = segment(network, image, size)
            except ConfigError as error:
                raise ConfigError(f"{file.name}: {error}.") from None
        except ConfigError as error:
            failed.append(str(error))
            continue
        write_bytes(output / f"{name}_mask.png", mask_png(mask, meta))
        write_bytes(output / f"{name}_overlay.png", overlay_png(image, mask, meta))
    log.info("%d of %d images done, in %s.", len(files) - len(failed), len(files), output)
    return failed


def _names(files: Iterable[Path]) -> list[str]:
    """What the output of each file is called: its name without the extension, unless two would be one."""
    files = list(files)
    stems = Counter(file.stem for file in files)
    return [file.stem if stems[file.stem] == 1 else file.name for file in files]


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipelines.tools.predict", description=__doc__)
    parser.add_argument("--weights", required=True, type=Path, help="weights.safetensors of a cell")
    parser.add_argument("--images", required=True, type=Path, help="an image, or a folder of images")
    parser.add_argument("--output", required=True, type=Path, help="a folder for the results")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="what images are resized to for the network"
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
