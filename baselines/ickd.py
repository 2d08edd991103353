"""ICKD: the correlations between the channels of a map, compared row by row.

Source: Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation" (ICCV
2021, arXiv 2202.03680); the authors' code for classification is compared at ADLab-AutoDrive/ICKD, commit
403b8d3 (that of their segmentation is not released). With X the map of one image as (C, positions), G(X) = X
Xᵀ (C x C) and its rows brought to unit L2 norm:

    L = mean over images and rows of |G(X_s)_row - G(X_t)_row|²      (0 to 4; 0 to 2 for maps after ReLU)

Reduction: summed over the C entries of a row, mean over images and rows, as in the authors' code, so that
a weight there carries over. As a mean over all C x C entries it would be C times larger. Theirs is 4 for
classification; no weight for segmentation is published.

On a feature map the student's is adapted by a 1x1 convolution without bias and batch normalisation, also
for equal widths, as the authors do; the teacher's map is raw. ``tap: logits`` compares the logits without
an adapter (the version in AICSD's repository, which its training never adds to the loss).

Differences from the authors' code: the embedding of the teacher that it registers and never uses is not
there. The sizes of the two maps may differ, as rows have unit norm and no position meets another's; all
pixels count. Not in it: the variant on a grid of patches that the paper's segmentation tables report, 1 x
1 to 32 x 32 (this is 1 x 1), and the other losses of those tables.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from pipelines.maps import unit
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps


def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and channels of the squared distance of unit rows of correlations (see the top).

    Maps (B, C, h, w) with equal C; their sizes may differ. Returns a float32 scalar. No gradient reaches the
    teacher. Raises ValueError on unequal C.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"ICKD needs equal channels, not {student.shape[1]} and {teacher.shape[1]}: adapt the student's."
        )

    def correlations(x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return unit(flat @ flat.transpose(1, 2), dim=2)  # (B, C, C)

    difference = correlations(student.float()) - correlations(teacher.detach().float())
    return difference.square().sum(dim=2).mean()


def embedding(width: int, wanted: int) -> nn.Sequential:
    """The student's adapter: 1x1 convolution without bias, batch normalisation."""
    return nn.Sequential(nn.Conv2d(width, wanted, 1, bias=False), nn.BatchNorm2d(wanted))


class Method(Distiller):
    """ICKD on one tap: a feature map, or the logits before upsampling."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.4, 40.0)]
        tap: Literal["logits", "fusion", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    config: Config
    adapter: nn.Module

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if not config.weight:
            return
        self.student_taps = self.teacher_taps = (config.tap,)
        width, wanted = student_shapes[config.tap][0], teacher_shapes[config.tap][0]
        self.adapter = nn.Identity() if config.tap == "logits" else embedding(width, wanted)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        tap = self.config.tap
        if not self.config.weight:
            return {}
        return {"ickd": self.config.weight * ickd_loss(self.adapter(student[tap]), teacher[tap])}
