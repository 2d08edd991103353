"""CWD: channel-wise distillation; every channel becomes a distribution over positions.

Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021, arXiv 2011.13256),
eqs. 2 to 4. With p[n, c] = softmax over the positions i of channel c of image n, at temperature tau:

    L = tau² / (N * C) * sum_n sum_c sum_i p_t[n, c, i] * (log p_t[n, c, i] - log p_s[n, c, i])

for the teacher's p_t and the student's p_s.

Reduction: summed over positions, mean over images and channels. CIRKD, TorchDistiller and mmrazor reduce in
the same way, so their weights need no conversion, but their tau differ (4, 1 and 1). mmsegmentation-distiller
leaves the teacher's entropy out: the same gradient, another value.

Differences from the authors' code: log_softmax instead of log(softmax), which underflows on large maps; the
adapter of feature maps is a 1x1 convolution alone (theirs adds batch normalisation and ReLU) and exists only
if the widths differ. Unlabelled and padded positions take part in the softmax, as in theirs. The published
"CWD" tables of the authors add pixel-wise KD and an adversarial term; this is the channel-wise term alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def cwd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Mean over images and channels of KL(teacher || student) over positions, times tau² (see the top).

    Both maps are (B, C, h, w) with equal C; unequal spatial sizes are brought to the smaller one by average
    pooling. Returns a float32 scalar in nats. No gradient reaches the teacher. Raises ValueError on unequal
    C.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"CWD needs equal channels, not {student.shape[1]} and {teacher.shape[1]}: adapt the student's."
        )
    student, teacher = same_size(student.float(), teacher.detach().float())
    log_p = torch.log_softmax(student.flatten(2) / tau, dim=2)
    log_q = torch.log_softmax(teacher.flatten(2) / tau, dim=2)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=2).mean() * tau**2


class Method(Distiller):
    """CWD on one tap: the logits by default, or a feature map."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        tau: float = Field(gt=0)
        tap: Literal["logits", "fusion", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    config: Config
    adapter: nn.Module

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.student_taps = self.teacher_taps = (config.tap,)
        width, wanted = student_shapes[config.tap][0], teacher_shapes[config.tap][0]
        # no bias: the softmax over positions does not see a constant, a bias would never get a gradient
        self.adapter = nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1, bias=False)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        tap = self.config.tap
        return {
            "cwd": self.config.weight * cwd_loss(self.adapter(student[tap]), teacher[tap], self.config.tau)
        }
