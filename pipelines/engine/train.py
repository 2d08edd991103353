"""The only training loop: it trains a pack, trainee after trainee on the same batch and teacher.

A batch is a pure function of data, seed and step, and the teacher is frozen, so that all trainees of a pack
see what each would see alone: the outcome of one does not depend on its company, bit for bit on the CPU.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from pipelines.config import ConfigError, Recipe, Training
from pipelines.datasets.folder import Split, Stream
from pipelines.datasets.transforms import training_batches
from pipelines.engine import checkpoint, strict
from pipelines.engine.seeds import derive
from pipelines.method import AUXILIARY, Batch, Distiller, Taps
from pipelines.methods import reason
from pipelines.networks import SegmentationNetwork, upsample

LOG_EVERY = 10  # steps that one row of the history averages
SAVE_EVERY = 20.0  # seconds between resume files, and
SAVE_SHARE = 30.0  # how many times as long as writing them takes
ENGINE_COLUMNS = frozenset({"step", "lr", "loss", "task", AUXILIARY, "val_miou"})  # no names for a term

log = logging.getLogger(__name__)

Told = Callable[[str, int, int, float], None]  # cell, step, steps, loss


def silent(*_: object) -> None:
    """Tell nobody how far a training is."""


@dataclass
class History:
    """What a training leaves beside its weights: rows for history.csv, and the seconds of every step, with
    the whole time of batch and teacher, as if the cell had them for itself."""

    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Trainee:
    """One student in a pack, with its method, optimisers and history."""

    label: str
    student: SegmentationNetwork
    method: Distiller
    training: Training
    recipe: Recipe | None
    seed: int
    state_file: Path
    mark: str  # the fingerprint of the cell, to which the resume state belongs
    validate: Callable[[Trainee], float]  # mIoU in percent
    history: History = field(default_factory=History)
    step: int = 0
    failure: Exception | None = None
    found: dict[str, Optimizer] = field(init=False)
    evaluating: float = 0.0  # seconds
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0

    @property
    def finished(self) -> bool:
        return self.step == self.training.steps

    def start(self) -> None:
        """Build the optimisers and take up a resume state that belongs to exactly this training."""
        self.student.to(memory_format=torch.channels_last).train()
        self.method.to(next(self.student.parameters()).device).train()
        torch.manual_seed(derive(self.seed, "optimizers"))  # in which a method may build networks
        self.found = optimizers(self.student, self.method, self.training, self.recipe)
        if state := checkpoint.load(self.state_file, self.mark):
            self.student.load_state_dict(state["student"])
            self.method.load_state_dict(state["method"])
            for name, optimizer in self.found.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.history, self.step = History(state["rows"], state["seconds"]), state["step"]
            log.info("%s resumes at step %d of %d.", self.label, self.step, self.training.steps)

    def advance(self, batch: Batch, teacher: Taps, waited: float) -> float:
        """One step on a batch and the teacher's taps, which took ``waited`` seconds to get. Its loss.

        :class:`ConfigError` when a term is not finite, and when a parameter gets no gradient in step 0.
        """
        began, step = time.perf_counter(), self.step
        torch.manual_seed(derive(self.seed, "layers", step))  # dropout, and the draws of the method
        factor = schedule(self.training, step)
        for optimizer in self.found.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        seen = {name: teacher[name] for name in self.method.teacher_taps}
        held = _shapes(self.method) if step == 0 else {}
        with strict.deterministic():
            terms, taps = terms_of(self.student, self.method, batch, seen, self.training, self.recipe)
        values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
        self._check_finite(values)
        loss = torch.stack(list(terms.values())).sum()
        self.found["main"].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            _check_gradients(self.student, self.method, self.found["main"])
            for name in (name for name, term in terms.items() if not term.requires_grad):
                log.warning("%s: no gradient comes from the term %r in the first step.", self.label, name)
        self.found["main"].step()
        with strict.deterministic():
            extra = self.method.after_step({name: tap.detach() for name, tap in taps.items()}, seen, batch)
        if taken := sorted(extra.keys() & (ENGINE_COLUMNS | values.keys())):
            raise ConfigError(
                f"`after_step` gives {taken[0]!r} a value, a name that a term or the engine has: rename it."
            )
        if step == 0 and (late := {name for name, _ in held.items() ^ _shapes(self.method).items()}):
            raise ConfigError(
                f"The method makes or changes {min(late)} in its first step, so that it could not resume: "
                "register it in `__init__`, in its final shape."
            )
        values |= {name: float(value) for name, value in extra.items()}
        self._check_finite(values)
        values["loss"] = float(loss.detach())
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1
        self.step += 1
        self.history.seconds.append(waited + time.perf_counter() - began)
        return values["loss"]

    def note(self) -> bool:
        """Close a row of the history where one is due, with a validation where one is due. Whether it was."""
        due = self.step % self.training.validate_every == 0
        if not (self.step % LOG_EVERY == 0 or due or self.finished):
            return False
        row = {"step": float(self.step), "lr": self.found["main"].param_groups[0]["lr"]}
        names = ("loss", *(name for name in self.sums if name != "loss"))
        row |= {name: self.sums[name] / self.summed for name in names}
        self.sums.clear()
        self.summed = 0
        self.history.rows.append(row)
        if due and not self.finished:
            row["val_miou"] = self.validate(self)
        return True

    def check_weights(self) -> None:
        """:class:`ConfigError` when a weight is not finite."""
        for name, value in self.student.state_dict().items():
            if not torch.isfinite(value).all():
                raise ConfigError(
                    f"The student's {name} is not finite after step {self.step}: lower `lr` in params.yaml. "
                    "The last good state is kept."
                )

    def save(self) -> None:
        """Replace the resume file. :class:`ConfigError` when a weight is not finite: the old one stays."""
        self.check_weights()
        state = {"step": self.step, "student": self.student.state_dict(), "method": self.method.state_dict()}
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.found.items()}
        checkpoint.save(self.state_file, self.mark, state | vars(self.history))

    def _check_finite(self, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not -float("inf") < value < float("inf")]
        if bad:
            raise ConfigError(
                f"{self.label}: the term {', '.join(bad)} is not finite at step {self.step}. The last good "
                "state is kept; lower `lr` or this term's weight in params.yaml."
            )


def train(
    trainees: Sequence[Trainee],
    teacher: SegmentationNetwork | None,
    data: Split | Stream,
    classes: int,
    ignore_index: int,
    finish: Callable[[Trainee], None],
    tell: Told = silent,
    left: Callable[[Trainee], None] = silent,
) -> None:
    """Train a pack to its end; ``finish`` is called for every trainee whose last step is done, ``left`` for
    every one that fails, at once.

    All trainees have the same seed, batch size, crop, augmentation and precision, and may differ in their
    number of steps. Those that a resume state puts behind catch up first. One that raises leaves the pack
    with its ``failure``; the others go on. ``teacher`` is frozen and in eval mode.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun and other distributed launchers are not supported: use `make repro JOBS=…`."
        )
    for trainee in trainees:
        _guard(trainee, trainee.start)
    going = _remaining(trainees, left)
    if not going:
        return
    first = min(trainee.step for trainee in going)
    longest = max((trainee.training for trainee in going), key=lambda training: training.steps)
    device = next(going[0].student.parameters()).device
    batches = _batches(data, longest, going[0].seed, first, (classes, ignore_index), device)
    saved, spent = time.monotonic(), 0.0
    for step in range(first, longest.steps):
        if not (now := [trainee for trainee in going if trainee.step == step and not trainee.finished]):
            if not any(trainee.step > step for trainee in going):
                break  # all have failed, or are done
            next(batches)
            continue
        began = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        taps = teacher_taps(teacher, now, batch.images, longest.precision)
        asked = time.perf_counter()
        for trainee in now:
            waited = (asked if trainee.method.teacher_taps else loaded) - began
            before = _versions(taps, batch)
            _guard(trainee, _step, trainee, batch, taps, waited, tell)
            after = _versions(taps, batch)
            if changed := [name for name in before if before[name] != after[name]]:
                trainee.failure = ConfigError(  # whatever else was raised follows from it
                    f"{trainee.label}: the method changes {changed[0]} in place, which others use too: "
                    "let it work on a copy."
                )
                batch = next(_batches(data, longest, trainee.seed, step, (classes, ignore_index), device))
                taps = teacher_taps(teacher, now, batch.images, longest.precision)
        del taps, batch
        going = _remaining(going, left)
        clock = time.monotonic()
        whole = [trainee for trainee in now if trainee.summed == 0 and not trainee.finished]
        if whole and clock - saved > max(SAVE_EVERY, SAVE_SHARE * spent):
            for trainee in whole:
                _guard(trainee, trainee.save)
            saved = time.monotonic()
            spent = saved - clock
        for trainee in now:
            if trainee.finished and trainee.failure is None:
                _end(trainee, finish)
        going = [one for one in _remaining(going, left) if not (one.finished and one in now)]
    for trainee in going:  # that a resume state puts at its end
        if trainee.finished:
            _end(trainee, finish)
    _remaining(going, left)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Of all parameters and buffers that a resume state holds."""
    return {name: value.shape for name, value in module.state_dict().items()}


def _remaining(trainees: Sequence[Trainee], left: Callable[[Trainee], None]) -> list[Trainee]:
    """Those that go on; ``left`` hears of the others."""
    for trainee in trainees:
        if trainee.failure is not None:
            left(trainee)
    return [trainee for trainee in trainees if trainee.failure is None]


def _batches(
    data: Split | Stream,
    training: Training,
    seed: int,
    first: int,
    labels: tuple[int, int],
    device: torch.device,
) -> Iterator[Batch]:
    """The batch of every step from ``first``, on the device; ``labels``: classes and the index to ignore."""
    for images, wanted in training_batches(data, training, labels[1], seed, first):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        yield Batch(images, wanted.to(device, non_blocking=True), *labels)


def _versions(taps: Taps, batch: Batch) -> dict[str, int]:
    """How often each of the tensors that trainees share was changed in place."""
    shared = {"the images": batch.images, "the labels": batch.labels}
    shared |= {f"the teacher's {name}": tap for name, tap in taps.items()}
    return {name: tensor._version for name, tensor in shared.items()}


def _step(trainee: Trainee, batch: Batch, taps: Taps, waited: float, tell: Told) -> None:
    loss = trainee.advance(batch, taps, waited)
    trainee.note()
    tell(trainee.label, trainee.step, trainee.training.steps, loss)


def _end(trainee: Trainee, finish: Callable[[Trainee], None]) -> None:
    _guard(trainee, trainee.check_weights)
    _guard(trainee, finish, trainee)


def _guard(trainee: Trainee, act: Callable[..., object], *arguments: Any) -> None:
    """Do something for a trainee. What it raises takes it out of the pack, and nothing else: the activations
    of its last step are let go, so that the others have the memory."""
    if trainee.failure is not None:
        return
    try:
        act(*arguments)
    except Exception as error:
        trainee.failure = error
        log.error("%s failed: %s", trainee.label, reason(error)[:400])
        if not isinstance(error, ConfigError):
            log.debug("%s", trainee.label, exc_info=error)
        traceback.clear_frames(error.__traceback__)


def terms_of(
    student: SegmentationNetwork,
    method: Distiller,
    batch: Batch,
    teacher: Taps,
    training: Training,
    recipe: Recipe | None,
) -> tuple[dict[str, Tensor], Taps]:
    """Named scalar terms (float32) of a step, and the student's taps that the method asked for."""
    with autocast(batch.images.device, training.precision):
        output = student(batch.images)
    taps = {name: output[name].float() for name in method.student_taps}
    terms = {"task": cross_entropy(output["logits"], batch)}
    if AUXILIARY in output:
        terms[AUXILIARY] = auxiliary_weight(training, recipe) * cross_entropy(output[AUXILIARY], batch)
    own = method.losses(taps, teacher, batch)
    if wrong := [name for name, term in own.items() if not (isinstance(term, Tensor) and term.ndim == 0)]:
        raise ConfigError(
            f"`losses` gives a term {wrong[0]!r} that is not a tensor of one value, without dimensions: take "
            "its mean or its sum."
        )
    if taken := sorted(set(own) & ENGINE_COLUMNS):
        raise ConfigError(f"The method calls a term {taken[0]!r}, a name that the engine uses: rename it.")
    return terms | own, taps


def teacher_taps(
    teacher: SegmentationNetwork | None, trainees: Sequence[Trainee], images: Tensor, precision: str
) -> dict[str, Tensor]:
    """One pass of the teacher: the taps that any of the trainees asks for, in float32, without gradient."""
    wanted = {name for trainee in trainees for name in trainee.method.teacher_taps}
    if not wanted:
        return {}
    assert teacher is not None  # the trainees were prepared with it
    with torch.no_grad(), autocast(images.device, precision):
        output = teacher(images, auxiliary=AUXILIARY in wanted)
    if images.device.type == "cuda":
        torch.cuda.synchronize()  # so that its time is not that of the first trainee
    return {name: output[name].float() for name in sorted(wanted)}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def auxiliary_weight(training: Training, recipe: Recipe | None) -> float:
    """The weight of the auxiliary head's loss; a network trained with 0 has no such head."""
    return training.auxiliary_weight if recipe is None else recipe.auxiliary_weight


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Pixel cross-entropy of upsampled logits, mean over the labelled pixels of the batch; 0 when there are
    none."""
    logits = upsample(logits.float(), batch.labels.shape[-2:])
    total = F.cross_entropy(logits, batch.labels, ignore_index=batch.ignore_index, reduction="sum")
    return total / (batch.labels != batch.ignore_index).sum().clamp(min=1)


def schedule(training: Training, step: int) -> float:
    """Factor on every learning rate: linear warm-up, times (1 − step/steps)^power."""
    warm = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    return float(warm * (1 - step / training.steps) ** training.power)


def optimizers(
    student: nn.Module, method: Distiller, training: Training, recipe: Recipe | None
) -> dict[str, Optimizer]:
    """``main`` for the student and every method parameter without an optimiser of its own, by the student's
    ``recipe`` or else by the protocol's SGD; then the method's own."""
    own = method.own_optimizers()
    theirs = {
        id(p) for optimizer in own.values() for group in optimizer.param_groups for p in group["params"]
    }
    parameters = [
        p
        for module in (student, method)
        for p in module.parameters()
        if p.requires_grad and id(p) not in theirs
    ]
    main: Optimizer
    if recipe is None:
        main = SGD(parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    else:
        main = AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if "main" in own:
        raise ConfigError("`own_optimizers` has one called 'main', as the student's is: rename it.")
    found = {"main": main, **own}
    for optimizer in found.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


def _check_gradients(student: nn.Module, method: Distiller, optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [
        (f"{room}.{name}", p)
        for room, module in (("student", student), ("method", method))
        for name, p in module.named_parameters()
    ]
    without = [name for name, p in named if id(p) in held and p.grad is None]
    if without:
        raise ConfigError(
            f"No gradient reaches {', '.join(without[:3])} ({len(without)} parameters): use it in `losses`, "
            "remove it, or give it an optimiser in `own_optimizers`."
        )
