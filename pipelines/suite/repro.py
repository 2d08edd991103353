"""``make repro``: train what is due, then the report, then one commit for DVC.

What is due says the fingerprint of each record; :mod:`pipelines.suite.head` hands it out to workers. One
``dvc status`` comes before, one commit after.
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
import logging  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

from pipelines import cli, config, files, place  # noqa: E402
from pipelines.config import ROOT, ConfigError, Params  # noqa: E402
from pipelines.runs import records  # noqa: E402
from pipelines.suite import cluster, dvc, head, plan  # noqa: E402

log = logging.getLogger(__name__)


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
    due = plan.trainings(params, root)
    with contextlib.ExitStack() as stack:

        def start() -> head.Workers:
            check_networks(params, root)
            return stack.enter_context(head.started(options, params, root))

        workers = start() if due and not options.dry else None  # they import while DVC looks
        pipeline = dvc.Pipeline(root)
        changed, uncached = pipeline.changed()
        needed = plan.needs(params, due, changed, pipeline.stages, root)
        if options.dry:
            for line in needed.told():
                log.info("%s.", line)
            return []
        if needed.any:
            workers = workers or start()
            first = workers.check()
            suite = head.Suite(workers.client, params, needed, workers.jobs, workers.display, root)
            suite.first = first
            suite.run()
            _commit(pipeline, (changed | uncached | suite.ran) - suite.broken, suite.report(), root)
            return suite.failed

    def made() -> bool:
        if "report" in changed or not (root / "reports").is_dir():
            from pipelines.stages import report

            with cli.timed("the report"):
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
        whole -= {dvc.stage_of(now, cell) for cell in plan.unfinished(now, benchmark, root)}
    trouble, timed = list[Exception](), contextlib.ExitStack()
    timed.enter_context(cli.timed("the commit to DVC"))

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
