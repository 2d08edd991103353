"""The confusion matrix, and every score that is read from it.

Counts are int64, rows = ground truth, columns = prediction. The mIoU of a split comes from the matrix summed
over its images, never from a mean of per-image or per-batch scores. torch is imported only where a network's
output is counted: the tables are made without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Count (truth, prediction) pairs per image, in one ``bincount`` over the batch.

    ``prediction`` and ``label``: integer tensors (B, H, W) of class indices, any integer dtype. Pixels whose
    label is ``ignore_index`` are left out, whatever was predicted there. Returns int64 (B, classes, classes),
    rows = truth, on the device of ``label``. Raises ValueError on unequal shapes, and on a label or a counted
    prediction outside the classes (which would otherwise land silently in another cell of the matrix).
    """
    import torch

    if prediction.shape != label.shape or label.ndim != 3:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} must both be (B, H, W)."
        )
    images = label.shape[0]
    valid = label != ignore_index
    truth, guess = label[valid].long(), prediction[valid].long()
    for name, values in (("label", truth), ("prediction", guess)):
        if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < classes):
            raise ValueError(
                f"a {name} lies outside the {classes} classes: {int(values.min())} to {int(values.max())}."
            )
    image = torch.arange(images, device=label.device).view(-1, 1, 1).expand_as(label)[valid]
    index = (image * classes + truth) * classes + guess
    return torch.bincount(index, minlength=images * classes * classes).view(images, classes, classes)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union per class, 0 to 1, float64 (C,), from one summed matrix (C, C).

    A class that is absent from the ground truth is NaN, and so left out of the mean, even when it was
    predicted somewhere: its IoU would be 0 for a single stray pixel and undefined without it. The stray
    pixels still count against the classes that they were taken from.
    """
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"counts must be (C, C), not {counts.shape}; sum them over the images first.")
    hit = np.diag(counts).astype(np.float64)
    truth, guess = counts.sum(axis=1), counts.sum(axis=0)
    return np.divide(hit, truth + guess - np.diag(counts), out=np.full(len(hit), np.nan), where=truth > 0)


def summary(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of a split in percent, from counts (N, C, C) of its images.

    ``miou``: mean IoU over the classes of the ground truth; ``pixel_accuracy``: correct share of the labelled
    pixels; ``mean_accuracy``: mean recall over the same classes; ``iou``: per class, null where the class is
    absent. Rounded to six decimals; NaN never occurs. Raises ValueError when no pixel carries a label.
    """
    total = np.asarray(counts, dtype=np.int64).reshape(-1, len(classes), len(classes)).sum(axis=0)
    if not (pixels := int(total.sum())):
        raise ValueError("No pixel of this split carries a label: there is nothing to score.")
    scores = iou(total)
    present = ~np.isnan(scores)
    recall = np.diag(total)[present] / total.sum(axis=1)[present]
    return {
        "miou": _percent(scores[present].mean()),
        "pixel_accuracy": _percent(np.trace(total) / pixels),
        "mean_accuracy": _percent(recall.mean()),
        "iou": {name: None if np.isnan(x) else _percent(x) for name, x in zip(classes, scores, strict=True)},
    }


def _percent(share: float) -> float:
    return round(100 * float(share), 6)
