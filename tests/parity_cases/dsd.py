"""DSD against winycg/CIRKD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.dsd import csd_loss, psd_loss
from parity_cases import Case, gradient, maps


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    number = sum(key.startswith("student/") for key in data)
    student = [maps(data, f"student/{i}", gradient=True) for i in range(number)]
    teacher = [maps(data, f"teacher/{i}") for i in range(number)]
    psd, csd = psd_loss(student, teacher), csd_loss(student[-1], teacher[-1], float(data["tau"]))
    yield "loss_psd", psd, data["loss_psd"]
    yield "loss_csd", csd, data["loss_csd"]
    for i, x in enumerate(student):
        yield f"grad_psd/{i}", gradient(psd, x), data[f"grad_psd/{i}"]
    yield "grad_csd", gradient(csd, student[-1]), data["grad_csd"]
