"""AICSD, ``formula: code``, against the authors' code, which divides by the number of images once more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from baselines.aicsd import ics_code_loss
from pipelines.maps import pixel_kl


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student = torch.from_numpy(data["student"]).requires_grad_()
    teacher = torch.from_numpy(data["teacher"])
    ics = ics_code_loss(student, teacher) / len(student)
    pixel = pixel_kl(student, teacher).mean() / student.shape[1]  # theirs is a mean over all elements
    for name, loss in {"ics": ics, "pixel": pixel}.items():
        yield f"loss_{name}", loss, data[f"loss_{name}"]
        yield f"grad_{name}", torch.autograd.grad(loss, student)[0], data[f"grad_{name}"]
