"""Run a part of the pipeline again and again in children that kill themselves, and print what comes out.

``python killable.py pack|fetch|report ROOT KILLS SEED``, ROOT being a folder with params.yaml and what the
part needs. Events are the moments at which a kill could hurt: before a file is synced, before and after it
takes its name, before a step, before an evaluation, around a run in MLflow. A child is forked from this
process, in which everything is imported but nothing has run, and sends SIGKILL to itself at a random event
of each kind in turn. Whenever one gets through, the outcome is noted and the part starts from nothing, until
there were KILLS kills and the last one was survived. The last line is the sum of the outcome.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines import config
from pipelines.datasets import transforms
from pipelines.engine import pack, train
from pipelines.methods import checked
from pipelines.networks import SegmentationNetwork
from pipelines.runs import tracking
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages import fetch, report

PACK = [Cell("streets", "pspnet-resnet18", method, 0) for method in ("skd", "none")]


def part(name: str, root: Path) -> None:
    params = config.load(root / "params.yaml")
    if name == "fetch":
        fetch.fetch(root / "data", "streets", params.benchmark("streets"))
    elif name == "report":
        report.report(params, root)
    else:
        pack.run_cell(teacher_cell(params, "streets"), checked(params), root)
        if failures := [failure for failure in pack.run_pack(PACK, params, root).values() if failure]:
            raise failures[0]


def watch(event: Callable[[str], None]) -> None:
    """Call ``event`` with its name at every moment that matters."""

    def before(owner: Any, name: str, label: str, after: bool = False) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            event(label)
            result = real(*args, **kwargs)
            if after:
                event(f"after {label}")
            return result

        setattr(owner, name, watched)

    before(os, "fsync", "sync")
    before(Path, "replace", "replace", after=True)
    before(Path, "rename", "rename", after=True)
    before(Path, "write_bytes", "write")
    before(transforms, "training_batch", "step")
    before(pack, "evaluate", "evaluation")
    before(pack, "checked_teacher", "teacher")
    before(Image.Image, "save", "image")
    before(tracking, "_write", "MLflow run", after=True)
    train.SAVE_EVERY, train.SAVE_SHARE, train.LOG_EVERY = 0.0, 0.0, 1


def child(name: str, root: Path, at: tuple[str, int] | None, note: Path) -> int:
    """Fork; the child runs the part and dies at the n-th event of a name, or notes all names. Its wait
    status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen: list[str] = []

    def event(label: str) -> None:
        seen.append(label)
        if at is not None and (label, seen.count(label)) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        watch(event)
        part(name, root)
        note.write_text("\n".join(seen))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def outcome(name: str, root: Path) -> str:
    """A sum over all that must not depend on kills, which is everything but times."""
    kinds = {
        "fetch": ("data", ("*.json", "*.png", "*.txt")),
        "pack": ("runs", ("*.safetensors", "metrics.json", "confusion.npz", "history.csv")),
        "report": ("reports", ("*.csv", "*.md", "*.tex", "*.png")),
    }
    folder, patterns = kinds[name]
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in (root / folder).rglob(pattern)):
        total.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    if left := [str(path) for path in (root / folder).rglob("*.part*")]:
        sys.exit(f"kills have left {left}")
    return total.hexdigest()


def clear(name: str, root: Path) -> None:
    for folder in {"fetch": ["data"], "pack": ["runs", ".scratch"], "report": ["reports"]}[name]:
        shutil.rmtree(root / folder, ignore_errors=True)
    if name == "report":
        (root / "mlflow.db").unlink(missing_ok=True)


def main() -> None:
    name, root, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if name == "report":
        importlib.import_module("mlflow")
    if name == "pack":  # what a training imports late, once for all children
        SegmentationNetwork(checked(config.load(root / "params.yaml")).students[PACK[0].student], 2)
    note, draw, places = root / ".event", random.Random(seed), Counter[str]()
    if child(name, root, None, note):
        sys.exit("the part failed before any kill")
    events, outcomes = Counter(note.read_text().splitlines()), {outcome(name, root)}
    labels = draw.sample(sorted(events), len(events))
    through, attempts = True, 0
    while sum(places.values()) < kills or not through:  # the last kill too must be survived
        if through and kills:
            clear(name, root)
        label = labels[attempts % len(labels)]  # each kind of moment in its turn
        attempts += 1
        at = (label, draw.randint(1, events[label])) if sum(places.values()) < kills else None
        status = child(name, root, at, note)
        through = not os.WIFSIGNALED(status)
        if not through:
            places[label] += 1
        elif os.WEXITSTATUS(status):
            sys.exit(f"the part failed after {dict(places)}")
        else:
            outcomes.add(outcome(name, root))
    note.unlink(missing_ok=True)
    if len(outcomes) > 1:
        sys.exit(f"{len(outcomes)} different outcomes after {dict(places)}")
    listed = ", ".join(f"{n} at {place}" for place, n in sorted(places.items()))
    sys.stdout.write(f"{sum(places.values())} kills ({listed})\n{outcomes.pop()}\n")


if __name__ == "__main__":
    main()
