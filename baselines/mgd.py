"""MGD: from the student's features with most pixels masked, a small generator makes the teacher's.

Source: Yang et al., "Masked Generative Distillation" (ECCV 2022, arXiv 2205.01529); the authors' code is
compared at yzd-v/MGD, commit 2c9da0b. With A = a 1x1 convolution to the teacher's width (only if the widths
differ), keep = one mask for all channels, 0 where a uniform draw is > 1 - masked, G = 3x3 convolution, ReLU,
3x3 convolution:

    L = mean over images, the teacher's channels and positions of (G(A(student) * keep) - teacher)²

Reduction: the mean. Theirs is the sum divided by the number of images, whose weight depends on the crop and
the teacher. ``weight`` = theirs * channels * h * w of the teacher's map: 2e-5 at 512x512 with 2048 channels
at stride 8 is 168, and no one number is exact for all crops. The masked map is not rescaled, as in theirs.

Not in it: the term on logits that their configurations switch on (``use_logit``: 3 times CWD at T 4), which
the published numbers of MGD contain. For a teacher of 2048 channels G has 75 million parameters; they are
trained, but not exported.

Differences from the authors' code: unequal sizes are brought to the smaller one by average pooling, before
the mask. All pixels take part. Images are not coupled.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def random_keep(x: Tensor, masked: float) -> Tensor:
    """A mask (B, 1, h, w) for a map: 0 at the share ``masked`` of the positions, in expectation, else 1."""
    return (torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device) <= 1 - masked).float()


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences of two maps (B, C, h, w) of one shape, in float32. No gradient reaches the
    teacher."""
    return F.mse_loss(generated.float(), teacher.detach().float())


class Method(Distiller):
    """MGD on one tap: the last stage of the backbone in the authors' code."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(17.0, 1700.0)]
        masked: float = Field(ge=0, lt=1)  # share of the positions that the generator does not see
        tap: Literal["fusion", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if not config.weight:
            return
        self.student_taps = self.teacher_taps = (config.tap,)
        width, wanted = student_shapes[config.tap][0], teacher_shapes[config.tap][0]
        self.align: nn.Module = nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(wanted, wanted, 3, padding=1), nn.ReLU(), nn.Conv2d(wanted, wanted, 3, padding=1)
        )

    def generate(self, student: Tensor, keep: Tensor) -> Tensor:
        """G(A(student) * keep)."""
        return self.generation(self.align(student) * keep)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        if not config.weight:
            return {}
        ours, theirs = same_size(student[config.tap].float(), teacher[config.tap].detach().float())
        return {
            "mgd": config.weight * mgd_loss(self.generate(ours, random_keep(ours, config.masked)), theirs)
        }
