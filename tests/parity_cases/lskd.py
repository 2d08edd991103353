"""LSKD against its authors' code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.lskd import lskd_loss
from parity_cases import Case, gradient, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student = maps(data, "student", gradient=True)
    loss = lskd_loss(student, maps(data, "teacher"), float(data["temperature"]))
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
