"""One process a cell: a second one waits, also for an orphan that a killed `dvc` has left behind."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def hold(path: Path, cell: str) -> Iterator[None]:
    """Hold the lock file ``path`` for ``cell``; wait, and say for which process, while another one has it.

    The operating system lets go of it when its process ends, in whatever way, so there are no stale locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            if pid.isdigit() and not alive(int(pid)):
                log.warning(
                    "%s was being run by process %s, which has ended: waiting for the processes that it "
                    "started to see that.",
                    cell,
                    pid,
                )
            else:
                log.warning(
                    "%s is being run by process %s: waiting until it ends. After `kill %s` this process "
                    "goes on from where that one was.",
                    cell,
                    pid,
                    pid,
                )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
