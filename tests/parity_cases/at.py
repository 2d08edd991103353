"""AT against szagoruyko/attention-transfer, and RepDistiller for unequal sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.at import at_loss
from parity_cases import Case, gradient, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    loss = at_loss(student, teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
