"""What is wrong with the place of a checkout is said before anything is made in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipelines.config import ROOT, ConfigError

TRACKED = ("data", "runs", "reports")  # DVC follows no link in them


def check_links(root: Path = ROOT) -> None:
    """:class:`ConfigError` for a folder of results that is a link."""
    for folder in (path for name in TRACKED for path in (root / name, *(root / name).glob("*"))):
        if folder.is_symlink():
            name, disk = folder.relative_to(root), folder.readlink()
            raise ConfigError(
                f"{name} is a link to {disk}, and DVC follows no links: put the whole checkout on that disk, "
                f"or mount it there (`mount --bind {disk} {name}`). Most room is taken by DVC's cache, which "
                "may lie anywhere: `dvc cache dir --local /another/disk`."
            )


def git(root: Path, *arguments: str) -> str | None:
    """What git prints in ``root``; None where it refuses or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, encoding="utf-8", check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def holds_code(root: Path) -> bool:
    """Whether the last commit has this code: the repository may be another, around the checkout."""
    return git(root, "rev-parse", "--quiet", "--verify", "HEAD:./pipelines") is not None


def in_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def no_commit(root: Path = ROOT) -> str | None:
    """Why records can name no commit of the code, with what would help; None where they can."""
    if not in_git(root):
        return "this is not a git checkout. Everything else works; use a git clone to record it."
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return "git is not installed."
    if done.returncode == 0:
        return None if holds_code(root) else "the git repository around this folder does not hold its files."
    if "dubious ownership" in done.stderr:
        return (
            "its files belong to another user. "
            f"`git config --global --add safe.directory '{root}'` allows git to read them."
        )
    return f"{' '.join(done.stderr.split())[:200]}."
