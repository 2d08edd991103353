"""The strict mode: other operations, the same values, and none that lacks a deterministic kernel on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pairs import CLASSES, CROP, METHODS, STUDENTS, student, train, trainee, training
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.engine import strict
from pipelines.engine.cost import _KNOWN, step_cost
from pipelines.engine.train import History
from pipelines.methods import method_class, method_config
from pipelines.networks import tap_shapes


@pytest.fixture
def asked() -> Iterator[None]:
    """As ``suite.strict`` asks torch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pooled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Adaptive average pooling by its definition."""
    height, width = x.shape[-2:]
    found = x.new_zeros(*x.shape[:-2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
            left, right = math.floor(j * width / columns), math.ceil((j + 1) * width / columns)
            found[..., i, j] = x[..., top:bottom, left:right].mean((-2, -1))
    return found


@pytest.mark.parametrize("size", [(5, 7), (12, 6), (6, 13)])
@pytest.mark.parametrize("wanted", [1, 2, 3, (6, 6), (5, 4), (None, 3), (7, 14)])
def test_pooling_is_the_mean_of_every_cell(size: tuple[int, int], wanted: Any, asked: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    with strict.deterministic():
        found = nn.AdaptiveAvgPool2d(wanted)(x)
    rows, columns = (wanted, wanted) if isinstance(wanted, int) else wanted
    exact = pooled(x, rows or size[0], columns)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
    weights = torch.randn_like(exact)
    (slope,) = torch.autograd.grad((weights * found).sum(), x, retain_graph=True)
    (right,) = torch.autograd.grad((weights * exact).sum(), x)
    torch.testing.assert_close(slope, right, rtol=0, atol=1e-14)


def test_pooling_in_bf16_rounds_once(asked: None) -> None:
    torch.manual_seed(0)
    x = (100 + torch.randn(1, 4, 11, 11)).bfloat16()
    with strict.deterministic(), torch.autocast("cpu", torch.bfloat16):
        found = F.adaptive_avg_pool2d(x, 3)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, pooled(x.double(), 3, 3).bfloat16())  # one rounding


LOSSES = (F.cross_entropy, F.nll_loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_torchs_own(loss: Callable[..., Any], reduction: str, weighted: bool, asked: None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 5))
    labels[0, 0] = 255
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    smooth = {"label_smoothing": 0.1} if loss is F.cross_entropy else {}
    for more in ({}, smooth):
        options: dict[str, Any] = {"weight": weight, "ignore_index": 255, "reduction": reduction} | more
        values, slopes = [], []
        for mode in (strict.deterministic(), strict.nullcontext()):
            with mode:
                values.append(loss(logits, labels, **options))
            slopes.append(torch.autograd.grad(values[-1].sum(), logits)[0])
        torch.testing.assert_close(*values, rtol=0, atol=1e-13)
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-13)


def test_what_is_not_a_map_of_classes_is_left_to_torch(asked: None) -> None:
    logits, odds = torch.randn(2, 4, 3), torch.rand(2, 4, 3)
    with strict.deterministic():
        assert torch.equal(F.cross_entropy(logits, odds), nn.CrossEntropyLoss()(logits, odds))
        nothing = torch.full((2, 3), 255)
        assert F.cross_entropy(logits, nothing, ignore_index=255).isnan()
        assert F.cross_entropy(logits, nothing, ignore_index=255, reduction="sum") == 0


class Operations(TorchDispatchMode):
    """Notes the two that training meets without a deterministic kernel on a GPU, and a relative."""

    def __init__(self) -> None:
        super().__init__()
        self.without: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        summed = name in ("nll_loss2d_forward", "nll_loss_nd") and args[3] != 0
        if name in ("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward") or summed:
            self.without.add(name)
        return func(*args, **(kwargs or {}))


def steps(key: str, pupil: str, folder: Path) -> tuple[set[str], History]:
    """Two steps by a method after a teacher whose maps have another size."""
    taught = student("segformer-b0").eval()
    one = trainee(key, pupil, tap_shapes(taught, CROP), folder)
    with Operations() as seen:
        train([one], taught)
    return seen.without, one.history


@pytest.mark.parametrize("key", METHODS)
def test_no_method_meets_the_two_without_a_deterministic_kernel(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = STUDENTS["pspnet-resnet18"].model_copy(update={"encoder": "tu-test_resnet"})
    monkeypatch.setitem(STUDENTS, "small", small)
    fast, usual = steps(key, "small", tmp_path)
    assert fast >= {"_adaptive_avg_pool2d_backward", "nll_loss2d_forward"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found, history = steps(key, "small", tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found
    for row, other in zip(history.rows, usual.rows, strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("pupil", [name for name in STUDENTS if "imagenet" not in name])
def test_no_network_meets_the_two_without_a_deterministic_kernel(
    pupil: str, tmp_path: Path, asked: None
) -> None:
    assert not steps("none", pupil, tmp_path)[0]


def test_counting_operations_is_not_strict(asked: None) -> None:
    """Its numbers are thrown away: torch must not warn, and no pooling be counted as matrix products."""
    network = student("pspnet-resnet18")
    _KNOWN.clear()
    method = method_class("none")(method_config("none", {}), *[tap_shapes(network, CROP)] * 2)
    with Operations() as seen:
        strictly = step_cost(network, None, method, CLASSES, training(), None)
    assert seen.without and torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    _KNOWN.clear()
    assert step_cost(network, None, method, CLASSES, training(), None) == strictly
