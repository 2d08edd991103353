"""LSKD against the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from baselines.lskd import lskd_loss


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student = torch.from_numpy(data["student"]).requires_grad_()
    loss = lskd_loss(student, torch.from_numpy(data["teacher"]), float(data["temperature"]))
    yield "loss", loss, data["loss"]
    yield "grad_student", torch.autograd.grad(loss, student)[0], data["grad_student"]
