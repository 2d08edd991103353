"""What a training costs in floating-point operations: the same number on every machine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from pipelines.config import Training
from pipelines.engine import eager, strict
from pipelines.engine.fit import DistillationStep
from pipelines.method import Batch, Distiller
from pipelines.networks import SegmentationNetwork


def step_flops(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork | None,
    method: Distiller,
    classes: int,
    ignore_index: int,
    training: Training,
) -> int:
    """Floating-point operations (2 per multiply-add; convolutions and matrix products) of one training step.

    Student forward and backward, the teacher's forward, the method's terms and its ``after_step``, counted by
    doing a step on copies with random data at the training crop and batch size. Neither the networks, the
    method nor the random streams are changed. ``teacher`` may be None when the method has no teacher taps.
    """
    eager.install()
    device = next(student.parameters()).device
    student, method = copy.deepcopy((student, method))
    method.to(device)
    if teacher is not None:
        teacher = teacher.to(device)
    with torch.random.fork_rng(), strict.suspended():
        torch.manual_seed(0)
        size = (training.batch_size, *training.crop)
        images = torch.randn(training.batch_size, 3, *training.crop, device=device)
        batch = Batch(images, torch.randint(0, classes, size, device=device), classes, ignore_index)
        step = DistillationStep(student, teacher, method, training.auxiliary_weight).train()
        if device.type == "cuda" and training.precision == "bf16":  # to take no more memory than the training
            step.autocast = torch.autocast(device.type, torch.bfloat16)
        method.own_optimizers()  # a method may build its own networks here
        with _Counter() as counter:
            terms, student_taps, teacher_taps = step(batch)
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            method.after_step({name: tap.detach() for name, tap in student_taps.items()}, teacher_taps, batch)
    return counter.total


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's FLOP formulas over whatever runs inside.

    Not by its FlopCounterMode, which follows modules by hooks that a second derivative (a gradient penalty)
    does not survive, and which counts the backward pass of a grouped convolution as if it had one group.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
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
