"""Evaluation: single scale, whole image, at the resolution of the labels. Counts per image, so every metric
follows."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.datasets.folder import Split
from pipelines.datasets.transforms import normalise
from pipelines.networks import SegmentationNetwork
from pipelines.results.confusion import confusion_matrix

BATCH = 16  # images at a time; has no influence on the counts


@torch.no_grad()
def evaluate(
    network: SegmentationNetwork, split: Split, classes: int, ignore_index: int, precision: str
) -> np.ndarray:
    """Confusion counts (N, classes, classes) int64 of a split, rows = truth. The network is left in the mode
    it was in."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    counts = []
    for first in range(0, len(split.images), BATCH):
        images = normalise(split.images[first : first + BATCH].to(device)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = network.predict(images)
        labels = split.labels[first : first + BATCH].to(device)
        counts.append(confusion_matrix(prediction, labels, classes, ignore_index).cpu())
    network.train(was_training)
    return torch.cat(counts).numpy()


@torch.no_grad()
def latency(network: SegmentationNetwork, size: tuple[int, int], precision: str, runs: int = 20) -> float:
    """Milliseconds of one inference, batch 1 at ``size`` (H, W), on this machine: median of ``runs`` after a
    warm-up."""
    network.eval()
    device = next(network.parameters()).device
    image = torch.zeros(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    taken = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            network.predict(image)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(taken[3:]))
