"""Files of several processes at once: what is being written, and who holds a lock."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import pytest

from pipelines import files
from pipelines.runs.journal import Journal


def test_what_a_living_process_writes_is_not_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parts = {
        who: tmp_path / "below" / f".tuning.csv.{pid}.part"
        for who, pid in {"living": os.getppid(), "dead": dead.pid, "own": os.getpid()}.items()
    }
    for part in (*parts.values(), odd := tmp_path / ".odd.part"):
        files.write_bytes(part, b"half")
    files.clear_parts(tmp_path, below=False)
    assert all(part.is_file() for part in parts.values()) and not odd.exists()
    files.clear_parts(tmp_path)
    assert [who for who, part in parts.items() if part.is_file()] == ["living"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "The report is being run by process unknown: waiting until it ends."),
        ("elsewhere 1\n", "The report is being run by process 1 on elsewhere: waiting until it ends."),
        (
            f"{platform.node()} {os.getpid()}\n",
            f"The report is being run by process {os.getpid()}: waiting until it ends. After "
            f"`kill {os.getpid()}` this process goes on from where that one was.",
        ),
        (
            f"{platform.node()} {2**30}\n",  # more than there are
            f"The report was being run by process {2**30}, which has ended: waiting for the processes that "
            "it started to see that.",
        ),
    ],
    ids=["nobody", "elsewhere", "here", "ended"],  # the same in every process of pytest-xdist
)
def test_who_holds_a_lock_is_said(
    content: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.lock"

    def wait() -> None:
        with files.hold(path, "The report"):
            pass

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not caplog.messages:
            time.sleep(0.01)
    waiting.join(60)
    assert caplog.messages == [said]
    assert path.read_text() == f"{platform.node()} {os.getpid()}\n"


def test_entries_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    some = Journal(Path("runs") / "some.json", "`make some`", itemgetter("n"))

    def add(number: int) -> None:
        some.add({"n": number}, tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert [entry["n"] for entry in some.read(tmp_path)] == [*range(40)]
