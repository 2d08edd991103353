"""AttnFD against its authors' code: one layer, lambda 1, divided by the number of images as there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from baselines.attnfd import CBAM, attnfd_loss, connector
from parity_cases import Case, below, gradient, load, maps

PLACES = {  # theirs -> ours
    "ChannelGate.mlp.1": "channels.0",
    "ChannelGate.mlp.3": "channels.2",
    "SpatialGate.spatial.conv": "positions.0",
    "SpatialGate.spatial.bn": "positions.1",
}


def gate(data: Case, prefix: str, width: int) -> CBAM:
    module = CBAM(width, reduction=width // len(data[f"{prefix}ChannelGate.mlp.1.weight"]))
    split = {tuple(name.rsplit(".", 1)): value for name, value in below(data, prefix).items()}
    load(module, {f"{PLACES[place]}.{leaf}": value for (place, leaf), value in split.items()})
    return module


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("a", "free_teacher", "given_refined"):
        raise KeyError(case)
    prefix = "refined_" if case == "given_refined" else ""
    student, target = maps(data, f"{prefix}student", gradient=True), maps(data, f"{prefix}teacher")
    width, wanted = student.shape[1], target.shape[1]
    refined = student
    if not prefix:
        refined = gate(data, "cbam_student/", width)(student)
        # the free gate leaves the parameters of a convolution unused that its file has
        target = (gate(data, "cbam_teacher/", wanted) if case == "a" else CBAM(None))(target).detach()
        yield "refined_student", refined, data["refined_student"]
        yield "refined_teacher", target, data["refined_teacher"]
    adapt = connector(width, wanted)
    load(adapt, below(data, "connector/"))
    loss = attnfd_loss(adapt(refined), target) / len(student)
    yield "loss", loss, data["loss"]
    yield f"grad_{prefix}student", gradient(loss, student), data[f"grad_{prefix}student"]
