"""APD: each network's pixels seen from its own class centres, plus the centres themselves.

Source: Tian et al., "Adaptive Perspective Distillation for Semantic Segmentation" (TPAMI 2022, doi
10.1109/TPAMI.2022.3159581); the authors' code is compared at dvlab-research/APD, commit 4036315. With E_s,
E_t = 1x1 convolution, ReLU, 1x1 convolution, a = E(map) at unit length per pixel, and for every class among
the labels of the **batch** its centre c = the mean of the class's vectors, at unit length, one for each
network:

    o[n, i] = scale * cosine of pixel i with centre n of its own network
    view    = mean over images, centres and pixels of q (log q - log p), where p, q = softmax of o_s, o_t
    align   = mean over centres of (1 - cosine(c_s, c_t)) / 2
    pixel   = mean over images, classes and pixels of KL(teacher || student) of the logits, T = 1

Reduction: ``view`` and ``pixel`` are means over *all* elements, as in the authors' code, so that the
weights 10, 10 and 10 carry over as they are. Per pixel, summed over classes, they would be 10 / N for the
N centres of a batch and 10 / C. ``pixel`` is on logits upsampled to the labels' size, also as theirs.
Unlabelled pixels take part in both, but in no centre; without any label ``view`` and ``align`` are 0.

**Images are coupled**: the centres are those of all images of a step (theirs: of one process).

E_t is trained apart, by cross-entropy of o_t as logits (0 for an absent class), upsampled to the labels;
Adam 1e-5 with betas (0.9, 0.99). The authors step it *before* the student's update, the contract here
*after*: the student sees a teacher's adapter that is one step older.

Differences from the authors' code: any exception there is caught, and the step goes on without the loss;
not here. Both adapters have the width of the teacher's map (theirs: 512, which that is for PSPNet), and
E_s learns at the student's rate (theirs: ten times the encoder's). A term with weight 0 is not computed.
No published term is missing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from pipelines.maps import direction, labels_at, one_hot, pixel_kl
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

ABSENT = -1e4  # logit of a class without a centre: its probability is exactly 0


def perspective(width: int, hidden: int, out: int) -> nn.Sequential:
    """The adapter of one network."""
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out, 1))


def upsampled(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def views(adapted: Tensor, labels: Tensor, classes: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a map (B, D, h, w) sees of the classes in ``labels`` (B, h, w); other values count for none.

    Returns ``scale`` * cosine with each class centre (B, classes, h, w), 0 where a class is absent; the
    centres (classes, D) at unit length; and which classes are present (classes,) bool.
    """
    vectors = direction(adapted.float())
    members = one_hot(labels, classes)  # (B, classes, h * w)
    count = members.sum(dim=(0, 2))
    total = torch.einsum("bkp,bdp->kd", members, vectors.flatten(2))
    centres = direction(total / count.clamp(min=1).unsqueeze(1))
    seen = scale * torch.einsum("kd,bdhw->bkhw", centres, vectors)
    return seen, centres, count > 0


def view_loss(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Mean over images, present classes and pixels of q (log q - log p); 0 without any."""
    absent = ~present[:, None, None]
    s, t = student.masked_fill(absent, ABSENT), teacher.masked_fill(absent, ABSENT)
    return pixel_kl(s, t).mean() / present.sum().clamp(min=1)


def align_loss(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Mean over present classes of half of 1 - cosine of unit centres (classes, D); 0 without any."""
    distance = (1 - (student * teacher.detach()).sum(dim=1)) / 2
    return torch.where(present, distance, torch.zeros_like(distance)).sum() / present.sum().clamp(min=1)


def teacher_loss(seen: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of what the teacher's adapter sees, upsampled to ``labels`` (B, H, W); mean over labelled
    pixels, 0 without any."""
    total = F.cross_entropy(
        upsampled(seen, labels.shape[-2:]), labels, ignore_index=ignore_index, reduction="sum"
    )
    return total / (labels != ignore_index).sum().clamp(min=1)


def pixel_loss(student_logits: Tensor, teacher_logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Mean over all elements of the pixel-wise KL of logits upsampled to ``size``; T = 1."""
    s, t = (upsampled(x, size) for x in (student_logits.float(), teacher_logits.detach().float()))
    return pixel_kl(s, t).mean() / s.shape[1]


class Method(Distiller):
    """APD on the map before the classifier (``fusion``) and the logits."""

    class Config(MethodConfig):
        weight_pixel: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        weight_view: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        weight_align: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        scale: float = Field(gt=0)  # of a cosine as a logit; the authors' is 10
        teacher_lr: float = Field(gt=0)  # of the teacher's adapter

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.optimizers: dict[str, Optimizer] = {}
        self.adapted = config.weight_view > 0 or config.weight_align > 0
        fusion = ("fusion",) if self.adapted else ()
        self.student_taps = self.teacher_taps = fusion + (("logits",) if config.weight_pixel else ())
        if self.adapted:
            width, wanted = student_shapes["fusion"][0], teacher_shapes["fusion"][0]
            self.student_adapter = perspective(width, wanted, wanted)
            self.teacher_adapter = perspective(wanted, wanted, wanted)

    def own_optimizers(self) -> dict[str, Optimizer]:
        # built at the first call, when the parameters are on their device; the same object ever after
        if self.adapted and not self.optimizers:
            parameters = self.teacher_adapter.parameters()
            self.optimizers["teacher_adapter"] = Adam(parameters, self.config.teacher_lr, betas=(0.9, 0.99))
        return self.optimizers

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_pixel:
            pixel = pixel_loss(student["logits"], teacher["logits"], batch.labels.shape[-2:])
            terms["pixel"] = config.weight_pixel * pixel
        if self.adapted:
            s, t, labels = self._inputs(student, teacher, batch)
            seen, centres, present = views(self.student_adapter(s), labels, batch.classes, config.scale)
            with torch.no_grad():
                target, target_centres, _ = views(
                    self.teacher_adapter(t), labels, batch.classes, config.scale
                )
            if config.weight_view:
                terms["view"] = config.weight_view * view_loss(seen, target, present)
            if config.weight_align:
                terms["align"] = config.weight_align * align_loss(centres, target_centres, present)
        return terms

    def after_step(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.adapted:
            return {}
        optimizer = self.own_optimizers()["teacher_adapter"]
        with torch.enable_grad():
            _, t, labels = self._inputs(student, teacher, batch)
            seen, *_ = views(self.teacher_adapter(t), labels, batch.classes, self.config.scale)
            loss = teacher_loss(seen, batch.labels, batch.ignore_index)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return {"teacher_ce": loss.detach()}

    @staticmethod
    def _inputs(student: Taps, teacher: Taps, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both maps at one size, and the labels there, -1 where there is none."""
        s, t = same_size(student["fusion"].float(), teacher["fusion"].detach().float())
        labels = batch.labels.masked_fill(batch.labels == batch.ignore_index, -1)
        return s, t, labels_at(labels, s.shape[-2:])
