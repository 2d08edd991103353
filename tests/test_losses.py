"""Values, invariances and safety of every loss, against float64 formulas written out in loops."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from acfd.losses import (
    adaptive_feature_loss,
    channel_correlation_loss,
    channel_descriptors,
    channel_significance_loss,
    peak_class_weights,
    redundancy_weights,
)
from baselines import afdcd
from baselines.afdcd import tokens
from baselines.aicsd import ics_loss
from baselines.cirkd import batch_loss
from baselines.cwd import cwd_loss
from baselines.dsd import csd_loss
from baselines.kd import kd_loss
from baselines.lskd import lskd_loss
from baselines.skd import Critic, gradient_penalty, pairwise_loss, pixelwise_loss

Array = np.ndarray


def maps(*shape: int, seed: int = 0, positive: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    return x.relu() + 0.01 if positive else x


def array(x: Tensor) -> Array:
    return x.detach().numpy().astype(np.float64)


# --- the formulas again, in float64 loops ---


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(q: Array, p: Array) -> float:
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(q, p, strict=True) if a > 0))


def pool(x: Array, rows: int, columns: int) -> Array:
    """One map (H, W) averaged to (rows, columns), with the borders of adaptive pooling."""
    out = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * x.shape[0] // rows, -(-(i + 1) * x.shape[0] // rows)
            left, right = j * x.shape[1] // columns, -(-(j + 1) * x.shape[1] // columns)
            out[i, j] = x[top:bottom, left:right].mean()
    return out


def np_kd(s: Array, t: Array, temperature: float, valid: Array | None = None) -> float:
    values = []
    for b, i, j in np.ndindex(s.shape[0], *s.shape[2:]):
        if valid is None or valid[b, i, j]:
            values.append(kl(softmax(t[b, :, i, j] / temperature), softmax(s[b, :, i, j] / temperature)))
    return temperature**2 * sum(values) / len(values)


def np_csd(s: Array, t: Array, tau: float, v: Array | None = None) -> float:
    total = 0.0
    for b, c in np.ndindex(*s.shape[:2]):
        weight = 1.0 if v is None else v[b, c]
        total += weight * kl(softmax(t[b, c].ravel() / tau), softmax(s[b, c].ravel() / tau))
    return tau**2 * total / (s.shape[0] * s.shape[1])


def np_ccd(s: Array, t: Array) -> float:
    total = 0.0
    for b in range(len(s)):
        pearson = [np.corrcoef(x[b].reshape(x.shape[1], -1)) for x in (s, t)]
        total += ((pearson[0] - pearson[1]) ** 2).sum() / s.shape[1] ** 2
    return total / len(s)


def np_descriptors(x: Array, grid: int) -> Array:
    cells = min(grid, x.shape[1]), min(grid, x.shape[2])
    rows = np.array([pool(channel, *cells).ravel() for channel in x])
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def np_weights(d: Array, tau: float, kind: str) -> Array:
    attention = np.array([softmax(row) for row in d @ d.T / tau])
    w = np.diag(attention) if kind == "votes" else 1 / attention.sum(axis=0)
    return w / w.mean()


def np_afd(s: Array, t: Array, grid: int, tau: float, kind: str | None, bias: Array | None = None) -> float:
    total = 0.0
    for b in range(len(s)):
        d_t, d_s = np_descriptors(t[b], grid), np_descriptors(s[b], grid)
        w = np.ones(len(d_t)) if kind is None else np_weights(d_t, tau, kind)
        for c in range(len(d_t)):
            logits = np.array([d_t[c] @ d_s[j] / tau for j in range(len(d_s))])
            a = softmax(logits + (0 if bias is None else bias[c]))
            r = sum(a[j] * s[b, j].ravel() for j in range(len(d_s)))
            target = t[b, c].ravel()
            distance = ((r / np.linalg.norm(r) - target / np.linalg.norm(target)) ** 2).sum()
            total += w[c] * distance / len(d_t)
    return total / len(s)


def np_pairwise(s: Array, t: Array, scale: float) -> float:
    def similarity(x: Array) -> Array:
        kernel = [max(1, int(size * scale)) for size in x.shape[1:]]
        nodes = []
        for i in range(0, x.shape[1], kernel[0]):
            for j in range(0, x.shape[2], kernel[1]):
                nodes.append(x[:, i : i + kernel[0], j : j + kernel[1]].max(axis=(1, 2)))
        return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in nodes] for a in nodes])

    return float(np.mean([((similarity(s[b]) - similarity(t[b])) ** 2).mean() for b in range(len(s))]))


# --- values ---


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_value(temperature: float) -> None:
    s, t = maps(2, 5, 3, 4), maps(2, 5, 3, 4, seed=1)
    valid = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    assert kd_loss(s, t, temperature).item() == pytest.approx(
        np_kd(array(s), array(t), temperature), rel=1e-5
    )
    expected = np_kd(array(s), array(t), temperature, valid.numpy())
    assert kd_loss(s, t, temperature, valid).item() == pytest.approx(expected, rel=1e-5)


def test_kd_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = log 2 - H(1/4)."""
    s, t = torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1)
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kd_loss(s, t, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # dividing doubled logits by T = 2 gives the same distributions, times T²
    assert kd_loss(2 * s, 2 * t, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


def test_dsd_pools_the_border_of_an_odd_map() -> None:
    """Cells of 2 x 2 positions; those of the last row and column average what there is."""
    logits = [maps(2, 4, 7, 9), maps(2, 4, 7, 9, seed=1)]
    matrices = []
    for x in map(array, logits):
        cells = np.array(
            [
                [x[:, :, i : i + 2, j : j + 2].mean(axis=(2, 3)) for j in range(0, 9, 2)]
                for i in range(0, 7, 2)
            ]
        ).reshape(20, 2, 4)
        share = np.array([[softmax(cells[:, b, c] / 4) for c in range(4)] for b in range(2)])
        matrices.append(share @ share.transpose(0, 2, 1))
    expected = ((matrices[0] - matrices[1]) ** 2).mean()
    assert csd_loss(logits[0], logits[1], 4.0).item() == pytest.approx(expected, rel=1e-4)


def test_afdcd_in_parts_is_afdcd(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the backward pass of torch.cdist holds every difference, and writes elsewhere when these
    are 2**31 or more."""
    draw = torch.Generator().manual_seed(0)
    y, t = (torch.randn(3, 8, 12, 12, generator=draw) for _ in range(2))
    y.requires_grad_()
    found, sizes, real = [], list[int](), torch.cdist

    def cdist(a: Tensor, b: Tensor, p: float) -> Tensor:
        sizes.append(a.numel() * b.shape[1])
        return real(a, b, p=p)

    monkeypatch.setattr(torch, "cdist", cdist)
    for most in (2**28, 10_000):
        monkeypatch.setattr(afdcd, "AT_ONCE", most)
        loss = afdcd.ctr_loss(y, t, 4, 0, 4, 0.07)
        (gradient,) = torch.autograd.grad(loss, y)
        found.append((loss, gradient))
    assert len(sizes) > 2 and max(sizes[1:]) <= 10_000 < sizes[0]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_afdcd_tokens_of_a_map_that_does_not_divide() -> None:
    """Patches of 4 x 4 from the corner, three groups of 2 channels; what is left over is not used."""
    x = maps(2, 7, 9, 6)
    cut = tokens(x, 3, 0, 4)
    assert cut.shape == (4, 48, 2)  # 2 images with 2 patches, 16 positions of 3 groups
    assert torch.equal(cut[3, (4 * 1 + 2) * 3 + 1], x[1, 2:4, 4 + 1, 2])
    assert tokens(x, 16, 4, 4).shape == (4, 112, 1)  # too small to be pooled; every channel is a group
    assert tokens(maps(1, 4, 2, 3), 2, 4, 4).shape == (1, 12, 2)
    assert tokens(maps(1, 4, 16, 35), 2, 4, 4).shape == (2, 32, 2)  # pooled to 4 x 8


def test_cirkd_relations_of_a_batch() -> None:
    s, t = maps(3, 4, 2, 3), maps(3, 5, 2, 3, seed=1)
    unit = [array(x).reshape(3, -1, 6) for x in (s, t)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    rows = [
        kl(softmax(unit[1][i, :, p] @ unit[1][j] / 0.1), softmax(unit[0][i, :, p] @ unit[0][j] / 0.1))
        for i, j, p in np.ndindex(3, 3, 6)
    ]
    assert batch_loss(s, t, 0.1).item() == pytest.approx(np.mean(rows), rel=1e-4)


def test_kd_mask() -> None:
    s, t = maps(2, 4, 3, 3).requires_grad_(), maps(2, 4, 3, 3, seed=1)
    everything = torch.ones(2, 3, 3, dtype=torch.bool)
    assert kd_loss(s, t, 1.0, everything).item() == pytest.approx(kd_loss(s, t, 1.0).item(), rel=1e-6)
    one_pixel = torch.zeros_like(everything)
    one_pixel[1, 2, 0] = True
    alone = kd_loss(s[1:, :, 2:, :1], t[1:, :, 2:, :1], 1.0)
    assert kd_loss(s, t, 1.0, one_pixel).item() == pytest.approx(alone.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(kd_loss(s, t, 1.0, one_pixel), s)
    assert gradient[1, :, 2, 0].abs().min() > 0
    assert gradient.abs().sum() == gradient[1, :, 2, 0].abs().sum()


def test_kd_without_a_valid_pixel_is_zero_with_a_graph() -> None:
    s = maps(2, 4, 3, 3).requires_grad_()
    loss = kd_loss(s, maps(2, 4, 3, 3, seed=1), 1.0, torch.zeros(2, 3, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0 and gradient.abs().sum() == 0


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd_and_csd_values(tau: float) -> None:
    s, t, v = maps(2, 5, 3, 4), maps(2, 5, 3, 4, seed=1), maps(2, 5, seed=2).abs()
    assert cwd_loss(s, t, tau).item() == pytest.approx(np_csd(array(s), array(t), tau), rel=1e-5)
    expected = np_csd(array(s), array(t), tau, array(v))
    assert channel_significance_loss(s, t, tau, v).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 11, 12, 16)])
def test_csd_with_uniform_weights_is_cwd(shape: tuple[int, ...]) -> None:
    s, t = maps(*shape), maps(*shape, seed=1)
    assert torch.equal(channel_significance_loss(s, t, 4.0), cwd_loss(s, t, 4.0))
    assert torch.equal(channel_significance_loss(s, t, 4.0, torch.ones(shape[:2])), cwd_loss(s, t, 4.0))


def test_cwd_by_hand() -> None:
    """Teacher mass (3/4, 1/4) over two positions in one of two channels; the other channel agrees."""
    s, t = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    t[0, 0, 0] = 2 * torch.tensor([3.0, 1.0]).log()
    expected = (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) * 4 / 2
    assert cwd_loss(s, t, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_peak_class_weights_value() -> None:
    t = maps(2, 4, 3, 3)
    peaks = np.array(
        [
            [max(softmax(array(t)[b, :, i, j])[c] for i, j in np.ndindex(3, 3)) for c in range(4)]
            for b in range(2)
        ]
    )
    expected = peaks / peaks.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(peak_class_weights(t).numpy(), expected, rtol=1e-5)


def test_peak_class_weights_forget_absent_classes() -> None:
    t = torch.zeros(1, 3, 2, 2)
    t[0, 2] = -30
    t[0, 0, :, 0], t[0, 1, :, 1] = 30, 30
    torch.testing.assert_close(peak_class_weights(t), torch.tensor([[1.5, 1.5, 0.0]]))


def test_ccd_value() -> None:
    s, t = maps(2, 6, 4, 5), maps(2, 6, 4, 5, seed=1)
    assert channel_correlation_loss(s, t).item() == pytest.approx(np_ccd(array(s), array(t)), rel=1e-5)


def test_ccd_by_hand() -> None:
    """Two channels, correlated by 1 in the teacher, -1 in the student: two of four entries differ by 2."""
    t = torch.tensor([[[[0.0, 1.0, 2.0]], [[5.0, 6.0, 7.0]]]])
    s = torch.tensor([[[[0.0, 1.0, 2.0]], [[7.0, 6.0, 5.0]]]])
    assert channel_correlation_loss(s, t).item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("kind", [None, "mass", "votes"])
@pytest.mark.parametrize("grid", [2, 8])
def test_afd_value(kind: str | None, grid: int) -> None:
    s, t = maps(2, 4, 5, 6, positive=True), maps(2, 6, 5, 6, seed=1, positive=True)
    choice = {None: False, "mass": True, "votes": "votes"}[kind]
    expected = np_afd(array(s), array(t), grid, 0.3, kind)
    value = adaptive_feature_loss(s, t, grid, 0.3, redundancy_weighting=choice)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_afd_bias_value() -> None:
    s, t, bias = maps(2, 4, 5, 6), maps(2, 6, 5, 6, seed=1), maps(6, 4, seed=2)

    def given(d_t: Tensor, d_s: Tensor) -> Tensor:
        assert d_t.shape == (2, 6, 9) and d_s.shape == (2, 4, 9)
        return bias

    expected = np_afd(array(s), array(t), 3, 0.1, "mass", array(bias))
    assert adaptive_feature_loss(s, t, 3, 0.1, attention_bias=given).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_afd_projection_value() -> None:
    """With a projection instead of attention: mean of 2 - 2 cos over channels."""
    s, t = maps(2, 4, 5, 6), maps(2, 6, 5, 6, seed=1)
    conv = nn.Conv2d(4, 6, 1)
    r, target = conv(s).flatten(2), t.flatten(2)
    expected = (2 - 2 * F.cosine_similarity(r, target, dim=2)).mean().item()
    value = adaptive_feature_loss(s, t, 8, 0.1, redundancy_weighting=False, projection=conv)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_descriptors_value() -> None:
    x = maps(2, 3, 5, 7)
    for grid in (1, 3, 8):
        if grid > 1:  # a single cell has no shape: zeros
            expected = np.array([np_descriptors(image, grid) for image in array(x)])
        else:
            expected = np.zeros((2, 3, 1))
        np.testing.assert_allclose(channel_descriptors(x, grid).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])  # odd: ceil mode makes nodes of the border
def test_pairwise_value(scale: float, size: tuple[int, int]) -> None:
    s, t = maps(2, 3, *size), maps(2, 6, *size, seed=1)  # the widths may differ
    assert pairwise_loss(s, t, scale).item() == pytest.approx(
        np_pairwise(array(s), array(t), scale), rel=1e-4
    )


def test_pairwise_by_hand() -> None:
    """Two nodes, orthogonal in the student and equal in the teacher: two of four pairs differ by 1."""
    s = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert pairwise_loss(s, torch.ones(1, 2, 1, 2), 0.5).item() == pytest.approx(0.5, rel=1e-6)


def test_aicsd_of_the_paper_value() -> None:
    """Divergences between the distributions of all ordered pairs of classes, image by image."""
    s, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    squares = []
    for image in range(2):
        p, q = ([softmax(c.ravel()) for c in array(x)[image]] for x in (s, t))
        squares += [(kl(p[i], p[j]) - kl(q[i], q[j])) ** 2 for i in range(3) for j in range(3)]
    assert ics_loss(s, t).item() == pytest.approx(np.mean(squares), rel=1e-4)


def test_lskd_of_a_pixel_without_a_direction_is_finite_and_gives_it_no_gradient() -> None:
    s, t = maps(1, 4, 2, 3), maps(1, 4, 2, 3, seed=1)
    s[:, :, 0, 0] = 0.1
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(lskd_loss(s, t, 2.0), s)
    assert gradient.isfinite().all() and not gradient[:, :, 0, 0].any() and gradient[:, :, 1:].any()


def test_gradient_penalty_of_a_linear_critic() -> None:
    class Linear(nn.Module):
        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return 3 * x[:, 0, 0, 0]  # slope 3 everywhere: (3 - 1)²

    x = maps(4, 2, 3, 3)
    assert gradient_penalty(Linear(), x, maps(4, 2, 3, 3, seed=1), x).item() == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (12, 16)])
def test_critic_takes_any_size_and_scores_images_alone(size: tuple[int, int]) -> None:
    critic = Critic(classes=4, width=8)
    x, image = maps(3, 4, *size).softmax(dim=1), maps(3, 3, *size, seed=1)
    scores = critic(x, image)
    assert scores.shape == (3,)
    torch.testing.assert_close(critic(x[1:2], image[1:2]), scores[1:2])


# --- published weights: the reductions of other code bases ---


def test_published_weights_convert() -> None:
    """The factors in the docstrings of kd.py, cwd.py and skd.py, from reductions computed here."""
    n, c, h, w, temperature = 3, 5, 4, 6, 4.0
    s, t = maps(n, c, h, w).requires_grad_(), maps(n, c, h, w, seed=1)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, c)

    ours = kd_loss(s, t, temperature).item()
    log_p, q = (s / temperature).log_softmax(1), (t / temperature).softmax(1)
    torch_mean = F.kl_div(log_p, q, reduction="none").mean().item()  # IFVD, TorchDistiller: without T²
    assert isclose(torch_mean, ours / (c * temperature**2), rel_tol=1e-5)
    mmrazor = F.kl_div(log_p, q, reduction="batchmean").item() * temperature**2
    assert isclose(mmrazor, ours * h * w, rel_tol=1e-5)
    cirkd = F.kl_div(rows(log_p), rows(q), reduction="batchmean").item() * temperature**2
    assert isclose(cirkd, ours, rel_tol=1e-5)

    # SKD sums the cross-entropy and divides by W * H alone; same gradient as N times ours at T = 1
    skd = -(rows(t).softmax(1) * rows(s).log_softmax(1)).sum() / w / h
    (theirs,) = torch.autograd.grad(skd, s)
    for function in (lambda: kd_loss(s, t, 1.0), lambda: pixelwise_loss(s, t)):
        (gradient,) = torch.autograd.grad(function(), s)
        torch.testing.assert_close(theirs, n * gradient, rtol=1e-4, atol=1e-6)

    cwd = (
        F.kl_div((s / 4).flatten(2).log_softmax(2), (t / 4).flatten(2).softmax(2), reduction="sum")
        * 16
        / (n * c)
    )
    assert isclose(cwd.item(), cwd_loss(s, t, 4.0).item(), rel_tol=1e-5)

    # SKD's pair-wise term: summed, divided by (nodes)² and by N
    a, b = (F.normalize(F.max_pool2d(x, (2, 3)).flatten(2), dim=1) for x in (s, t))
    pair = (torch.einsum("icm,icn->imn", a, a) - torch.einsum("icm,icn->imn", b, b)).square().sum() / 4**2 / n
    assert isclose(pair.item(), pairwise_loss(s, t, 0.5).item(), rel_tol=1e-5)


# --- invariances ---

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "kd": lambda s, t: kd_loss(s, t, 2.0),
    "pixelwise": pixelwise_loss,
    "pairwise": lambda s, t: pairwise_loss(s, t, 0.5),
    "cwd": lambda s, t: cwd_loss(s, t, 4.0),
    "afd": lambda s, t: adaptive_feature_loss(s, t, 4, 0.1),
    "afd-votes": lambda s, t: adaptive_feature_loss(s, t, 4, 0.1, redundancy_weighting="votes"),
    "ccd": channel_correlation_loss,
    "csd": lambda s, t: channel_significance_loss(s, t, 4.0, peak_class_weights(t)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
LEVELLING = [
    loss for name, loss in LOSSES.items() if not name.startswith("afd")
]  # zero on equal inputs at any setting


@pytest.mark.parametrize("loss", LEVELLING)
def test_equal_inputs_give_zero_without_a_gradient(loss: Loss) -> None:
    x = maps(2, 5, 4, 6).requires_grad_()
    value = loss(x, x.detach().clone())
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(0.0, abs=1e-6) and gradient.abs().max() < 1e-5


def test_afd_is_zero_on_equal_inputs_at_low_tau() -> None:
    x = maps(2, 5, 6, 6, positive=True)
    values = [adaptive_feature_loss(x, x, 8, tau).item() for tau in (1.0, 0.1, 0.01)]
    assert values[0] > values[1] > values[2] and values[2] == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 99))
def test_ccd_ignores_scale_and_shift_of_every_channel(scale: float, shift: float, seed: int) -> None:
    s, t = maps(2, 5, 4, 4, seed=seed), maps(2, 5, 4, 4, seed=seed + 100)
    scales = scale ** torch.linspace(-1, 1, 5).reshape(1, 5, 1, 1)
    shifts = shift * scales * torch.linspace(-1, 1, 5).reshape(1, 5, 1, 1)
    expected = channel_correlation_loss(s, t)
    torch.testing.assert_close(
        channel_correlation_loss(s * scales + shifts, t), expected, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        channel_correlation_loss(s, t * scales + shifts), expected, rtol=1e-3, atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_softmax_losses_ignore_a_shift(shift: float, seed: int) -> None:
    """KD does not see a constant per pixel, CWD and CSD none per channel."""
    s, t = maps(2, 4, 3, 3, seed=seed), maps(2, 4, 3, 3, seed=seed + 100)
    per_pixel = s + shift * maps(2, 1, 3, 3, seed=seed + 200)
    per_channel = s + shift * maps(2, 4, 1, 1, seed=seed + 200)
    torch.testing.assert_close(kd_loss(per_pixel, t, 2.0), kd_loss(s, t, 2.0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cwd_loss(per_channel, t, 2.0), cwd_loss(s, t, 2.0), rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), tau=st.floats(0.02, 5), grid=st.integers(1, 9))
def test_bounds(seed: int, tau: float, grid: int) -> None:
    s, t = maps(2, 4, 5, 6, seed=seed), maps(2, 4, 5, 6, seed=seed + 1000)
    assert 0 <= adaptive_feature_loss(s, t, grid, tau, redundancy_weighting=False).item() <= 4 + 1e-5
    assert 0 <= channel_correlation_loss(s, t).item() <= 4
    assert 0 <= pairwise_loss(s, t, 0.5).item() <= 4
    assert kd_loss(s, t, tau).item() >= -1e-6 and cwd_loss(s, t, tau).item() >= -1e-6


def test_afd_reaches_both_bounds() -> None:
    """One channel each: the student's channel points as the teacher's or the opposite way."""
    t = maps(1, 1, 4, 4)
    assert adaptive_feature_loss(3 * t, t, 4, 0.1).item() == pytest.approx(0.0, abs=1e-6)
    assert adaptive_feature_loss(-t, t, 4, 0.1).item() == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("kind", [True, False, "votes"])
def test_afd_ignores_the_order_of_channels(kind: bool) -> None:
    s, t = maps(2, 6, 5, 6, positive=True), maps(2, 4, 5, 6, seed=1, positive=True)
    expected = adaptive_feature_loss(s, t, 4, 0.1, redundancy_weighting=kind)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        adaptive_feature_loss(s[:, order], t, 4, 0.1, redundancy_weighting=kind), expected
    )
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        adaptive_feature_loss(s, t[:, order], 4, 0.1, redundancy_weighting=kind), expected
    )


def test_votes_are_shared_by_copies() -> None:
    x = maps(2, 6, 8, 8)
    d = channel_descriptors(torch.cat([x, x[:, :1].repeat(1, 3, 1, 1)], dim=1), 8)
    w = redundancy_weights(d, 0.1, kind="votes")
    copies, others = w[:, [0, 6, 7, 8]], w[:, 1:6]
    torch.testing.assert_close(copies.sum(dim=1), others.mean(dim=1), rtol=0.02, atol=0)
    torch.testing.assert_close(w.mean(dim=1), torch.ones(2))
    # what method.md's column mass does not do: rows sum to 1, so that equal copies keep their full votes
    mass = redundancy_weights(d, 0.1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0.02, atol=0)


def test_column_mass_lowers_a_hub() -> None:
    """A channel that is the mean of others is closer to them than they are to each other."""
    x = maps(1, 5, 8, 8)
    d = channel_descriptors(torch.cat([x, x.mean(dim=1, keepdim=True)], dim=1), 8)
    w = redundancy_weights(d, 0.5)
    assert w[0, 5] < w[0, :5].min() and w.mean().item() == pytest.approx(1.0, rel=1e-6)


def test_silent_teacher_channels_do_not_dilute_afd() -> None:
    s, t = maps(2, 4, 5, 6, positive=True), maps(2, 4, 5, 6, seed=1, positive=True)
    silent = torch.cat([t, torch.zeros(2, 3, 5, 6)], dim=1)
    for kind in (True, False, "votes"):
        expected = adaptive_feature_loss(s, t, 4, 0.1, redundancy_weighting=kind)  # type: ignore[arg-type]
        value = adaptive_feature_loss(s, silent, 4, 0.1, redundancy_weighting=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)


def test_flat_channels_do_not_take_the_votes() -> None:
    t = maps(1, 6, 8, 8)
    t[:, 0] = 3.0
    for kind in ("mass", "votes"):
        w = redundancy_weights(channel_descriptors(t, 8), 0.1, kind=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(w, torch.ones(1, 6), rtol=0.05, atol=0)


@every_loss
def test_order_of_images_does_not_matter(loss: Loss) -> None:
    s, t, order = maps(3, 4, 4, 6), maps(3, 4, 4, 6, seed=1), torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))
    alone = torch.stack([loss(s[i : i + 1], t[i : i + 1]) for i in range(3)]).mean()
    torch.testing.assert_close(loss(s, t), alone)


# --- safety ---


@every_loss
@pytest.mark.parametrize("other", [(4, 6), (5, 3), (9, 12)])
def test_unequal_sizes_meet_at_the_smaller(loss: Loss, other: tuple[int, int]) -> None:
    s, t = maps(2, 4, 5, 6), maps(2, 4, *other, seed=1)
    size = (min(5, other[0]), min(6, other[1]))
    pooled = [
        torch.from_numpy(np.array([[pool(c, *size) for c in b] for b in array(x)])).float() for x in (s, t)
    ]
    if loss is not LOSSES["csd"]:  # its class weights come from the teacher's own size
        torch.testing.assert_close(loss(s, t), loss(*pooled), rtol=1e-4, atol=1e-5)
    assert loss(s, t).isfinite()


EDGES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "bf16": lambda: (maps(2, 4, 4, 6).bfloat16(), maps(2, 4, 4, 6, seed=1).bfloat16()),
    "fp16": lambda: (maps(2, 4, 4, 6).half(), maps(2, 4, 4, 6, seed=1).half()),
    "huge": lambda: (maps(2, 4, 4, 6) * 1e4, maps(2, 4, 4, 6, seed=1) * 1e4),
    "tiny": lambda: (maps(2, 4, 4, 6) * 1e-8, maps(2, 4, 4, 6, seed=1) * 1e-8),
    "zero student": lambda: (torch.zeros(2, 4, 4, 6), maps(2, 4, 4, 6)),
    "zero teacher": lambda: (maps(2, 4, 4, 6), torch.zeros(2, 4, 4, 6)),
    "both zero": lambda: (torch.zeros(2, 4, 4, 6), torch.zeros(2, 4, 4, 6)),
    "constant": lambda: (torch.full((2, 4, 4, 6), 0.1), torch.full((2, 4, 4, 6), 7e3)),
    "one constant channel": lambda: (
        maps(2, 4, 4, 6) * torch.tensor([0.0, 1, 1, 1]).view(4, 1, 1) + 0.1,
        maps(2, 4, 4, 6, seed=1),
    ),
    "one position": lambda: (maps(2, 4, 1, 1), maps(2, 4, 1, 1, seed=1)),
    "one channel": lambda: (maps(2, 1, 4, 6), maps(2, 1, 4, 6, seed=1)),
}


@every_loss
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_finite_and_no_gradient_explodes(loss: Loss, edge: str) -> None:
    s, t = EDGES[edge]()
    s, t = s.requires_grad_(), t.requires_grad_()
    value = loss(s, t)
    assert value.dtype == torch.float32 and value.shape == () and value.isfinite()
    value.backward()
    assert s.grad is not None and s.grad.isfinite().all()
    assert s.grad.abs().max() < 1e4  # a bare eps under a norm would give 1e12
    assert t.grad is None, "a gradient reached the teacher"


@every_loss
def test_low_precision_inputs_are_computed_in_float32(loss: Loss) -> None:
    s, t = maps(2, 4, 4, 6).bfloat16(), maps(2, 4, 4, 6, seed=1).bfloat16()
    assert torch.equal(loss(s, t), loss(s.float(), t.float()))


@every_loss
def test_a_step_against_the_gradient_lowers_the_loss(loss: Loss) -> None:
    s, t = maps(2, 4, 4, 6).requires_grad_(), maps(2, 4, 4, 6, seed=1)
    before = loss(s, t)
    (gradient,) = torch.autograd.grad(before, s)
    assert gradient.norm() > 0
    after = loss(s.detach() - 0.01 * s.detach().norm() * gradient / gradient.norm(), t)
    assert after < before


@pytest.mark.parametrize("loss", [LOSSES["cwd"], LOSSES["ccd"], LOSSES["csd"]])
def test_unequal_widths_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"equal channels, not 4 and 6"):
        loss(maps(1, 4, 3, 3), maps(1, 6, 3, 3))
