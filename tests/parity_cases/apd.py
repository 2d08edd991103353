"""APD against its authors' code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn

from baselines import apd
from parity_cases import Case, below, gradient, integers, load, maps
from pipelines.maps import labels_at


def adapter(data: Case, prefix: str) -> nn.Sequential:
    parameters = below(data, prefix)
    hidden, width = parameters["0.weight"].shape[:2]
    module = apd.perspective(width, hidden, len(parameters["2.weight"]))
    load(module, parameters)
    return module


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "absent_class"):
        raise KeyError(case)
    student, teacher, full = (
        maps(data, "student", gradient=True),
        maps(data, "teacher"),
        integers(data, "labels"),
    )
    ignore_index = int(data["ignore_index"])
    labels = labels_at(full.masked_fill(full == ignore_index, -1), student.shape[-2:])
    given = (labels, int(data["classes"]), float(data["kmeans_temp"]))
    ours, theirs = adapter(data, "student_adapter/"), adapter(data, "teacher_adapter/")
    seen, centres, present = apd.views(ours(student), *given)
    target, target_centres, _ = apd.views(theirs(teacher), *given)

    view = apd.view_loss(seen, target, present)
    yield "loss_view_kl", view, data["loss_view_kl"]
    yield "grad_view_kl", gradient(view, student), data["grad_view_kl"]
    align = apd.align_loss(centres, target_centres, present)
    yield "loss_align", align, data["loss_align"]
    yield "grad_align", gradient(align, student), data["grad_align"]

    loss = apd.teacher_loss(target, full, ignore_index)
    yield "loss_teacher_ce", loss, data["loss_teacher_ce"]
    for key in data:
        if key.startswith("grad_teacher_ce/"):
            parameter = theirs.get_parameter(key.removeprefix("grad_teacher_ce/"))
            yield key, gradient(loss, parameter), data[key]

    logits = maps(data, "logits_student", gradient=True)
    loss = apd.pixel_loss(logits, maps(data, "logits_teacher"), full.shape[-2:])
    yield "loss_pixel_kd", loss, data["loss_pixel_kd"]
    yield "grad_pixel_kd", gradient(loss, logits), data["grad_pixel_kd"]
