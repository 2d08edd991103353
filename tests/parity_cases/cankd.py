"""CanKD against its authors' code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.cankd import Method, cankd_loss
from parity_cases import Case, below, gradient, load, maps, shape

PLACES = {  # theirs -> ours; the biases of W.0 and W.1 have no place, as the instance norm removes them
    "att.theta.weight": "theta.weight",
    "att.theta.bias": "theta.bias",
    "att.phi.0.weight": "phi.weight",
    "att.phi.0.bias": "phi.bias",
    "g.0.weight": "g.weight",
    "g.0.bias": "g.bias",
    "W.0.weight": "out.weight",
    "W.1.weight": "scale.weight",
}


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "odd"):
        raise KeyError(case)
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    shapes = ({"backbone.4": shape(x)} for x in (student, teacher))
    method = Method(Method.Config(weight=1.0), *shapes)
    theirs = below(data, "param/")
    load(method.attention, {ours: theirs[name] for name, ours in PLACES.items()})
    load(method.connector, below(data, "connector/"))
    loss = cankd_loss(method.attention(method.connector(student), teacher), teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", gradient(loss, student), data["grad_student"]
