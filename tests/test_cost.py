"""Operations and memory of a training step against counts by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipelines import config
from pipelines.config import Network, Recipe
from pipelines.engine.cost import _KNOWN, step_cost
from pipelines.method import Distiller, MethodConfig
from pipelines.methods import checked, configured, method_class
from pipelines.networks import SegmentationNetwork, tap_shapes

CLASSES = 5
TRAINING = config.load().benchmarks["streets"].training.model_copy(update={"batch_size": 2, "crop": (32, 48)})


def network(encoder: str) -> SegmentationNetwork:
    return SegmentationNetwork(
        Network(architecture="PSPNet", encoder=encoder, output_stride=8, weights=None), CLASSES
    )


def flops(student: SegmentationNetwork, teacher: SegmentationNetwork | None, method: Distiller) -> int:
    return step_cost(student, teacher, method, CLASSES, TRAINING, None).flops


def forward(net: SegmentationNetwork, mode: bool) -> list[int]:
    """2 × multiply-adds of every convolution in the order they run, by its definition."""
    found: list[int] = []

    def count(layer: nn.Conv2d, _: Any, out: torch.Tensor) -> None:
        per_output = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
        found.append(2 * out.numel() * per_output)

    net = copy.deepcopy(net).train(mode)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        net(torch.randn(TRAINING.batch_size, 3, *TRAINING.crop))
    return found


@pytest.mark.parametrize("encoder", ["tu-resnet18", "tu-mobilenetv2_100"])  # the latter has grouped ones
def test_a_step_of_the_student_is_three_times_its_forward_pass(encoder: str) -> None:
    net = network(encoder)
    by_layer = forward(net, True)
    plain = Distiller(MethodConfig(), {}, {})
    # forward, gradient of the weights, gradient of the input, which the images do not need
    wanted = 3 * sum(by_layer) - by_layer[0]
    assert flops(net, None, plain) == wanted


def test_kd_adds_the_forward_pass_of_its_teacher() -> None:
    student, teacher = network("tu-resnet18"), network("tu-resnet34").eval()
    kind = method_class("kd")
    values = {"weight": 1.0, "temperature": 1.0, "mask": "none"}
    shapes = [tap_shapes(net, TRAINING.crop) for net in (student, teacher)]
    kd = kind(kind.Config.model_validate(values), *shapes)
    alone = flops(student, None, Distiller(MethodConfig(), {}, {}))
    both = flops(student, teacher, kd)
    assert both - alone == sum(forward(teacher, False))


def test_counting_changes_nothing() -> None:
    params = checked(config.load())
    student, teacher = network("tu-resnet18"), network("tu-resnet18").eval()
    shapes = tap_shapes(student, TRAINING.crop)
    for key in ("skd", "acfd-full"):  # both have parameters of their own
        method = method_class(key)(configured(params, key), shapes, shapes)
        before = copy.deepcopy([part.state_dict() for part in (student, teacher, method)])
        state = torch.get_rng_state()
        first = flops(student, teacher, method)
        _KNOWN.clear()
        assert first == flops(student, teacher, method)
        assert torch.equal(state, torch.get_rng_state())
        for part, old in zip((student, teacher, method), before, strict=True):
            assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())
            assert all(parameter.grad is None for parameter in part.parameters())


def test_the_layers_count_not_the_shapes_of_their_weights_alone() -> None:
    """The same weights at another stride are another network, with a count of its own."""
    nothing = Distiller(MethodConfig(), {}, {})
    entry = Network(architecture="PSPNet", encoder="tu-resnet18", output_stride=8, weights=None)
    fine, coarse = (
        SegmentationNetwork(entry.model_copy(update={"output_stride": stride}), CLASSES) for stride in (8, 16)
    )
    assert {k: v.shape for k, v in fine.state_dict().items()} == {
        k: v.shape for k, v in coarse.state_dict().items()
    }
    costs = [step_cost(net, None, nothing, CLASSES, TRAINING, None) for net in (fine, coarse)]
    assert costs[0].flops > 1.3 * costs[1].flops and costs[0].memory_mb > costs[1].memory_mb


class Wide(Distiller):
    """Keeps a map of known size for the backward pass."""

    student_taps = ("logits",)
    teacher_taps = ("logits",)

    def losses(self, student: Any, teacher: Any, batch: Any) -> dict[str, torch.Tensor]:
        wide = student["logits"].mean() * torch.ones(2**20)
        return {"wide": (wide * wide).mean()}


def test_memory_is_what_a_step_alone_keeps() -> None:
    student, teacher = network("tu-test_resnet"), network("tu-resnet18").eval()
    nothing, wide = Distiller(MethodConfig(), {}, {}), Wide(MethodConfig(), {}, {})
    adam = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.0, auxiliary_weight=0.4)

    def memory(method: Distiller, recipe: Recipe | None = None, size: int = 2) -> float:
        training = TRAINING.model_copy(update={"batch_size": size})
        taught = teacher if method.teacher_taps else None
        return step_cost(student, taught, method, CLASSES, training, recipe).memory_mb

    def size(net: nn.Module) -> float:
        return sum(4 * p.numel() for p in net.parameters()) / 2**20

    # weights, gradients, momentum; a second moment
    assert memory(nothing) > 3 * size(student)
    assert memory(nothing, adam) - memory(nothing) == pytest.approx(size(student))
    # the activations alone grow with the batch
    grown = memory(nothing, size=4) - memory(nothing)
    assert memory(nothing, size=6) - memory(nothing) == pytest.approx(2 * grown, rel=0.01)
    # the teacher's weights, the map of 4 MB and the ones that it is made of; all taps are small
    assert memory(wide) - memory(nothing) == pytest.approx(size(teacher) + 8, rel=0.01)
