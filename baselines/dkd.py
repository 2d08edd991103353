"""DKD: decoupled distillation; how sure of the labelled class, and how the rest is shared out.

Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679), eqs. 2 to 7; the
authors' code for classification is compared at megvii-research/mdistiller, commit a08d46f. With y the label
of a pixel, p and q the probabilities of student and teacher at temperature T:

    tckd = T² * mean over labelled pixels of KL((q_y, 1 - q_y) || (p_y, 1 - p_y))
    nckd = T² * mean over labelled pixels of KL(q' || p'),  p' = softmax over the classes other than y

and L = weight_tckd * tckd + weight_nckd * nckd, the authors' alpha and beta.

Reduction: mean over the pixels that carry a label (a label is needed), as theirs over samples. For
classification they take alpha 1, beta 8, T 4 with a linear warm-up over 20 epochs; they publish none for
segmentation. There is no warm-up here, and theirs are the upper ends of the ranges that are searched.

Differences from the authors' code: the labelled class is left out exactly, where theirs subtracts 1000
from its logit; 1 - p_y is a difference of logsumexp, where theirs takes the logarithm of a summed
softmax, -inf when it underflows. Applied to the logits before upsampling, with labels at that size by
nearest neighbour. A batch without labels gives 0. A term with weight 0 is not computed. No published term
is missing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipelines.maps import labels_at
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def _own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y, log(1 - p_y), each (B, h, w), and log p' (B, C, h, w), 0 at the labelled class."""
    at = labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, at, True)
    others = logits.masked_fill(own, -torch.inf)
    total, rest = logits.logsumexp(dim=1), others.logsumexp(dim=1)
    shares = torch.log_softmax(others, dim=1).masked_fill(own, 0.0)
    return logits.gather(1, at).squeeze(1) - total, rest - total, shares


def _labelled_mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)


def tckd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """KL between labelled class and all others, mean over labelled pixels, times T² (see the top).

    Logits (B, C, h, w), C > 1, of one size, and labels (B, h, w) at that size. Returns a float32 scalar in
    nats, 0 without labels. No gradient reaches the teacher.
    """
    p, not_p, _ = _own_and_others(student.float() / temperature, labels)
    q, not_q, _ = _own_and_others(teacher.detach().float() / temperature, labels)
    kl = q.exp() * (q - p) + not_q.exp() * (not_q - not_p)
    return _labelled_mean(kl, labels != ignore_index) * temperature**2


def nckd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """KL over the classes other than the labelled one; arguments and reduction as for ``tckd_loss``."""
    *_, p = _own_and_others(student.float() / temperature, labels)
    *_, q = _own_and_others(teacher.detach().float() / temperature, labels)
    kl = (q.exp() * (q - p)).sum(dim=1)  # at the labelled class 1 * (0 - 0)
    return _labelled_mean(kl, labels != ignore_index) * temperature**2


class Method(Distiller):
    """DKD on the logits before upsampling."""

    class Config(MethodConfig):
        weight_tckd: Annotated[float, Field(ge=0), Search(0.01, 1.0)]
        weight_nckd: Annotated[float, Field(ge=0), Search(0.08, 8.0)]
        temperature: float = Field(gt=0)

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if config.weight_tckd or config.weight_nckd:
            self.student_taps = self.teacher_taps = ("logits",)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        parts = {"tckd": (self.config.weight_tckd, tckd_loss), "nckd": (self.config.weight_nckd, nckd_loss)}
        wanted = {name: part for name, part in parts.items() if part[0]}
        if not wanted:
            return {}
        s, t = same_size(student["logits"], teacher["logits"])
        labels = labels_at(batch.labels, s.shape[-2:])
        given = (s, t, labels, self.config.temperature, batch.ignore_index)
        return {name: weight * loss(*given) for name, (weight, loss) in wanted.items()}
