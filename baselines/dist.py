"""DIST: the student's class probabilities correlate with the teacher's, instead of being equal to them.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022, arXiv 2205.10536); the
authors' code is compared at hunto/DIST_KD, commit 2418f18. With p and q = softmax over classes (T = 1) of
student and teacher, and r(a, b) = <a - mean a, b - mean b> / (||a - mean a|| * ||b - mean b|| + 1e-8):

    inter = 1 - mean over pixels of r(p_i, q_i), vectors over classes
    intra = 1 - mean over classes of r(p_c, q_c), vectors over all pixels of all images
    L = beta * inter + gamma * intra

``dist`` is L on the logits before upsampling, ``dist_auxiliary`` is L on the logits of the auxiliary head,
which stands in the authors' training loop alone (with weight 0.4). Where student or teacher has no such head,
the term is left out, and the record says so.

Reduction: means, so that the weights (1 and 0.4, with beta = gamma = 1) need no conversion. Unlabelled and
padded pixels take part, as in theirs. There is no KD term in theirs.

Differences from the authors' code: images are coupled, ``intra`` sees all images of a step, where the
authors' processes see 2 each; unequal sizes are brought to the smaller one by average pooling of the logits.
mmrazor's port correlates over the batch dimension of a map; that is another loss.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.method import AUXILIARY, Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Correlation of ``a`` and ``b`` along ``dim``; 1e-8 beside the product of the norms keeps a constant
    vector finite."""
    a, b = a - a.mean(dim=dim, keepdim=True), b - b.mean(dim=dim, keepdim=True)
    return (a * b).sum(dim=dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)


def probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C, h, w) as class probabilities (C, pixels of the batch) in float32. No gradient reaches
    the teacher."""
    student, teacher = same_size(student.float(), teacher.detach().float())
    return student.softmax(dim=1).transpose(0, 1).flatten(1), teacher.softmax(dim=1).transpose(0, 1).flatten(
        1
    )


def inter_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 - the mean over pixels of the correlation over classes."""
    p, q = probabilities(student_logits, teacher_logits)
    return 1 - pearson(p, q, dim=0).mean()


def intra_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 - the mean over classes of the correlation over all pixels of the batch."""
    p, q = probabilities(student_logits, teacher_logits)
    return 1 - pearson(p, q, dim=1).mean()


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float) -> Tensor:
    """beta * inter + gamma * intra; a part with coefficient 0 is not computed."""
    parts = ((beta, inter_loss), (gamma, intra_loss))
    return torch.stack([share * loss(student_logits, teacher_logits) for share, loss in parts if share]).sum()


class Method(Distiller):
    """DIST on the logits before upsampling and on those of the auxiliary head."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_auxiliary: Annotated[float, Field(ge=0), Search(0.04, 4.0)]
        beta: float = Field(ge=0)  # of the relation between classes
        gamma: float = Field(ge=0)  # of the relation within a class

        @model_validator(mode="after")
        def _some(self) -> Method.Config:
            if not (self.beta or self.gamma):
                raise ValueError("at least one of beta and gamma must be positive")
            return self

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        weights = {"logits": config.weight, AUXILIARY: config.weight_auxiliary}
        wanted = tuple(tap for tap, weight in weights.items() if weight)
        have = tuple(tap for tap in wanted if tap in student_shapes and tap in teacher_shapes)
        self.left_out = tuple(tap for tap in wanted if tap not in have)
        self.student_taps = self.teacher_taps = have

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        for tap in self.student_taps:
            name, weight = (
                ("dist", config.weight) if tap == "logits" else ("dist_auxiliary", config.weight_auxiliary)
            )
            terms[name] = weight * dist_loss(student[tap], teacher[tap], config.beta, config.gamma)
        return terms
