"""ICKD against its authors' code, and AICSD's version on logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.ickd import Method, ickd_loss
from parity_cases import Case, below, gradient, load, maps, shape

TAPS = {"a": "backbone.4", "equal_width": "backbone.4", "logits": "logits"}
PLACES = {"conv2d.weight": "0.weight", "l2norm.weight": "1.weight", "l2norm.bias": "1.bias"}  # theirs -> ours


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    tap = TAPS[case]
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    method = Method(Method.Config(weight=1.0, tap=tap), {tap: shape(student)}, {tap: shape(teacher)})
    load(method.adapter, {PLACES[name]: value for name, value in below(data, "param/").items()})
    loss = ickd_loss(method.adapter(student), teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
