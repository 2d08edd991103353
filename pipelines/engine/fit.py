"""The only training loop: the task loss, a method's terms, SGD, a poly schedule; the same for teachers and
students."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from pipelines.config import ConfigError, Recipe, Training
from pipelines.datasets.folder import Split, Stream
from pipelines.datasets.transforms import training_batches
from pipelines.engine import checkpoint, strict
from pipelines.engine.seeds import derive
from pipelines.method import Batch, Distiller, Taps
from pipelines.networks import SegmentationNetwork, upsample

LOG_EVERY = 10  # steps that one row of the history averages
SAVE_EVERY = 20.0  # seconds between resume files, and
SAVE_SHARE = 30.0  # how many times as long as writing one takes

log = logging.getLogger(__name__)


@dataclass
class History:
    """What a training leaves beside its weights: rows for history.csv, the seconds of every step, and its
    peak of memory."""

    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory_mb: float = 0.0


class DistillationStep(nn.Module):
    """Teacher, student and method in one forward that returns the terms, so that wrappers see all that has a
    gradient."""

    teacher: SegmentationNetwork | None

    def __init__(
        self,
        student: SegmentationNetwork,
        teacher: SegmentationNetwork | None,
        method: Distiller,
        auxiliary: float,
    ) -> None:
        super().__init__()
        self.student, self.method, self.auxiliary = student, method, auxiliary
        # outside of the module tree: no optimiser, no train(), no wrapper can reach the teacher
        object.__setattr__(self, "teacher", teacher)
        self.autocast = torch.autocast("cpu", enabled=False)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Taps, Taps]:
        """Named scalar terms (float32), and the taps of student and teacher that the method asked for."""
        with self.autocast:
            output = self.student(batch.images)
            seen: dict[str, Tensor] = {}
            if self.teacher is not None:
                with torch.no_grad():
                    seen = self.teacher(batch.images)
        student = {name: output[name].float() for name in self.method.student_taps}
        teacher = {name: seen[name].float() for name in self.method.teacher_taps}
        terms = {"task": cross_entropy(output["logits"], batch)}
        terms["auxiliary"] = self.auxiliary * cross_entropy(output["auxiliary"], batch)
        own = self.method.losses(student, teacher, batch)
        if taken := sorted(set(own) & {"step", "lr", "loss", "val_miou", *terms}):
            raise ConfigError(
                f"The method calls a term {taken[0]!r}, a name that the engine uses: rename it."
            )
        return terms | own, student, teacher


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
    found = {"main": main, **own}
    for optimizer in found.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


def fit(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork | None,
    method: Distiller,
    data: Split | Stream,
    classes: int,
    ignore_index: int,
    training: Training,
    recipe: Recipe | None,
    seed: int,
    validate: Callable[[], float],
    state_file: Path,
    mark: str,
    label: str,
) -> History:
    """Train ``student`` in place and return its history.

    ``validate`` scores the student (mIoU in percent) every ``training.validate_every`` steps. ``state_file``
    holds the resume state, valid for the fingerprint ``mark``; at the end, that of the finished training. A
    batch, and the noise inside the networks (dropout), depend on (seed, step) alone, so a resumed training
    equals an uninterrupted one bit for bit on the CPU.
    Raises :class:`ConfigError` when a term is not finite (the resume file keeps the last good state) and when
    a parameter gets no gradient in the first step.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if training.precision == "bf16" else "no", cpu=not torch.cuda.is_available()
    )
    if accelerator.num_processes > 1:
        raise ConfigError("A cell is one process: do not start it by a distributed launcher.")
    auxiliary = training.auxiliary_weight if recipe is None else recipe.auxiliary_weight
    step_module = DistillationStep(student, teacher, method, auxiliary).to(accelerator.device)
    step_module.autocast = torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=training.precision == "bf16"
    )
    if training.precision == "bf16" and accelerator.device.type == "cpu" and not native_bf16():
        log.warning(
            "This processor has no bf16 instructions: it computes %s many times slower than in fp32. Set "
            "`precision: fp32` in params.yaml or use another machine.",
            label,
        )
    student.to(memory_format=torch.channels_last)
    step_module.train()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what was built and counted before is no part of it
    found = optimizers(student, method, training, recipe)
    history, sums, count, start = History(), dict[str, float](), 0, 0

    if state := checkpoint.load(state_file, mark):
        student.load_state_dict(state["student"])
        method.load_state_dict(state["method"])
        for name, optimizer in found.items():
            optimizer.load_state_dict(state["optimizers"][name])
        history, start = History(state["rows"], state["seconds"], state["memory_mb"]), state["step"]
        log.info("%s resumes at step %d of %d.", label, start, training.steps)

    saved, spent = time.monotonic(), 0.0
    interactive = sys.stderr.isatty()
    with tqdm(
        total=training.steps,
        initial=start,
        desc=label,
        unit="step",
        mininterval=0.5 if interactive else 30,
        smoothing=0.1,
    ) as bar:
        batches = training_batches(data, training, ignore_index, seed, start)
        for step in range(start, training.steps):
            began = time.perf_counter()
            torch.manual_seed(derive(seed, "layers", step))  # dropout, and the draws of a method
            factor = schedule(training, step)
            for optimizer in found.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
            images, labels = next(batches)
            images = images.to(accelerator.device, non_blocking=True)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = labels.to(accelerator.device, non_blocking=True)
            batch = Batch(images, labels, classes, ignore_index)

            with strict.deterministic():
                terms, student_taps, teacher_taps = step_module(batch)
            values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
            _check_finite(values, step, label)
            loss = torch.stack(list(terms.values())).sum()
            found["main"].zero_grad()
            accelerator.backward(loss)
            if step == 0:
                _check_gradients(step_module, found["main"])
            found["main"].step()
            with strict.deterministic():
                extra = method.after_step(
                    {name: tap.detach() for name, tap in student_taps.items()},
                    {name: tap.detach() for name, tap in teacher_taps.items()},
                    batch,
                )
            values |= {name: float(value) for name, value in extra.items()}
            _check_finite(values, step, label)
            history.seconds.append(time.perf_counter() - began)

            values["loss"] = float(loss.detach())
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            done = step + 1
            count += 1
            due = done % training.validate_every == 0
            if done % LOG_EVERY == 0 or due or done == training.steps:
                row = {"step": float(done), "lr": found["main"].param_groups[0]["lr"]}
                row |= {name: sums[name] / count for name in ("loss", *(n for n in sums if n != "loss"))}
                sums.clear()
                count = 0
                history.rows.append(row)
                if due and done < training.steps:
                    row["val_miou"] = validate()
                now = time.monotonic()
                if now - saved > max(SAVE_EVERY, SAVE_SHARE * spent) or done == training.steps:
                    history.memory_mb = max(history.memory_mb, memory_peak_mb())
                    _save(state_file, mark, done, student, method, found, history)
                    saved = time.monotonic()
                    spent = saved - now
            bar.set_postfix(
                loss=f"{values['loss']:.3f}", lr=f"{found['main'].param_groups[0]['lr']:.4f}", refresh=False
            )
            bar.update()
    return history


def memory_peak_mb() -> float:
    """Of the GPU, or of this process on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 numbers itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _check_finite(values: dict[str, float], step: int, label: str) -> None:
    bad = [name for name, value in values.items() if not -float("inf") < value < float("inf")]
    if bad:
        raise ConfigError(
            f"{label}: the term {', '.join(bad)} is not finite at step {step}. The last good state is kept; "
            "lower `lr` or this term's weight in params.yaml."
        )


def _check_gradients(module: nn.Module, optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    without = [name for name, p in module.named_parameters() if id(p) in held and p.grad is None]
    if without:
        raise ConfigError(
            f"No gradient reaches {', '.join(without[:3])} ({len(without)} parameters): use it in `losses`, "
            "remove it, or give it an optimiser in `own_optimizers`."
        )


def _check_weights(student: nn.Module, step: int) -> None:
    for name, value in student.state_dict().items():
        if not torch.isfinite(value).all():
            raise ConfigError(
                f"The student's {name} is not finite after step {step}: lower `lr` in params.yaml. The last "
                "good state is kept."
            )


def _save(
    path: Path,
    mark: str,
    step: int,
    student: nn.Module,
    method: Distiller,
    found: dict[str, Optimizer],
    history: History,
) -> None:
    _check_weights(student, step)
    state = {"step": step, "student": student.state_dict(), "method": method.state_dict()}
    state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in found.items()}
    checkpoint.save(path, mark, state | vars(history))
