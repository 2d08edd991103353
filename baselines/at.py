"""AT: attention transfer; where the student's features are strong, relative to the rest of the image.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017, arXiv 1612.03928), section
3.1 with p = 2; the authors' code is compared at szagoruyko/attention-transfer, commit 893df54 (CIRKD has the
same function for segmentation). With a(x) = the mean over channels of x², as a unit vector over the P
positions of an image:

    L = sum over taps of the mean over images and positions of (a(student) - a(teacher))²

Reduction: the mean over positions, as in the code. The paper has the norm of the difference, times beta / 2.
The vectors are of unit length, so that the mean hides a factor 1 / P: the distance of two vectors counts
weight / P, and a weight does not carry over to maps of another size (1e4 on the 64 x 128 positions of
Cityscapes is 1.2 per image; on a map of 6 x 6 it is 280).

The official weight needs no conversion: 1e4 on the last feature map (CIRKD), 1e3 on each of three stages
(the authors, classification). CIRKD's runs add KD with weight 1, which is not in it here.

Differences from the authors' code: unequal sizes are brought to the smaller one by average pooling, each side
on its own; other ports pool to a square. The widths may differ, there is no adapter. A dead map gives 0. All
pixels take part. Images are not coupled.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from pipelines.maps import spatial_attention
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

Tap = Literal["fusion", "logits", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and positions of the squared difference of the attention maps (see the top).

    Maps (B, C, h, w), the widths may differ; unequal spatial sizes are brought to the smaller one by average
    pooling. Returns a float32 scalar in 0..2 / (h * w). No gradient reaches the teacher.
    """
    student, teacher = same_size(student.float(), teacher.detach().float())
    return (spatial_attention(student) - spatial_attention(teacher)).square().mean()


def _distinct(taps: list[Tap]) -> list[Tap]:
    if len(set(taps)) < len(taps):
        raise ValueError("a tap stands there twice")
    return taps


class Method(Distiller):
    """AT on one tap or several."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(300.0, 30000.0)]
        taps: Annotated[list[Tap], AfterValidator(_distinct)] = Field(min_length=1)

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.student_taps = self.teacher_taps = tuple(config.taps) if config.weight else ()

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        layers = [at_loss(student[tap], teacher[tap]) for tap in self.config.taps]
        return {"at": self.config.weight * torch.stack(layers).sum()}
