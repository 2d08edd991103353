"""AttnFD: maps refined by attention over channels and positions (CBAM), compared as one unit tensor each.

Source: Mansourian et al., "Attention-guided Feature Distillation for Semantic Segmentation" (2024; WACV 2026
workshop as "Attention as Geometric Transformation", arXiv 2403.05451); the authors' code is compared at
AmirMansurian/AttnFD, commit f090bbe. R(x) = CBAM of a map x:

    x <- x * sigmoid(m(mean over positions) + m(maximum over positions)),  m = linear C -> C/16, ReLU, linear
    R  = x * sigmoid(BN(7x7 convolution(maximum over channels, mean over channels)))
    L  = sum over layers of |K(R(s)) / |K(R(s))| - R(t) / |R(t)||²

with K = 1x1 convolution without bias, BN. The norms are those of the **whole tensor of a step**.

Reduction: a sum over everything of unit tensors, 0 to 4 a layer. The authors' code divides it by the
number of images, and its cross-entropy once more too, so that the two cancel: their lambda of 2 is
``weight`` 2 here.

**Images are coupled** by the norm (the author calls that intended; the paper's text has a norm per
channel).

The gate of the teacher: in the authors' code a CBAM with weights of its own, which nothing trains. By
threads #2 and #6 there, either it is trained, or a gate without parameters was meant. ``teacher_gate``
names which:
- ``free``: without parameters, m = identity and the sigmoid of maximum + mean over channels; the default;
- ``random``: a CBAM as initialised, kept as buffers: what the code does;
- ``learnt``: a CBAM trained together with the student's.

Differences from the authors' code: all of the student's CBAM is trained (theirs leaves m as initialised),
and so is K at every step (theirs: in the first epoch alone, in which the student is not); the teacher is
in eval mode, where theirs is in train mode and gets a gradient. Layers are the last stage and the map
before the classifier, both after ReLU; theirs are the last stage *before* ReLU, the ASPP, and the
decoder. Unequal sizes meet at the smaller by average pooling of the refined maps. All pixels count. A
dead tensor has no direction and gets no gradient, where theirs divides by 0.
"""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.maps import direction
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

LAYERS = ("backbone.4", "fusion")
REDUCTION = 16  # of the hidden layer of a channel gate


def attnfd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two tensors (B, C, h, w), each at unit L2 norm as a whole.

    Unequal spatial sizes are brought to the smaller one by average pooling. Returns a float32 scalar in 0..4.
    The gradient flows to both, as the teacher's gate may learn: detach its map before the gate.
    """
    s, t = same_size(student.float(), teacher.float())
    return (direction(s.flatten(), dim=0) - direction(t.flatten(), dim=0)).square().sum()


def gated(x: Tensor, channels: nn.Module, positions: nn.Module) -> Tensor:
    """x gated by ``channels`` (B, C) -> (B, C) of what positions hold, then by ``positions`` (B, 2, h, w) ->
    (B, 1, h, w) of what channels hold."""
    flat = x.flatten(2)
    gate = channels(flat.mean(dim=2)) + channels(flat.max(dim=2).values)
    x = x * gate.sigmoid()[:, :, None, None]
    both = torch.stack([x.max(dim=1).values, x.mean(dim=1)], dim=1)
    return x * positions(both).sigmoid()


class Sum(nn.Module):
    """Over channels, one channel out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=1, keepdim=True)


class CBAM(nn.Module):
    """R of the formula, of ``width`` channels; without parameters where ``width`` is None."""

    channels: nn.Module
    positions: nn.Module

    def __init__(self, width: int | None, trained: bool = True, reduction: int = REDUCTION) -> None:
        super().__init__()
        if width is None:
            self.channels, self.positions = nn.Identity(), Sum()
            return
        hidden = max(1, width // reduction)
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.positions = nn.Sequential(conv, nn.BatchNorm2d(1, momentum=0.01))
        if not trained:
            for module in list(self.modules()):
                for name, value in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, value.detach())

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, self.channels, self.positions)


def connector(width: int, wanted: int) -> nn.Sequential:
    """K of the formula."""
    conv = nn.Conv2d(width, wanted, 1, bias=False)
    nn.init.normal_(conv.weight, std=sqrt(2 / wanted))
    return nn.Sequential(conv, nn.BatchNorm2d(wanted))


class Method(Distiller):
    """AttnFD on the last stage of the backbone and the map before the classifier."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(0.2, 20.0)]
        teacher_gate: Literal["free", "random", "learnt"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if not config.weight:
            return
        self.student_taps = self.teacher_taps = LAYERS
        widths = [(student_shapes[tap][0], teacher_shapes[tap][0]) for tap in LAYERS]
        free, learnt = config.teacher_gate == "free", config.teacher_gate == "learnt"
        self.student_gates = nn.ModuleList(CBAM(s) for s, _ in widths)
        self.teacher_gates = nn.ModuleList(CBAM(None if free else t, trained=learnt) for _, t in widths)
        self.connectors = nn.ModuleList(connector(s, t) for s, t in widths)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        parts = zip(LAYERS, self.student_gates, self.teacher_gates, self.connectors, strict=True)
        terms = [
            attnfd_loss(adapt(own(student[tap].float())), theirs(teacher[tap].detach().float()))
            for tap, own, theirs, adapt in parts
        ]
        return {"attnfd": self.config.weight * torch.stack(terms).sum()}
