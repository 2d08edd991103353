"""What a worker does: one function a kind of task. Workers stay warm: libraries, data and teacher are loaded
once. Progress and messages go to the head as events of Dask."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import config, place
from pipelines.config import ConfigError
from pipelines.runs.records import Cell

TOPIC = "acfd"
LIBRARIES = ("torch", "timm", "segmentation-models-pytorch", "numpy", "distributed")
CODE = ("pipelines", "baselines", "acfd")
TELL_EVERY = 1.0  # seconds between two reports of a pack's progress


@dataclass(frozen=True)
class Identity:
    """What head and workers have to have in common."""

    root: str
    code: str | None  # the trees of its folders in git
    params: str
    libraries: tuple[str, ...]
    threads: int = 1  # in which a worker does tasks: their trainings would share torch's random numbers


def identity(root: str) -> Identity:
    """Of this process. The sum is that of params.yaml as it is now."""
    file = Path(root) / "params.yaml"
    text = file.read_bytes() if file.is_file() else b""
    have = tuple(f"{name} {version(name)}" for name in LIBRARIES)
    return Identity(root, _code(root), hashlib.sha256(text).hexdigest(), have, _threads())


def _threads() -> int:
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:  # no worker of Dask
        return 1


@functools.cache
def _code(root: str) -> str | None:
    """The code that this process has: a later commit in the checkout does not change it, and one of results
    or documents alone is the same code."""
    trees = place.git(Path(root), "rev-parse", *(f"HEAD:./{folder}" for folder in CODE))
    return None if trees is None else " ".join(trees.split())


@dataclass
class Outcome:
    """What came of a task: why it, or cells of it, failed."""

    seconds: float = 0.0
    failure: str | None = None
    cells: dict[Cell, str | None] = field(default_factory=dict)


def fetch(expected: Identity, benchmark: str) -> Outcome:
    from pipelines.stages.fetch import fetch as run

    def act(params: config.Params, root: Path, _: Outcome) -> None:
        students = [params.student(key) for key in params.suite.students]
        run(root / "data", benchmark, params.benchmark(benchmark), students)

    return _do(expected, act)


def fetch_weights(expected: Identity, key: str) -> Outcome:
    from pipelines.stages.fetch_weights import fetch as run

    return _do(expected, lambda params, root, _: run(key, params.encoder_weights(key), root))


def count(expected: Identity) -> Outcome:
    from pipelines.stages.count import count as run

    return _do(expected, lambda params, root, _: run(params, root))


def figures(expected: Identity, benchmark: str) -> Outcome:
    from pipelines.stages.report import make_figures as run

    return _do(expected, lambda params, root, _: run(params, benchmark, root))


def panels(expected: Identity, benchmark: str) -> Outcome:
    from pipelines.stages.report import make_panels as run

    return _do(expected, lambda params, root, _: run(params, benchmark, root))


def report(expected: Identity, drawn: Mapping[str, Outcome]) -> Outcome:
    """Write the report, after the figures that were drawn."""
    from pipelines.stages.report import write as run

    have = [benchmark for benchmark, outcome in drawn.items() if outcome.failure is None]
    return _do(expected, lambda params, root, _: run(params, root, drawn=have))


def ready(expected: Identity) -> str | None:
    """Import what takes seconds, and look at the values of the methods: why one is refused."""
    import segmentation_models_pytorch  # noqa: F401

    from pipelines.engine import pack  # noqa: F401

    if identity(expected.root) == expected:  # otherwise its tasks say so
        try:
            _params(Path(expected.root))
        except ConfigError as error:
            return str(error)
    return None


def export(expected: Identity, benchmark: str, student: str) -> Outcome:
    from pipelines.stages.export import check as run

    return _do(expected, lambda params, root, _: run(benchmark, student, params, root))


def train(expected: Identity, cells: Sequence[Cell]) -> Outcome:
    """Train a pack. The outcome has the cells that failed, with the reason."""
    from pipelines.engine.pack import run_pack

    def act(params: config.Params, root: Path, outcome: Outcome) -> None:
        done: dict[str, int] = {}  # steps by cell
        told = 0.0

        def tell(cell: str, step: int, steps: int, loss: float) -> None:
            nonlocal told
            done[cell], now = step, time.monotonic()
            if step == steps or now - told > TELL_EVERY:
                told = now
                _event({"cell": cell, "step": step, "steps": steps, "loss": loss, "done": dict(done)})

        found = run_pack(cells, params, root, tell)
        outcome.cells = {cell: None if error is None else _sentence(error) for cell, error in found.items()}

    return _do(expected, act)


def trial(expected: Identity, trials: Mapping[str, dict[str, float]]) -> dict[str, float | str]:
    """Trials of tuning, side by side; see :func:`try_weights`."""
    root = Path(expected.root)
    check(expected, identity(expected.root))
    return try_weights(_params(root), trials, root)


def shortened(params: config.Params, trials: Mapping[str, dict[str, float]]) -> config.Params:
    """``params`` with the schedule of tuning and the loss weights of trials."""
    tuning, raw = params.tuning, params.model_dump(exclude_unset=True)
    raw["benchmarks"][tuning.benchmark]["training"] |= {
        "steps": tuning.steps,
        "validate_every": tuning.steps,
    }
    for method, weights in trials.items():
        prefix = f"{config.PAPER}-"
        section = raw[config.PAPER] if method.startswith(prefix) else raw["methods"]
        section[method.removeprefix(prefix)] |= weights
    return config.Params.model_validate(raw)


def try_weights(
    params: config.Params, trials: Mapping[str, dict[str, float]], root: Path
) -> dict[str, float | str]:
    """Train a short cell for each method with the weights of its trial, in one pack: mIoU on validation, or
    why there is none. No test image is read."""
    from pipelines.engine.pack import Prepared, bench, plan, teacher_of, train_plans, validate
    from pipelines.runs.confusion import summary

    tuning, short = params.tuning, shortened(params, trials)
    cells = {name: Cell(tuning.benchmark, tuning.student, name, tuning.seed) for name in trials}
    shared, scores = bench(short, tuning.benchmark, root), dict[Cell, float | str]()

    def finish(prepared: Prepared) -> None:
        score = summary(validate(prepared.trainee, shared), shared.classes)["miou"]
        scores[prepared.plan.cell] = round(score, 4)

    teacher = teacher_of([*cells.values()], short, shared, root)
    plans = [plan(short, cell) for cell in cells.values()]
    for cell, error in train_plans(plans, short, shared, teacher, finish, root=root).items():
        if error is not None:
            scores[cell] = _sentence(error)
    return {name: scores[cell] for name, cell in cells.items()}


def _params(root: Path) -> config.Params:
    from pipelines.methods import checked

    return checked(config.load(root / "params.yaml"))


def _do(expected: Identity, act: Callable[[config.Params, Path, Outcome], object]) -> Outcome:
    """Do a task in the checkout that the head has; an error becomes its sentence."""
    outcome, start = Outcome(), time.monotonic()
    try:
        check(expected, identity(expected.root))
        with _messages():
            root = Path(expected.root)
            act(_params(root), root, outcome)
    except Exception as error:
        outcome.failure = _sentence(error)
    outcome.seconds = time.monotonic() - start
    return outcome


def check(head: Identity, here: Identity) -> None:
    """:class:`ConfigError`, one sentence, when a worker does not see what the head sees."""
    worker, root = f"The worker on {platform.node()}", Path(head.root)
    if not root.is_dir():
        raise ConfigError(
            f"{worker} has no folder {root}: put the checkout on a file system that all machines share."
        )
    if here.code is None and head.code is not None and (why := place.no_commit(root)):
        raise ConfigError(f"{worker} cannot tell what code it has: {why}")
    if here.code != head.code or here.params != head.params:
        what = "version of the code" if here.code != head.code else "params.yaml"
        raise ConfigError(
            f"{worker} sees another {what} in {root} than the machine that started the suite: wait until "
            "the file system is in step, or run the same command again."
        )
    if here.threads != head.threads:
        raise ConfigError(
            f"{worker} does {here.threads} tasks at a time in one process, which would change each other's "
            "random numbers: start it with `--nthreads 1`."
        )
    if differ := [f"{b} (here {a})" for a, b in zip(head.libraries, here.libraries, strict=True) if a != b]:
        raise ConfigError(
            f"{worker} has other libraries: {', '.join(differ)}. Install requirements.lock there."
        )


def _sentence(error: Exception) -> str:
    from pipelines.methods import reason

    return reason(error)[:1000]


class _Forward(logging.Handler):
    """Warnings and errors of a task, for the head to show."""

    def emit(self, record: logging.LogRecord) -> None:
        _event({"level": record.levelno, "text": record.getMessage()})


@contextlib.contextmanager
def _messages() -> Any:
    logger, handler = logging.getLogger("pipelines"), _Forward(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _event(content: dict[str, Any]) -> None:
    from distributed import get_worker

    with contextlib.suppress(ValueError):  # no worker of Dask: a test
        get_worker().log_event(TOPIC, content | {"who": f"{platform.node()} {os.getpid()}"})
