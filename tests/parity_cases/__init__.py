"""Each method against its authors' code: ``parity_cases/<method>.py`` has

    def compare(case: str, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor, np.ndarray]]

which computes a case of ``parity/<method>.npz`` with the method's own functions and adapters, and yields
(key, computed, expected) for every loss and gradient of the case. Here is what the cases share.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

Case = Mapping[str, np.ndarray]


def maps(data: Case, key: str, gradient: bool = False) -> Tensor:
    """A map or parameter in float32."""
    return torch.from_numpy(data[key]).float().requires_grad_(gradient)


def integers(data: Case, key: str) -> Tensor:
    """Labels, indices or pointers in int64."""
    return torch.from_numpy(data[key].astype(np.int64))


def below(data: Case, prefix: str) -> dict[str, Tensor]:
    """What stands below ``prefix``, by the rest of its name: the parameters below ``param/``."""
    return {key.removeprefix(prefix): maps(data, key) for key in data if key.startswith(prefix)}


def load(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """The authors' parameters into an adapter; of what it has, only the running state of a batch norm may be
    missing."""
    missing, unexpected = module.load_state_dict(dict(parameters), strict=False)
    missing = [
        name for name in missing if not name.endswith(("running_mean", "running_var", "batches_tracked"))
    ]
    assert not missing and not unexpected, f"missing: {missing}; unexpected: {unexpected}"


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """d(loss) / d(leaf), to be called several times on one graph."""
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def shape(x: Tensor) -> tuple[int, int, int]:
    """The shape of a map as a method is told it: (C, h, w)."""
    return x.shape[1], x.shape[2], x.shape[3]
