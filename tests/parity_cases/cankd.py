"""CanKD against the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from baselines.cankd import CrossAttention, Method, cankd_loss


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "odd"):
        raise KeyError(case)
    student, teacher = (torch.from_numpy(data[name]) for name in ("student", "teacher"))
    shapes = [{"backbone.4": (x.shape[1], x.shape[2], x.shape[3])} for x in (student, teacher)]
    method = Method(Method.Config(weight=1.0), *shapes)
    load(method, data)
    student.requires_grad_()
    z = method.attention(method.connector(student), teacher)
    loss = cankd_loss(z, teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", torch.autograd.grad(loss, student)[0], data["grad_student"]


def load(method: Method, data: Mapping[str, np.ndarray]) -> None:
    """The biases that the instance norm removes have no place here."""
    attention: CrossAttention = method.attention
    places: dict[str, nn.Parameter] = {
        "connector/weight": method.connector.weight,
        "connector/bias": method.connector.bias,  # type: ignore[dict-item]
        "param/att.theta.weight": attention.theta.weight,
        "param/att.theta.bias": attention.theta.bias,  # type: ignore[dict-item]
        "param/att.phi.0.weight": attention.phi.weight,
        "param/att.phi.0.bias": attention.phi.bias,  # type: ignore[dict-item]
        "param/g.0.weight": attention.g.weight,
        "param/g.0.bias": attention.g.bias,  # type: ignore[dict-item]
        "param/W.0.weight": attention.out.weight,
        "param/W.1.weight": attention.scale.weight,
    }
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(torch.from_numpy(data[key]))
