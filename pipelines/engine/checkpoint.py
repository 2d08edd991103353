"""Resume state of a training: written whole, tied to a fingerprint and the libraries, never part of a
result."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch

from pipelines.engine import machine
from pipelines.files import write_bytes

SUM = 32  # bytes of a sha256
HEAD = 2 * SUM  # of a resume file: the sum of what follows, which begins with that of what it belongs to

log = logging.getLogger(__name__)


def save(path: Path, mark: str, state: dict[str, Any]) -> None:
    """Replace the resume file in one step, so that a kill at any moment leaves the old or the new one."""
    content = io.BytesIO()
    content.write(bytes(SUM) + _mark(mark))
    torch.save(state, content)
    with content.getbuffer() as view:  # the sum goes first: torch does not notice every flipped bit
        view[:SUM] = hashlib.sha256(view[SUM:]).digest()
        write_bytes(path, view)


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """The state to resume from; None, with a message, when there is none that belongs to exactly this
    training."""
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
            "the resume file %s belongs to other inputs (settings, method, data, teacher or libraries): "
            "starting from step 0.",
            path,
        )
        return None
    return state


def _mark(fingerprint: str) -> bytes:
    return hashlib.sha256("\0".join([fingerprint, *machine.versions().values()]).encode()).digest()
