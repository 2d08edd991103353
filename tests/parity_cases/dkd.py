"""DKD against its authors' code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.dkd import nckd_loss, tckd_loss
from parity_cases import Case, gradient, integers, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    given = (integers(data, "labels"), float(data["temperature"]), int(data["ignore_index"]))
    tckd, nckd = (loss(student, teacher, *given) for loss in (tckd_loss, nckd_loss))
    loss = float(data["alpha"]) * tckd + float(data["beta"]) * nckd
    yield "loss_tckd", tckd, data["loss_tckd"]
    yield "loss_nckd", nckd, data["loss_nckd"]
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
