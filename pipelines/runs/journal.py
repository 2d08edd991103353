"""Measurements beside the records of cells, ``runs/<name>.json``: a sealed list of entries. A later one
replaces an earlier one of the same key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import ROOT, ConfigError

CPU = "cpu"  # the device where there is no GPU

Entry = Mapping[str, Any]


def read(file: Path, command: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """The entries of ``root/file``; none when nothing was measured. :class:`ConfigError`, which names the
    command that measures, when the file is damaged."""
    if not (root / file).is_file():
        return []
    try:
        return list(files.unseal((root / file).read_bytes())["entries"])
    except (OSError, ValueError, KeyError, TypeError):
        name = file.as_posix()
        raise ConfigError(
            f"{name} is damaged or was changed by hand: restore it by `git checkout -- {name}`, or delete it "
            f"and run {command}."
        ) from None


def add(
    file: Path, command: str, entry: Entry, key: Callable[[Entry], tuple[Any, ...]], root: Path = ROOT
) -> None:
    """Add an entry in place of an older one of the same key."""
    with files.hold(root / ".scratch" / "locks" / f"{file.name}.lock", file.as_posix()):
        entries = [old for old in read(file, command, root) if key(old) != key(entry)] + [dict(entry)]
        content = {"entries": sorted(entries, key=key)}
        files.write_sealed(root / file, content)


def on_gpu(entry: Entry) -> bool:
    return bool(entry["hardware"]["device"] != CPU)


def device(entry: Entry) -> str:
    """The GPU, or the processor with the threads that computed."""
    about = entry["hardware"]
    if on_gpu(entry):
        return str(about["device"])
    return f"{about['processor']}, {about['threads']} of {about['cores']} cores"
