"""Af-DCD: dense contrast within patches, between groups of channels, without augmentation.

Source: Fan et al., "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic
Segmentation" (NeurIPS 2023, arXiv 2312.04168); the authors' code is compared at OSVAI/Af-DCD, commit 5b086a7.
As in MGD, y = G(A(student) * keep), A = a 1x1 convolution, G = 3x3 convolution, ReLU, 3x3 convolution
(``projector: enhanced``: two blocks of 3x3 convolution and ReLU in a row, the mean of a 3x3 convolution of
each):

- ``fd``: mean over images, the teacher's channels and positions of (y - teacher)².
- ``ctr``: both maps max-pooled by ``pool`` (0 = not), cut into patches of ``patch`` x ``patch`` positions,
  the channels into ``groups`` contiguous groups; a token is one group at one position. Similarity = -(L1
  distance) / ``temperature``. Cross-entropy of each token of y: the positive is the teacher's token of the
  same position and group, the negatives are those of all *other groups* at any position of the patch; tokens
  of its own group elsewhere are neither. Mean over tokens, times the number of groups (that is the sum over
  tokens, per image and position of the pooled map).
- ``kd``: pixel-wise KD at T = 1, mean over all pixels.

Reduction and weights: ``kd`` and ``ctr`` need no conversion (Cityscapes: 1 and 5e-3). Their ``fd`` is the sum
divided by the number of images, whose weight depends on the crop and the teacher: ``weight_fd`` = theirs *
channels * h * w of the teacher's map. 2e-6 at 512x1024 with 2048 channels at stride 8 is 33.554432, exact for
that map alone.

Any map will do: it is not pooled where that would leave less than a patch, a map smaller than a patch is one,
and rows and columns (bottom, right) and last channels that fill no patch or group are left out. With a width
below ``groups`` each channel is a group.

Differences from the authors' code: equal widths have no A (theirs crash); ``mask: center`` and the enhanced
projector, which their scripts cannot reach, can be chosen; the gradient of A and G is not clipped by itself;
unequal sizes are brought to the smaller one by average pooling. All pixels take part. Images are not coupled.
All terms of the paper are in it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.maps import pixel_kl
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

AT_ONCE = 2**28  # differences of channels: on a GPU their backward pass holds them all, and can index 2**31


def keep_mask(x: Tensor, kind: str, masked: float) -> Tensor:
    """(B, 1, h, w) for a map: ``random``, 0 at the share ``masked`` in expectation; ``center``, 0 in the
    middle third of both directions."""
    keep = torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device) <= 1 - masked
    if kind == "center":
        h, w = x.shape[-2] // 3, x.shape[-1] // 3
        keep = torch.ones_like(keep)
        keep[..., h : 2 * h, w : 2 * w] = False
    return keep.float()


def fd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences of two maps of one shape. No gradient reaches the teacher."""
    return F.mse_loss(projected.float(), teacher.detach().float())


def tokens(x: Tensor, groups: int, pool: int, patch: int) -> Tensor:
    """A map (B, C, h, w) as tokens (B * patches, positions * groups, channels of a group)."""
    if pool and min(x.shape[-2:]) >= pool * patch:
        x = F.max_pool2d(x, pool)
    rows, columns = min(patch, x.shape[-2]), min(patch, x.shape[-1])
    groups = min(groups, x.shape[1])
    down, across, depth = x.shape[-2] // rows, x.shape[-1] // columns, x.shape[1] // groups
    x = x[:, : groups * depth, : down * rows, : across * columns]
    x = x.reshape(len(x), groups, depth, down, rows, across, columns)
    return x.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, rows * columns * groups, depth)


def ctr_loss(
    projected: Tensor, teacher: Tensor, groups: int, pool: int, patch: int, temperature: float
) -> Tensor:
    """``ctr`` (see the top) for two maps of one shape. Returns a float32 scalar. No gradient reaches the
    teacher."""
    y, t = (tokens(x.float(), groups, pool, patch) for x in (projected, teacher.detach()))
    groups = min(groups, teacher.shape[1])
    patches = max(1, AT_ONCE // (y[0].numel() * t.shape[1]))
    parts = zip(torch.split(y, patches), torch.split(t, patches), strict=True)
    near = -torch.cat([torch.cdist(*part, p=1) for part in parts]) / temperature
    token = torch.arange(y.shape[1], device=y.device)
    group = token % groups
    neither = (group == group.unsqueeze(1)) & (token != token.unsqueeze(1))
    positive = near.diagonal(dim1=1, dim2=2)
    return groups * (near.masked_fill(neither, -torch.inf).logsumexp(dim=2) - positive).mean()


class Projector(nn.Module):
    """G: ``blocks`` of 3x3 convolution and ReLU in a row, and the mean of a 3x3 convolution of each."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.heads = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        views = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x).relu()
            views.append(head(x))
        return torch.stack(views).mean(dim=0)


class Method(Distiller):
    """Af-DCD on the last stage of the backbone and, for KD, the logits."""

    class Config(MethodConfig):
        weight_kd: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_fd: Annotated[float, Field(ge=0), Search(3.3, 330.0)]
        weight_ctr: Annotated[float, Field(ge=0), Search(0.0005, 0.05)]
        temperature: float = Field(gt=0)  # of the similarities
        groups: int = Field(ge=2)
        pool: int = Field(ge=0)
        patch: int = Field(ge=1)
        mask: Literal["random", "center"]
        masked: float = Field(ge=0, lt=1)  # share of the positions, of the random mask
        projector: Literal["plain", "enhanced"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        logits = ("logits",) if config.weight_kd else ()
        self.features = bool(config.weight_fd or config.weight_ctr)
        self.student_taps = self.teacher_taps = (("backbone.4",) if self.features else ()) + logits
        if self.features:
            width, wanted = student_shapes["backbone.4"][0], teacher_shapes["backbone.4"][0]
            self.align: nn.Module = nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1)
            self.projector = Projector(wanted, 2 if config.projector == "enhanced" else 1)

    def project(self, student: Tensor, keep: Tensor) -> Tensor:
        """G(A(student) * keep)."""
        return self.projector(self.align(student) * keep)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_kd:
            kl = pixel_kl(*same_size(student["logits"].float(), teacher["logits"].float()))
            terms["kd"] = config.weight_kd * kl.mean()
        if self.features:
            ours, theirs = same_size(student["backbone.4"].float(), teacher["backbone.4"].detach().float())
            y = self.project(ours, keep_mask(ours, config.mask, config.masked))
            if config.weight_fd:
                terms["fd"] = config.weight_fd * fd_loss(y, theirs)
            if config.weight_ctr:
                ctr = ctr_loss(y, theirs, config.groups, config.pool, config.patch, config.temperature)
                terms["ctr"] = config.weight_ctr * ctr
        return terms
