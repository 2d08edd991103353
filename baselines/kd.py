"""KD: pixel-wise distillation of the class probabilities.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), eq.
1 and section 2.1, applied to every pixel as in Liu et al., "Structured Knowledge Distillation for Semantic
Segmentation" (CVPR 2019), eq. 1.

With p = softmax over classes of logits / T, for the pixels i of the whole batch:

    L = T² / |pixels| * sum_i sum_c p_teacher[i, c] * (log p_teacher[i, c] - log p_student[i, c])

Reduction: summed over classes, mean over the pixels of the batch (over the labelled ones with ``mask:
valid``). The authors of pixel-wise KD count every pixel, also the unlabelled ones: that is ``mask: none``.

How a published weight converts to ``weight`` here (N images a process, C classes, H x W logits):
- SKD's code: cross-entropy summed and divided by H * W but not by N, T = 1: weight = N * theirs (the
  teacher's entropy is a constant, so that the gradient is the same);
- IFVD's and TorchDistiller's: ``KLDivLoss`` with reduction "mean", without T²: weight = theirs / (C * T²);
- mmrazor's: "batchmean" on a 4-D map, with T²: weight = H * W * theirs;
- CIRKD's: the same as here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Taps, same_size


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """Mean over pixels of KL(teacher || student) over classes, times T² (see the top of the file).

    Logits are (B, C, h, w); unequal spatial sizes are brought to the smaller one by average pooling of the
    logits. ``valid`` is (B, h, w) bool at that size; without any valid pixel the loss is 0, still connected
    to the student. Returns a float32 scalar in nats. No gradient reaches the teacher.
    """
    student, teacher = same_size(student_logits.float(), teacher_logits.detach().float())
    log_p = torch.log_softmax(student / temperature, dim=1)
    log_q = torch.log_softmax(teacher / temperature, dim=1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)  # (B, h, w)
    if valid is None:
        return kl.mean() * temperature**2
    # where, not a product: an unlabelled pixel must not count even if its logits are not finite
    kl = torch.where(valid, kl, torch.zeros_like(kl))
    return kl.sum() / valid.sum().clamp(min=1) * temperature**2


class Method(Distiller):
    """Pixel-wise KD on the logits before upsampling."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        temperature: float = Field(gt=0)
        mask: Literal["none", "valid"]  # which pixels count: all, or those that carry a label

    config: Config
    student_taps = teacher_taps = ("logits",)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        logits, target = same_size(student["logits"], teacher["logits"])
        size = (logits.shape[-2], logits.shape[-1])
        valid = batch.valid(size) if self.config.mask == "valid" else None
        return {"kd": self.config.weight * kd_loss(logits, target, self.config.temperature, valid)}
