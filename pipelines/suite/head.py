"""The head of a suite: hands out tasks to the workers of a Dask cluster as what they need is done.

Data, then the teacher, then packs of cells, then the exports of students and the figures; each benchmark goes
on as soon as it can. A cell that fails stops no other, and its reason is in the tables. A worker that dies
hands its pack to another, which resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import cli, files
from pipelines.config import ConfigError, Params
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell
from pipelines.suite import cluster, plan, work
from pipelines.suite.dvc import stage_of
from pipelines.suite.plan import Needs

log = logging.getLogger(__name__)

LOOK = 5  # seconds between two looks for workers that have joined


@dataclass(frozen=True)
class Workers:
    """Those that have been started: a client of Dask, how many there are or will be, what shows what they do,
    and the answer of the first, which imports meanwhile, to :func:`work.ready`."""

    client: Any
    jobs: int
    display: Any
    answer: Any

    def check(self) -> list[str]:
        """:class:`ConfigError` for values of the methods that are refused; else the address of the worker
        that has looked, and has imported what others have not."""
        from distributed import wait

        with _there():
            wait(self.answer)
            # of a worker that cannot look, its tasks say why
            if self.answer.status == "finished" and (why := self.answer.result()) is not None:
                raise ConfigError(why)
            return [address for found in self.client.who_has(self.answer).values() for address in found]


@contextlib.contextmanager
def started(options: argparse.Namespace, params: Params, root: Path) -> Iterator[Workers]:
    """Workers on this machine, or on the cluster that the options name."""
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
        self.first: list[str] = []  # the worker that gets the first task, if it is there

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
            with cli.timed("the report"):
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
                how = {"pure": False, "key": f"{task.name}--{next(self.numbers)}"}
                if self.first:
                    how |= {"workers": self.first, "allow_other_workers": True}
                self.waiting[self.client.submit(task.act, self.expected, *task.arguments, **how)] = task
                self.first = []
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
            if benchmark not in self.needed.due:  # new data may have made it due
                self._draw(benchmark)
        self.others = []

    def _draw(self, benchmark: str) -> None:
        self._submit(f"figures of {benchmark}", work.figures, benchmark, last=2)

    def _took(self, outcome: work.Outcome, pack: list[Cell]) -> None:
        self.ran |= {stage_of(self.params, cell) for cell in pack}
        lost = outcome.failure and plan.unfinished(self.params, pack[0].benchmark, self.root)
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
