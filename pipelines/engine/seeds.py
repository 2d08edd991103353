"""Named random streams. Every draw that must repeat comes from a seed and names, never from a shared global
state.

The names say what is drawn ("order", epoch) or ("augment", position), never for which method: that is what
pairs the cells of one seed, and what makes an exact resume possible without saving any generator.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream ``names`` of ``seed``: the same on every machine and Python version.

    The names are hashed as a JSON list, so that ("a", 1), ("a1",) and ("a", "1") are three streams.
    """
    text = json.dumps([seed, *names], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A fresh CPU generator at the start of the stream ``names`` of ``seed``."""
    import torch  # imported late: the data stage derives seeds too, and starts without torch

    return torch.Generator().manual_seed(derive(seed, *names))
