"""The three losses of ACFD as pure functions. Needs torch alone, so that it fits into any code base.

Source: "Adaptive channel-wise feature distillation in semantic segmentation", Journal of Jiangsu University
(Natural Science Edition) 46(5), 2025, doi 10.3969/j.issn.1671-7775.2025.05.009. Its abstract states the three
components and their tools (self-attention, correlation matrices, softmax); the formulas are not public. They
are this project's reading; acfd/README.md says of each item whether it is stated, inferred or chosen.

Every loss: maps are (B, C, H, W); unequal spatial sizes are brought to the smaller one by adaptive average
pooling; float32 inside, whatever the input; no gradient reaches the teacher; a float32 scalar comes out, the
mean over images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SILENT = 1e-6  # L2 norm at or below which a channel carries no signal
FLAT = 1e-5  # spread relative to its own L2 norm at or below which a channel is constant up to rounding

Bias = Callable[[Tensor, Tensor], Tensor]
Projection = Callable[[Tensor], Tensor]
Kind = Literal["mass", "votes"]


def adaptive_feature_loss(
    student: Tensor,
    teacher: Tensor,
    grid: int,
    tau: float,
    attention_bias: Bias | None = None,
    redundancy_weighting: bool | Literal["votes"] = True,
    projection: Projection | None = None,
) -> Tensor:
    """AFD: distance between every teacher channel and its reconstruction from the student's channels.

        r_c = sum_j A_ts[c, j] s_j,     A_ts = softmax over j of (D_t D_s^T / tau + attention_bias(D_t, D_s))
        L   = mean over images and c of w_c * || r_c / ||r_c||  -  t_c / ||t_c|| ||²

    D are the ``channel_descriptors`` on a ``grid`` x ``grid``, w the ``redundancy_weights`` (mean 1 per
    image). Widths may differ: student (B, Cs, H, W), teacher (B, Ct, H', W'). ``attention_bias`` maps
    descriptors (B, Ct, g) and (B, Cs, g) to (B, Ct, Cs), None = plain similarity. ``projection`` (a 1x1
    convolution Cs -> Ct, the adapter of FitNets) replaces the attention. A teacher channel that is zero all
    over an image has no direction to follow and is left out of that image's mean. ``redundancy_weighting``:
    True = by column mass, "votes" = by the share that a channel keeps for itself, False = w_c = 1 (the value
    then lies in 0..4).
    """
    student, teacher = _aligned(student, teacher)
    with torch.no_grad():
        d_t = channel_descriptors(teacher, grid)
        target = teacher.flatten(2)
        alive = (target.norm(dim=2) > SILENT).float()
        if redundancy_weighting:
            kind: Kind = "votes" if redundancy_weighting == "votes" else "mass"
            weights = redundancy_weights(d_t, tau, alive, kind)
        else:
            weights = _mean_one(alive)
        target = _unit(target)
    if projection is None:
        d_s = channel_descriptors(student, grid)
        similarity = (d_t / tau) @ d_s.transpose(1, 2)
        if attention_bias is not None:
            similarity = similarity + attention_bias(d_t, d_s)
        reconstruction = similarity.softmax(dim=2) @ student.flatten(2)
    else:
        reconstruction = projection(student).float().flatten(2)
    distance = (_unit(reconstruction) - target).square().sum(dim=2)
    return (weights * distance).mean()


def channel_correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """CCD: || G(S) - G(T) ||_F² / C², mean over images; G[i, j] = correlation of channels i and j.

    Pearson correlation over the positions. Both maps have C channels, else ValueError. Invariant to the scale
    (> 0) and the shift of every channel; a channel that is constant has correlation 0 with all. The value
    lies in 0..4. Follows ICKD (Liu et al., ICCV 2021), which takes inner products of the raw channels
    instead; weights published for that do not convert.
    """
    _same_width(student, teacher, "channel correlation")
    student, teacher = _aligned(student, teacher)
    difference = _correlation(student) - _correlation(teacher)
    return difference.square().mean()


def channel_significance_loss(
    student: Tensor, teacher: Tensor, tau: float, class_weights: Tensor | None = None
) -> Tensor:
    """CSD: tau² / C * sum_c v_c KL(p_c^T || p_c^S), mean over images; p_c = softmax of z_c / tau.

    The softmax is over the positions. Logits (B, C, H, W) with equal C, else ValueError. ``class_weights`` is
    v, (B, C) with mean 1 per image; None is uniform, and then this is exactly CWD on logits (Shu et al., ICCV
    2021), with the same weight.
    """
    _same_width(student, teacher, "channel significance")
    student, teacher = _aligned(student, teacher)
    log_p = torch.log_softmax(student.flatten(2) / tau, dim=2)
    log_q = torch.log_softmax(teacher.flatten(2) / tau, dim=2)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=2)  # (B, C)
    if class_weights is not None:
        kl = kl * class_weights.detach().float()
    return kl.mean() * tau**2


def peak_class_weights(teacher_logits: Tensor) -> Tensor:
    """Class weights (B, C), mean 1 per image, proportional to the peak probability of each class.

    The peak is taken over the image. A class that is absent from an image has no saliency to copy there.
    Probabilities are the teacher's softmax over the classes of (B, C, H, W) logits, without temperature.
    """
    return _mean_one(teacher_logits.detach().float().softmax(dim=1).amax(dim=(2, 3)))


def channel_descriptors(features: Tensor, grid: int) -> Tensor:
    """Where each channel fires, coarsely: (B, C, H, W) to (B, C, g), average-pooled, centred, L2-normalised.

    g = min(grid, H) * min(grid, W): a smaller map stays as it is. A constant channel gives zeros.
    """
    cells = (min(grid, features.shape[-2]), min(grid, features.shape[-1]))
    return _unit_centred(F.adaptive_avg_pool2d(features.float(), cells).flatten(2))


def redundancy_weights(
    descriptors: Tensor, tau: float, alive: Tensor | None = None, kind: Kind = "mass"
) -> Tensor:
    """Weights (B, C), mean 1 per image, by the channels' self-attention A = row softmax of D D^T / tau.

    ``mass``: w_c proportional to 1 / m_c with the column mass m_c = sum_j A[j, c]. It lowers a channel that
    many others resemble more than they resemble each other. Every row of A sums to 1, so the members of a
    group of equal copies keep mass 1 each: at a low tau equal copies are *not* weighed down.
    ``votes``: w_c proportional to A[c, c], the attention that a channel keeps for itself: q equal copies get
    1/q each, and so share one vote.

    ``descriptors`` (B, C, g) are centred unit vectors. Channels that are not ``alive`` (B, C) get 0. A
    channel without shape (all zeros) counts as a copy of itself alone; by D D^T it would not even resemble
    itself, have almost no mass and so drown the votes of all others.
    """
    similarity = (descriptors / tau) @ descriptors.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(1 / tau)
    attention = similarity.softmax(dim=2)
    if kind == "votes":
        rarity = attention.diagonal(dim1=1, dim2=2)
    else:
        rarity = attention.sum(dim=1).reciprocal()
    return _mean_one(rarity if alive is None else rarity * alive)


def _aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in float32 at the smaller spatial size of the two, the teacher detached."""
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    student, teacher = student.float(), teacher.detach().float()
    if student.shape[-2:] != size:
        student = F.adaptive_avg_pool2d(student, size)
    if teacher.shape[-2:] != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return student, teacher


def _same_width(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"The {what} loss needs equal channels, not {student.shape[1]} and {teacher.shape[1]}: "
            "map the student's to the teacher's first."
        )


def _correlation(features: Tensor) -> Tensor:
    rows = _unit_centred(features.flatten(2))
    return rows @ rows.transpose(1, 2)


def _unit(rows: Tensor) -> Tensor:
    """Rows (…, n) at length 1. A silent row becomes zeros without a gradient (a bare eps: a huge one)."""
    norm = rows.norm(dim=-1, keepdim=True)
    return rows / norm.clamp_min(SILENT) * (norm > SILENT)


def _unit_centred(rows: Tensor) -> Tensor:
    """Rows (…, n) with mean 0 and length 1; a row that is constant up to rounding: zeros, no gradient."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    shaped = norm > SILENT + FLAT * rows.detach().norm(dim=-1, keepdim=True)
    return centred / norm.clamp_min(SILENT) * shaped


def _mean_one(weights: Tensor) -> Tensor:
    """Weights (B, C) >= 0 scaled to mean 1 per image; all zeros stay zeros."""
    return weights / weights.mean(dim=1, keepdim=True).clamp_min(1e-12)
