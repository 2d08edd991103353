"""What a training costs in floating-point operations and memory: the same numbers on every machine."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from pipelines.config import Recipe, Training
from pipelines.engine import strict
from pipelines.engine.train import terms_of
from pipelines.method import AUXILIARY, Batch, Distiller, Shapes
from pipelines.networks import SegmentationNetwork

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """Of one training step of a cell as if it were trained alone, or of a method's own part of it."""

    flops: int  # 2 per multiply-add; convolutions and matrix products
    largest_mb: float  # the largest tensor on the way, which recomputing does not avoid
    memory_mb: float  # weights, gradients, optimiser, what the backward pass keeps, teacher and its taps
    parameters: int  # of the method, trained and not exported


_KNOWN: dict[str, Cost] = {}


def step_cost(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork | None,
    method: Distiller,
    classes: int,
    training: Training,
    recipe: Recipe | None,
) -> Cost:
    """Count one training step: student forward and backward, the teacher's forward, the method's terms and
    its ``after_step``.

    Done by a step on copies with random data at the training crop and batch size; neither the networks, the
    method nor the random streams are changed. Counted once a process for the same networks and method.
    ``teacher`` may be None when the method has no teacher taps.
    """
    key = json.dumps(
        [
            _shape(student),
            _shape(teacher),
            _shape(method),
            f"{type(method).__module__}.{type(method).__qualname__}",
            method.config.model_dump(mode="json"),
            classes,
            training.batch_size,
            training.crop,
            training.precision,
            training.auxiliary_weight,
            repr(recipe),
        ]
    )
    if key not in _KNOWN:
        _KNOWN[key] = _count(student, teacher, method, classes, training, recipe)
    return _KNOWN[key]


def _shape(module: torch.nn.Module | None) -> list[Any]:
    """All that decides what a pass costs: the layers, with their strides, and their weights."""
    if module is None:
        return []
    return [repr(module), *([name, *value.shape] for name, value in module.state_dict().items())]


def _count(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork | None,
    method: Distiller,
    classes: int,
    training: Training,
    recipe: Recipe | None,
) -> Cost:
    device = next(student.parameters()).device
    student, method = copy.deepcopy((student, method))
    student.train()
    method.to(device).train()
    kept: dict[int, int] = {}  # bytes by the address of their storage

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(), strict.suspended():
        torch.manual_seed(0)
        size = (training.batch_size, *training.crop)
        images = torch.randn(training.batch_size, 3, *training.crop, device=device)
        batch = Batch(images, torch.randint(0, classes, size, device=device), classes, 255)
        method.own_optimizers()  # a method may build its own networks here
        with _Counter() as counter:
            seen: dict[str, Tensor] = {}
            if teacher is not None:
                with (
                    torch.no_grad(),
                    torch.autocast(
                        device.type,
                        torch.bfloat16,
                        enabled=training.precision == "bf16" and device.type == "cuda",
                    ),
                ):
                    output = teacher(images, auxiliary=AUXILIARY in method.teacher_taps)
                seen = {name: output[name].float() for name in method.teacher_taps}
            exact = training if device.type == "cuda" else training.model_copy(update={"precision": "fp32"})
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                terms, taps = terms_of(student, method, batch, seen, exact, recipe)
            for tensor in (*seen.values(), *student.parameters(), *method.parameters(), images):
                kept.pop(tensor.untyped_storage().data_ptr(), None)
            saved = sum(kept.values())
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            method.after_step({name: tap.detach() for name, tap in taps.items()}, seen, batch)
    states = 1 if recipe is None else 2  # momentum; two moments
    trained = _bytes(student.parameters()) + _bytes(method.parameters())
    fixed = _bytes(teacher.parameters()) if teacher else 0
    total = (2 + states) * trained + fixed + saved + _bytes([images, *seen.values()])
    parameters = sum(p.numel() for p in method.parameters())
    return Cost(counter.total, counter.largest / 2**20, total / 2**20, parameters)


def method_cost(own: Distiller, student: Shapes, teacher: Shapes, size: Size, classes: int) -> Cost:
    """What a method built on the meta device adds to a step: its terms, their gradients and ``after_step`` on
    maps of these shapes, for ``size`` = images, height, width. Nothing is computed. The memory is that of the
    teacher's taps, what the backward pass keeps, and twice the method's parameters."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # meta tensors have no address
        return tensor

    with torch.device("meta"), torch.random.fork_rng():
        own.train()
        images, height, width = size
        batch = Batch(
            torch.empty(images, 3, height, width), torch.zeros(size, dtype=torch.int64), classes, 255
        )
        taps = {name: torch.empty(images, *student[name]).requires_grad_() for name in own.student_taps}
        seen = {name: torch.empty(images, *teacher[name]) for name in own.teacher_taps}
        own.own_optimizers()
        with _Counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                terms = own.losses(taps, seen, batch)
            for tensor in (*taps.values(), *seen.values(), *own.parameters(), batch.images, batch.labels):
                kept.pop(tensor.untyped_storage()._cdata, None)
            saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
            if terms:
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            own.after_step({name: tap.detach() for name, tap in taps.items()}, seen, batch)
    total = saved + _bytes(seen.values()) + 2 * _bytes(own.parameters())
    parameters = sum(p.numel() for p in own.parameters())
    return Cost(counter.total, counter.largest / 2**20, total / 2**20, parameters)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's FLOP formulas over whatever runs inside.

    Not by its FlopCounterMode, which follows modules by hooks that a second derivative (a gradient penalty)
    does not survive, and which counts the backward pass of a grouped convolution as if it had one group.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel() * value.element_size())
        operation = func.overloadpacket
        if operation is torch.ops.aten.convolution_backward:
            gradient, image, weight = args[:3]
            transposed, mask = args[7], args[10]
            # the gradients of the input and of the weight each cost what the forward pass costs
            once = conv_flop_count(image.shape, weight.shape, gradient.shape, transposed=transposed)
            self.total += int(once) * (int(mask[0]) + int(mask[1]))
        elif formula := flop_registry.get(operation):
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out
