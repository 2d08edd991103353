"""Af-DCD against OSVAI/Af-DCD, whose feature term is the sum over an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from baselines.afdcd import Method, ctr_loss, fd_loss, keep_mask
from parity_cases import Case, below, gradient, load, maps, shape

# the layers of the projectors in their code and here
PLAIN = {"0": "blocks.0", "2": "heads.0"}
ENHANCED = {"block_1.0": "blocks.0", "adpator_1": "heads.0", "block_2.0": "blocks.1", "adpator_2": "heads.1"}


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher, keep = maps(data, "student", gradient=True), maps(data, "teacher"), maps(data, "keep")
    projector = below(data, "param/projetor.")
    enhanced = any(name.startswith("block") for name in projector)
    config = Method.Config(
        weight_kd=0.0,
        weight_fd=1.0,
        weight_ctr=1.0,
        temperature=float(data["tau"]),
        groups=int(data["groups"]),
        pool=int(data["pool"]),
        patch=int(data["patch"]),
        mask="center" if enhanced else "random",
        masked=float(data["mask_ratio"]),
        projector="enhanced" if enhanced else "plain",
    )
    method = Method(config, {"backbone.4": shape(student)}, {"backbone.4": shape(teacher)})
    names = ENHANCED if enhanced else PLAIN
    load(
        method.projector,
        {
            f"{names[layer]}.{kind}": projector[f"{layer}.{kind}"]
            for layer in names
            for kind in ("weight", "bias")
        },
    )
    load(method.align, below(data, "param/align."))
    if config.mask == "center":
        assert torch.equal(keep_mask(student, config.mask, config.masked), keep)
    projected = method.project(student, keep)
    fd = fd_loss(projected, teacher) * teacher[0].numel()
    ctr = ctr_loss(projected, teacher, config.groups, config.pool, config.patch, config.temperature)
    for name, loss in (("fd", fd), ("ctr", ctr)):
        yield f"loss_{name}", loss, data[f"loss_{name}"]
        yield f"grad_{name}", gradient(loss, student), data[f"grad_{name}"]
