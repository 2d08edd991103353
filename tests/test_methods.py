"""The contract, for every file in baselines/ and every variant of ACFD; and the doors between rooms.

A new baseline needs no line here: its file and its entry in params.yaml are picked up.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from acfd.losses import adaptive_feature_loss, channel_significance_loss, peak_class_weights
from baselines.cirkd import draw, enqueue
from baselines.cwd import cwd_loss
from baselines.mgd import random_keep
from pipelines.config import PAPER, ROOT, ConfigError
from pipelines.maps import labels_at, one_hot
from pipelines.method import AUXILIARY, TAPS, Batch, Distiller
from pipelines.methods import method_class, method_config

PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
VALUES: dict[str, dict[str, Any]] = {
    **PARAMS["methods"],
    **{f"{PAPER}-{variant}": values for variant, values in PARAMS[PAPER].items()},
}
# settings that params.yaml does not use, but a user may
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "kd, valid pixels": ("kd", {"mask": "valid", "temperature": 4.0}),
    "cwd on fusion": ("cwd", {"tap": "fusion"}),
    "cwd on backbone.4": ("cwd", {"tap": "backbone.4"}),
    "skd without critic": ("skd", {"weight_holistic": 0.0}),
    "skd, pair-wise alone": ("skd", {"weight_holistic": 0.0, "weight_pixel": 0.0}),
    "ickd on logits": ("ickd", {"tap": "logits"}),
    "apd without its views": ("apd", {"weight_view": 0.0, "weight_align": 0.0}),
    "apd, centres alone": ("apd", {"weight_view": 0.0, "weight_pixel": 0.0}),
    "dkd, other classes alone": ("dkd", {"weight_tckd": 0.0}),
    "attnfd, random gate": ("attnfd", {"teacher_gate": "random"}),
    "attnfd, learnt gate": ("attnfd", {"teacher_gate": "learnt"}),
    "aicsd by its code": ("aicsd", {"formula": "code", "weight_ics": 9500.0}),
    "dist within classes alone": ("dist", {"beta": 0.0, "weight_auxiliary": 0.0}),
    "at on stages": ("at", {"taps": ["backbone.2", "backbone.3", "backbone.4"]}),
    "mgd on fusion": ("mgd", {"tap": "fusion", "masked": 0.0}),
    "cirkd, the authors' queue": (
        "cirkd",
        {"pixels": "authors", "pixel_queue": 20, "region_queue": 3, "pool": 2, "weight_kd": 0.0},
    ),
    "cirkd, mini-batch alone": ("cirkd", {"weight_kd": 0.0, "weight_pixel": 0.0, "weight_region": 0.0}),
    "afdcd, its other projector": (
        "afdcd",
        {"mask": "center", "projector": "enhanced", "pool": 0, "groups": 2},
    ),
    "afdcd, contrast alone": ("afdcd", {"weight_kd": 0.0, "weight_fd": 0.0}),
    "dsd between classes alone": ("dsd", {"weight_psd": 0.0}),
    "acfd by 1x1 convolution": ("acfd-full", {"alignment": "conv1x1"}),
    "acfd without weights": ("acfd-full", {"redundancy_weighting": False, "class_weighting": "uniform"}),
    "acfd by votes": ("acfd-full", {"redundancy_weighting": "votes", "stages": [4], "grid": 3}),
}
# the method that the README adds, as a user would copy it
MINE = types.ModuleType("baselines.mymethod")
SNIPPET = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
exec(SNIPPET, vars(MINE))
sys.modules[MINE.__name__] = MINE
CASES = {
    **{key: (key, VALUES[key]) for key in VALUES},
    "the README's": ("mymethod", {"weight": 0.1}),
    **{n: (k, VALUES[k] | v) for n, (k, v) in EXTRA.items()},
}

CROP, CLASSES, IGNORE = (64, 96), 5, 255
ODD = (56, 88)  # a crop whose maps have odd sizes
# widths of the backbone's stages, their strides, width of the fusion map, stride of fusion and logits
NETWORKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "resnet50": ((256, 512, 1024, 2048), (4, 8, 8, 8), 512, 8),
    "resnet18": ((64, 128, 256, 512), (4, 8, 8, 8), 512, 8),
    "mobilenetv2": ((24, 32, 96, 320), (4, 8, 16, 32), 256, 32),
    "segformer-b0": ((32, 64, 160, 256), (4, 8, 16, 32), 256, 4),
    "small": ((6, 8, 10, 12), (4, 8, 16, 16), 9, 16),
    "smaller": ((4, 6, 8, 10), (4, 8, 16, 32), 7, 16),
    "headless": ((4, 6, 8, 11), (4, 8, 16, 16), 7, 32),
}
PAIRS = [("resnet50", "resnet18"), ("resnet50", "mobilenetv2"), ("segformer-b0", "resnet18")]
HEADLESS = ("mobilenetv2", "segformer-b0", "headless")  # without an auxiliary head
SMALL = ("small", "smaller")  # teacher, student, where the widths do not matter

every_case = pytest.mark.parametrize("case", CASES)
every_key = pytest.mark.parametrize("key", VALUES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def features(network: str, seed: int, images: int = 2, crop: tuple[int, int] = CROP) -> dict[str, Tensor]:
    """Random taps as a network with ReLUs would give them."""
    widths, strides, fusion, stride = NETWORKS[network]
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, step: int) -> Tensor:
        return torch.randn(images, channels, crop[0] // step, crop[1] // step, generator=generator)

    taps = {f"backbone.{i}": draw(*at).relu() for i, at in enumerate(zip(widths, strides, strict=True), 1)}
    taps |= {"fusion": draw(fusion, stride).relu(), "logits": 2 * draw(CLASSES, stride)}
    return taps if network in HEADLESS else taps | {AUXILIARY: 2 * draw(CLASSES, strides[2])}


def batch(images: int = 2, crop: tuple[int, int] = CROP) -> Batch:
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, CLASSES, (images, *crop), generator=generator)
    labels[:, :8] = IGNORE
    return Batch(torch.randn(images, 3, *crop, generator=generator), labels, CLASSES, IGNORE)


def shapes(taps: Mapping[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    return {name: (x.shape[1], x.shape[2], x.shape[3]) for name, x in taps.items()}


class Scene:
    """A method with the taps that it asks for, the student's requiring gradients."""

    def __init__(
        self, case: str, pair: tuple[str, str] = SMALL, images: int = 2, crop: tuple[int, int] = CROP
    ) -> None:
        key, values = CASES[case]
        teacher, student = features(pair[0], 0, images, crop), features(pair[1], 1, images, crop)
        torch.manual_seed(0)
        self.method = method_class(key)(method_config(key, values), shapes(student), shapes(teacher))
        self.student = {name: student[name].requires_grad_() for name in self.method.student_taps}
        self.teacher = {name: teacher[name] for name in self.method.teacher_taps}
        self.batch = batch(images, crop)
        self.state = {name: x.clone() for name, x in self.method.named_buffers()}

    def terms(self) -> dict[str, Tensor]:
        """The terms of the first step, at every call: the same draws, and the state before it."""
        torch.manual_seed(1)
        for name, x in self.method.named_buffers():
            x.copy_(self.state[name])
        return self.method.losses(self.student, self.teacher, self.batch)

    def after_step(self) -> dict[str, Tensor]:
        torch.manual_seed(2)
        detached = {name: x.detach() for name, x in self.student.items()}
        return self.method.after_step(detached, self.teacher, self.batch)

    @property
    def own(self) -> list[nn.Parameter]:
        return [
            p
            for o in self.method.own_optimizers().values()
            for group in o.param_groups
            for p in group["params"]
        ]

    @property
    def rest(self) -> dict[str, nn.Parameter]:
        own = {id(p) for p in self.own}
        return {name: p for name, p in self.method.named_parameters() if id(p) not in own}


# --- files, names and hyper-parameters ---


def test_every_baseline_has_an_entry() -> None:
    files = {p.stem for p in (ROOT / "baselines").glob("[a-z]*.py")}
    assert files == set(PARAMS["methods"]), (
        "each file in baselines/ needs an entry `methods.<key>` and vice versa"
    )


def test_an_unknown_method_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"cwd, .*kd, .*none"):
        method_config("kdd", {})


@every_key
def test_hyper_parameters_have_no_defaults(key: str) -> None:
    for name, field in method_class(key).Config.model_fields.items():
        assert field.is_required(), f"{name}: values that move a score live in params.yaml alone"


@every_key
def test_a_misspelt_or_missing_hyper_parameter_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=r"wieght is not a known setting"):
        method_config(key, VALUES[key] | {"wieght": 1.0})
    for name in VALUES[key]:
        with pytest.raises(ConfigError, match=rf"\b{name} is missing"):
            method_config(key, {k: v for k, v in VALUES[key].items() if k != name})


def numeric(key: str) -> list[str]:
    return [name for name, value in VALUES[key].items() if type(value) in (int, float)]


@pytest.mark.parametrize(("key", "name"), [(key, name) for key in VALUES for name in numeric(key)])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", None])
def test_a_number_out_of_range_is_named(key: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"\b{name} = .* is not allowed"):
        method_config(key, VALUES[key] | {name: value})


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("kd", "temperature", 0.0),
        ("kd", "mask", "some"),
        ("skd", "scale", 0.0),
        ("skd", "scale", 1.5),
        ("skd", "critic_lr", 0.0),
        ("cwd", "tau", 0.0),
        ("cwd", "tap", "backbone.5"),
        ("dist", "beta", -0.1),
        ("ifvd", "tap", "logits"),
        ("at", "taps", []),
        ("at", "taps", ["fusion", "fusion"]),
        ("mgd", "masked", 1.0),
        ("cirkd", "temperature", 0.0),
        ("cirkd", "pixel_queue", 0),
        ("cirkd", "pool", 0),
        ("cirkd", "pixels", "mine"),
        ("afdcd", "groups", 1),
        ("afdcd", "patch", 0),
        ("afdcd", "mask", "none"),
        ("dsd", "tau", 0.0),
        ("acfd-full", "grid", 0),
        ("acfd-full", "grid", 2.5),
        ("acfd-full", "dimension", 0),
        ("acfd-full", "attention_tau", 0.0),
        ("acfd-full", "csd_tau", 0.0),
        ("acfd-full", "stages", []),
        ("acfd-full", "stages", [0]),
        ("acfd-full", "stages", [5]),
        ("acfd-full", "stages", [3, 3]),
        ("acfd-full", "alignment", "linear"),
        ("acfd-full", "redundancy_weighting", "perhaps"),
        ("acfd-full", "class_weighting", "mean"),
    ],
)
def test_bounds_and_choices(key: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"\b{name}\b.* is not allowed"):
        method_config(key, VALUES[key] | {name: value})


def test_acfd_without_any_weight_is_refused() -> None:
    nothing = {"weight_afd": 0.0, "weight_ccd": 0.0, "weight_csd": 0.0}
    with pytest.raises(ConfigError, match=r"acfd\.full .*at least one of weight_afd"):
        method_config("acfd-full", VALUES["acfd-full"] | nothing)


# --- the contract ---


@every_case
def test_terms_are_scalars_with_a_gradient(case: str) -> None:
    scene = Scene(case)
    for name, term in scene.terms().items():
        assert term.dtype == torch.float32 and term.shape == () and term.isfinite(), name
        assert term.requires_grad, name


@every_case
def test_every_tap_that_is_asked_for_is_used(case: str) -> None:
    scene = Scene(case)
    assert set(scene.student) <= set(TAPS) and set(scene.teacher) <= set(TAPS)
    if scene.student:
        sum(scene.terms().values(), torch.zeros(())).backward()
    for name, tap in scene.student.items():
        assert tap.grad is not None and tap.grad.isfinite().all() and tap.grad.abs().max() > 0, name


@every_case
def test_no_gradient_reaches_the_teacher(case: str) -> None:
    scene = Scene(case)
    scene.teacher = {name: tap.requires_grad_() for name, tap in scene.teacher.items()}
    for term in scene.terms().values():
        term.backward(retain_graph=True)
    scene.after_step()
    assert all(tap.grad is None for tap in scene.teacher.values())


@every_case
def test_every_parameter_gets_a_gradient_or_has_its_own_optimiser(case: str) -> None:
    scene = Scene(case)
    terms = scene.terms()
    if terms:
        torch.stack(list(terms.values())).sum().backward()
    for name, parameter in scene.rest.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for parameter in scene.own:
        assert parameter.grad is None, "the student's update left a gradient in what is trained elsewhere"


@every_case
def test_own_optimisers(case: str) -> None:
    """The same objects at every call, over the method's own parameters, each once."""
    scene = Scene(case)
    first, again = scene.method.own_optimizers(), scene.method.own_optimizers()
    assert first.keys() == again.keys() and all(first[name] is again[name] for name in first)
    own = [id(p) for p in scene.own]
    assert len(own) == len(set(own)) and set(own) <= {id(p) for p in scene.method.parameters()}


@every_case
def test_after_step_changes_its_own_parameters_alone(case: str) -> None:
    scene = Scene(case)
    terms = scene.terms()
    if terms:
        torch.stack(list(terms.values())).sum().backward()
    rest, own = ([p.detach().clone() for p in ps] for ps in (scene.rest.values(), scene.own))
    gradients = [p.grad.clone() for p in scene.rest.values() if p.grad is not None]
    taps = {name: x.detach().clone() for name, x in (scene.student | scene.teacher).items()}
    logged = scene.after_step()
    assert not set(logged) & set(terms), "a logged value may not share its name with a term"
    assert all(
        value.isfinite() and value.numel() == 1 and not value.requires_grad for value in logged.values()
    )
    assert all(torch.equal(old, new) for old, new in zip(rest, scene.rest.values(), strict=True))
    assert all(torch.equal(old, p.grad) for old, p in zip(gradients, scene.rest.values(), strict=True))  # type: ignore[arg-type]
    assert all(torch.equal(taps[name], x) for name, x in (scene.student | scene.teacher).items())
    assert all(not torch.equal(old, new) for old, new in zip(own, scene.own, strict=True))


@every_case
def test_a_step_against_its_gradient_lowers_each_term(case: str) -> None:
    """On the student's taps and the adapters; what has its own optimiser (a critic) stands still."""
    scene = Scene(case)
    for name in scene.terms():
        before = scene.terms()[name]
        leaves = [*scene.student.values(), *scene.rest.values()]
        gradients = torch.autograd.grad(before, leaves, allow_unused=True)
        length = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        assert length > 0, name
        size = 1e-3 * torch.stack([x.detach().norm() for x in leaves]).norm()
        moved = [
            x - size * g / length if g is not None else x for x, g in zip(leaves, gradients, strict=True)
        ]
        old = [x.detach().clone() for x in leaves]
        with torch.no_grad():
            for x, new in zip(leaves, moved, strict=True):
                x.copy_(new)
            assert scene.terms()[name] < before, name
            for x, back in zip(leaves, old, strict=True):
                x.copy_(back)


@every_case
def test_the_same_draw_gives_the_same_terms(case: str) -> None:
    first, second = Scene(case).terms(), Scene(case).terms()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_case
def test_a_batch_without_labels_is_survived(case: str) -> None:
    scene = Scene(case)
    scene.batch.labels.fill_(IGNORE)
    for term in scene.terms().values():
        term.backward(retain_graph=True)
        assert term.isfinite()
    assert all(value.isfinite() for value in scene.after_step().values())
    assert all(tap.grad is None or tap.grad.isfinite().all() for tap in scene.student.values())


def survived(scene: Scene) -> None:
    """Finite terms in float32, and finite gradients; taps of any size have one."""
    terms = scene.terms()
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.isfinite(), name
    if terms:
        torch.stack(list(terms.values())).sum().backward()
    assert all(value.isfinite() for value in scene.after_step().values())
    for name, leaf in {**scene.student, **scene.rest}.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all(), name


@every_case
def test_a_class_that_is_absent_is_survived(case: str) -> None:
    scene = Scene(case)
    scene.batch.labels[scene.batch.labels == 2] = 3
    survived(scene)


@every_case
@pytest.mark.parametrize("pair", [("headless", "smaller"), ("small", "headless")], ids="-to-".join)
def test_one_image_of_one_class_on_odd_maps_is_survived(case: str, pair: tuple[str, str]) -> None:
    """Maps of 3 x 5 and 1 x 2 against each other, other widths, and an auxiliary head on one side alone."""
    scene = Scene(case, pair, images=1, crop=ODD)
    scene.batch.labels.fill_(2)
    survived(scene)


@every_case
def test_networks_in_bf16_are_survived(case: str) -> None:
    """Taps come from autocast; the engine casts them to float32 and runs the method outside of it."""
    scene = Scene(case)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for tap in (*scene.student.values(), *scene.teacher.values()):
            tap.copy_(tap.bfloat16().float())
    survived(scene)


@every_case
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_dead_or_exploded_student_gives_finite_gradients(case: str, value: float) -> None:
    scene = Scene(case)
    for tap in scene.student.values():
        tap.data.fill_(value) if value < 1 else tap.data.mul_(value)
    for name, term in scene.terms().items():
        term.backward(retain_graph=True)
        assert term.isfinite(), name
    leaves = [*scene.student.values(), *scene.rest.values()]
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)


@every_case
def test_state_survives_saving(case: str) -> None:
    """What the engine keeps for a resume: the same next step from a saved method and its optimisers."""
    scene, other = Scene(case), Scene(case)
    scene.after_step()
    other.method.load_state_dict(scene.method.state_dict())
    for name, optimizer in other.method.own_optimizers().items():
        optimizer.load_state_dict(deepcopy(scene.method.own_optimizers()[name].state_dict()))
    first, second = scene.after_step(), other.after_step()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    state = other.method.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in scene.method.state_dict().items())


@cache
def wide(pair: tuple[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return features(pair[0], 0, images=1), features(pair[1], 1, images=1)


# variants of ACFD do here what `full` does, the 1x1 alignment is the other path; Af-DCD's generator for 2048
# channels takes seconds
WIDE = [
    case
    for case in CASES
    if not (CASES[case][0].startswith(f"{PAPER}-") or case.startswith("afdcd,"))
    or case in ("acfd-full", "acfd by 1x1 convolution")
]


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
@pytest.mark.parametrize("case", WIDE)
def test_any_pair_of_backbones(case: str, pair: tuple[str, str]) -> None:
    """Real widths and strides: ResNets at stride 8, MobileNetV2 undilated, SegFormer logits at stride 4."""
    key, values = CASES[case]
    teacher, student = wide(pair)
    method = method_class(key)(method_config(key, values), shapes(student), shapes(teacher))
    own = {id(p) for o in method.own_optimizers().values() for g in o.param_groups for p in g["params"]}
    taps = {name: student[name].clone().requires_grad_() for name in method.student_taps}
    terms = method.losses(taps, {name: teacher[name] for name in method.teacher_taps}, batch(1))
    for term in terms.values():
        term.backward(retain_graph=True)
        assert term.isfinite()
    assert all(tap.grad is not None for tap in taps.values())
    assert all(p.grad is not None for p in method.parameters() if id(p) not in own)


# --- single methods ---


def test_none_does_nothing() -> None:
    scene = Scene("none")
    assert scene.terms() == {} and scene.method.teacher_taps == () and not list(scene.method.parameters())


@every_case
def test_weights_scale_their_terms(case: str) -> None:
    key, values = CASES[case]
    weights = [name for name in values if name == "weight" or name.startswith("weight_")]
    before = Scene(case).terms()
    CASES["scaled"] = (key, values | {name: 3 * values[name] for name in weights})
    try:
        after = Scene("scaled").terms()
    finally:
        del CASES["scaled"]
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], 3 * before[name])


def test_a_missing_auxiliary_head_is_told() -> None:
    for key, rest in (("dist", ("logits",)), ("dsd", ("fusion", "logits"))):
        for pair in (("headless", "small"), ("small", "headless")):
            method = Scene(key, pair).method
            assert method.left_out == (AUXILIARY,) and method.student_taps == method.teacher_taps == rest
        assert Scene(key).method.left_out == () and AUXILIARY in Scene(key).method.teacher_taps


ZERO = ("dist", "ifvd", "at", "fitnet", "mgd", "cirkd", "afdcd", "dsd")


@pytest.mark.parametrize("key", ZERO)
def test_a_term_without_weight_leaves_nothing_behind(key: str) -> None:
    weights = [name for name in VALUES[key] if name == "weight" or name.startswith("weight_")]
    CASES["nothing"] = (key, VALUES[key] | dict.fromkeys(weights, 0.0))
    try:
        scene = Scene("nothing")
    finally:
        del CASES["nothing"]
    assert scene.terms() == {} and scene.method.student_taps == scene.method.teacher_taps == ()
    assert not scene.method.state_dict()


def test_fitnet_and_mgd_adapt_the_width_where_they_must() -> None:
    equal = ("resnet50", "resnet18")  # on fusion
    assert [tuple(p.shape) for p in Scene("fitnet", equal).method.parameters()] == [(512, 512, 1, 1)]
    assert not list(Scene("mgd on fusion", equal).method.align.parameters())  # type: ignore[union-attr, operator]
    assert list(Scene("mgd on fusion").method.align.parameters())  # type: ignore[union-attr, operator]


def test_mgd_masks_the_share_that_it_is_told() -> None:
    keep = random_keep(torch.zeros(4, 6, 50, 50), 0.75)
    assert keep.shape == (4, 1, 50, 50) and keep.mean().item() == pytest.approx(0.25, abs=0.02)
    assert random_keep(torch.zeros(2, 6, 5, 5), 0.0).all()


def test_cirkd_keeps_pixels_of_their_own_class() -> None:
    """Features that name their class: in the ring every entry that was written is of its class; as the
    authors choose them, some are not. The state moves on with each step."""
    for case, own in (("cirkd", True), ("cirkd, the authors' queue", False)):
        scene = Scene(case)
        labels = labels_at(scene.batch.labels, (4, 6))
        vectors = one_hot(labels, 9).reshape(2, 9, 4, 6)  # the width of the teacher's map
        method: Any = scene.method
        before = method.pixel_queue.clone()
        method.remember(vectors, labels)
        written = (method.pixel_queue != before).any(dim=2)
        assert torch.equal(method.pixel_pointer, written.sum(dim=1)) and written.any(dim=1).all()
        of = method.pixel_queue.argmax(dim=2) == torch.arange(CLASSES).unsqueeze(1)
        right = of | (method.pixel_queue.abs().sum(dim=2) == 0)  # an unlabelled pixel has no direction
        assert right[written].all() == own
        regions = method.region_queue[:, 0].argmax(dim=1)
        assert torch.equal(regions, torch.arange(CLASSES)) and (method.region_pointer == 2).all()


def test_cirkd_goes_around_its_queue() -> None:
    """A ring takes up at the start what passes its end; the authors' way overwrites the last entries."""
    entries = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    for ring, expected, then in ((True, [2, 3, 0, 0, 1], 2), (False, [0, 0, 1, 2, 3], 0)):
        queue, pointer = torch.zeros(1, 5, 1), torch.tensor([4])
        enqueue(queue, pointer, entries, torch.tensor([[3]]), ring)
        assert queue.flatten().tolist() == expected and pointer.tolist() == [then]


def test_cirkd_draws_distinct_positions_that_are_eligible() -> None:
    eligible = torch.rand(3, 4, 30, generator=torch.Generator().manual_seed(0)) > 0.7
    positions, count = draw(eligible, 6)
    assert torch.equal(count, eligible.sum(dim=2).clamp(max=6))
    for index in np.ndindex(3, 4):
        chosen = positions[index][: int(count[index])]
        assert eligible[index][chosen].all() and len(set(chosen.tolist())) == len(chosen)


def test_kd_leaves_out_unlabelled_pixels() -> None:
    everywhere, labelled = Scene("kd"), Scene("kd, valid pixels")
    for scene in (everywhere, labelled):
        scene.terms()["kd"].backward()
    unlabelled = ~labelled.batch.valid((4, 6))
    assert 0 < unlabelled.sum() < unlabelled.numel()
    gradients = [scene.student["logits"].grad for scene in (everywhere, labelled)]
    assert all(g is not None for g in gradients)
    silent = [g.abs().sum(dim=1) == 0 for g in gradients if g is not None]
    assert not silent[0].any() and torch.equal(silent[1], unlabelled)


def test_cwd_adapts_the_width_where_it_must() -> None:
    assert not list(Scene("cwd").method.parameters())
    adapted = Scene("cwd on fusion")
    assert [tuple(p.shape) for p in adapted.method.parameters()] == [(9, 7, 1, 1)]
    assert not list(Scene("cwd on fusion", ("resnet50", "resnet18")).method.parameters())


def test_skd_critic_raises_its_own_objective() -> None:
    """On one batch: score(teacher) - score(student) - weight * penalty goes up as the critic trains."""
    scene = Scene("skd")
    weight = scene.method.config.gradient_penalty  # type: ignore[attr-defined]

    # draws the same mixture each time, and logs the state before its update
    logged = [scene.after_step() for _ in range(30)]
    values = [float(now["critic_gap"] - weight * now["critic_penalty"]) for now in logged]
    assert values[-1] > values[1] > values[0]
    assert logged[-1]["critic_gap"] > logged[1]["critic_gap"] > logged[0]["critic_gap"]


def test_skd_student_is_pulled_towards_the_critic() -> None:
    scene = Scene("skd")
    for _ in range(30):
        gap = scene.after_step()["critic_gap"]
    weight = scene.method.config.weight_holistic  # type: ignore[attr-defined]
    apart = scene.terms()["holistic"]
    scene.student["logits"] = scene.teacher["logits"].clone().requires_grad_()
    together = scene.terms()["holistic"]
    assert gap > 0 and together < apart
    # the term is minus the mean score, so that its drop is the critic's gap
    assert (apart - together).item() == pytest.approx(weight * scene_gap(scene, apart), rel=0.2)


def scene_gap(scene: Scene, apart: Tensor) -> float:
    """The critic's gap between teacher and the student of ``Scene('skd')``, from its own forward pass."""
    fresh = Scene("skd")
    fresh.method.load_state_dict(scene.method.state_dict())
    return float(fresh.after_step()["critic_gap"])


def test_skd_builds_what_its_weights_ask_for() -> None:
    assert Scene("skd without critic").method.own_optimizers() == {}
    assert not list(Scene("skd without critic").method.parameters())
    assert Scene("skd, pair-wise alone").method.student_taps == ("fusion",)


@pytest.mark.parametrize("variant", PARAMS[PAPER])
def test_acfd_variants_compute_what_their_weights_ask_for(variant: str) -> None:
    scene = Scene(f"{PAPER}-{variant}")
    config: Any = scene.method.config
    wanted = {part for part in ("afd", "ccd", "csd") if getattr(config, f"weight_{part}") > 0}
    assert set(scene.terms()) == wanted
    assert wanted == ({"afd", "ccd", "csd"} if variant == "full" else set(variant.split("-")))
    stages = [f"backbone.{stage}" for stage in config.stages] if "afd" in wanted else []
    rest = (["fusion"] if "ccd" in wanted else []) + (["logits"] if "csd" in wanted else [])
    assert list(scene.method.student_taps) == stages + rest
    names = {name.split(".")[0] for name, _ in scene.method.named_parameters()}
    adapters = {"afd": "aligners", "ccd": "fusion_adapter"}
    assert names == {adapters[part] for part in wanted if part in adapters}


def test_acfd_terms_are_the_losses_of_the_paper() -> None:
    """Which tap meets which loss, with which settings; the learned attention starts as plain similarity."""
    scene = Scene("acfd-full")
    terms, config = scene.terms(), VALUES["acfd-full"]
    stages = [
        adaptive_feature_loss(scene.student[tap], scene.teacher[tap], config["grid"], config["attention_tau"])
        for tap in ("backbone.2", "backbone.3", "backbone.4")
    ]
    torch.testing.assert_close(terms["afd"], config["weight_afd"] * torch.stack(stages).mean())
    logits = scene.student["logits"], scene.teacher["logits"]
    csd = channel_significance_loss(*logits, config["csd_tau"], peak_class_weights(logits[1]))
    torch.testing.assert_close(terms["csd"], config["weight_csd"] * csd)
    uniform = Scene("acfd without weights").terms()["csd"]
    assert torch.equal(uniform, config["weight_csd"] * cwd_loss(*logits, config["csd_tau"]))


def test_acfd_attention_learns() -> None:
    """Plain gradient descent on Q and K alone lowers AFD, and both move."""
    scene = Scene("acfd-afd")
    parameters = list(scene.method.parameters())
    old = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = scene.terms()["afd"]
        values.append(loss.item())
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0]
    assert all(not torch.equal(a, b) for a, b in zip(old, parameters, strict=True))


# --- doors ---

STANDARD = set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
    return found


def strangers(path: Path, allowed: set[str]) -> set[str]:
    """Imports neither of the standard library nor ``allowed`` (a module, or a package by its first name)."""
    return {name for name in imports(path) if not {name, name.split(".")[0]} & (STANDARD | allowed)}


@pytest.mark.parametrize("path", sorted((ROOT / "baselines").glob("*.py")), ids=lambda p: p.name)
def test_doors_of_baselines(path: Path) -> None:
    assert not strangers(path, {"torch", "pydantic", "pipelines.maps", "pipelines.method"})


def test_doors_of_acfd() -> None:
    assert not strangers(ROOT / PAPER / "losses.py", {"torch"})
    assert not strangers(
        ROOT / PAPER / "method.py",
        {"torch", "pydantic", "pipelines.maps", "pipelines.method", f"{PAPER}.losses"},
    )
    assert {p.name for p in (ROOT / PAPER).glob("*.py")} == {"__init__.py", "losses.py", "method.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda p: p.name)
def test_pipelines_import_no_method(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in ("baselines", PAPER)}


def test_the_door_check_sees_a_stranger(tmp_path: Path) -> None:
    """The check itself: a baseline that reaches into the engine or into another baseline is caught."""
    file = tmp_path / "rival.py"
    file.write_text(
        "import math, numpy\nfrom pipelines.engine import fit\nfrom baselines.kd import kd_loss\n"
    )
    assert strangers(file, {"torch", "pydantic", "pipelines.maps", "pipelines.method"}) == {
        "numpy",
        "pipelines.engine",
        "baselines.kd",
    }


def test_a_distiller_alone_is_the_undistilled_student() -> None:
    bare = Distiller(Distiller.Config(), {}, {})
    assert (
        bare.losses({}, {}, batch()) == {}
        and bare.own_optimizers() == {}
        and bare.after_step({}, {}, batch()) == {}
    )
