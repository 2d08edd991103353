"""ICKD against the authors' code, and AICSD's version on logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from baselines.ickd import Method, ickd_loss


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    tap = {"a": "backbone.4", "equal_width": "backbone.4", "logits": "logits"}[case]
    student, teacher = (torch.from_numpy(data[name]) for name in ("student", "teacher"))
    shapes = [{tap: (x.shape[1], x.shape[2], x.shape[3])} for x in (student, teacher)]
    method = Method(Method.Config(weight=1.0, tap=tap), *shapes)  # type: ignore[arg-type]
    if tap != "logits":
        names = {"param/conv2d.weight": "0.weight", "param/l2norm.weight": "1.weight"}
        names["param/l2norm.bias"] = "1.bias"
        parameters = dict(method.adapter.named_parameters())
        with torch.no_grad():
            for key, name in names.items():
                parameters.pop(name).copy_(torch.from_numpy(data[key]))
        assert not parameters
    student.requires_grad_()
    loss = ickd_loss(method.adapter(student), teacher)
    yield "loss", loss, data["loss"]
    yield "grad_student", torch.autograd.grad(loss, student)[0], data["grad_student"]
