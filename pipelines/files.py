"""Files that are whole or absent, carry their own sum, and belong to one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave the new name empty
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path, below: bool = True) -> None:
    """Remove what killed writers have left in a folder, and ``below`` it."""
    for part in folder.rglob(".*.part") if below else folder.glob(".*.part"):
        if not another(part.stem.rpartition(".")[2]):
            part.unlink(missing_ok=True)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest(path: Path, kind: Literal["md5", "sha256"]) -> str:
    """The sum of a file that need not fit into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own sum, which :func:`unseal` accepts."""
    write_bytes(path, json_bytes({**content, "seal": seal(content)}))


def unseal(content: bytes) -> dict[str, Any]:
    """What was sealed and written as JSON. ValueError unless it is whole and unchanged."""
    found = json.loads(content)
    if not isinstance(found, dict) or found.pop("seal", None) != seal(found):
        raise ValueError("the seal is broken")
    return found


def seal(content: Mapping[str, Any]) -> str:
    """The sum of the content without this sum."""
    return sha256(json.dumps({k: v for k, v in content.items() if k != "seal"}, sort_keys=True).encode())


def probe(database: Path) -> None:
    """Raise at once when an SQLite file cannot be written; its users would try again for minutes. One that is
    damaged is put aside, so that they build a new one."""
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute("PRAGMA integrity_check").fetchall()
            connection.rollback()
        if found == [("ok",)]:
            return
    except sqlite3.OperationalError:  # no permission, no room, or somebody else's transaction
        raise
    except sqlite3.DatabaseError:
        pass
    aside = database.with_name(f"{database.name}.damaged")
    log.warning("%s is damaged: it is kept as %s and built anew.", database.name, aside.name)
    database.replace(aside)
    for end in ("-journal", "-wal", "-shm"):
        database.with_name(database.name + end).unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    import psutil

    return bool(psutil.pid_exists(pid))


def another(pid: str) -> bool:
    """Whether a file's name ends with the number of another process that runs."""
    return pid.isdigit() and int(pid) != os.getpid() and alive(int(pid))


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
            log.warning("%s %s", cell, _held(file.read()))
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{platform.node()} {os.getpid()}\n")
        file.flush()
        yield


def _held(content: str) -> str:
    """What is said of a lock that another process holds, by what that has written into it."""
    host, _, pid = content.strip().rpartition(" ")
    if not pid.isdigit():
        return "is being run by process unknown: waiting until it ends."
    if host not in ("", platform.node()):  # which has numbers of its own
        return f"is being run by process {pid} on {host}: waiting until it ends."
    if not alive(int(pid)):
        return (
            f"was being run by process {pid}, which has ended: waiting for the processes that it started to "
            "see that."
        )
    return (
        f"is being run by process {pid}: waiting until it ends. After `kill {pid}` this process goes on from "
        "where that one was."
    )
