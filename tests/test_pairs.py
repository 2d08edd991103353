"""Every method on teacher → student pairs of the paper's scale, convolutional and transformer both ways:
two steps of the real loop, on tiny crops."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from suites import slow

from pipelines import config
from pipelines.config import ROOT, Network, Training
from pipelines.datasets.folder import Split
from pipelines.engine import train as engine
from pipelines.engine.teacher import state_sha256
from pipelines.engine.train import Trainee
from pipelines.method import Shapes
from pipelines.methods import method_class, method_config
from pipelines.networks import SegmentationNetwork, tap_shapes

pytestmark = slow
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
METHODS = {**PARAMS["methods"], "acfd-full": PARAMS["acfd"]["full"]}
TEACHERS = {
    "pspnet-resnet34": ("PSPNet", "tu-resnet34", 8),
    "pspnet-resnet101": ("PSPNet", "tu-resnet101", 8),
    "deeplabv3-resnet101": ("DeepLabV3", "tu-resnet101", 8),
    "segformer-b2": ("Segformer", "mit_b2", 32),
    "segformer-b4": ("Segformer", "mit_b4", 32),
    "fpn-efficientnet-lite2": ("FPN", "tu-tf_efficientnet_lite2", 32),
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


def trainee(key: str, pupil: str, teacher_shapes: Shapes, folder: Path) -> Trainee:
    """A copy of the student with a method of params.yaml."""
    network = copy.deepcopy(student(pupil))
    torch.manual_seed(2)
    method = method_class(key)(method_config(key, METHODS[key]), tap_shapes(network, CROP), teacher_shapes)
    return Trainee(
        label=key,
        student=network,
        method=method,
        training=training(),
        recipe=STUDENTS[pupil].recipe,
        seed=0,
        state_file=folder / f"{key}.pt",
        mark="",
        validate=lambda _: 0.0,
    )


def train(trainees: list[Trainee], taught: SegmentationNetwork | None) -> None:
    """Two steps of a pack. What stops a trainee is raised."""
    engine.train(trainees, taught, data(), CLASSES, IGNORE, lambda _: None)
    for one in trainees:
        if one.failure is not None:
            raise one.failure


def pairs() -> list[tuple[str, str]]:
    """Every teacher with two students, every student by one teacher at least."""
    distinct = dict[str, str]()  # weights make no other network
    for key, network in STUDENTS.items():
        distinct.setdefault(repr(network.model_copy(update={"weights": None})), key)
    pupils = list(distinct.values())
    return [(name, pupils[(i + j) % len(pupils)]) for i, name in enumerate(TEACHERS) for j in (0, 3)]


@pytest.mark.parametrize(("name", "pupil"), pairs())
def test_every_method_trains_a_student_by_a_teacher(tmp_path: Path, name: str, pupil: str) -> None:
    """Finite losses, a gradient in every parameter and a step of every weight; the teacher stays as it is."""
    taught, teacher_shapes = teacher(name)
    start = student(pupil).state_dict()
    state, recipe = state_sha256(taught), STUDENTS[pupil].recipe
    every = (trainee(key, pupil, teacher_shapes, tmp_path) for key in METHODS)
    first = name == next(iter(TEACHERS))  # without a teacher, once is enough
    pack = [one for one in every if one.method.teacher_taps or first]
    for some in (pack[:8], pack[8:16], pack[16:]):
        train(some, taught)
        for one in some:
            terms = set(one.history.rows[-1]) - {"step", "lr", "loss", "task", "auxiliary"}
            assert bool(terms) == bool(one.method.teacher_taps), one.label
            for part, parameter in [*one.student.named_parameters(), *one.method.named_parameters()]:
                assert parameter.grad is None or parameter.grad.isfinite().all(), (one.label, part)
            for part, parameter in one.student.named_parameters():
                if recipe and not recipe.auxiliary_weight and part.startswith("auxiliary."):
                    continue
                assert parameter.grad is not None, (one.label, part)
                assert not torch.equal(start[part], parameter), (one.label, part)
        some.clear()
    assert not taught.training and all(p.grad is None for p in taught.parameters())
    assert state_sha256(taught) == state
