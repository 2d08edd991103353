"""SP against RepDistiller's code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.sp import sp_loss
from parity_cases import Case, gradient, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "unequal", "pair"):
        raise KeyError(case)
    student = maps(data, "student", gradient=True)
    loss = sp_loss(student, maps(data, "teacher"))
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
