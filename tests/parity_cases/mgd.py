"""MGD against yzd-v/MGD, whose loss is the sum over an image times alpha."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.mgd import Method, mgd_loss
from parity_cases import Case, below, gradient, load, maps, shape


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher, keep = maps(data, "student", gradient=True), maps(data, "teacher"), maps(data, "keep")
    config = Method.Config(weight=1.0, masked=float(data["lambda_mgd"]), tap="backbone.4")
    method = Method(config, {"backbone.4": shape(student)}, {"backbone.4": shape(teacher)})
    load(method, below(data, "param/"))
    loss = mgd_loss(method.generate(student, keep), teacher)
    loss = loss * float(data["alpha_mgd"]) * teacher[0].numel()
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
    for name, parameter in method.named_parameters():
        yield f"grad/{name}", gradient(loss, parameter), data[f"grad/{name}"]
