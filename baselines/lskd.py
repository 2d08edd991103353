"""LSKD: pixel-wise distillation of standardised logits.

Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024, arXiv 2403.01427), algorithm
1; the authors' code for classification is compared at sunshangquan/logit-standardization-KD, commit f6e5aa5.
With z(x) = (x - mean x) / (1e-7 + std x) over the classes of a pixel (std with C - 1), for student and
teacher:

    L = T² * mean over pixels of KL(softmax(z(t) / T) || softmax(z(s) / T))

Reduction: summed over classes, mean over all pixels of the batch, as KD here; the gradient flows through
the student's mean and std. For classification the authors take T = 2 to 4 and a weight of 9 to 12 against
a cross-entropy with weight 0.1, so that no weight carries over; they publish none for segmentation.

The loss does not see a shift or a scale of the student's logits: their size comes from the task loss
alone.

Differences from the authors' code: it standardises over the last dimension, which is the classes for (B,
C) logits and would be the width of a map; here it is the classes. A pixel whose logits are all equal (std
below 1e-6) has no direction: it becomes 0 without a gradient, where theirs would give a gradient of 1e7
or NaN. No published term is missing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipelines.maps import pixel_kl
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

EPSILON = 1e-7
SILENT = 1e-6  # standard deviation at or below which logits have no direction


def standardised(logits: Tensor) -> Tensor:
    """Logits (B, C, h, w) at mean 0 and standard deviation 1 over the classes of every pixel."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / max(1, logits.shape[1] - 1)
    heard = variance > SILENT**2
    deviation = torch.where(heard, variance, torch.ones_like(variance)).sqrt()  # no root of 0: no NaN
    return torch.where(heard, centred / (EPSILON + deviation), torch.zeros_like(centred))


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean over pixels of KL(teacher || student) of standardised logits, times T² (see the top).

    Logits (B, C, h, w); unequal spatial sizes are brought to the smaller one by average pooling. Returns a
    float32 scalar in nats. No gradient reaches the teacher.
    """
    student, teacher = same_size(student_logits.float(), teacher_logits.detach().float())
    return pixel_kl(standardised(student), standardised(teacher), temperature).mean()


class Method(Distiller):
    """LSKD on the logits before upsampling."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        temperature: float = Field(gt=0)

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if config.weight:
            self.student_taps = self.teacher_taps = ("logits",)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        loss = lskd_loss(student["logits"], teacher["logits"], self.config.temperature)
        return {"lskd": self.config.weight * loss}
