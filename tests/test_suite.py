"""`make repro` with real processes: on several workers, on a cluster, killed, stopped, twice at once; what
DVC notes of it; which cells are due and how they are shared out.

A short version runs with the other tests; ``make torture`` sets ACFD_TORTURE and runs the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.system
import distributed
import psutil
import pytest
from conftest import ROOT, TALLY, copy_repository, read_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from suites import (
    ATTEMPTS,
    RIVALS,
    TORTURE,
    change,
    dvc,
    environment,
    git,
    lockfile,
    mlflow_runs,
    new_suite,
    processes_in,
    repro,
    run_dvc,
    slow,
    start,
    tables,
    trained_by,
    until,
    varied,
    weights,
)

from pipelines import config, files
from pipelines.config import ConfigError
from pipelines.engine import pack as engine_pack
from pipelines.engine.machine import cores
from pipelines.reports.results import label
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages import report
from pipelines.suite import cluster, display, plan, work
from pipelines.suite import dvc as pipeline
from pipelines.suite import head as suite_head
from pipelines.suite import repro as command
from pipelines.suite.dvc import stage_of
from pipelines.suite.head import Suite, started
from pipelines.suite.plan import Needs, needs
from pipelines.tools import keep

pytestmark = varied
NONE = Cell("streets", "pspnet-resnet18", "none", 0)
SLOW, BAD = (Cell("streets", "pspnet-resnet18", method, 0) for method in ("slow", "bad"))
DONE = ["FINISHED"] * (len(RIVALS) + 3)  # of MLflow: the teacher, the control and the paper's method too
METHOD = '''"""For a test."""

import time

from pipelines.method import Distiller, MethodConfig


class Method(Distiller):
    Config = MethodConfig
    student_taps = teacher_taps = ("logits",)

    def losses(self, student, teacher, batch):
        {act}
        return {{"own": 0.1 * (student["logits"] - teacher["logits"]).square().mean()}}
'''


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny suite after `dvc repro`. Do not change it."""
    root = new_suite(tmp_path_factory.mktemp("serial"))
    subprocess.run(dvc("repro"), cwd=root, env=environment(root), check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same suite after `make repro` with two workers. A test may run it again, and changes nothing."""
    root = new_suite(tmp_path_factory.mktemp("parallel"))
    repro(root, "--jobs", "2")
    return root


@pytest.fixture
def copy(parallel: Path, tmp_path: Path) -> Path:
    """A copy of the finished suite that a test may change."""
    shutil.copytree(parallel, tmp_path / "suite", symlinks=True)
    return tmp_path / "suite"


def same(root: Path, serial: Path) -> None:
    """Nothing was lost, mixed up, trained twice or left behind."""
    assert weights(root) == weights(serial)
    assert tables(root) == tables(serial)
    assert mlflow_runs(root) == DONE
    assert not list((root / "runs").rglob(".*.part"))
    assert not list((root / ".scratch").rglob("state.pt"))
    assert clean(root)
    assert processes_in(root) == []


def clean(root: Path) -> bool:
    done = run_dvc(root, "status", "--json")
    return done.returncode == 0 and json.loads(done.stdout) == {}


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*.json")}


def add(root: Path, method: str, act: str) -> None:
    """A method of a test, part of the suite."""
    (root / "baselines" / f"{method}.py").write_text(METHOD.format(act=act))

    def entry(raw: dict[str, Any]) -> None:
        raw["methods"].setdefault(method, {})
        if method not in raw["suite"]["methods"]:
            raw["suite"]["methods"] = [*raw["suite"]["methods"], method]

    change(root, entry)


def statuses(root: Path) -> dict[str, str]:
    with (root / "reports/streets/comparison.csv").open(newline="") as file:
        return {row["method"]: row["status"] for row in csv.DictReader(file)}


# ---- the same bytes


@slow
def test_two_workers_give_the_bytes_of_a_serial_run(serial: Path, parallel: Path) -> None:
    same(parallel, serial)
    assert not (parallel / ATTEMPTS).exists(), (parallel / ATTEMPTS).read_text()
    TALLY.append(
        "parallel, two workers: tables and weights are those of the serial run; nothing else is called"
    )


@slow
def test_a_second_run_finds_nothing_to_do(parallel: Path) -> None:
    """Neither torch nor Dask is imported, so no worker starts."""
    before = stamps(parallel)
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.suite.repro"]

    def run() -> None:
        done = subprocess.run(
            command, cwd=parallel, env=environment(parallel), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert not re.search(r"\| +(torch|distributed|mlflow)$", done.stderr, re.M)
        assert stamps(parallel) == before

    run()
    file = parallel / "baselines" / "none.py"
    text = file.read_text()
    file.write_text(f"{text}\n# a comment\n")
    try:
        run()  # DVC is told, nothing is trained
        assert clean(parallel)
    finally:
        file.write_text(text)
    run()
    out = run_dvc(parallel, "repro").stdout
    assert "Running stage" not in out and "up to date" in out


@slow
def test_one_worker_gives_the_bytes_of_a_serial_run(serial: Path, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    repro(root, "--jobs", "1")
    same(root, serial)
    repro(serial)
    same(serial, root)  # after `dvc repro` there is nothing to do


@contextmanager
def running(root: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers, started by hand on the loopback; its address, and the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def dask(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            cwd=root,
            env=environment(root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    port = address.rpartition(":")[2]
    all_ = [dask("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")]
    worker = ("worker", address, "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard")
    all_ += [dask(*worker, "--local-directory", str(root / ".scratch" / "dask")) for _ in range(2)]
    try:
        yield address, all_
    finally:
        for process in reversed(all_):
            process.terminate()
        for process in all_:
            process.wait(60)
        until(lambda: not processes_in(root))


@slow
def test_a_running_cluster_gives_the_bytes_of_a_serial_run(serial: Path, tmp_path: Path) -> None:
    """Then it is killed while it trains: the next run goes on without it."""
    root = new_suite(tmp_path / "suite")
    with running(root) as (address, _):
        repro(root, "--scheduler", address)
        assert weights(root) == weights(serial) and tables(root) == tables(serial)
        assert clean(root)
    same(root, serial)
    add(root, "slow", "time.sleep(1)")
    with running(root) as (address, (scheduler, *_)):
        process = start(root, "--scheduler", address)
        until(lambda: trained_by(SLOW, root) in processes_in(root))
        scheduler.kill()
        _, text = process.communicate(timeout=300)
        assert process.returncode == 1 and "error: The scheduler of Dask is gone." in text, text
        assert "Traceback" not in text and text.count("\n") < 6, text
    repro(root)
    assert records.read(SLOW, root) is not None and clean(root)
    TALLY.append("cluster, a scheduler and two workers on the loopback: the bytes of the serial run")
    TALLY.append("cluster, the scheduler killed: one sentence, the next run goes on")


# ---- kills, Ctrl-C, failures


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_killed_worker_ctrl_c_and_a_failing_cell_lose_nothing(copy: Path) -> None:
    """A pack of two: one cell fails, and no other. Its worker is killed: another one resumes. Ctrl-C, which a
    terminal sends to all: one sentence. Then what failed is put right."""
    train = copy / "pipelines" / "engine" / "train.py"
    train.write_text(train.read_text().replace("SAVE_EVERY = 20.0", "SAVE_EVERY = 0.0"))
    before = stamps(copy)
    add(copy, "slow", "time.sleep(2)")  # to be stopped, a worker waits for seconds
    add(copy, "bad", 'raise RuntimeError("the paper left this out")')
    state = SLOW.scratch(copy) / "state.pt"
    process = start(copy, "--jobs", "1")
    until(state.is_file)
    first = trained_by(SLOW, copy)
    assert first is not None and first in processes_in(copy)
    os.kill(first, signal.SIGKILL)
    until(lambda: trained_by(SLOW, copy) not in (None, first))
    until(lambda: trained_by(SLOW, copy) in processes_in(copy))
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    last = text.splitlines()[-1]
    assert last == "stopped; the same command goes on from here." and text.count(last) == 1, text
    assert "Traceback" not in text
    assert processes_in(copy) == []
    assert state.is_file() and records.read(SLOW, copy) is None

    reason = records.failure(BAD, copy) or ""
    assert reason.startswith("RuntimeError: the paper left this out (baselines/bad.py, line ")
    said = repro(copy, "--jobs", "1", status=1)
    assert "1 failed; the others are done." in said
    assert f"{BAD.path}: RuntimeError: the paper left this out" in said
    assert "RuntimeError: the paper left this out" in statuses(copy)["bad"]
    assert statuses(copy)["slow"] == "complete"
    kept = weights(copy)
    add(copy, "bad", "pass")
    repro(copy, "--jobs", "1")
    assert statuses(copy)["bad"] == statuses(copy)["slow"] == "complete"
    assert records.failure(BAD, copy) is None
    assert before.items() <= stamps(copy).items() and kept.items() <= weights(copy).items()
    assert clean(copy)

    # that of the formula trained without a stop, the same bit for bit
    slow_, bad = (
        {Path(name).name: content for name, content in weights(copy).items() if f"/{method}/" in name}
        for method in ("slow", "bad")
    )
    assert slow_ == bad and slow_
    TALLY.append(
        "kill, a worker in the middle of a pack: another one resumes; then Ctrl-C: the same bit for bit"
    )
    TALLY.append("parallel, one cell fails: the others are done, the table says why; put right, it runs")


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("Cluster failed to start: a port is taken")])
def test_processes_that_do_not_start_are_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(distributed, "SpecCluster", late)
    said = rf"did not start \({type(error).__name__}.*busy or short of memory.*fewer JOBS"
    with pytest.raises(ConfigError, match=said), cluster.local(1, [], False, tmp_path):
        pass


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("wait", [0.0, 0.3, 1.0, 2.0, 4.0, 6.0])
def test_ctrl_c_while_python_imports(wait: float, parallel: Path) -> None:
    process = start(parallel, "--jobs", "2")

    def listens() -> bool:  # Python itself catches no SIGTERM
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> (signal.SIGTERM - 1) & 1)

    until(listens)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, text) in (
        (130, "stopped; the same command goes on from here.\n"),
        *([(0, "")] if wait else []),
    )
    assert processes_in(parallel) == []


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_stopped_suite_loses_nothing(serial: Path, tmp_path: Path) -> None:
    """By Ctrl-C, by a signal to the head alone, and killed, so that its workers have to see it."""
    root, draw = new_suite(tmp_path / "suite"), random.Random(3)
    ways = {
        "Ctrl-C": lambda process: os.killpg(process.pid, signal.SIGINT),
        "SIGTERM": lambda process: process.send_signal(signal.SIGTERM),
        "SIGKILL": lambda process: process.kill(),
    }
    order = ["Ctrl-C", "SIGTERM", "SIGKILL", "SIGKILL"]
    for way in order:
        process = start(root, "--jobs", "2")
        time.sleep(draw.uniform(3, 14))
        ways[way](process)
        _, text = process.communicate(timeout=60)
        if way == "SIGKILL":
            until(lambda: not processes_in(root), 60)
        else:
            assert process.returncode in (0, 130) and "Traceback" not in text, text
            assert processes_in(root) == []
    repro(root, "--jobs", "2")
    same(root, serial)
    TALLY.append(
        "kill, the head: Ctrl-C, SIGTERM, 2 times SIGKILL, after which the workers end by themselves: "
        "the next run finishes, the same bit for bit"
    )


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_it_commits(number: int, serial: Path, copy: Path) -> None:
    (copy / "dvc.lock").unlink()
    talk = copy / "pipelines" / "suite" / "dvc.py"
    text = talk.read_text()
    pause = "stage.save(run_cache=False)"
    talk.write_text(text.replace(pause, f"(self.root / 'busy').touch(); time.sleep(0.5); {pause}"))
    process = start(copy)
    until((copy / "busy").is_file)
    time.sleep(1)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9) and "Traceback" not in said, said
    talk.write_text(text)
    repro(copy)
    same(copy, serial)


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("whom", ["dvc alone", "everything"])
def test_killed_dvc(whom: str, serial: Path, tmp_path: Path) -> None:
    """Of dvc alone: its child trains on as an orphan, while the next `dvc repro` begins at once."""
    root, draw = new_suite(tmp_path / "suite"), random.Random(whom)
    orphans, kills = 0, 4
    for _ in range(kills):
        process = subprocess.Popen(
            dvc("repro"),
            cwd=root,
            env=environment(root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(1, 12))
        if whom == "everything":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        orphans += bool(processes_in(root))
    repro(root)
    until(lambda: not processes_in(root))
    same(root, serial)
    note = f", {orphans} times with a child left running" if whom == "dvc alone" else ""
    TALLY.append(f"kill, dvc repro, {whom}: {kills} kills{note}: the outcome is the same bit for bit")


@slow
def test_two_suites_at_once(serial: Path, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    both = [start(root, "--jobs", "2") for _ in range(2)]
    texts = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    (waited,) = [text for text in texts if "`make repro` is being run by process" in text]
    assert "done in" not in waited  # it found nothing to do
    same(root, serial)
    TALLY.append("parallel, two suites at once: the second waits, nothing is trained twice")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_suite_that_waits_can_be_stopped(number: int, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    with files.hold(root / ".scratch" / "locks" / "repro.lock", "the test"):
        process = start(root)
        assert process.stderr is not None
        said = process.stderr.readline()
        assert f"`make repro` is being run by process {os.getpid()}: waiting" in said
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 130


@slow
def test_settings_that_change_while_a_suite_runs_are_taken_for_nothing(copy: Path) -> None:
    add(copy, "slow", "time.sleep(2)")
    process = start(copy, "--jobs", "1")
    until(lambda: trained_by(SLOW, copy) in processes_in(copy))
    change(copy, lambda raw: raw["benchmarks"]["streets"]["training"].update(lr=0.011))
    _, text = process.communicate(timeout=300)
    assert process.returncode == 1 and f"Since {SLOW.path} began, its settings" in text, text
    assert "Traceback" not in text and records.read(SLOW, copy) is None
    change(copy, lambda raw: raw["benchmarks"]["streets"]["training"].update(lr=0.02))
    repro(copy)
    assert records.read(SLOW, copy) is not None and clean(copy)


@pytest.mark.parametrize("fetch", [[], ["streets"]])
def test_networks_are_counted_at_last_whatever_failed(
    fetch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"  # tasks are pickled
    ran.touch()

    def failing(_: object, benchmark: str) -> work.Outcome:
        ran.write_text(f"{ran.read_text()}{benchmark} ")
        return work.Outcome(failure="it is gone")

    def counting(_: object) -> work.Outcome:
        ran.write_text(f"{ran.read_text()}count ")
        return work.Outcome()

    monkeypatch.setattr(work, "fetch", failing)
    monkeypatch.setattr(work, "count", counting)
    params = config.Params.model_validate(tiny(read_params()))
    with distributed.Client(processes=False, n_workers=1, dashboard_address=None) as client:
        shown = display.Display()
        suite = Suite(client, params, Needs(count=True, fetch=fetch), 1, shown, tmp_path)
        suite.run()
        shown.close()
    assert ran.read_text().split() == [*fetch, "count"]
    assert suite.failed == [f"data of {name}: it is gone" for name in fetch]
    assert suite.ran == {"count"}
    assert {f"fetch@{name}" for name in fetch} <= suite.broken


@pytest.mark.parametrize("fetch", [[], ["streets"]])
@pytest.mark.parametrize("failure", [None, "the network is gone"])
def test_nothing_is_trained_before_the_encoder_weights_are_there(
    fetch: list[str], failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it left out when they could not be had: not every cell needs them."""
    ran = tmp_path / "ran"  # tasks are pickled

    def note(name: str) -> None:
        with ran.open("a") as file:
            file.write(f"{name} ")

    def loading(_: object, key: str) -> work.Outcome:
        time.sleep(0.2 if key == "a" else 1.0)  # a worker is free meanwhile
        note(key)
        return work.Outcome(failure=failure)

    def training(_: object, __: object) -> work.Outcome:
        note("teacher")
        return work.Outcome(failure="it is enough")

    monkeypatch.setattr(work, "fetch", lambda *_: work.Outcome())
    monkeypatch.setattr(work, "fetch_weights", loading)
    monkeypatch.setattr(work, "train", training)
    params = config.Params.model_validate(tiny(read_params()))
    needed = Needs(weights=["a", "b"], fetch=fetch, due={"streets": plan.due(params, "streets", tmp_path)})
    with distributed.Client(processes=False, n_workers=3, dashboard_address=None) as client:
        shown = display.Display()
        suite = Suite(client, params, needed, 3, shown, tmp_path)
        suite.run()
        shown.close()
    assert ran.read_text().split() == ["a", "b", "teacher"]
    assert suite.failed[0] == (
        "encoder weights a: the network is gone" if failure else "teacher of streets: it is enough"
    )


@slow
@pytest.mark.parametrize("what", ["the data", "the teacher"])
def test_nothing_is_tried_or_lost_without(what: str, copy: Path) -> None:
    """No mirror, no network; or a teacher that does not train."""
    own = {"dataset": "cityscapes", "mirror": None, "holdout": ["ulm"], "size": [32, 48]}

    def damage(raw: dict[str, Any]) -> None:
        if what == "the data":
            raw["benchmarks"]["streets"]["data"] = own
        else:
            raw["benchmarks"]["streets"]["teacher"]["training"]["lr"] = 1e30

    before = weights(copy)
    change(copy, damage)
    planned = len(plan.suite_cells(config.load(copy / "params.yaml"), "streets"))
    repro(copy, "--jobs", "2", status=1)
    text = repro(copy, "--jobs", "2", status=1)  # nor is what failed taken for done
    if what == "the data":
        assert "data of streets failed: " in text and "leftImg8bit_trainvaltest.zip" in text
        assert f"{planned} trainings are not tried, because its data could not be had" in text
    else:
        assert "is not finite" in text
        assert f"{planned} trainings are not tried, because its teacher failed" in text
    assert weights(copy) == before


# ---- DVC


@slow
def test_a_damaged_dvc_lock_loses_no_training(serial: Path, copy: Path) -> None:
    lock, before = copy / "dvc.lock", stamps(copy)
    content = lock.read_bytes()
    conflict = (
        b"<<<<<<< HEAD\n" + content[:500] + b"=======\n" + content[:700] + b">>>>>>> theirs\n" + content
    )
    line = content.index(b"\n", len(content) // 2) + 1
    damages = [content[: len(content) // 2] + b"\n- 'x", conflict, b"", content[:line]]
    for damage in damages:
        lock.write_bytes(damage)
        (copy / ".dvc" / "tmp" / "rwlock").write_text("{")
        text = repro(copy)
        if damage != content[:line]:  # a file with fewer entries
            assert "dvc.lock is damaged" in text
            assert (copy / "dvc.lock.damaged").read_bytes() == damage
        assert stamps(copy) == before
        same(copy, serial)
    TALLY.append(
        f"corruption, dvc.lock and rwlock: {len(damages)} damages: made whole, nothing trained again"
    )


@slow
def test_damaged_objects_of_the_dvc_cache_are_made_anew(serial: Path, copy: Path) -> None:
    """After `dvc checkout` would have put them into the workspace."""
    shutil.rmtree(copy / "data")
    for path in (copy / "runs").rglob("weights.safetensors"):
        path.unlink()
    objects = [path for path in (copy / ".dvc/cache/files").rglob("*") if path.is_file()]
    for number, path in enumerate(sorted(objects)):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # read-only, perhaps a link
        if number % 4 < 3:
            path.write_bytes((content, content[: len(content) // 2], b"")[number % 4])
    done = run_dvc(copy, "repro")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert weights(copy) == weights(serial)
    assert tables(copy) == tables(serial)
    TALLY.append(f"corruption, DVC cache: {len(objects)} objects: made anew, the same bit for bit")


@slow
def test_a_record_that_dvc_takes_for_todays_and_is_not_is_made_anew(copy: Path) -> None:
    """As after an edit just when the stage ended; and the note of a failure that has been put right goes."""
    change(copy, lambda raw: raw["acfd"]["full"].update(csd_tau=2.0))
    cell = Cell("streets", "pspnet-resnet18", "acfd-full", 0)
    done = run_dvc(copy, "commit", "-f", "acfd@streets-pspnet-resnet18-full-0")
    assert done.returncode == 0 and "full-0" not in run_dvc(copy, "status").stdout
    files.write_bytes(records.failure_note(NONE, copy), b"a setting that was wrong")
    before = (NONE.folder(copy) / "run.json").stat().st_mtime_ns
    repro(copy, "--jobs", "1")
    record = records.read(cell, copy)
    assert record is not None and record.run["config"]["method"]["csd_tau"] == 2.0
    assert (NONE.folder(copy) / "run.json").stat().st_mtime_ns == before
    assert records.failure(NONE, copy) is None
    TALLY.append("stale state, DVC takes an old record for today's: the cell is trained again, once")


@pytest.mark.parametrize("kept", ["by git", "by nobody"])
def test_a_damaged_dvc_lock_is_put_aside(kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut off anywhere, flipped, with marks of a merge; most beginnings of a YAML file are YAML."""
    place, aside, busy = (tmp_path / name for name in ("dvc.lock", "dvc.lock.damaged", ".dvc/tmp/rwlock"))
    busy.parent.mkdir(parents=True)
    lock = lockfile(12)
    git(tmp_path, "init", "-q")
    place.write_bytes(lock)
    if kept == "by git":
        git(tmp_path, "add", "dvc.lock")
        git(tmp_path, "commit", "-qm", "start")
    for whole in (lock, lock.replace(b"size: ", b"size: 1", 1)):  # also one that git does not have
        place.write_bytes(whole)
        pipeline.heal(tmp_path)
        assert place.read_bytes() == whole and not aside.exists() and not caplog.text
    marked = lock.replace(b"    deps:\n", b"<<<<<<< ours\n    deps:\n=======\n>>>>>>> x\n", 1)
    draw = random.Random(0)
    broken = [marked, b"", lock[: len(lock) // 2] + b"\xff"]
    cuts = [lock[: draw.randrange(40, len(lock) - 1)] for _ in range(200 if TORTURE else 10)]
    broken += [cut for cut in cuts if not cut.endswith(b"\n")]  # which is a file with fewer entries
    for text in broken:
        place.write_bytes(text)
        busy.write_text('{"write": {')
        pipeline.heal(tmp_path)
        assert not busy.exists() and "dvc.lock is damaged: it is kept as dvc.lock.damaged" in caplog.text
        assert aside.read_bytes() == text
        assert (place.read_bytes() == lock) if kept == "by git" else not place.exists()
        aside.unlink()
        caplog.clear()
    busy.write_text("{}")
    pipeline.heal(tmp_path)
    assert busy.exists()
    TALLY.append(f"corruption, dvc.lock, kept {kept}: {len(broken)} damages: put aside and made whole")


def test_every_cell_has_its_stage() -> None:
    """Of a suite with everything that params.yaml offers."""
    stages = set(pipeline.Pipeline(ROOT).stages)
    params = config.load()
    cells = [cell for name in params.suite.benchmarks for cell in plan.suite_cells(params, name)]
    named = [stage_of(params, cell) for cell in cells]
    named += [stage_of(params, teacher_cell(params, name)) for name in params.suite.benchmarks]
    trained = ("train_teacher", "distill", "control", "official", "acfd")
    assert sorted(named) == sorted(name for name in stages if name.partition("@")[0] in trained)


def test_controls_are_named_as_dvc_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However their factors are written: `dvc repro` and `make repro` train the same cells."""
    root = copy_repository(tmp_path)
    monkeypatch.chdir(root)  # from where DVC names stages
    text = (root / "params.yaml").read_text()
    written = re.sub(r"(?m)^  controls: \[.*?\]", "  controls: [1.5, 2.0, 3, 1.23456789, 4.50, 1e1]", text)
    (root / "params.yaml").write_text(written)
    params = config.load(root / "params.yaml")
    assert len(params.controls) == 6
    cells = [cell for cell in plan.suite_cells(params, "streets") if cell.method in params.controls]
    made = {
        name: stage for name, stage in pipeline.Pipeline(root).stages.items() if name.startswith("control@")
    }
    assert sorted(made) == sorted(stage_of(params, cell) for cell in cells)
    for cell in cells:
        stage = made[stage_of(params, cell)]
        assert f"runs/{cell.path}/run.json" in {str(out) for out in stage.outs}
        assert f"--method {cell.method} " in stage.cmd
    assert label("none-x2.0", params.controls) == "none ×2"


def test_another_dvc_is_waited_for_ten_minutes_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.lock import LockError

    clock, tries = [0.0], 0

    def act() -> str:
        nonlocal tries
        tries += 1
        clock[0] += 3  # DVC tries for so long by itself
        if tries == free:
            return "done"
        raise LockError("it is locked")

    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pipeline.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    free = 100
    assert pipeline.Pipeline(ROOT)._locked(act) == "done"
    free, tries, clock[0] = 0, 0, 0.0
    with pytest.raises(ConfigError, match=r"for ten minutes: .* remove \.dvc/tmp/lock\.$"):
        pipeline.Pipeline(ROOT)._locked(act)
    assert tries == 150


@pytest.mark.parametrize("written", ["by DVC", "by hand"])
def test_what_is_noted_in_dvc_lock_is_what_dvc_would_note(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a stage that is there and a new one; the other entries keep their bytes."""
    root = copy_repository(tmp_path)
    monkeypatch.chdir(root)
    lock, found = root / "dvc.lock", pipeline.Pipeline(root)
    entries = pipeline._entries(lock.read_text()) or {}
    some = {key: entries[key] for key in [*[*entries][:5], "  count:", "  report:"]}  # of hundreds
    text = pipeline.LOCK + "".join(some.values()).replace("  count:\n", "  uncounted:\n")
    if written == "by hand":
        text = text.replace("stages:\n", "# ours\nstages:\n", 1)
    lock.write_text(text)
    for name in ("networks.json", "speed.json"):
        (root / "runs" / name).write_text("{}")
    stages = [found.stages[name] for name in ("count", "report")]
    for stage in stages:
        stage.save(run_cache=False)
    found._note(stages)
    mine, read = lock.read_text(), config.read_yaml(lock)
    lock.write_text(text)
    stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
    assert read == config.read_yaml(lock) and list(read["stages"])[-1] == "count"
    until = text.index("  report:\n")
    assert mine[until:] != text[until:]
    assert mine[:until] == text[:until]


def test_bytecode_and_junk_of_editors_change_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_repository(tmp_path)
    monkeypatch.chdir(root)
    before = pipeline.Pipeline(root).stages["fetch@streets"]
    before.save_deps()
    compiled = root / "pipelines" / "datasets" / "__pycache__" / "camvid.cpython-311.pyc"
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_bytes(b"x")
    for junk in (".camvid.py.swp", ".DS_Store", ".nfs0001", "camvid.py~"):
        (root / "pipelines" / "datasets" / junk).write_bytes(b"x")
    (root / "pipelines" / "datasets" / ".#camvid.py").symlink_to("user@host.1")
    after = pipeline.Pipeline(root).stages["fetch@streets"]
    after.save_deps()
    assert [str(dep.hash_info) for dep in after.deps] == [str(dep.hash_info) for dep in before.deps]


def test_what_dvc_refuses_is_one_sentence(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    subprocess.run(dvc("init", "-q"), cwd=tmp_path, env=environment(), check=True)
    (tmp_path / "dvc.yaml").write_text("stages: [")
    with pytest.raises(ConfigError, match=r"^DVC refused: [^\n]+\.$"):
        pipeline.Pipeline(tmp_path).changed()


# ---- what is due, and how it is shared out


def suite_of(methods: int, seeds: int, pack: int, controls: list[float]) -> config.Params:
    raw = tiny(read_params())
    names = [name for name in raw["methods"] if name != "none"][:methods]
    raw["suite"] |= {"methods": ["none", *names], "seeds": list(range(seeds)), "pack": pack}
    raw["suite"] |= {"controls": controls, "official": []}
    return config.Params.model_validate(raw)


def guess(params: config.Params, cell: Cell) -> float:
    """The work of a cell of which nothing has been measured."""
    alone = cell.method == "none" or cell.method in params.controls
    return params.schedule("streets", cell.method).steps * (1.0 if alone else plan.GUIDED)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([[], [1.5], [1.5, 2, 3]]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_packs(methods: int, seeds: int, pack: int, controls: list[float], workers: int, number: int) -> None:
    """Every cell once, one seed a pack, no pack too large, the work in nearly equal parts."""
    params = suite_of(methods, seeds, pack, controls)
    cells = plan.suite_cells(params, "streets")
    draw = random.Random(number)
    cells = [cell for cell in cells if draw.random() < 0.8]  # those that are due
    nowhere = ROOT / "nowhere"  # without records, by which work is weighed
    packs = plan.cut(cells, params, workers, nowhere)
    assert packs == plan.cut(cells, params, workers, nowhere)
    assert sorted(c.path for p in packs for c in p) == sorted(cell.path for cell in cells)
    assert all(len({(cell.seed, cell.benchmark) for cell in own}) == 1 for own in packs)
    assert all(0 < len(own) <= pack for own in packs)
    if not cells:
        return
    taken = {cell: guess(params, cell) for cell in cells}
    total, largest = sum(taken.values()), max(taken.values())
    loads = [0.0] * workers  # the longest first, each to whoever is free: as Dask does
    for own in packs:
        loads[loads.index(min(loads))] += sum(taken[cell] for cell in own)
    if len(cells) <= workers * pack and seeds == 1:
        assert max(loads) <= total / workers + largest
    assert max(loads) <= 2 * total / workers + largest
    fewest = max(-(-len([c for c in cells if c.seed == seed]) // pack) for seed in range(seeds))
    assert len(packs) <= workers * -(-len(cells) // (workers * pack)) + 2 * seeds + fewest * seeds


def test_packs_are_cut_by_the_seconds_that_steps_took(tmp_path: Path) -> None:
    """With other seeds: a slow method, one that has no record, a damaged record."""
    params = suite_of(methods=7, seeds=1, pack=8, controls=[])
    cells = [cell for cell in plan.suite_cells(params, "streets") if cell.method != "none"]
    assert [len(own) for own in plan.cut(cells, params, 2, tmp_path)] == [4, 4]
    for number, cell in enumerate(cells):
        run = {"seconds": {"step_median": 7.0 if number == 0 else 1.0}}
        if number != 5:
            other = replace(cell, seed=3)
            records.write(other.folder(tmp_path), run, dict.fromkeys(records.RECORD_FILES[:3], b"{}"))
    (replace(cells[6], seed=3).folder(tmp_path) / "metrics.json").write_bytes(b"{ }")
    assert [len(own) for own in plan.cut(cells, params, 2, tmp_path)] == [7, 1]


def test_a_long_control_leaves_no_worker_idle(tmp_path: Path) -> None:
    params = suite_of(methods=4, seeds=1, pack=8, controls=[1.5, 2, 3])
    cells = plan.suite_cells(params, "streets")
    loads = [sum(guess(params, cell) for cell in own) for own in plan.cut(cells, params, 2, tmp_path)]
    assert len(loads) == 2 and max(loads) <= 1.15 * sum(loads) / 2


def test_what_is_due(place: Path) -> None:
    params = config.load(place / "params.yaml")
    cells = plan.suite_cells(params, "streets")
    due = plan.due(params, "streets", place)
    assert not due.train_teacher and due.cells == cells
    assert not needs(params, plan.trainings(params, place), set(), set(), place).fetch
    file = teacher_cell(params, "streets").folder(place) / "weights.safetensors"
    weights_, kept = file.read_bytes(), place / "teachers" / "streets.safetensors"
    file.unlink()
    assert plan.due(params, "streets", place).train_teacher  # cells need its weights
    kept.parent.mkdir()
    kept.write_bytes(weights_ + b"\0")
    records.restore_teacher(params, "streets", place)
    assert not file.exists()  # another file than the record's
    kept.write_bytes(weights_)
    records.restore_teacher(params, "streets", place)
    assert file.read_bytes() == weights_ and not plan.due(params, "streets", place).train_teacher
    shutil.rmtree(place / "data")  # as in a clone
    due = plan.due(params, "streets", place)
    assert not due.train_teacher and due.cells == cells
    found = needs(params, plan.trainings(params, place), set(), {"export@streets-pspnet-resnet18"}, place)
    assert found.fetch == ["streets"] and found.exports == [("streets", "pspnet-resnet18")]
    told = found.told()
    assert told[0] == "would fetch the data of streets" and len(told) == 2 + len({c.method for c in cells})
    assert "would train streets/pspnet-resnet18/kd, 1 seed" in told and "export" in told[-1]
    shutil.rmtree(file.parent)
    due = plan.due(params, "streets", place)
    assert due.train_teacher and due.cells == cells and due.data is None


def test_a_teacher_of_the_repository(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = config.load(place / "params.yaml")
    file = teacher_cell(params, "streets").folder(place) / "weights.safetensors"
    assert keep.keep("streets", params, place).read_bytes() == file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="too many for a repository"):
        patch.setattr(keep, "MOST", 1000)
        keep.keep("streets", params, place)
    file.write_bytes(b"other")
    with pytest.raises(ConfigError, match="not the file of its record"):
        keep.keep("streets", params, place)
    file.unlink()
    with pytest.raises(ConfigError, match="no trained teacher"):
        keep.keep("streets", params, place)


# ---- workers and clusters


def test_a_worker_that_sees_something_else_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "params.yaml").write_text("a: 1\n")
    for folder in work.CODE:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").touch()

    def commit() -> None:
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-qm", "a commit")

    commit()
    head = work.identity(str(tmp_path))
    assert head.code is not None
    work.check(head, work.identity(str(tmp_path)))
    (tmp_path / "README.md").touch()
    commit()
    work._code.cache_clear()
    work.check(head, work.identity(str(tmp_path)))  # the same code
    (tmp_path / "acfd" / "a.py").write_text("a = 1\n")
    commit()
    work.check(head, work.identity(str(tmp_path)))  # the code of this process is still that of the start
    work._code.cache_clear()

    def said(here: work.Identity, root: str = "") -> str:
        expected = work.Identity(root or head.root, head.code, head.params, head.libraries)
        with pytest.raises(ConfigError) as error:
            work.check(expected, here)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "sees another version of the code in" in said(work.identity(str(tmp_path)))
    monkeypatch.setenv("PATH", "/nowhere")
    work._code.cache_clear()
    assert said(work.identity(str(tmp_path))).endswith("cannot tell what code it has: git is not installed.")
    (tmp_path / "params.yaml").write_text("a: 2\n")
    same = work.Identity(head.root, head.code, work.identity(str(tmp_path)).params, head.libraries)
    assert "sees another params.yaml in" in said(same)
    other = ("torch 0.1", *head.libraries[1:])
    text = said(work.Identity(head.root, head.code, head.params, other))
    assert f"{head.libraries[0]}" in text and "torch 0.1" in text and "requirements.lock" in text
    assert f"has no folder {tmp_path}/absent" in said(head, f"{tmp_path}/absent")
    outcome = work.count(work.Identity(f"{tmp_path}/absent", None, "", ()))
    assert outcome.failure and "has no folder" in outcome.failure


def listening() -> set[str]:
    """The addresses at which this process and its children wait for connections."""
    own = psutil.Process()
    every = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections("inet")]
    return {c.laddr.ip for c in every if c.status == psutil.CONN_LISTEN}


def test_the_local_cluster_is_for_this_suite_alone(tmp_path: Path) -> None:
    """Only this machine can reach its ports, only with its credentials; each worker has a GPU of its own."""
    from distributed import Security
    from distributed.comm import connect

    before = listening()
    with cluster.local(2, ["a", "b"], False, tmp_path) as client:
        client.wait_for_workers(2, timeout=60)
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert listening() - before <= {"127.0.0.1"}
        seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
        assert sorted(seen.values()) == [("a", "1"), ("b", "1")]
        (worker, *_) = client.scheduler_info()["workers"].values()
        plain = address.replace("tls", "tcp")
        strangers = [(plain, {}), (worker["nanny"].replace("tls", "tcp"), {})]
        other = Security.temporary()  # of somebody else's cluster
        strangers += [(to, other.get_connection_args("client")) for to in (address, worker["nanny"])]
        for to, credentials in strangers:
            with pytest.raises(OSError):
                asyncio.run(connect(to, timeout=3, **credentials))
        own = client.security.get_connection_args("client")
        asyncio.run(connect(address, timeout=3, **own))  # as it is meant
        for port in {c.laddr.port for c in psutil.Process().net_connections() if c.status == "LISTEN"}:
            with contextlib.suppress(urllib.error.HTTPError, OSError, http.client.HTTPException):
                pytest.fail(urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).read())
    assert listening() == before
    with cluster.local(1, [], True, tmp_path) as client:
        link = client.dashboard_link
        assert link.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(link, timeout=60) as page:
            assert page.status == 200
        assert listening() - before <= {"127.0.0.1"}


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER", "1s")
    with pytest.raises(ConfigError, match=r"No scheduler of Dask answers at tcp://127\.0\.0\.1:9 "):
        cluster.running("tcp://127.0.0.1:9").__enter__()
    with pytest.raises(ConfigError, match="No scheduler of Dask answers at nonsense "):
        cluster.running("nonsense").__enter__()
    with pytest.raises(ConfigError, match=r"CLUSTER = slum is not known; those that are: slurm, pbs, lsf"):
        cluster.queue("slum", 2).__enter__()
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match="needs the package dask-jobqueue"):
        cluster.queue("slurm", 2).__enter__()


@pytest.mark.parametrize(("jobs", "shared"), [(None, 2), (1, 2), (3, 3)])
def test_packs_are_cut_for_the_workers_of_a_cluster(jobs: int | None, shared: int, place: Path) -> None:
    """Of which there may be more, or fewer, than this machine would start; JOBS says how many will come."""
    params = config.load(place / "params.yaml")
    options = argparse.Namespace(scheduler=None, cluster=None, jobs=jobs, dashboard=False)
    with distributed.LocalCluster(n_workers=2, processes=False, dashboard_address=None) as there:
        options.scheduler = there.scheduler_address
        with started(options, params, place) as workers:
            assert workers.jobs == shared


def test_a_queue_is_told_how_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["repro", "--cluster", "slurm"])
    with pytest.raises(ConfigError, match=r"^CLUSTER needs JOBS, .*JOBS=8`\.$"):
        command.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (type("KilledWorker", (Exception,), {})("x"), "want of memory"),
        (ModuleNotFoundError("No module named 'pipelines'"), "PYTHONPATH"),
        (ValueError("a\nb"), "ValueError: a b"),
    ],
)
def test_a_lost_task_says_why(error: Exception, said: str, place: Path) -> None:
    params = config.load(place / "params.yaml")
    suite = Suite(None, params, needs(params, {}, set(), set(), place), 1, display.Display(), place)
    suite._took(work.Outcome(failure=cluster.lost(error)), [NONE])
    assert said in (records.failure(NONE, place) or "")


def test_a_dry_run_says_what_is_due_and_does_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(copy, lambda raw: raw["suite"].update(seeds=[0, 1]))
    before = {
        path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and ".dvc" not in path.parts
    }
    monkeypatch.chdir(copy)
    with caplog.at_level("INFO"):
        assert command.repro(argparse.Namespace(dry=True), copy) == []
    after = {
        path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and ".dvc" not in path.parts
    }
    assert after == before
    assert "would train streets/pspnet-resnet18/kd, 1 seed." in caplog.text and "teacher" not in caplog.text


def test_an_empty_cache_of_dvc_is_filled_and_nothing_is_made_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was moved; but data that was changed meanwhile is still fetched again."""
    cache = copy / ".dvc" / "cache"
    held = {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}
    linked = [path for path in copy.rglob("*") if path.is_file() and path.stat().st_nlink > 1]
    for path in linked:
        content = path.read_bytes()  # a link to the cache, where the machine has none else
        path.unlink()
        path.write_bytes(content)
    shutil.rmtree(cache)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(suite_head, "started", None)
    assert command.repro(argparse.Namespace(dry=False), copy) == []
    assert held <= {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}
    shutil.rmtree(cache)
    assert "fetch@streets" in pipeline.Pipeline(copy).changed()[1]
    (copy / "data" / "streets" / "train.txt").open("a").write("\n")
    changed, uncached = pipeline.Pipeline(copy).changed()
    assert "fetch@streets" in changed - uncached


def test_a_report_that_fails_takes_nothing_from_the_commit(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is made all the same; the report itself is still to be made."""
    (copy / "dvc.lock").unlink()
    weights, same = NONE.folder(copy) / "weights.safetensors", copy / ".scratch" / "same"
    same.hardlink_to(weights)
    shutil.rmtree(copy / ".dvc" / "cache", ignore_errors=True)
    monkeypatch.setattr(plan, "needs", lambda *_: Needs())
    monkeypatch.setattr(report, "report", lambda *_: 1 / 0)
    monkeypatch.chdir(copy)
    with pytest.raises(ZeroDivisionError):
        command.repro(argparse.Namespace(dry=False), copy)
    stages = pipeline.locked(copy)
    assert {"train_teacher@streets", "distill@streets-pspnet-resnet18-kd-0"} <= stages.keys()
    assert "report" not in stages
    assert weights.samefile(same)  # a kill in the commit leaves it there


def test_settings_that_changed_meanwhile_are_not_those_of_what_was_trained(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC would write the new ones down beside the old weights."""
    (copy / "dvc.lock").unlink()

    def edit(*_: object) -> Needs:
        change(copy, lambda raw: raw["methods"]["kd"].update(temperature=9.0))
        return Needs()

    monkeypatch.setattr(plan, "needs", edit)
    monkeypatch.chdir(copy)
    command.repro(argparse.Namespace(dry=False), copy)
    names = {name for name in pipeline.locked(copy) if "@streets-pspnet-resnet18-" in name}
    assert {name for name in names if name.startswith("distill@") and "-none-" in name}
    assert not {name for name in names if "-kd-" in name}


def test_settings_that_are_half_written_at_the_commit_are_one_sentence(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(*_: object) -> Needs:
        (copy / "params.yaml").write_text("suite: [")
        return Needs()

    monkeypatch.setattr(plan, "needs", edit)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        command.repro(argparse.Namespace(dry=False), copy)


def test_a_report_that_settings_have_outlived_is_due(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(*_: object) -> None:
        change(copy, lambda raw: raw["methods"]["kd"].update(temperature=9.0))

    monkeypatch.setattr(plan, "needs", lambda *_: Needs())
    monkeypatch.setattr(report, "report", edit)
    monkeypatch.chdir(copy)
    (copy / "dvc.lock").unlink()  # so that the report is made
    command.repro(argparse.Namespace(dry=False), copy)
    assert "report" in pipeline.locked(copy)
    assert "report" in pipeline.Pipeline(copy).changed()[0]


def test_a_student_is_exported_where_its_weights_are_or_will_be(copy: Path) -> None:
    stage = "export@streets-pspnet-resnet18"

    def wanted(changed: set[str]) -> bool:
        params = config.load(copy / "params.yaml")
        return needs(params, plan.trainings(params, copy), changed, {stage}, copy).exports == [
            ("streets", "pspnet-resnet18")
        ]

    assert wanted({stage}) and not wanted(set())
    shutil.rmtree(replace(NONE, method="kd").folder(copy))  # is trained anew
    assert wanted(set())
    (NONE.folder(copy) / "weights.safetensors").unlink()  # as in a clone
    assert not wanted({stage})
    shutil.rmtree(NONE.folder(copy))
    assert wanted(set())


def test_a_cell_that_was_whole_before_its_pack_was_lost_has_not_failed(copy: Path) -> None:
    params = config.load(copy / "params.yaml")
    suite = Suite(None, params, needs(params, {}, set(), set(), copy), 1, display.Display(), copy)
    lost = replace(NONE, method="kd")
    shutil.rmtree(lost.folder(copy))
    suite._took(work.Outcome(failure="its worker was killed"), [NONE, lost])
    assert records.failure(NONE, copy) is None
    assert records.failure(lost, copy) == "its worker was killed"


def test_other_data_is_trained_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the new files show: the code that draws them has changed."""
    ran = tmp_path / "ran"  # tasks are pickled
    params = config.Params.model_validate(tiny(read_params()))
    due = [plan.Due("new", None, True, plan.suite_cells(params, "streets"))]

    def training(_: object, cells: list[Cell]) -> work.Outcome:
        ran.write_text(cells[0].path)
        return work.Outcome(failure="it is enough")

    monkeypatch.setattr(work, "fetch", lambda *_: work.Outcome())
    monkeypatch.setattr(work, "train", training)
    monkeypatch.setattr(plan, "due", lambda *_: due[0])
    (tmp_path / "runs" / "streets").mkdir(parents=True)
    monkeypatch.setattr(work, "figures", lambda *_: (tmp_path / "figures").touch() or work.Outcome())
    with distributed.Client(processes=False, n_workers=1, dashboard_address=None) as client:
        shown = display.Display()
        suite = Suite(client, params, Needs(fetch=["streets"]), 1, shown, tmp_path)
        suite.run()
        shown.close()
    assert ran.read_text() == "streets/teacher"
    assert suite.ran == {"fetch@streets", "train_teacher@streets"}
    assert not (tmp_path / "figures").exists()  # of what is no longer there


def test_students_are_exported_beside_the_packs_of_later_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first seed they are, and of it the last pack need not be handed out first."""
    ran = tmp_path / "ran"  # tasks are pickled
    params = config.Params.model_validate(tiny(read_params()))
    first, later = (replace(plan.suite_cells(params, "streets")[0], seed=seed) for seed in (0, 1))
    assert params.suite.seeds[0] == 0

    def note(what: str) -> None:
        with ran.open("a") as file:
            file.write(f"{what} ")

    def training(_: object, pack: list[Cell]) -> work.Outcome:
        note(str(pack[0].seed))
        if pack[0].seed == 1:
            until(lambda: "export" in ran.read_text(), 60)
        return work.Outcome(cells=dict.fromkeys(pack))

    monkeypatch.setattr(work, "train", training)
    monkeypatch.setattr(work, "export", lambda *_: note("export") or work.Outcome())
    monkeypatch.setattr(work, "panels", lambda *_: note("panels") or work.Outcome())
    monkeypatch.setattr(work, "figures", lambda *_: work.Outcome())
    monkeypatch.setattr(plan, "due", lambda *_: plan.Due("data", "teacher", False, [first, later]))
    monkeypatch.setattr(plan, "cut", lambda *_: [[later], [first]])
    usual = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.Client(**usual) as client:
        exports = [("streets", params.suite.students[0])]
        needed = Needs(due={"streets": plan.due(params, "streets")}, exports=exports)
        suite = Suite(client, params, needed, 2, display.Display(), tmp_path)
        suite.run()
    assert sorted(ran.read_text().split()) == ["0", "1", "export", "panels"] and not suite.failed
    assert ran.read_text().split()[-1] == "panels"  # whose images are chosen by the scores of all


@pytest.mark.parametrize("gone", ["nothing", "the report", "the workers", "the scheduler"])
def test_a_worker_writes_the_report_or_the_head_does(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by = tmp_path / "by"

    def writing(*_: object) -> work.Outcome:
        by.write_text("worker")
        return work.Outcome(failure="it is gone" if gone == "the report" else None)

    monkeypatch.setattr(work, "report", writing)
    monkeypatch.setattr(report, "write", lambda *_: by.write_text("head"))
    params = config.Params.model_validate(tiny(read_params()))
    usual = {"processes": False, "n_workers": 1, "dashboard_address": None}
    with distributed.LocalCluster(**usual) as there, distributed.Client(there) as client:
        suite = Suite(client, params, Needs(), 1, display.Display(), tmp_path)
        if gone == "the workers":
            there.scale(0)
            until(lambda: not client.nthreads(), 60)
        if gone == "the scheduler":
            there.close()
        assert suite.report()()
    assert by.read_text() == ("worker" if gone == "nothing" else "head")


def test_a_worker_with_threads_trains_nothing(tmp_path: Path) -> None:
    """Packs side by side in one process would draw from the same generator of random numbers."""
    head = work.identity(str(tmp_path))
    usual = {"processes": False, "n_workers": 1, "dashboard_address": None}
    with distributed.Client(threads_per_worker=2, **usual) as client:
        outcome = client.submit(work.train, head, [NONE], pure=False).result()
    assert outcome.failure is not None and "start it with `--nthreads 1`" in outcome.failure


def test_no_pack_waits_for_a_busy_worker_while_another_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = config.Params.model_validate(tiny(read_params()))
    cells = plan.suite_cells(params, "streets")[:6]
    packs = [[cell] for cell in cells]

    def training(_: object, pack: list[Cell]) -> work.Outcome:
        if pack[0] == cells[0]:
            until(lambda: len([*tmp_path.glob("streets-*")]) == len(cells) - 1, 60)
        (tmp_path / pack[0].path.replace("/", "-")).write_text(str(distributed.get_worker().name))
        return work.Outcome(cells=dict.fromkeys(pack))

    monkeypatch.setattr(work, "train", training)
    for task in ("panels", "figures"):
        monkeypatch.setattr(work, task, lambda *_: work.Outcome())
    monkeypatch.setattr(plan, "due", lambda *_: plan.Due("data", "teacher", False, cells))
    monkeypatch.setattr(plan, "cut", lambda *_: packs)
    usual = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.Client(**usual) as client:
        needed = Needs(due={"streets": plan.due(params, "streets")})
        suite = Suite(client, params, needed, 2, display.Display(), tmp_path)
        suite.run()
    first, *others = ((tmp_path / cell.path.replace("/", "-")).read_text() for cell in cells)
    assert len({*others}) == 1 and first not in others


def test_tasks_wait_until_there_is_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them died, say, and are started again."""
    params = config.Params.model_validate(tiny(read_params()))
    monkeypatch.setattr(work, "count", lambda _: work.Outcome())
    with distributed.Client(processes=False, n_workers=1, dashboard_address=None) as client:
        there, looks = client.nthreads, [{}, {}]
        monkeypatch.setattr(client, "nthreads", lambda: looks.pop() if looks else there())
        suite = Suite(client, params, Needs(count=True, due={}), 1, display.Display(), tmp_path)
        suite._rest()
        suite.run()
    assert suite.ran == {"count"} and not looks


def test_a_pack_tells_of_all_its_cells_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, now = list[dict[str, Any]](), itertools.count(100.0, 0.4)

    def run_pack(cells: list[Cell], _: object, __: object, tell: Callable[..., None]) -> dict[Cell, None]:
        for step in (1, 2, 3):
            for cell in ("a", "b"):
                tell(cell, step, 3, 0.5)
        return {}

    monkeypatch.setattr(engine_pack, "run_pack", run_pack)
    monkeypatch.setattr(work, "_params", lambda _: None)
    monkeypatch.setattr(work, "_event", told.append)
    monkeypatch.setattr(work.time, "monotonic", lambda: next(now))
    assert work.train(work.identity(str(tmp_path)), []).failure is None
    # the last step of a cell is told in any case
    assert [one["done"] for one in told] == [{"a": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 3}]
    shown = display.Display()
    for cell in ("a", "b"):
        shown.expect(cell, 3)
    shown.event((0, told[1] | {"who": "node 7"}))
    assert "67% of the steps" in shown.summary(100.0)
    shown.close()


def test_what_is_shown_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.Display()
    for cell in ("a", "b"):
        shown.expect(cell, 100)

    def tell(cell: str, step: int, after: float) -> None:
        now[0] += after
        about = {"cell": cell, "step": step, "steps": 100, "loss": 1.5, "done": {cell: step}}
        shown.event((0, about | {"who": "node 7"}))

    tell("a", 10, 0)
    assert shown.left(now[0]) is None and not caplog.text
    tell("a", 30, 40)
    assert shown.left(now[0]) == pytest.approx(170 * 2) and not caplog.text
    tell("a", 50, 40)
    assert (
        "0 of 2 trainings done, 25% of the steps, about 5 min to go; node 7: a, step 50 of 100" in caplog.text
    )
    shown.finished("a")
    assert "1 of 2 trainings done" in shown.summary(now[0])
    shown.event({"level": 30, "text": "take care"})
    assert "take care" in caplog.text
    shown.close()


@pytest.mark.parametrize(
    ("listed", "chosen", "slots"),
    [
        (["GPU 0: H100 (UUID: GPU-a)", "GPU 1: H100 (UUID: GPU-b)"], None, ["GPU-a", "GPU-b"]),
        (
            [
                "GPU 0: A100 (UUID: GPU-a)",
                "  MIG 3g.20gb     Device  0: (UUID: MIG-1)",
                "  MIG 3g.20gb     Device  1: (UUID: MIG-2)",
                "GPU 1: A100 (UUID: GPU-b)",
            ],
            None,
            ["MIG-1", "MIG-2", "GPU-b"],
        ),
        (["GPU 0: H100 (UUID: GPU-a)"], "2, 3", ["2", "3"]),
        (["GPU 0: H100 (UUID: GPU-a)"], "1,-1,2", ["1"]),
        (["GPU 0: H100 (UUID: GPU-a)"], "-1", []),
        (["GPU 0: H100 (UUID: GPU-a)"], "", []),
        (["No devices were found"], None, []),
    ],
)
def test_every_gpu_that_may_be_used_has_a_worker(
    listed: list[str], chosen: str | None, slots: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(listed) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert cluster.visible_gpus() == slots


@pytest.mark.skipif(sys.platform != "linux", reason="needs cgroups")
@pytest.mark.parametrize("quota", ["-1", "50000", "100000", "99000000"])
def test_no_more_cores_are_used_than_a_container_may(
    quota: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dask.system", None)  # as where a cell is trained alone
    own = cores()
    assert own == len(os.sched_getaffinity(0))
    monkeypatch.undo()
    (tmp_path / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu.cfs_period_us").write_text("100000")

    def opened(path: str) -> Any:  # of the files of a container, those that a test may write
        return (tmp_path / Path(path).name).open()

    monkeypatch.setattr(dask.system, "open", opened, raising=False)
    allowed = own if int(quota) < 0 else max(1, math.ceil(int(quota) / 100_000))
    assert cores() == min(own, allowed)


@slow
def test_commands_that_cannot_be_are_one_sentence(parallel: Path, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    shutil.copytree(parallel, root, symlinks=True)
    shutil.rmtree(NONE.folder(root))
    for option, said in (
        (("--scheduler", "tcp://127.0.0.1:9"), "No scheduler of Dask answers"),
        (("--cluster", "slum", "--jobs", "2"), "CLUSTER = slum is not known"),
        (("--cluster", "slurm"), "CLUSTER needs JOBS"),
        (("--jobs", "0"), "JOBS = 0: it must be 1 or more."),
    ):
        text = repro(root, *option, status=1)
        assert said in text and text.count("\n") == 1, text
