"""Resume state of a training in progress: written whole, tied to a fingerprint, never part of a result."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def fingerprint(inputs: dict[str, Any], code: list[Path]) -> str:
    """A hash of everything that a training's outcome depends on: its inputs (config, data, teacher), code and
    torch."""
    content = {
        "inputs": inputs,
        "code": {
            f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in code
        },
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def save(path: Path, mark: str, state: dict[str, Any]) -> None:
    """Replace the resume file in one step, so that a kill at any moment leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save({"fingerprint": mark, **state}, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """The state to resume from; None, with a message, when there is none that belongs to exactly this
    training."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
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
