"""AttnFD against the authors' code: one layer, lambda 1, divided by the number of images as there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from baselines.attnfd import CBAM, attnfd_loss, connector

PLACES = {  # theirs -> ours
    "ChannelGate.mlp.1": "channels.0",
    "ChannelGate.mlp.3": "channels.2",
    "SpatialGate.spatial.conv": "positions.0",
    "SpatialGate.spatial.bn": "positions.1",
}


def load(module: nn.Module, data: Mapping[str, np.ndarray], prefix: str, places: Mapping[str, str]) -> None:
    """Every parameter of ours from theirs, each once; buffers of batch norms stay."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for key, value in data.items():
            if key.startswith(prefix):
                name, leaf = key.removeprefix(prefix).rsplit(".", 1)
                if leaf in ("weight", "bias"):
                    parameters.pop(f"{places.get(name, name)}.{leaf}").copy_(torch.from_numpy(value))
    assert not parameters


def gate(data: Mapping[str, np.ndarray], prefix: str, width: int) -> CBAM:
    module = CBAM(width, reduction=width // len(data[f"{prefix}ChannelGate.mlp.1.weight"]))
    load(module, data, prefix, PLACES)
    return module


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "free_teacher", "given_refined"):
        raise KeyError(case)
    given = case == "given_refined"
    leaf = "refined_student" if given else "student"
    student = torch.from_numpy(data[leaf]).requires_grad_()
    refined, target = student, torch.from_numpy(data["refined_teacher" if given else "teacher"])
    wanted = target.shape[1]
    if not given:
        own = gate(data, "cbam_student/", student.shape[1])
        theirs = gate(data, "cbam_teacher/", wanted) if case == "a" else CBAM(None)
        refined, target = own(student), theirs(target).detach()
        yield "refined_student", refined, data["refined_student"]
        yield "refined_teacher", target, data["refined_teacher"]
    adapt = connector(student.shape[1], wanted)
    load(adapt, data, "connector/", {})
    loss = attnfd_loss(adapt(refined), target) / len(student)
    yield "loss", loss, data["loss"]
    yield f"grad_{leaf}", torch.autograd.grad(loss, student)[0], data[f"grad_{leaf}"]
