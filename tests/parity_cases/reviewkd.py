"""ReviewKD against its authors' code (``square``), TransKD's port (``wide``), and the loss on given maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from baselines.reviewkd import Review, hcl_loss
from parity_cases import Case, below, gradient, load, maps, shape

PLACES = {"conv1.": "reduce.", "conv2.": "expand.", "att_conv.0.": "attention."}  # theirs -> ours


def listed(data: Case, name: str) -> list[str]:
    """The keys ``<name>/<i>`` from the shallowest stage to the deepest, or ``<name>`` alone."""
    if name in data:
        return [name]
    return sorted((k for k in data if k.startswith(f"{name}/")), key=lambda k: int(k.rpartition("/")[2]))


def review(data: Case, student: list[Tensor], teacher: list[Tensor]) -> Review:
    """The authors list the stages from the deepest, here they stand from the shallowest."""
    module = Review([shape(x)[0] for x in student], int(data["mid"]), [shape(x)[0] for x in teacher])
    parameters = {}
    for name, value in below(data, "abf/").items():
        stage, place = name.split(".", 1)
        for theirs, ours in PLACES.items():
            place = place.replace(theirs, ours)
        parameters[f"stages.{len(student) - 1 - int(stage)}.{place}"] = value
    load(module, parameters)
    return module


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("square", "wide", "hcl_only"):
        raise KeyError(case)
    keys = listed(data, "student")
    student = [maps(data, key, gradient=True) for key in keys]
    teacher = [maps(data, key) for key in listed(data, "teacher")]
    compared = student
    if case != "hcl_only":
        compared = review(data, student, teacher)(student, [t.shape[-2:] for t in teacher])
        for key in listed(data, "out"):
            yield key, compared[int(key.removeprefix("out/"))], data[key]
    loss = torch.stack([hcl_loss(s, t) for s, t in zip(compared, teacher, strict=True)]).sum()
    yield "loss", loss, data["loss"]
    for key, x in zip(keys, student, strict=True):
        yield f"grad_{key}", gradient(loss, x), data[f"grad_{key}"]
