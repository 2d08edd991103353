"""``suite.strict``: what torch has no deterministic kernel for on a GPU, computed in another way.

torch 2.15 has none for two operations that segmentation uses everywhere: the gradient of adaptive average
pooling, and the sum of a loss on maps of classes. While the context of :func:`deterministic` is open, calls
of ``F.adaptive_avg_pool2d``, ``F.cross_entropy`` and ``F.nll_loss`` and of their modules, by networks, losses
or a method of the user's own, become matrix products and a sum of single losses. The values are the same but
for rounding. It does so on every device: what a GPU computes is tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def deterministic() -> AbstractContextManager[Any]:
    """Open around what needs a gradient; does nothing unless torch was asked for deterministic algorithms."""
    return _Replace() if torch.are_deterministic_algorithms_enabled() else nullcontext()


@contextmanager
def suspended() -> Iterator[None]:
    """Not strict meanwhile: for what is computed and thrown away."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class _Replace(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """``F.adaptive_avg_pool2d`` as two products with matrices of averages, at least in float32."""
    wanted = (output_size, output_size) if isinstance(output_size, int) else output_size
    size = [old if new is None else new for old, new in zip(input.shape[-2:], wanted, strict=True)]
    with torch.autocast(input.device.type, enabled=False):
        exact = input if input.dtype == torch.float64 else input.float()
        rows, columns = (_averages(old, new, exact) for old, new in zip(exact.shape[-2:], size, strict=True))
        return (rows @ exact @ columns.T).to(input.dtype)


def _averages(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): row i holds the mean over the cells from floor(i old / new) to ceil((i + 1) old / new)."""
    cell = torch.arange(old, device=like.device)
    index = torch.arange(new, device=like.device)[:, None]
    inside = (cell >= index * old // new) & (cell < -(-(index + 1) * old // new))
    inside = inside.to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _summed_apart(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss on class maps whose sum or mean is taken of the single losses."""

    def replaced(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        **others: Any,
    ) -> Tensor:
        if size_average is not None or reduce is not None or target.is_floating_point():
            return loss(input, target, weight, size_average, ignore_index, reduce, reduction, **others)
        single = loss(input, target, weight, ignore_index=ignore_index, reduction="none", **others)
        if reduction == "none":
            return single
        if reduction == "sum":
            return single.sum()
        valid = target != ignore_index
        return single.sum() / (valid.sum() if weight is None else weight[target[valid]].sum())

    return replaced


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.cross_entropy: _summed_apart(F.cross_entropy),
    F.nll_loss: _summed_apart(F.nll_loss),
}
