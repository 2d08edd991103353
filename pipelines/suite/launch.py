"""`make repro`: everything that is not up to date, several cells at a time.

DVC runs one stage after the other. This runs the stages of a matrix side by side, each by
``dvc --wait-for-lock repro -s <stage>`` in a process group of its own: first the data, then the teachers,
then all cells, then the exports of their students, then the report. A cell that fails does not stop the
others; its reason is in the tables. The output of a stage is in ``.scratch/logs/``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from ruamel.yaml import YAML

from pipelines import cli, config, files
from pipelines.config import PAPER, ROOT, ConfigError, Params
from pipelines.engine import checkpoint
from pipelines.files import write_bytes
from pipelines.methods import checked
from pipelines.runs import exports, records
from pipelines.runs.records import Cell
from pipelines.stages import report

WAVES = (
    ("fetch", "fetch_weights", "count"),
    ("train_teacher",),
    ("distill", "acfd"),
    ("export",),
)  # the stages of a wave do not need each other
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")

BUSY = "it is being blocked by"  # what DVC says of a stage that another process of it has, and does not wait

log = logging.getLogger(__name__)


class Launcher:
    """A pool of slots; a slot has a GPU of its own where there are any."""

    def __init__(self, jobs: int, gpus: Sequence[str], root: Path = ROOT) -> None:
        self.jobs, self.root = jobs, root
        self.slots: Queue[str | None] = Queue()
        for slot in range(jobs):
            self.slots.put(gpus[slot % len(gpus)] if gpus else None)
        self.running: dict[str, subprocess.Popen[Any]] = {}
        self.guard = threading.RLock()  # re-entrant: a signal may come while this thread has it
        self.stopped = False
        self.cells: dict[str, Cell] = {}
        self.exports: dict[str, Path] = {}  # the records of the stages that make one

    def run(self) -> list[str]:
        """Run what is not up to date; the stages that failed."""
        stages = self._ask("stage", "list", "--name-only").split()
        params = config.load(self.root / "params.yaml")
        self.cells, owners = stages_of(params)
        self.exports = {
            f"export@{name}-{student}": exports.path(name, student, self.root)
            for name in params.suite.benchmarks
            for student in params.suite.students
        }
        failed: list[str] = []
        broken: dict[str, str] = {}  # benchmarks without data or teacher, and the stage that failed
        for wave in WAVES:
            own = [stage for stage in stages if stage.split("@")[0] in wave]
            if self.stopped or not own:
                continue
            changed = json.loads(self._ask("status", "--json", *own))
            tried = [stage for stage in own if owners.get(stage) not in broken]
            for name, stage in broken.items():
                if blocked := [other for other in own if other in changed and owners.get(other) == name]:
                    log.error("%s: %d stages are not tried, because %s failed.", name, len(blocked), stage)
            own = [stage for stage in tried if stage in changed]
            for stage in set(tried) - set(own):
                if (cell := self.cells.get(stage)) is not None:  # what failed has been put right
                    records.failure_note(cell, self.root).unlink(missing_ok=True)
            failed += self._all(own)
            failed += self._again(set(tried) - set(failed))
            if "distill" not in wave:
                broken |= {owners[stage]: stage for stage in failed if stage in owners}
        if not self.stopped and not self._stage("report", 1):
            failed.append("report")
        return failed

    def _all(self, stages: list[str], *options: str) -> list[str]:
        """Run stages side by side; those that failed."""
        with ThreadPoolExecutor(self.jobs) as pool:
            done = list(pool.map(lambda stage: self._stage(stage, len(stages), *options), stages))
        return [stage for stage, good in zip(stages, done, strict=True) if not good]

    def _again(self, stages: set[str]) -> list[str]:
        """Train those cells again whose record is none of today's, though DVC has not seen why: a control of
        equal compute whose partners now cost something else, a setting that changed as a stage ended. Those
        that failed."""
        if self.stopped or not stages & self.cells.keys():
            return []
        try:
            params = config.load(self.root / "params.yaml")  # as DVC has just read it
            found = report.finished(params, self.root)
        except ConfigError:  # a damaged record: the report says so
            return []
        old = {cell for own in found.values() for cell in records.outdated(own, params)}
        return self._all([stage for stage in sorted(stages) if self.cells.get(stage) in old], "--force")

    def stop(self) -> None:
        """Start nothing more, and interrupt what runs: a cell resumes from its last state next time."""
        with self.guard:
            self.stopped = True
            for process in self.running.values():
                try:
                    os.killpg(process.pid, signal.SIGINT)
                except ProcessLookupError:
                    continue

    def _stage(self, stage: str, of: int, *options: str) -> bool:
        gpu, before = self.slots.get(), self._record(stage)
        try:
            environment = dict(os.environ)
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            place = self.root / ".scratch" / "logs" / f"{stage.replace('@', '--')}.log"
            place.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            with place.open("wb") as output:
                with self.guard:
                    if self.stopped:
                        return False
                    process = subprocess.Popen(
                        [*DVC, "repro", "-s", *options, stage],
                        cwd=self.root,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # so that stop() reaches dvc, its shell and the training
                    )
                    self.running[stage] = process
                status = process.wait()
            with self.guard:
                del self.running[stage]
            if status and not all(file.is_file() for file in before):
                for file, content in before.items():
                    write_bytes(file, content)
            if status and not self.stopped:
                why = reason(place)
                log.error("%s failed: %s", stage, why)
                self._note(stage, why)
            elif not status:
                with self.guard:
                    keep(self.root)
                    checkpoint.forget(self.root)
                log.info("%s: done in %.0f s (one of %d).", stage, time.monotonic() - began, of)
            return status == 0
        finally:
            self.slots.put(gpu)

    def _note(self, stage: str, why: str) -> None:
        """Why a cell stopped, where it could not say so itself: one that the system has killed, for want of
        memory perhaps."""
        cell = self.cells.get(stage)
        if cell is not None and records.failure(cell, self.root) is None:
            text = f"it was stopped, perhaps by the system for want of memory ({why})"
            write_bytes(records.failure_note(cell, self.root), f"{text}\n".encode())

    def _record(self, stage: str) -> dict[Path, bytes]:
        """The files of the record that a stage makes anew. DVC deletes them first: they are kept until it is
        through, so that a failure or Ctrl-C loses no result."""
        files = [self.exports[stage]] if stage in self.exports else []
        if (cell := self.cells.get(stage)) is not None:
            files = [cell.folder(self.root) / name for name in records.RECORD_FILES]
        return {file: file.read_bytes() for file in files if file.is_file()}

    def _ask(self, *command: str) -> str:
        waited = False
        while True:
            with self.guard:
                if self.stopped:
                    sys.exit(130)
                process = subprocess.Popen(
                    [*DVC, *command],
                    cwd=self.root,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for stop()
                )
                self.running["dvc"] = process
            output, errors = process.communicate()
            with self.guard:
                del self.running["dvc"]
            if not process.returncode or BUSY not in errors or self.stopped:
                break
            if not waited:
                log.warning("another dvc is at work here: waiting until it ends. %s", errors.strip()[-300:])
            waited = True
            time.sleep(3)
        if process.returncode and self.stopped:
            sys.exit(130)
        if process.returncode:
            raise ConfigError(f"`dvc {' '.join(command[:2])}` failed: {errors.strip()[-500:]}")
        return output


def stages_of(params: Params) -> tuple[dict[str, Cell], dict[str, str]]:
    """The stages of the suite that train a cell, with the cell, and all that belong to a benchmark, with its
    name; as dvc.yaml calls them."""
    suite = params.suite
    cells, owners = {}, {}
    for name in suite.benchmarks:
        cells[f"train_teacher@{name}"] = records.teacher_cell(params, name)
        for student, seed in itertools.product(suite.students, suite.seeds):
            stage = f"{name}-{student}"
            cells |= {f"distill@{stage}-{m}-{seed}": Cell(name, student, m, seed) for m in params.methods}
            cells |= {
                f"{PAPER}@{stage}-{variant}-{seed}": Cell(name, student, f"{PAPER}-{variant}", seed)
                for variant in suite.variants
            }
            owners[f"export@{stage}"] = name
        owners[f"fetch@{name}"] = name
    return cells, owners | {stage: cell.benchmark for stage, cell in cells.items()}


def heal(root: Path = ROOT) -> None:
    """Make the two files whole that DVC does not write whole, in case it was killed while it wrote one.

    Its list of busy files is begun anew. Its dvc.lock gets the stages that are whole in it, and the others
    from the last one that was whole; a stage that is in neither runs again.
    """
    busy, place = root / ".dvc" / "tmp" / "rwlock", root / "dvc.lock"
    if busy.is_file() and _content(busy) is None:
        log.warning("%s is damaged: DVC begins it anew.", busy.relative_to(root))
        busy.unlink(missing_ok=True)
    if not place.is_file():
        return
    content, last = place.read_bytes(), _kept(root)
    if (found := _content(place)) is not None and (
        content == _committed(root) or _whole(found, last, content, root)
    ):
        write_bytes(root / ".scratch" / "dvc.lock", content)
        return
    parts = re.split(r"^(?=  \S)", content.decode(errors="replace"), flags=re.MULTILINE)[1:]
    stages = dict(last)
    for number, part in enumerate(parts, 1):
        for name, stage in (_parsed(part) or {}).items():
            if (
                isinstance(stage, dict)
                and "cmd" in stage
                and (number < len(parts) or _ended(name, stage, last.get(name), root))
            ):
                stages[name] = stage
    write_bytes(place.with_name("dvc.lock.damaged"), content)
    whole = io.BytesIO()
    YAML().dump({"schema": "2.0", "stages": stages}, whole)
    write_bytes(place, whole.getvalue())
    log.warning("dvc.lock is damaged: it is kept as dvc.lock.damaged, %d stages were restored.", len(stages))


def _committed(root: Path) -> bytes:
    """The dvc.lock of the commit that is checked out; empty when there is none."""
    command = ["git", "show", "HEAD:./dvc.lock"]
    return subprocess.run(command, cwd=root, capture_output=True, check=False).stdout


def _kept(root: Path) -> dict[str, Any]:
    """The stages of the last dvc.lock that was whole: noted here, or else committed."""
    found = _content(root / ".scratch" / "dvc.lock", tries=1) or _parsed(
        _committed(root).decode(errors="replace")
    )
    stages = found.get("stages") if isinstance(found, dict) else None
    return dict(stages) if isinstance(stages, dict) else {}


def _whole(content: dict[str, Any], last: dict[str, Any], text: bytes, root: Path) -> bool:
    """Whether a dvc.lock is not cut off, though most of its beginnings are valid YAML. One that lacks the end
    of the last whole one is; one that lacks other stages had them taken out."""
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages or not text.endswith(b"\n"):
        return False
    names = list(stages)
    if len(names) < len(last) and names == list(last)[: len(names)]:
        return False
    return _ended(names[-1], stages[names[-1]], last.get(names[-1]), root)


def _ended(name: str, stage: Any, before: Any, root: Path) -> bool:
    """Whether a stage of dvc.lock has its end, which is the size of its last output; ``before`` is what it
    was. It may have fewer outputs than dvc.yaml says, or than before, but not both."""

    def outs(of: Any) -> list[Any]:
        found = of.get("outs") if isinstance(of, dict) else None
        return found if isinstance(found, list) else []

    declared = (_content(root / "dvc.yaml", tries=1) or {}).get("stages", {}).get(name.split("@")[0], {})
    wanted = sum(len(declared.get(kind) or []) for kind in ("outs", "metrics", "plots")) if declared else 1
    if before is not None:
        wanted = min(wanted, len(outs(before)))
    return len(outs(stage)) >= wanted and all(isinstance(out, dict) and "size" in out for out in outs(stage))


def keep(root: Path) -> None:
    """Note dvc.lock while it is whole; another process may be writing it just now."""
    new = _content(root / "dvc.lock", tries=1)
    if new is not None and _whole(new, _kept(root), content := (root / "dvc.lock").read_bytes(), root):
        write_bytes(root / ".scratch" / "dvc.lock", content)


def _content(file: Path, tries: int = 3) -> dict[str, Any] | None:
    """A file of DVC, YAML or JSON; None when it is damaged, on the last of a few looks, as it may be being
    written."""
    for number in range(tries):
        time.sleep(0.4 * number)
        try:
            if isinstance(found := config.read_yaml(file), dict):
                return found
        except ConfigError:
            continue
    return None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = config.parse_yaml(text, "dvc.lock")
    except ConfigError:
        return None
    return found if isinstance(found, dict) else None


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
                f"The suite needs the encoder weights '{key}', of which params.yaml has no sum: run `python "
                f"-m pipelines.stages.fetch_weights --weights {key}`, which says the one of the file, and "
                f"write it there (weights.{key}.sha256) if you trust it."
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


def reason(output: Path) -> str:
    """The sentence that a failed stage ended with."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.split(": ", 1)[1] for line in lines if line.startswith("ERROR: ")][:1]
    errors += [line.split(": ", 1)[1] for line in lines if line.startswith("error: ")]
    return (
        errors[-1] if errors else f"see {output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}"
    )


def visible_gpus() -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them, without importing torch; of one
    that is split (MIG) its parts."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
        return list(itertools.takewhile(lambda gpu: not gpu.startswith("-"), named))  # as CUDA reads it
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    found: list[list[str]] = []  # a GPU, then its parts
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if (identity := re.search(r"\(UUID: (\S+)\)", line)) is None:
            continue
        if line.startswith("GPU"):
            found.append([])
        if found:
            found[-1].append(identity[1])
    return [name for gpu, *parts in found for name in parts or [gpu]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--jobs", type=int, help="cells at a time; else one a GPU, or as many as the CPU has room for"
    )
    params, gpus = checked(config.load()), visible_gpus()
    check_networks(params)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = parser.parse_args().jobs
    if jobs is None:
        jobs = len(gpus) or max(1, cores // params.suite.threads)
    if jobs < 1:
        raise ConfigError(f"JOBS = {jobs}: it must be 1 or more.")
    launcher = Launcher(jobs, gpus)

    def stop(number: int, _: object) -> None:
        log.warning("stopping; the same command goes on from here.")
        launcher.stop()

    with files.hold(ROOT / ".scratch" / "locks" / "launch.lock", "`make repro`"):
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: either ends one that waits
            signal.signal(number, stop)
        heal()
        failed = launcher.run()
    if launcher.stopped:
        sys.exit(130)
    if failed:
        raise ConfigError(f"{len(failed)} of the stages failed: {', '.join(failed)}. The others are done.")


if __name__ == "__main__":
    cli.run(main)
