"""Measurements beside the records of cells, ``runs/<name>.json``: a sealed list of entries. A later one
replaces an earlier one of the same key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import ROOT, ConfigError

CPU = "cpu"  # the device where there is no GPU

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Journal:
    """A file of measurements, the command that makes them, and what tells two of them apart."""

    file: Path
    command: str
    key: Callable[[Entry], tuple[Any, ...]]

    def read(self, root: Path = ROOT) -> list[dict[str, Any]]:
        """The entries; none when nothing was measured. :class:`ConfigError`, which names the command that
        measures, when the file is damaged."""
        if not (root / self.file).is_file():
            return []
        try:
            return list(files.unseal((root / self.file).read_bytes())["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            name = self.file.as_posix()
            raise ConfigError(
                f"{name} is damaged or was changed by hand: restore it by `git checkout -- {name}`, or "
                f"delete it and run {self.command}."
            ) from None

    def add(self, entry: Entry, root: Path = ROOT) -> None:
        """Add an entry in place of an older one of the same key."""
        with files.hold(root / ".scratch" / "locks" / f"{self.file.name}.lock", self.file.as_posix()):
            entries = [old for old in self.read(root) if self.key(old) != self.key(entry)] + [dict(entry)]
            files.write_sealed(root / self.file, {"entries": sorted(entries, key=self.key)})


def on_gpu(entry: Entry) -> bool:
    return bool(entry["hardware"]["device"] != CPU)


def device(entry: Entry) -> str:
    """The GPU, or the processor with the threads that computed."""
    about = entry["hardware"]
    if on_gpu(entry):
        return str(about["device"])
    return f"{about['processor']}, {about['threads']} of {about['cores']} cores"
