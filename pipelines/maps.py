"""What several losses on feature maps share. Methods may import this beside :mod:`pipelines.method`.

Maps are (B, C, h, w). Everything is differentiable in its map arguments and keeps their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-12  # the norm below which a vector has no direction


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """Vectors along ``dim`` at unit L2 norm; one shorter than ``EPSILON`` is divided by that, so that 0 stays
    0."""
    return F.normalize(x, dim=dim, eps=EPSILON)


def labels_at(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Labels (B, H, W) int64 at a map's ``size`` (h, w), nearest neighbour: row ``floor(i * H / h)``."""
    if labels.shape[-2:] == torch.Size(size):
        return labels
    return F.interpolate(labels.unsqueeze(1).double(), size=tuple(size), mode="nearest").squeeze(1).long()


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels (B, h, w) as indicators (B, classes, h * w); a pixel outside of the classes belongs to none."""
    flat = labels.flatten(1)
    return (flat.unsqueeze(1) == torch.arange(classes, device=labels.device)[:, None]).to(dtype)


def spatial_attention(x: Tensor) -> Tensor:
    """The mean over channels of squares as a unit vector over positions, (B, h * w): Zagoruyko and Komodakis,
    ICLR 2017, eq. 2 with p = 2."""
    return unit(x.square().mean(dim=1).flatten(1))


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over channels, per position, times T²: (B, h, w). No gradient to the teacher."""
    log_p = torch.log_softmax(student / temperature, dim=1)
    log_q = torch.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1) * temperature**2


SILENT = 1e-6  # the norm at or below which a vector is a dead one


def direction(x: Tensor, dim: int = 1) -> Tensor:
    """As :func:`unit`, but a dead vector gives 0 and no gradient; ``unit`` gives it 1e12 times what comes."""
    norm = x.norm(dim=dim, keepdim=True)
    return x / norm.clamp_min(SILENT) * (norm > SILENT)
