"""``make repro``: train what is due, then the report, then one commit for DVC.

What is due says the fingerprint of each record. The tasks run on a Dask cluster: data, then the teacher, then
packs of cells, then the exports of students and the figures; each benchmark goes on as soon as it can. A cell
that fails stops no other, and its reason is in the tables. A worker that dies hands its pack to another,
which resumes.
"""

from __future__ import annotations

import signal
import sys


def _interrupted(number: int, _: object) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    signal.alarm(30)  # should the end hang: workers end with this process
    sys.stderr.write("stopped; the same command goes on from here.\n")
    sys.exit(130)


if __name__ == "__main__":  # before the imports that take seconds
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)

import argparse  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import logging  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Collection, Iterator, Mapping  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from pipelines import cli, config, files, place  # noqa: E402
from pipelines.config import PAPER, ROOT, ConfigError, Params  # noqa: E402
from pipelines.runs import records  # noqa: E402
from pipelines.runs.records import Cell, teacher_cell  # noqa: E402
from pipelines.suite import cluster, dvc, plan, work  # noqa: E402

log = logging.getLogger(__name__)

LOOK = 5  # seconds between two looks for workers that have joined


def stage_of(params: Params, cell: Cell) -> str:
    """The stage of dvc.yaml that trains a cell."""
    if cell.is_teacher:
        return f"train_teacher@{cell.benchmark}"
    place, method = f"{cell.benchmark}-{cell.student}", cell.method
    if method in params.controls:
        return f"control@{place}-{params.controls[method]}-{cell.seed}"
    if method.endswith(config.OFFICIAL):
        return f"official@{place}-{params.module_key(method)}-{cell.seed}"
    if method.startswith(f"{PAPER}-"):
        return f"{PAPER}@{place}-{method.removeprefix(f'{PAPER}-')}-{cell.seed}"
    return f"distill@{place}-{method}-{cell.seed}"


@dataclass
class Needs:
    """What has to be done before the commit."""

    weights: list[str] = field(default_factory=list)
    count: bool = False
    fetch: list[str] = field(default_factory=list)
    due: dict[str, plan.Due] = field(default_factory=dict)
    exports: list[tuple[str, str]] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.weights or self.count or self.fetch or self.due or self.exports)

    def told(self) -> list[str]:
        """What would be done, a line each."""
        lines = [f"would fetch the encoder weights {name}" for name in self.weights]
        lines += [f"would fetch the data of {name}" for name in self.fetch]
        for name, due in self.due.items():
            lines += [f"would train the teacher of {name}"] if due.train_teacher else []
            rows = Counter(f"{cell.student}/{cell.method}" for cell in due.cells)
            lines += [
                f"would train {name}/{row}, {count} seed{'s' * (count > 1)}" for row, count in rows.items()
            ]
        lines += [f"would measure the export of {student} of {name}" for name, student in self.exports]
        lines += ["would count networks and methods"] if self.count else []
        return lines or ["nothing is to be done but the report, if that"]


def trainings(params: Params, root: Path = ROOT) -> dict[str, plan.Due]:
    """What is to be trained, by benchmark."""
    found = {benchmark: plan.due(params, benchmark, root) for benchmark in params.suite.benchmarks}
    return {benchmark: own for benchmark, own in found.items() if own.train_teacher or own.cells}


def needs(
    params: Params,
    due: Mapping[str, plan.Due],
    changed: set[str],
    stages: Collection[str],
    root: Path = ROOT,
) -> Needs:
    """What has to be done beside the trainings that are ``due``, by what is there and by what DVC, which has
    ``stages``, calls changed."""
    found = Needs(count="count" in changed, due=dict(due))
    found.weights = [
        key for key in params.suite.weights if not (root / params.encoder_weights(key).file).is_file()
    ]
    for benchmark in params.suite.benchmarks:
        have = (root / "data" / benchmark).is_dir()
        stale, own = f"fetch@{benchmark}" in changed, found.due.get(benchmark)
        if (stale and have) or (own and not have):
            found.fetch.append(benchmark)
        for student in params.suite.students:
            stage = f"export@{benchmark}-{student}"
            cell = Cell(benchmark, student, params.suite.reference, params.suite.seeds[0])
            there = have and (cell.folder(root) / "weights.safetensors").is_file()
            trained = own is not None and cell in own.cells
            # a clone that adds a method to committed records has no weights of the student alone
            if stage in stages and (trained or (there and (stage in changed or benchmark in found.due))):
                found.exports.append((benchmark, student))
    return found


@dataclass(frozen=True)
class Task:
    """Something for a worker; ``then`` is called with what came of it. What is ``last`` waits until a worker
    has no pack to train, and what is short (2) until what is long (1) has begun."""

    name: str
    act: Any
    arguments: tuple[Any, ...]
    stage: str | None  # of dvc.yaml
    then: Callable[[work.Outcome], None] | None
    last: int


class Suite:
    """The head: hands out tasks as what they need is done."""

    def __init__(
        self, client: Any, params: Params, needed: Needs, jobs: int, display: Any, root: Path
    ) -> None:
        self.client, self.params, self.needed, self.jobs = client, params, needed, jobs
        self.display, self.root = display, root
        self.expected = work.identity(str(root))
        self.queue: list[Task] = []
        self.waiting: dict[Any, Task] = {}  # by future: one a worker
        self.numbers = itertools.count()
        self.failed: list[str] = []
        self.fetching = set(needed.weights)  # before they are there, nothing is trained
        self.held: list[str] = []  # benchmarks whose data is there before the weights
        self.ran: set[str] = set()  # stages of dvc.yaml
        self.broken: set[str] = set()  # those that failed: what lies in their place is not of today
        self.others = [
            name for name in params.benchmarks if name not in needed.due and (root / "runs" / name).is_dir()
        ]
        self.drawn: dict[str, Any] = {}  # futures of figures, by benchmark: who drew, writes the report
        self.mirrored = False

    def run(self) -> None:
        """Do all that is needed; ``failed`` are the sentences of what failed."""
        for key in self.needed.weights:
            self._load(key)
        for benchmark in self.params.suite.benchmarks:
            if benchmark in self.needed.fetch:
                self._fetch(benchmark)
            else:
                self._teach(benchmark)
        going = self._hand_out()
        with _there():  # while one makes the data, the others import, and so does the head
            self.importing = [
                self.client.submit(work.ready, self.expected, workers=[it], pure=False)
                for it in self.client.nthreads()
            ]
        from pipelines.stages import report

        report.prepare(self.root)
        while going:
            for future in self._done():
                self._end(self.waiting.pop(future), future)
            going = self._hand_out()
            if not self.mirrored and not self.queue and all(task.last for task in self.waiting.values()):
                report.mirror(self.params, self.root, self.params.suite.benchmarks)
                self.mirrored = True

    def report(self) -> Callable[[], bool]:
        """Let a worker write what is left of the report, while the head does something else. What is returned
        waits for it; where no worker could, it is made here."""
        from distributed import wait

        from pipelines.stages import report

        def made() -> bool:
            with contextlib.suppress(ConfigError), _there():  # the scheduler may be gone
                while not all(future.done() for future in futures) and self.client.nthreads():
                    with contextlib.suppress(TimeoutError):
                        wait(futures, LOOK)
                for outcome in (self._outcome(future) for future in futures if future.done()):
                    if outcome.failure is None:
                        self.display.say(logging.INFO, f"the report took {outcome.seconds:.0f} s.")
                        return True
            with _timed("the report"):
                report.write(self.params, self.root)
            return True

        futures = []
        with contextlib.suppress(ConfigError), _there():
            futures.append(self.client.submit(work.report, self.expected, self.drawn, pure=False))
        return made

    def _submit(
        self,
        name: str,
        act: Any,
        *arguments: Any,
        stage: str | None = None,
        then: Callable[[work.Outcome], None] | None = None,
        last: int = 0,
    ) -> None:
        self.queue.append(Task(name, act, arguments, stage, then, last))
        self.queue.sort(key=lambda task: task.last)

    def _hand_out(self) -> bool:
        """Give each free worker a task, and none to those that are busy: what waited at one of them might not
        go to another that is free sooner. Whether there is still something to do."""
        if not (self.queue or self.waiting):
            self._rest()
        with _there():
            free = max(0, sum(self.client.nthreads().values()) - len(self.waiting))
            for task in self.queue[:free]:
                key = f"{task.name}--{next(self.numbers)}"
                future = self.client.submit(task.act, self.expected, *task.arguments, pure=False, key=key)
                self.waiting[future] = task
        del self.queue[:free]
        return bool(self.queue or self.waiting)

    def _done(self) -> set[Any]:
        """What has ended; nothing after a while, so that workers that have joined get something to do."""
        from distributed import wait

        if not self.waiting:  # no worker is there: those that died come again
            time.sleep(1)
            return set()
        with _there(), contextlib.suppress(TimeoutError):
            return set(wait([*self.waiting], LOOK, "FIRST_COMPLETED").done)
        return set()

    def _outcome(self, future: Any) -> work.Outcome:
        from distributed import CancelledError

        with _there():
            try:
                return future.result()
            except CancelledError:
                raise
            except Exception as error:  # a worker that died again and again, a function that is not there
                return work.Outcome(failure=cluster.lost(error))

    def _end(self, task: Task, future: Any) -> None:
        outcome = self._outcome(future)
        if outcome.failure is not None and not outcome.cells:
            self._fail(task.name, outcome.failure)
        elif not outcome.cells:
            self.display.say(logging.INFO, f"{task.name} took {outcome.seconds:.0f} s.")
        if task.stage is not None:
            (self.ran if outcome.failure is None else self.broken).add(task.stage)
        if task.act is work.figures:
            self.drawn[task.arguments[0]] = future
        if task.then is not None:
            task.then(outcome)

    def _fail(self, name: str, why: str) -> None:
        self.failed.append(f"{name}: {why}")
        self.display.say(logging.ERROR, f"{name} failed: {why}")

    def _load(self, key: str) -> None:
        def then(_: work.Outcome) -> None:  # without them, each cell that needs them says so
            self.fetching.remove(key)
            if not self.fetching:
                for benchmark in self.held:
                    self._teach(benchmark)

        stage = f"fetch_weights@{key}"
        self._submit(f"encoder weights {key}", work.fetch_weights, key, stage=stage, then=then)

    def _fetch(self, benchmark: str) -> None:
        def then(outcome: work.Outcome) -> None:
            if outcome.failure is None:
                due = plan.due(self.params, benchmark, self.root)
                if due.train_teacher or due.cells:  # the new data is other data
                    self.needed.due[benchmark] = due
                self._teach(benchmark)
                return
            self.broken |= {f"export@{benchmark}-{student}" for student in self.params.suite.students}
            if benchmark in self.needed.due:
                cells = len(plan.suite_cells(self.params, benchmark))
                self._fail(benchmark, f"{cells} trainings are not tried, because its data could not be had")

        stage = f"fetch@{benchmark}"
        self._submit(f"data of {benchmark}", work.fetch, benchmark, stage=stage, then=then)

    def _teach(self, benchmark: str) -> None:
        """The data is there: train the teacher if it is due, as soon as the encoder weights are there too."""
        if self.fetching:
            self.held.append(benchmark)
            return
        if benchmark not in self.needed.due:
            self._exports(benchmark)
            return
        due = plan.due(self.params, benchmark, self.root)  # now that the data is known
        cell = teacher_cell(self.params, benchmark)
        if not due.train_teacher:
            self._distil(benchmark)
            return
        self.display.expect(cell.path, self.params.benchmark(benchmark).teacher.training.steps)

        def then(outcome: work.Outcome) -> None:
            self._took(outcome, [cell])
            if outcome.cells.get(cell, outcome.failure) is None:
                self._distil(benchmark)
            else:
                cells = plan.suite_cells(self.params, benchmark)
                self._fail(benchmark, f"{len(cells)} trainings are not tried, because its teacher failed")

        self._submit(f"teacher of {benchmark}", work.train, [cell], then=then)

    def _distil(self, benchmark: str) -> None:
        """The teacher is there: train the cells that are due, then look at the students."""
        due = plan.due(self.params, benchmark, self.root)
        for cell in set(plan.suite_cells(self.params, benchmark)) - set(due.cells):
            records.failure_note(cell, self.root).unlink(missing_ok=True)  # what failed has been put right
        packs = plan.cut(due.cells, self.params, self.jobs, self.root)
        first = self.params.suite.seeds[0]  # of which students are exported
        packs.sort(key=lambda pack: pack[0].seed != first)
        left = [*packs]
        for pack in packs:
            for cell in pack:
                self.display.expect(cell.path, self.params.schedule(benchmark, cell.method).steps)

            def then(outcome: work.Outcome, pack: list[Cell] = pack) -> None:
                self._took(outcome, pack)
                left.remove(pack)
                if pack[0].seed == first and first not in (other[0].seed for other in left):
                    self._exports(benchmark)
                if not left:
                    self._submit(f"panels of {benchmark}", work.panels, benchmark, last=2)
                    self._draw(benchmark)

            self._submit(f"{len(pack)} cells from {pack[0].path}", work.train, pack, then=then)
        self._rest()
        if first not in (pack[0].seed for pack in packs):
            self._exports(benchmark)

    def _rest(self) -> None:
        """What needs no training of today: not beside a teacher, which has all cores, and after all packs."""
        if self.needed.count:
            self.needed.count = False
            self._submit("count of networks", work.count, stage="count", last=1)
        for benchmark in self.others:
            self._draw(benchmark)
        self.others = []

    def _draw(self, benchmark: str) -> None:
        self._submit(f"figures of {benchmark}", work.figures, benchmark, last=2)

    def _took(self, outcome: work.Outcome, pack: list[Cell]) -> None:
        self.ran |= {stage_of(self.params, cell) for cell in pack}
        lost = outcome.failure and _unfinished(self.params, pack[0].benchmark, self.root)
        for cell in pack:
            self.display.finished(cell.path)
            if why := outcome.cells.get(cell):
                self._fail(cell.path, why)
            elif lost and cell in lost and records.failure(cell, self.root) is None:
                text = f"{outcome.failure}\n".encode()
                files.write_bytes(records.failure_note(cell, self.root), text)
        whole = [cell for cell in pack if not outcome.cells.get(cell)]
        if outcome.failure is None and whole:
            names = whole[0].path if len(whole) == 1 else f"{len(whole)} cells of seed {whole[0].seed}"
            self.display.say(logging.INFO, f"{pack[0].benchmark}: {names} done in {outcome.seconds:.0f} s.")

    def _exports(self, benchmark: str) -> None:
        for name, student in self.needed.exports:
            if name == benchmark:
                stage = f"export@{name}-{student}"
                self._submit(f"export of {name}, {student}", work.export, name, student, stage=stage, last=1)


def check_networks(params: Params, root: Path = ROOT) -> None:
    """Before anything is fetched or trained: the encoder weights that the suite needs are there, or will be
    fetched. :class:`ConfigError` for the first that is not; a warning for a student that starts from random
    weights beside a teacher that does not."""
    suite = params.suite
    teachers = {name: params.benchmark(name).teacher.network.weights for name in suite.benchmarks}
    students = {name: params.student(name).weights for name in suite.students}
    for key in dict.fromkeys(filter(None, [*teachers.values(), *students.values()])):
        if params.encoder_weights(key).sha256 is None:
            raise ConfigError(
                f"params.yaml has no checksum of the encoder weights '{key}', which it needs: run "
                f"`python -m pipelines.stages.fetch_weights --weights {key}`, which prints it, and enter it "
                f"as weights.{key}.sha256 if you trust the file."
            )
        if key not in suite.weights and not (root / params.encoder_weights(key).file).is_file():
            raise ConfigError(
                f"The suite needs the encoder weights '{key}' ({params.encoder_weights(key).file}), which "
                f"are not there: add {key} to suite.weights in params.yaml, which downloads them, or put the "
                "file there."
            )
    for name in (name for name, key in teachers.items() if key):
        if random := [student for student, key in students.items() if key is None]:
            log.warning(
                "the teacher of %s starts from ImageNet and %s from random weights, which is not the "
                "published protocol: take the students `…-imagenet`.",
                name,
                ", ".join(random),
            )


def repro(options: argparse.Namespace, root: Path = ROOT) -> list[str]:
    """Bring everything up to date; the sentences of what failed."""
    params = config.load(root / "params.yaml")
    place.check_links(root)
    if (why := place.no_commit(root)) is not None:
        log.warning("results will not record the commit of the code: %s", why)
    dvc.heal(root)
    for benchmark in params.suite.benchmarks:
        records.restore_teacher(params, benchmark, root)
    due = trainings(params, root)
    with contextlib.ExitStack() as stack:
        workers = None
        if due and not options.dry:  # they import while DVC looks
            workers = stack.enter_context(started(options, params, root))
        pipeline = dvc.Pipeline(root)
        changed, uncached = pipeline.changed()
        needed = needs(params, due, changed, pipeline.stages, root)
        if options.dry:
            for line in needed.told():
                log.info("%s.", line)
            return []
        if needed.any:
            workers = workers or stack.enter_context(started(options, params, root))
            workers.check()
            suite = Suite(workers.client, params, needed, workers.jobs, workers.display, root)
            suite.run()
            _commit(pipeline, (changed | uncached | suite.ran) - suite.broken, suite.report(), root)
            return suite.failed

    def made() -> bool:
        if "report" in changed or not (root / "reports").is_dir():
            from pipelines.stages import report

            with _timed("the report"):
                report.report(params, root, params.suite.benchmarks)
            return True
        return False

    _commit(pipeline, changed | uncached, made, root)
    return []


def _commit(pipeline: dvc.Pipeline, names: set[str], made: Callable[[], bool], root: Path) -> None:
    """Commit what is whole of the stages ``names``, and the report when it is ``made``. Neither keeps the
    other from being done."""
    now = config.load(root / "params.yaml")  # DVC reads it as it is now
    whole = names - {"report"}
    for benchmark in now.suite.benchmarks:
        whole -= {stage_of(now, cell) for cell in _unfinished(now, benchmark, root)}
    trouble, timed = list[Exception](), contextlib.ExitStack()
    timed.enter_context(_timed("the commit to DVC"))

    @functools.cache
    def report() -> list[str]:
        timed.close()
        try:
            return ["report"] if made() else []
        except Exception as error:
            trouble.append(error)
            return []

    try:
        pipeline.commit([name for name in pipeline.stages if name in whole], report)
    except Exception:
        report()
        raise
    if trouble:
        raise trouble[0]


@dataclass(frozen=True)
class Workers:
    """Those that have been started: a client of Dask, how many there are or will be, what shows what they do,
    and the answer of the first, which imports meanwhile, to :func:`work.ready`."""

    client: Any
    jobs: int
    display: Any
    answer: Any

    def check(self) -> None:
        """:class:`ConfigError` for values of the methods that are refused."""
        from distributed import wait

        with _there():
            wait(self.answer)
            # of a worker that cannot look, its tasks say why
            if self.answer.status == "finished" and (why := self.answer.result()) is not None:
                raise ConfigError(why)


@contextlib.contextmanager
def started(options: argparse.Namespace, params: Params, root: Path) -> Iterator[Workers]:
    """Workers on this machine, or on the cluster that the options name."""
    check_networks(params, root)
    from pipelines.suite import display

    jobs = options.jobs or 1
    with contextlib.ExitStack() as stack:
        if options.scheduler:
            client = stack.enter_context(cluster.running(options.scheduler))
        elif options.cluster:
            client = stack.enter_context(cluster.queue(options.cluster, jobs))
        else:
            gpus = cluster.visible_gpus()
            jobs = options.jobs or cluster.room(gpus, params.suite.threads)
            client = stack.enter_context(cluster.local(jobs, gpus, options.dashboard, root))
        if options.dashboard:
            log.info("the dashboard is at %s", client.dashboard_link)
        cluster.await_worker(client, forever=bool(options.cluster))
        shown = display.Display()
        stack.callback(shown.close)
        client.subscribe_topic(work.TOPIC, shown.event)
        with _there():
            answer = client.submit(work.ready, work.identity(str(root)), pure=False)
        yield Workers(client, max(jobs, len(client.nthreads())), shown, answer)


@contextlib.contextmanager
def _there() -> Iterator[None]:
    """:class:`ConfigError` when the scheduler is not there any more."""
    from distributed import CancelledError
    from distributed.client import ClosedClientError

    try:
        yield
    except (CancelledError, ClosedClientError, OSError):  # nobody here cancels or closes
        raise ConfigError(
            "The scheduler of Dask is gone. What is trained is kept: run the same command again."
        ) from None


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    """Say how long something took that was worth a second."""
    start = time.monotonic()
    yield
    if (seconds := time.monotonic() - start) >= 1:
        log.info("%s took %.0f s.", name, seconds)


def _unfinished(params: Params, benchmark: str, root: Path) -> list[Cell]:
    """The cells of a benchmark without a record of today."""
    due = plan.due(params, benchmark, root)
    return [*due.cells, *([teacher_cell(params, benchmark)] if due.train_teacher else [])]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make repro",
        description="Train everything in params.yaml that is not up to date, then write reports/. What was "
        "interrupted goes on where it stopped.",
    )
    parser.add_argument(
        "--jobs", type=int, help="processes; default: one a GPU, or as many as the CPU has room for"
    )
    parser.add_argument("--scheduler", help="address of a running Dask scheduler")
    parser.add_argument("--cluster", help="submit --jobs jobs to a queue: slurm, pbs, lsf or htcondor")
    parser.add_argument(
        "--dashboard", action="store_true", help="start Dask's dashboard and print its address"
    )
    parser.add_argument("--dry", action="store_true", help="say what would be done, and do nothing")
    options = parser.parse_args()
    if cluster.some(options.jobs) is None and options.cluster:
        raise ConfigError(
            "CLUSTER needs JOBS, the number of jobs to submit: `make repro CLUSTER=slurm JOBS=8`."
        )
    with files.hold(ROOT / ".scratch" / "locks" / "repro.lock", "`make repro`"):
        failed = repro(options)
    if failed:
        raise ConfigError("\n".join([f"{len(failed)} failed; the others are done.", *failed]))


if __name__ == "__main__":
    cli.run(main)
