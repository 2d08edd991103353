"""APD against the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from baselines import apd
from pipelines.maps import labels_at


def adapter(side: str, data: Mapping[str, np.ndarray]) -> nn.Sequential:
    first, last = (data[f"{side}_adapter/{i}.weight"] for i in (0, 2))
    module = apd.perspective(first.shape[1], first.shape[0], last.shape[0])
    prefix = f"{side}_adapter/"
    module.load_state_dict(
        {k.removeprefix(prefix): torch.from_numpy(v) for k, v in data.items() if k.startswith(prefix)}
    )
    return module


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "absent_class"):
        raise KeyError(case)
    student = torch.from_numpy(data["student"]).requires_grad_()
    teacher = torch.from_numpy(data["teacher"])
    full = torch.from_numpy(data["labels"].astype(np.int64))
    classes, ignore_index = int(data["classes"]), int(data["ignore_index"])
    scale = float(data["kmeans_temp"])
    labels = labels_at(full.masked_fill(full == ignore_index, -1), student.shape[-2:])
    own = adapter("teacher", data)
    seen, centres, present = apd.views(adapter("student", data)(student), labels, classes, scale)
    target, target_centres, _ = apd.views(own(teacher), labels, classes, scale)

    view = apd.view_loss(seen, target, present)
    align = apd.align_loss(centres, target_centres, present)
    for name, loss in {"view_kl": view, "align": align}.items():
        yield f"loss_{name}", loss, data[f"loss_{name}"]
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        yield f"grad_{name}", gradient, data[f"grad_{name}"]

    loss = apd.teacher_loss(target, full, ignore_index)
    yield "loss_teacher_ce", loss, data["loss_teacher_ce"]
    (gradient,) = torch.autograd.grad(loss, own[0].weight)
    yield "grad_teacher_ce/0.weight", gradient, data["grad_teacher_ce/0.weight"]

    logits = torch.from_numpy(data["logits_student"]).requires_grad_()
    loss = apd.pixel_loss(logits, torch.from_numpy(data["logits_teacher"]), full.shape[-2:])
    yield "loss_pixel_kd", loss, data["loss_pixel_kd"]
    yield "grad_pixel_kd", torch.autograd.grad(loss, logits)[0], data["grad_pixel_kd"]
