"""Training batches and the normalisation of images. A batch is a pure function of (data, seed, step).

Which samples a step gets, and how each is scaled, cropped, flipped and coloured, comes from named streams
(see ``engine.seeds``), so batches need no loader, no state and no order of evaluation. Plain torch instead of
torchvision: its import costs each process seconds. The photometric functions are those of
``torchvision.transforms.v2.functional``.

Resizing, cropping, padding and flipping are one linear map along each axis. Images: ``rows @ image @
columns`` with the weights of bilinear interpolation with antialiasing; labels: the same grid, nearest
neighbour, as an index. Samples that are read from disk are augmented one by one by the processes that read
them; as large images have long rows, each output pixel then sums its few non-zero weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.datasets.folder import Split, Stream
from pipelines.engine.seeds import generator

if TYPE_CHECKING:
    from pipelines.config import Augmentation, Training

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, with torchvision's digits
DRAWS = 8  # random numbers of one sample: scale, row, column, flip, brightness, contrast, saturation, hue


def normalise(images: Tensor) -> Tensor:
    """uint8 images (…, 3, H, W) to float32, less MEAN and over STD."""
    return _standardised(images.float() / 255)


def training_batches(
    split: Split | Stream, training: Training, ignore_index: int, seed: int, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch of every step from ``start`` to the last, see :func:`training_batch`."""
    if isinstance(split, Split):
        for step in range(start, training.steps):
            yield training_batch(split, training, ignore_index, seed, step)
    else:
        size = training.batch_size
        read = partial(_training_sample, split, training, ignore_index, seed)
        yield from split.load(read, range(start * size, training.steps * size), size)


def training_batch(
    split: Split, training: Training, ignore_index: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The augmented batch of a step: images (B, 3, h, w) float32 normalised, labels (B, h, w) int64.

    Samples run through one permutation of the split per epoch, without a break between epochs: position
    ``step·B + i``. Each is scaled by a factor uniform in ``scale``, cropped to (h, w) at random (where it is
    smaller than the crop it lies in it at random, over the ImageNet mean and ``ignore_index``), flipped, and
    its brightness, contrast, saturation (factors uniform in 1 ± x) and hue (shift uniform in ± x of a turn)
    jittered in that order. The result depends on nothing else, and lies on the device of ``split``.
    """
    first = step * training.batch_size
    positions = range(first, first + training.batch_size)
    chosen = [_chosen(seed, position, len(split.names)) for position in positions]
    draws = torch.stack([_draws(seed, position) for position in positions])
    return _augmented(split.images[chosen], split.labels[chosen], training, ignore_index, draws, _dense)


def _training_sample(
    split: Stream, training: Training, ignore_index: int, seed: int, position: int
) -> tuple[Tensor, Tensor]:
    """The sample at a position of the training, without the dimension of the batch."""
    image, label = split.read(_chosen(seed, position, len(split.names)))
    images, labels = _augmented(
        image[None], label[None], training, ignore_index, _draws(seed, position)[None], _sparse
    )
    return images[0], labels[0]


def _chosen(seed: int, position: int, count: int) -> int:
    """The index in the split of the sample at a position of the training."""
    return _order(seed, position // count, count)[position % count]


def _draws(seed: int, position: int) -> Tensor:
    return torch.rand(DRAWS, generator=generator(seed, "augment", position), dtype=torch.float64)


@torch.no_grad()
def _augmented(
    images: Tensor,
    labels: Tensor,
    training: Training,
    ignore_index: int,
    draws: Tensor,
    resample: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 and labels (B, H, W) uint8 as a training step sees them, by the random
    numbers ``draws`` (B, DRAWS)."""
    height, width = labels.shape[-2:]
    device, augmentation, draws = images.device, training.augmentation, draws.to(images.device)
    scale = _between(draws[:, 0], *augmentation.scale)
    flip = draws[:, 3] < augmentation.flip
    rows = _grid(height, training.crop[0], scale, draws[:, 1], torch.zeros_like(flip))
    columns = _grid(width, training.crop[1], scale, draws[:, 2], flip)

    with torch.autocast(device.type, enabled=False):
        images = resample(images.float() / 255, _weights(height, *rows), _weights(width, *columns))
        inside = (rows[0] >= 0)[:, :, None] & (columns[0] >= 0)[:, None, :]
        # Outside of the sample the mean: 0 after normalisation, and close to neutral for the contrast.
        outside = (~inside).unsqueeze(1)
        images = torch.where(outside, images.new_tensor(MEAN).view(3, 1, 1), images)
        images = _jitter(images, augmentation, draws[:, 4:].float())
        images = _standardised(images).masked_fill(outside, 0.0)

    row, column = _nearest(height, *rows), _nearest(width, *columns)
    which = torch.arange(len(labels), device=device)
    labels = labels[which[:, None, None], row[:, :, None], column[:, None, :]].long()
    return images, labels.masked_fill(~inside, ignore_index)


def _dense(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows`` (B, h, H) times images (B, 3, H, W) times ``columns`` (B, w, W) transposed."""
    return rows[:, None] @ images @ columns.mT[:, None]


def _sparse(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same for one sample (B = 1), by the non-zero weights alone."""
    for dim, weights in ((-2, rows[0]), (-1, columns[0])):
        count = max(1, int((weights > 0).sum(1).max()))
        weight, index = weights.topk(count, dim=1)
        shape = (-1, 1) if dim == -2 else (-1,)
        images = sum(  # type: ignore[assignment]
            images.index_select(dim, index[:, k]) * weight[:, k].view(shape) for k in range(count)
        )
    return images


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] times ``factor`` (B,), clipped."""
    return (images * _over_pixels(factor)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] drawn to (factor < 1) or away from the mean of their gray version,
    clipped."""
    mean = _gray(images).mean((-3, -2, -1), keepdim=True)
    return torch.lerp(mean, images, _over_pixels(factor)).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] drawn to (factor < 1) or away from their gray version, clipped."""
    return torch.lerp(_gray(images), images, _over_pixels(factor)).clamp(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with their hue turned by ``shift`` (B,) full turns.

    HSV there and back in one go: with hue h in sixths of a turn, a channel is V − C·clip(min(k, 4 − k), 0,
    1), k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue. Value V and chroma C stay as they are.
    """
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    # of a gray pixel the hue does not matter: its chroma is 0
    safe = chroma.clamp_min(torch.finfo(images.dtype).tiny)
    turn = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offsets = images.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    k = torch.remainder(offsets + (turn.unsqueeze(-3) + 6 * _over_pixels(shift)), 6)
    return value.unsqueeze(-3) - chroma.unsqueeze(-3) * torch.minimum(k, 4 - k).clamp(0, 1)


def _jitter(images: Tensor, augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Photometric jitter of (B, 3, h, w) in [0, 1] from ``draws`` (B, 4) in [0, 1). A setting of 0 costs
    nothing."""
    for column, function, extent, centre in (
        (0, brightness, augmentation.brightness, 1.0),
        (1, contrast, augmentation.contrast, 1.0),
        (2, saturation, augmentation.saturation, 1.0),
        (3, hue, augmentation.hue, 0.0),
    ):
        if extent:
            images = function(images, _between(draws[:, column], centre - extent, centre + extent))
    return images


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The permutation of the samples in an epoch."""
    return tuple(torch.randperm(count, generator=generator(seed, "order", epoch)).tolist())


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


def _grid(size: int, crop: int, scale: Tensor, place: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ``crop`` output pixels along one axis lie in each sample's scaled axis.

    Returns their indices in the scaled axis (B, crop), −1 outside of it, and its length (B, 1).
    """
    length = (size * scale).round().clamp(min=1)[:, None]
    room = length - crop  # negative: the sample is smaller than the crop
    start = torch.where(
        room >= 0, (place[:, None] * (room + 1)).floor(), -(place[:, None] * (1 - room)).floor()
    )
    steps = torch.arange(crop, dtype=torch.float64, device=scale.device)
    index = start + torch.where(flip[:, None], crop - 1 - steps, steps)
    return torch.where((index >= 0) & (index < length), index, -1.0), length


def _weights(size: int, index: Tensor, length: Tensor) -> Tensor:
    """Weights (B, crop, size) of bilinear interpolation with antialiasing, ``align_corners=False``; 0
    outside.

    A triangle around each output pixel's centre, as wide as a pixel of the coarser of the two axes.
    """
    ratio = size / length
    centre = (index + 0.5) * ratio - 0.5
    distance = (torch.arange(size, dtype=torch.float64, device=centre.device) - centre[:, :, None]).abs()
    weights = (1 - distance / ratio.clamp(min=1)[:, :, None]).clamp(min=0) * (index >= 0)[:, :, None]
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)).float()


def _nearest(size: int, index: Tensor, length: Tensor) -> Tensor:
    """The source pixel (B, crop) under each output pixel's centre; any valid one outside."""
    return ((index + 0.5) * (size / length)).floor().clamp(0, size - 1).long()


def _standardised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


def _gray(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W)."""
    red, green, blue = images.unbind(-3)
    return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue).unsqueeze(-3)


def _over_pixels(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
