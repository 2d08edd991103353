"""DKD against the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from baselines.dkd import nckd_loss, tckd_loss


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student = torch.from_numpy(data["student"]).requires_grad_()
    teacher = torch.from_numpy(data["teacher"])
    labels = torch.from_numpy(data["labels"].astype(np.int64))
    temperature, ignore_index = float(data["temperature"]), int(data["ignore_index"])
    tckd, nckd = (
        loss(student, teacher, labels, temperature, ignore_index) for loss in (tckd_loss, nckd_loss)
    )
    loss = float(data["alpha"]) * tckd + float(data["beta"]) * nckd
    yield "loss_tckd", tckd, data["loss_tckd"]
    yield "loss_nckd", nckd, data["loss_nckd"]
    yield "loss", loss, data["loss"]
    yield "grad_student", torch.autograd.grad(loss, student)[0], data["grad_student"]
