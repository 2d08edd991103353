"""Resume state of a training: written whole, tied to a fingerprint, never part of a result."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.results.records import write_bytes

SUM = 32  # bytes of a sha256

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
    content = io.BytesIO()
    torch.save({"fingerprint": mark, **state}, content)
    # the sum goes first: torch does not notice every flipped bit
    write_bytes(path, hashlib.sha256(content.getbuffer()).digest() + content.getvalue())


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """The state to resume from; None, with a message, when there is none that belongs to exactly this
    training."""
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[SUM:]).digest() != content[:SUM]:
            raise ValueError("wrong sum")
        state: dict[str, Any] = torch.load(io.BytesIO(content[SUM:]), map_location="cpu", weights_only=True)
        found = state.pop("fingerprint")
    except Exception as error:  # a damaged file fails in many ways, and all mean the same: start again
        log.warning("the resume file %s is damaged (%s): starting from step 0.", path, type(error).__name__)
        return None
    if found != mark:
        log.warning(
            "the resume file %s belongs to other inputs (params, code, data or teacher): starting from "
            "step 0.",
            path,
        )
        return None
    return state
