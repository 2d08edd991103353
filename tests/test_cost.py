"""FLOPs of a training step against counts by hand, and the control that is trained for as many of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines.engine.cell import run_cell
from torch import nn

from pipelines import config
from pipelines.config import Network
from pipelines.engine.cost import step_flops
from pipelines.method import Distiller, MethodConfig
from pipelines.methods import checked, configured, method_class
from pipelines.networks import SegmentationNetwork, tap_shapes
from pipelines.runs.records import Cell

CLASSES, IGNORE = 5, 255
TRAINING = config.load().benchmarks["streets"].training.model_copy(update={"batch_size": 2, "crop": (32, 48)})


def network(encoder: str) -> SegmentationNetwork:
    return SegmentationNetwork(
        Network(architecture="PSPNet", encoder=encoder, output_stride=8, weights=None), CLASSES
    )


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
    assert step_flops(net, None, plain, CLASSES, IGNORE, TRAINING) == wanted


def test_kd_adds_the_forward_pass_of_its_teacher() -> None:
    student, teacher = network("tu-resnet18"), network("tu-resnet34").eval()
    kind = method_class("kd")
    values = {"weight": 1.0, "temperature": 1.0, "mask": "none"}
    shapes = [tap_shapes(net, TRAINING.crop) for net in (student, teacher)]
    kd = kind(kind.Config.model_validate(values), *shapes)
    alone = step_flops(student, None, Distiller(MethodConfig(), {}, {}), CLASSES, IGNORE, TRAINING)
    both = step_flops(student, teacher, kd, CLASSES, IGNORE, TRAINING)
    assert both - alone == sum(forward(teacher, False))


def test_counting_changes_nothing() -> None:
    params = checked(config.load())
    student, teacher = network("tu-resnet18"), network("tu-resnet18").eval()
    shapes = tap_shapes(student, TRAINING.crop)
    for key in ("skd", "acfd-full"):  # both have parameters of their own
        method = method_class(key)(configured(params, key), shapes, shapes)
        before = copy.deepcopy([part.state_dict() for part in (student, teacher, method)])
        state = torch.get_rng_state()
        first = step_flops(student, teacher, method, CLASSES, IGNORE, TRAINING)
        assert first == step_flops(student, teacher, method, CLASSES, IGNORE, TRAINING)
        assert torch.equal(state, torch.get_rng_state())
        for part, old in zip((student, teacher, method), before, strict=True):
            assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())
            assert all(parameter.grad is None for parameter in part.parameters())


def test_the_control_is_trained_for_the_compute_of_the_dearest(place: Path) -> None:
    params = checked(config.load(place / "params.yaml"))
    runs = {}
    for method in ("none", "none_matched", "cwd", "skd"):
        cell = Cell("streets", "pspnet-resnet18", method, 0)
        run_cell(cell, params, place)
        runs[method] = json.loads((cell.folder(place) / "run.json").read_text())
    steps = params.benchmark("streets").training.steps
    own = runs["none"]["compute"]["step_flops"]
    control = runs["none_matched"]
    assert control["compute"]["step_flops"] == own
    assert control["teacher"] is None
    dearest = control["compute"]["matched"]
    assert dearest in params.methods["none_matched"]["match"]
    for method in ("cwd", "skd"):
        assert runs[method]["steps"] == steps
        assert runs[method]["compute"]["matched"] is None
        assert own < runs[method]["compute"]["step_flops"]
        # within half a step of it, when it is the dearest
        assert control["compute"]["flops"] >= runs[method]["compute"]["flops"] - 0.5 * own
    assert control["steps"] > steps
    history = (place / "runs/streets/pspnet-resnet18/none_matched/0/history.csv").read_text().splitlines()
    last = dict(zip(history[0].split(","), history[-1].split(","), strict=True))
    assert int(last["step"]) == control["steps"]
    assert float(last["lr"]) < 0.2 * TRAINING.lr  # the decay is stretched, not cut off or run twice
