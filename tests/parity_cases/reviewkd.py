"""ReviewKD against the authors' code (``square``), TransKD's port (``wide``), and its loss on given maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from baselines.reviewkd import Review, hcl_loss

NAMES = {"conv1": "reduce", "conv2": "expand"}  # theirs -> ours


def review(data: Mapping[str, np.ndarray], student: list[Tensor], teacher: list[Tensor]) -> Review:
    """Theirs are listed from the deepest stage, ours from the shallowest."""
    last = len(student) - 1
    state: dict[str, Tensor] = {}
    for key, value in data.items():
        if key.startswith("abf/"):
            index, part, number, leaf = key.removeprefix("abf/").split(".")
            name = f"attention.{leaf}" if part == "att_conv" else f"{NAMES[part]}.{number}.{leaf}"
            state[f"stages.{last - int(index)}.{name}"] = torch.from_numpy(value)
    module = Review([x.shape[1] for x in student], int(data["mid"]), [x.shape[1] for x in teacher])
    left = module.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(name.rsplit(".")[-1].startswith(("running_", "num_batches")) for name in left.missing_keys)
    return module


def listed(data: Mapping[str, np.ndarray], name: str) -> list[str]:
    """Keys ``<name>/<i>`` from the shallowest stage to the deepest, or ``<name>`` alone."""
    if name in data:
        return [name]
    found = sorted((k for k in data if k.startswith(f"{name}/")), key=lambda k: int(k.split("/")[1]))
    if not found:
        raise KeyError(name)
    return found


def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    if case not in ("square", "wide", "hcl_only"):
        raise KeyError(case)
    keys = listed(data, "student")
    student = [torch.from_numpy(data[k]).requires_grad_() for k in keys]
    teacher = [torch.from_numpy(data[k]) for k in listed(data, "teacher")]
    maps = student
    if case != "hcl_only":
        maps = review(data, student, teacher)(student, [t.shape[-2:] for t in teacher])
        for i, x in enumerate(maps):
            if f"out/{i}" in data:
                yield f"out/{i}", x, data[f"out/{i}"]
    loss = torch.stack([hcl_loss(s, t) for s, t in zip(maps, teacher, strict=True)]).sum()
    yield "loss", loss, data["loss"]
    for key, gradient in zip(keys, torch.autograd.grad(loss, student), strict=True):
        yield f"grad_{key}", gradient, data[f"grad_{key}"]
