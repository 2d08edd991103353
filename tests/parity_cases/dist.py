"""DIST against hunto/DIST_KD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.dist import dist_loss, inter_loss, intra_loss
from parity_cases import Case, gradient, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    yield "loss_inter", inter_loss(student, teacher), data["loss_inter"]
    yield "loss_intra", intra_loss(student, teacher), data["loss_intra"]
    loss = dist_loss(student, teacher, 1.0, 1.0)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
