"""Resume state of a training: written whole, tied to a fingerprint, never part of a result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import ROOT
from pipelines.files import write_bytes

SUM = 32  # bytes of a sha256
HEAD = 2 * SUM  # of a resume file: the sum of what follows, which begins with that of the fingerprint

log = logging.getLogger(__name__)


def sums(code: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files of code as they are on disk now."""
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in code}


def fingerprint(inputs: Mapping[str, Any], code: Mapping[str, str]) -> str:
    """A hash of everything that a training's outcome depends on: its inputs (config, data, teacher,
    libraries, device) and the sums of its code."""
    content = {"inputs": inputs, "code": code}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def save(path: Path, mark: str, state: dict[str, Any]) -> None:
    """Replace the resume file in one step, so that a kill at any moment leaves the old or the new one."""
    import torch

    content = io.BytesIO()
    content.write(_mark(mark))
    torch.save(state, content)
    # the sum goes first: torch does not notice every flipped bit
    write_bytes(path, hashlib.sha256(content.getbuffer()).digest() + content.getvalue())


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """The state to resume from; None, with a message, when there is none that belongs to exactly this
    training."""
    import torch

    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[SUM:]).digest() != content[:SUM]:
            raise ValueError("wrong sum")
        state: dict[str, Any] = torch.load(io.BytesIO(content[HEAD:]), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, and all mean the same: start again
        log.warning("the resume file %s is damaged (%s): starting from step 0.", path, type(error).__name__)
        return None
    if content[SUM:HEAD] != _mark(mark):
        log.warning(
            "the resume file %s belongs to other inputs (params, code, data or teacher): starting from "
            "step 0.",
            path,
        )
        return None
    return state


def forget(root: Path = ROOT) -> None:
    """Delete the resume files of trainings whose record dvc.lock has: DVC will not ask for them again."""
    lock, scratch = root / "dvc.lock", root / ".scratch"
    known = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
    for state in scratch.glob("**/state.pt"):
        # another DVC may be about to delete any of these
        with contextlib.suppress(OSError, ValueError, KeyError):
            run = (root / "runs" / state.parent.relative_to(scratch) / "run.json").read_bytes()
            with state.open("rb") as file:
                head = file.read(HEAD)
            finished = head[SUM:] == _mark(json.loads(run)["fingerprint"])
            if finished and hashlib.md5(run, usedforsecurity=False).hexdigest() in known:
                state.unlink()


def _mark(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()
