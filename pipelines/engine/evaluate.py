"""Evaluation: single scale, whole image or sliding window, at the resolution of the labels. Counts per image,
so every metric follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.config import Sliding, Training
from pipelines.datasets.folder import Split, Stream
from pipelines.datasets.transforms import normalise
from pipelines.networks import SegmentationNetwork, upsample
from pipelines.runs.confusion import confusion_matrix

BATCH = 16  # images at a time; has no influence on the counts


@torch.no_grad()
def evaluate(
    network: SegmentationNetwork, split: Split | Stream, classes: int, ignore_index: int, training: Training
) -> np.ndarray:
    """Confusion counts (N, classes, classes) int64 of a split, rows = truth, with the precision and window of
    ``training``. The network is left in the mode it was in."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    counts = []
    for pixels, labels in split.batches(BATCH):
        prediction = predict(network, pixels.to(device), training)
        counts.append(confusion_matrix(prediction, labels.to(device), classes, ignore_index).cpu())
    network.train(was_training)
    return torch.cat(counts).numpy()


@torch.no_grad()
def predict(network: SegmentationNetwork, pixels: Tensor, training: Training) -> Tensor:
    """Class of every pixel of uint8 images, (B, H, W) int64, as :func:`evaluate` counts them."""
    images = normalise(pixels).contiguous(memory_format=torch.channels_last)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        return slide(network, images, training.sliding) if training.sliding else network.predict(images)


def windows(size: Sequence[int], sliding: Sliding) -> tuple[list[int], list[list[int]]]:
    """Height and width of a window, cut to an image of ``size``, and where windows begin in each direction:
    the last one ends at the border."""
    own = [min(wanted, have) for wanted, have in zip(sliding.window, size, strict=True)]
    starts = [
        [*range(0, have - window, stride), have - window]
        for have, window, stride in zip(size, own, sliding.stride, strict=True)
    ]
    return own, starts


def slide(network: SegmentationNetwork, images: Tensor, sliding: Sliding) -> Tensor:
    """Class of every pixel, (B, H, W) int64: argmax of the upsampled logits of all :func:`windows`, averaged
    where they overlap."""
    size = images.shape[-2:]
    own, starts = windows(size, sliding)
    total, seen = None, images.new_zeros(size)
    for top in starts[0]:
        for left in starts[1]:
            place = (..., slice(top, top + own[0]), slice(left, left + own[1]))
            logits = upsample(network(images[place])["logits"].float(), (own[0], own[1]))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[place] += logits
            seen[place] += 1
    assert total is not None  # there is a window
    return (total / seen).argmax(1)
