"""Every method on every teacher → student pair of the paper's scale, convolutional and transformer both ways:
two steps of the real loop, on tiny crops."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines.engine.fit import fit

from pipelines import config
from pipelines.config import ROOT, Network, Training
from pipelines.datasets.folder import Split
from pipelines.methods import method_class, method_config
from pipelines.networks import SegmentationNetwork, tap_shapes

PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
METHODS = {**PARAMS["methods"], "acfd-full": PARAMS["acfd"]["full"]}
TEACHERS = {
    "pspnet-resnet101": ("PSPNet", "tu-resnet101", 8),
    "deeplabv3-resnet101": ("DeepLabV3", "tu-resnet101", 8),
    "segformer-b2": ("Segformer", "mit_b2", 32),
    "segformer-b4": ("Segformer", "mit_b4", 32),
}
STUDENTS = config.load().students
CLASSES, IGNORE, CROP = 5, 255, (32, 64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache(maxsize=1)  # the tests go teacher by teacher
def teacher(name: str) -> tuple[SegmentationNetwork, dict[str, tuple[int, int, int]]]:
    architecture, encoder, stride = TEACHERS[name]
    torch.manual_seed(0)
    network = SegmentationNetwork(
        Network(architecture=architecture, encoder=encoder, output_stride=stride, weights=None), CLASSES
    )
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return network, tap_shapes(network, CROP)


def data() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, *CROP), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (4, *CROP), generator=generator, dtype=torch.uint8)
    labels[:, :3] = IGNORE
    return Split(images, labels, list("abcd"))


def training() -> Training:
    values = PARAMS["benchmarks"]["streets"]["training"]
    changes = {"steps": 2, "batch_size": 2, "crop": CROP, "warmup_steps": 0, "validate_every": 2}
    return Training.model_validate(values | changes)


@lru_cache
def student(name: str) -> SegmentationNetwork:
    torch.manual_seed(1)
    return SegmentationNetwork(STUDENTS[name], CLASSES)


@pytest.mark.parametrize("pupil", STUDENTS)
@pytest.mark.parametrize("name", TEACHERS)
def test_every_method_trains_every_student_by_every_teacher(tmp_path: Path, name: str, pupil: str) -> None:
    """Finite losses, a gradient in every parameter and a step of every weight; the teacher stays as it is."""
    (taught, teacher_shapes), network = teacher(name), student(pupil)
    shapes, start = tap_shapes(network, CROP), {k: v.clone() for k, v in network.state_dict().items()}
    for key, values in METHODS.items():
        network.load_state_dict(start)
        method = method_class(key)(method_config(key, values), shapes, teacher_shapes)
        if not method.teacher_taps and name != next(iter(TEACHERS)):
            continue  # it has been trained, without any teacher
        history = fit(
            network,
            taught if method.teacher_taps else None,
            method,
            data(),
            CLASSES,
            IGNORE,
            training(),
            STUDENTS[pupil].recipe,
            0,
            lambda: 0.0,
            tmp_path / f"{key}.pt",
            "",
            key,
        )
        terms = set(history.rows[-1]) - {"step", "lr", "loss", "task", "auxiliary"}
        assert bool(terms) == bool(method.teacher_taps), key
        for part, parameter in [*network.named_parameters(), *method.named_parameters()]:
            assert parameter.grad is None or parameter.grad.isfinite().all(), (key, part)
        recipe = STUDENTS[pupil].recipe
        for part, parameter in network.named_parameters():
            if recipe and not recipe.auxiliary_weight and part.startswith("auxiliary."):
                continue
            assert parameter.grad is not None and not torch.equal(start[part], parameter), (key, part)
    assert not taught.training and all(p.grad is None for p in taught.parameters())
    network.load_state_dict(start)
