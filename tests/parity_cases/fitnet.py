"""FitNet against winycg/CIRKD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.fitnet import Method, fitnet_loss
from parity_cases import Case, below, gradient, load, maps, shape


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    config = Method.Config(weight=1.0, tap="fusion")
    method = Method(config, {"fusion": shape(student)}, {"fusion": shape(teacher)})
    load(method, below(data, "param/"))
    loss = fitnet_loss(method.conv(student), teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
    yield "grad/conv.weight", gradient(loss, method.conv.weight), data["grad/conv.weight"]
