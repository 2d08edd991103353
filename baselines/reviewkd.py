"""ReviewKD: every stage of the teacher teaches the student's stage together with all deeper ones.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv 2104.09044), sections 3.2
to 3.4; the authors' code for classification is compared at dvlab-research/ReviewKD, commit cede6ea, and its
port to segmentation and to maps that are not square, RuipingL/TransKD, commit 39ab795. From the deepest stage
k = 4 up to 1:

    f_k   = BN(1x1 convolution(s_k)) to ``width`` m
    f_k  <- a_0 f_k + a_1 up(f_{k+1}),  a = sigmoid(1x1 convolution(f_k, up(f_{k+1})))   (k < 4)
    out_k = BN(3x3 convolution(f_k)) to the teacher's width
    L     = sum over stages of HCL(out_k, t_k)
    HCL   = (MSE + sum over l of w_l * MSE of average pools l x l) / (1 + sum over l of w_l)

with l in 4, 2, 1 below the map's height and w = 1/2, 1/4, 1/8 in the order used. ``up`` is to the size of
f_k by nearest neighbour. If the teacher's map has another size, f_k is brought to it by nearest neighbour
before the 3x3 convolution, and goes on to the next stage so, as in the authors' code.

Reduction: means throughout, summed over the four stages, as theirs. Their weights are 0.6 to 8 with a
warm-up of 20 epochs for classification and 1 to 1.5 for detection; TransKD takes 1 without. There is none
by the authors for segmentation, and no warm-up here.

Differences from the authors' code: maps need not be square; m is ``width``, at most the student's widest
stage (theirs: 512; TransKD: 64). The stages of the teacher are taken after ReLU, as they come (theirs
before it, with the pooled vector as a fifth level). All pixels count. No published term is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps

STAGES = ("backbone.1", "backbone.2", "backbone.3", "backbone.4")
LEVELS = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squares at full size and on pooled grids (see the top). Maps (B, C, h, w) of one shape.

    Returns a float32 scalar. No gradient reaches the teacher.
    """
    s, t = student.float(), teacher.detach().float()
    total, weight, weights = F.mse_loss(s, t), 1.0, 1.0
    for level in LEVELS:
        if level < s.shape[2]:
            weight /= 2
            coarse = F.mse_loss(F.adaptive_avg_pool2d(s, level), F.adaptive_avg_pool2d(t, level))
            total = total + weight * coarse
            weights += weight
    return total / weights


class Fusion(nn.Module):
    """One stage: ``width`` channels of the student, with those of the deeper stage, to the teacher's map."""

    def __init__(self, width: int, middle: int, wanted: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(
            nn.Conv2d(middle, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted)
        )
        self.attention = None if deepest else nn.Conv2d(2 * middle, 2, 1)
        for block in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(block[0].weight, a=1)  # type: ignore[arg-type]

    def forward(
        self, student: Tensor, deeper: Tensor | None, size: tuple[int, int] | torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The map to compare at ``size``, and the fused one for the next stage."""
        fused = self.reduce(student)
        if self.attention is not None and deeper is not None:
            deeper = resized(deeper, fused.shape[-2:])
            share = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        fused = resized(fused, size)
        return self.expand(fused), fused


def resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode="nearest")


class Review(nn.Module):
    """All stages; widths and maps are listed from the shallowest to the deepest."""

    def __init__(self, widths: Sequence[int], middle: int, wanted: Sequence[int]) -> None:
        super().__init__()
        last = len(widths) - 1
        self.stages = nn.ModuleList(
            Fusion(width, middle, to, deepest=i == last)
            for i, (width, to) in enumerate(zip(widths, wanted, strict=True))
        )

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int] | torch.Size]) -> list[Tensor]:
        """The student's ``maps`` at the teacher's widths and ``sizes``."""
        found: list[Tensor] = []
        deeper: Tensor | None = None
        for stage, x, size in zip(reversed(self.stages), reversed(maps), reversed(sizes), strict=True):
            out, deeper = stage(x, deeper, size)
            found.insert(0, out)
        return found


class Method(Distiller):
    """ReviewKD on the four stages of the backbone."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        width: int = Field(ge=1)  # of the fused maps, at most

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if not config.weight:
            return
        self.student_taps = self.teacher_taps = STAGES
        widths = [student_shapes[tap][0] for tap in STAGES]
        wanted = [teacher_shapes[tap][0] for tap in STAGES]
        self.review = Review(widths, min(config.width, max(widths)), wanted)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        targets = [teacher[tap].detach() for tap in STAGES]
        maps = self.review([student[tap].float() for tap in STAGES], [t.shape[-2:] for t in targets])
        pairs = zip(maps, targets, strict=True)
        return {"review": self.config.weight * torch.stack([hcl_loss(*pair) for pair in pairs]).sum()}
