"""AICSD: how far apart the classes lie on the map, a matrix of divergences between them.

Source: Mansourian et al., "AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation"
(Multimedia Tools and Applications, 2025, arXiv 2308.04243); the authors' code is compared at
AmirMansurian/AICSD, commit f99949e. Paper and code are two losses. ``formula: paper``, the default, on the
logits before upsampling: with p[n, i] = softmax over the positions x of class i in image n,

    K[n, i, j] = sum_x p[n, i, x] (log p[n, i, x] - log p[n, j, x])
    ics        = mean over images and pairs of classes of (K_student - K_teacher)²

``formula: code``, on logits upsampled to the labels, is what the authors' code computes: the softmax runs
over the rows of every column instead of over all positions, KLDivLoss gets a probability where it expects
a logarithm, and only the pairs i <= j are computed and mirrored:

    K[i, j] = K[j, i] = 1 / B * sum over n, x of q_j (log q_j - q_i)     (i <= j)
    ics     = mean over pairs of classes of (u(K_student) - u(K_teacher))²,  u = rows at unit L2 norm

    pixel   = mean over pixels of KL(teacher || student) over classes, T = 1, on the same logits

Reduction: as stated. The authors divide ``ics`` by the number n of images once more, and their
cross-entropy too, so that their weight on it is ``weight_ics`` of ``formula: code``. Their ``pixel`` is a
mean over all elements: weight here = theirs * n / (number of classes). No weight is sure: their README's
(``--pa_lambda 9500 --pi_lambda 10``) sets the pair-wise term of SKD, and not this one, whose option is
``--lo_lambda``. With ``code`` **images are coupled**, as K is averaged over them first; with ``paper``
they are not.

Differences from the authors' code: with either formula any number of classes (theirs: 21), and no
gradient to the teacher, in eval mode (theirs is trained along). Not in it: the weights of the paper that
change over training, alpha (CE + ICS) + (1 - alpha) KD with alpha = epoch / epochs (commented out in the
code). All pixels count. A term with weight 0 is not computed.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipelines.maps import pixel_kl, unit
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def ics_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's loss: mean of squared differences of K (see the top), logits (B, C, h, w) of one size.

    Returns a float32 scalar in nats². No gradient reaches the teacher.
    """

    def divergences(logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.flatten(2), dim=2)
        p = log_p.exp()
        entropy = (p * log_p).sum(dim=2, keepdim=True)
        return entropy - p @ log_p.transpose(1, 2)  # (B, C, C)

    return (divergences(student.float()) - divergences(teacher.detach().float())).square().mean()


def ics_code_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The code's loss (see the top), before its last division by the number of images; same arguments."""

    def divergences(logits: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits, dim=2)
        q = log_q.exp()
        own = (q * log_q).sum(dim=(0, 2, 3))  # of class j
        cross = torch.einsum("bihw,bjhw->ij", q, q)
        upper = (own - cross).triu() / len(logits)
        return unit(upper + upper.triu(1).T)

    return (divergences(student.float()) - divergences(teacher.detach().float())).square().mean()


class Method(Distiller):
    """AICSD on the logits."""

    class Config(MethodConfig):
        weight_ics: Annotated[float, Field(ge=0), Search(0.001, 0.1)]  # ``formula: code`` wants about 10⁴
        weight_pixel: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        formula: Literal["paper", "code"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if config.weight_ics or config.weight_pixel:
            self.student_taps = self.teacher_taps = ("logits",)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        if not self.student_taps:
            return {}
        s, t = student["logits"].float(), teacher["logits"].detach().float()
        if config.formula == "code":
            size = tuple(batch.labels.shape[-2:])
            s, t = (F.interpolate(x, size=size, mode="bilinear", align_corners=True) for x in (s, t))
        s, t = same_size(s, t)
        terms: dict[str, Tensor] = {}
        if config.weight_ics:
            loss = ics_loss if config.formula == "paper" else ics_code_loss
            terms["ics"] = config.weight_ics * loss(s, t)
        if config.weight_pixel:
            terms["pixel"] = config.weight_pixel * pixel_kl(s, t).mean()
        return terms
