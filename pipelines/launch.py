"""`make repro`: everything that is not up to date, several cells at a time.

DVC runs one stage after the other. This runs the stages of a matrix side by side, each by
``dvc --wait-for-lock repro -s <stage>`` in a process group of its own: first the data, then the teachers,
then all cells, then the exports of their students, then the report. A cell that fails does not stop the
others; its reason is in the tables. The output of a stage is in ``.scratch/logs/``.
"""

from __future__ import annotations

import argparse
import io
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

from pipelines import cli, config
from pipelines.config import ROOT, ConfigError
from pipelines.results.records import write_bytes

WAVES = (
    ("fetch", "fetch_weights", "count"),
    ("train_teacher",),
    ("distill", "acfd"),
    ("export",),
)  # the stages of a wave do not need each other
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")

log = logging.getLogger(__name__)


class Launcher:
    """A pool of slots; a slot has a GPU of its own where there are any."""

    def __init__(self, jobs: int, gpus: Sequence[str], root: Path = ROOT) -> None:
        self.jobs, self.root = jobs, root
        self.slots: Queue[str | None] = Queue()
        for slot in range(jobs):
            self.slots.put(gpus[slot % len(gpus)] if gpus else None)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.guard = threading.RLock()  # re-entrant: a signal may come while this thread has it
        self.stopped = False

    def run(self) -> list[str]:
        """Run what is not up to date; the stages that failed."""
        stages = self._ask("stage", "list", "--name-only").split()
        failed: list[str] = []
        for wave in WAVES:
            own = [stage for stage in stages if stage.split("@")[0] in wave]
            if self.stopped or not own:
                continue
            changed = json.loads(self._ask("status", "--json", *own))
            failed += self._all([stage for stage in own if stage in changed])
        if not self.stopped and not self._stage("report", 1):
            failed.append("report")
        return failed

    def _all(self, stages: list[str]) -> list[str]:
        """Run stages side by side; those that failed."""
        with ThreadPoolExecutor(self.jobs) as pool:
            done = list(pool.map(lambda stage: self._stage(stage, len(stages)), stages))
        return [stage for stage, good in zip(stages, done, strict=True) if not good]

    def stop(self) -> None:
        """Start nothing more, and interrupt what runs: a cell resumes from its last state next time."""
        with self.guard:
            self.stopped = True
            for process in self.running.values():
                try:
                    os.killpg(process.pid, signal.SIGINT)
                except ProcessLookupError:
                    continue

    def _stage(self, stage: str, of: int) -> bool:
        gpu = self.slots.get()
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
                        [*DVC, "repro", "-s", stage],
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
            if status and not self.stopped:
                log.error("%s failed: %s", stage, reason(place))
            elif not status:
                with self.guard:
                    keep(self.root)
                log.info("%s: done in %.0f s (one of %d).", stage, time.monotonic() - began, of)
            return status == 0
        finally:
            self.slots.put(gpu)

    def _ask(self, *command: str) -> str:
        done = subprocess.run([*DVC, *command], cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"`dvc {' '.join(command[:2])}` failed: {done.stderr.strip()[-500:]}")
        return done.stdout


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
    if _content(place) is not None:
        write_bytes(root / ".scratch" / "dvc.lock", place.read_bytes())
        return
    text = place.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^(?=  \S)", text, flags=re.MULTILINE)[1:-1]  # the last stage is cut off
    found = [content for part in parts if isinstance(content := _parsed(part), dict)]
    committed = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=root, capture_output=True, check=False)
    kept = _content(root / ".scratch" / "dvc.lock", tries=1) or _parsed(
        committed.stdout.decode(errors="replace")
    )
    stages = dict(kept.get("stages", {})) if isinstance(kept, dict) else {}
    for name, stage in (item for content in found for item in content.items()):
        if isinstance(stage, dict) and "cmd" in stage:
            stages[name] = stage
    write_bytes(place.with_name("dvc.lock.damaged"), place.read_bytes())
    whole = io.BytesIO()
    YAML().dump({"schema": "2.0", "stages": stages}, whole)
    write_bytes(place, whole.getvalue())
    log.warning("dvc.lock is damaged: it is kept as dvc.lock.damaged, %d stages were restored.", len(stages))


def keep(root: Path) -> None:
    """Note dvc.lock while it is whole; another process may be writing it just now."""
    old, new = (_content(path, tries=1) for path in (root / ".scratch" / "dvc.lock", root / "dvc.lock"))
    if new is not None and len(new.get("stages", ())) >= len((old or {}).get("stages", ())):
        write_bytes(root / ".scratch" / "dvc.lock", (root / "dvc.lock").read_bytes())


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


def _parsed(text: str) -> Any:
    try:
        return config.parse_yaml(text, "dvc.lock")
    except ConfigError:
        return None


def reason(output: Path) -> str:
    """The sentence that a failed stage ended with."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.split("error: ", 1)[1] for line in lines if line.startswith("error: ")]
    return (
        errors[-1] if errors else f"see {output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}"
    )


def visible_gpus() -> list[str]:
    """The GPUs that a process may use, without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number, _ in enumerate(done.stdout.splitlines())] if done.returncode == 0 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--jobs", type=int, help="cells at a time; else one a GPU, or as many as the CPU has room for"
    )
    params, gpus = config.load(), visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = parser.parse_args().jobs or len(gpus) or max(1, cores // params.suite.threads)
    if jobs < 1:
        raise ConfigError(f"JOBS = {jobs}: it must be 1 or more.")
    launcher = Launcher(jobs, gpus)

    def stop(number: int, _: object) -> None:
        log.warning("stopping; the same command goes on from here.")
        launcher.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    heal()
    failed = launcher.run()
    if launcher.stopped:
        sys.exit(130)
    if failed:
        raise ConfigError(f"{len(failed)} of the stages failed: {', '.join(failed)}. The others are done.")


if __name__ == "__main__":
    cli.run(main)
