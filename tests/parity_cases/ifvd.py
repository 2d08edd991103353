"""IFVD against YukangWang/IFVD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.ifvd import ifvd_loss
from parity_cases import Case, gradient, integers, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    labels, classes = integers(data, "labels"), int(data["classes"])
    labels[labels == int(data["ignore_index"])] = 255
    loss = ifvd_loss(student, teacher, labels, classes)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
