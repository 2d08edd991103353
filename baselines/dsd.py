"""DSD: differences between the attention maps of layers, and similarities between the maps of classes.

Source: Feng et al., "Double Similarity Distillation for Semantic Image Segmentation" (TIP 2021, arXiv
2107.08591). No code of the authors was found; compared with the field's, winycg/CIRKD, commit dab64db. With u
= the unit vector over positions, and a(x) = u(the mean over channels of x²) as in AT:

- ``psd``: for each pair m < n of the maps [auxiliary logits, the map before the classifier, logits], with d =
  u(a(x_n) - a(x_m)): the mean over pairs, images and positions of (d(student) - d(teacher))².
- ``csd``: on the logits, average-pooled 2x2 (a border makes a cell too), softmax over positions of x / tau,
  inner products of the classes; mean over images and the C x C entries of squared differences. No tau².

Reduction: means, so that the weights (1000 and 10 in CIRKD, without KD) need no conversion. ``psd`` carries
1 / positions: its weight does not carry over to maps of another size, as with AT.

Differences from CIRKD's code: without an auxiliary head of student or teacher the first map is left out, and
the record says so; theirs takes the logits twice, and one of three pairs is a constant 0. Unequal sizes, also
between the maps, are brought to the smallest in each direction by average pooling. Where two maps agree, d is
0 and has no gradient. All pixels take part. Images are not coupled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipelines.maps import direction, spatial_attention
from pipelines.method import AUXILIARY, Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def differences(maps: Sequence[Tensor]) -> Tensor:
    """d of each pair of maps (B, C, h, w) of one spatial size: (pairs, B, h * w)."""
    attention = [spatial_attention(x) for x in maps]
    return direction(torch.stack([later - first for first, later in combinations(attention, 2)]), dim=2)


def psd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``psd`` (see the top) for two maps or more of each side, (B, C, h, w) of any widths and sizes.

    Returns a float32 scalar. No gradient reaches the teacher.
    """
    both = [*(x.float() for x in student), *(x.detach().float() for x in teacher)]
    size = (min(x.shape[-2] for x in both), min(x.shape[-1] for x in both))
    both = [x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in both]
    return (differences(both[: len(student)]) - differences(both[len(student) :])).square().mean()


def class_similarity(logits: Tensor, tau: float) -> Tensor:
    """Inner products of the classes' distributions over pooled positions: (B, C, C)."""
    pooled = F.avg_pool2d(logits, 2, ceil_mode=True).flatten(2)
    share = torch.softmax(pooled / tau, dim=2)
    return share @ share.transpose(1, 2)


def csd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """``csd`` (see the top). Unequal spatial sizes are brought to the smaller one by average pooling. Returns
    a float32 scalar. No gradient reaches the teacher."""
    student, teacher = same_size(student_logits.float(), teacher_logits.detach().float())
    return F.mse_loss(class_similarity(student, tau), class_similarity(teacher, tau))


class Method(Distiller):
    """DSD on auxiliary logits (where there are any), the map before the classifier, and logits."""

    class Config(MethodConfig):
        weight_psd: Annotated[float, Field(ge=0), Search(30.0, 3000.0)]
        weight_csd: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        tau: float = Field(gt=0)

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.maps: tuple[str, ...] = ()
        if config.weight_psd:
            head = AUXILIARY in student_shapes and AUXILIARY in teacher_shapes
            self.maps = (*((AUXILIARY,) if head else ()), "fusion", "logits")
            self.left_out = () if head else (AUXILIARY,)
        self.student_taps = self.teacher_taps = self.maps or (("logits",) if config.weight_csd else ())

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_psd:
            sides = ([taps[name] for name in self.maps] for taps in (student, teacher))
            terms["psd"] = config.weight_psd * psd_loss(*sides)
        if config.weight_csd:
            csd = csd_loss(student["logits"], teacher["logits"], config.tau)
            terms["csd"] = config.weight_csd * csd
        return terms
