"""AICSD, ``formula: code``, against its authors' code, which divides by the number of images once more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.aicsd import ics_code_loss
from parity_cases import Case, gradient, maps
from pipelines.maps import pixel_kl


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "b"):
        raise KeyError(case)
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    ics = ics_code_loss(student, teacher) / len(student)
    pixel = pixel_kl(student, teacher).mean() / student.shape[1]  # theirs is a mean over all elements
    for name, loss in {"ics": ics, "pixel": pixel}.items():
        yield f"loss_{name}", loss, data[f"loss_{name}"]
        yield f"grad_{name}", gradient(loss, student), data[f"grad_{name}"]
