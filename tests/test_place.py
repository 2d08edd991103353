"""Where a checkout lies: spaces in its path, links, no git, files of another user, a moved environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_repository

from pipelines.config import ConfigError
from pipelines.engine import machine
from pipelines.place import check_links, no_commit
from pipelines.suite.dvc import Pipeline


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return copy_repository(tmp_path / "my disk" / "kd suite")


def say(root: Path, target: str = "tables") -> str:
    """What `make` would do; nothing of the `make` that runs the tests."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--dry-run", target]
    done = subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True)
    return done.stdout


def test_make_in_a_path_with_spaces_makes_one_environment_and_again_after_a_move(clone: Path) -> None:
    assert "rm -rf .venv\n" in say(clone)  # no link is followed
    assert "-m venv --without-pip .venv\n" in say(clone)
    ready = clone / ".venv" / ".installed"
    ready.parent.mkdir()
    ready.write_text(f"{ready.parent.resolve()}\n")
    assert say(clone) == "python -m pipelines.stages.report\n"
    assert say(clone, "ui").endswith(" --backend-store-uri sqlite:///mlflow.db\n")  # wherever it stands
    moved = clone.rename(clone.with_name("moved suite"))
    assert "-m venv --without-pip .venv\n" in say(moved)
    # an environment that several checkouts share by a link has not moved
    other = copy_repository(clone.with_name("other"))
    (moved / ".venv" / ".installed").write_text(f"{moved.resolve() / '.venv'}\n")
    (other / ".venv").symlink_to(moved / ".venv")
    assert say(other) == "python -m pipelines.stages.report\n"


def test_a_link_to_another_disk_is_refused_before_anything_is_made(clone: Path) -> None:
    disk = clone.parent / "disk"
    disk.mkdir()
    for name in ("data", "runs", "data/streets"):
        shutil.rmtree(clone / name, ignore_errors=True)
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).symlink_to(disk)
        with pytest.raises(ConfigError, match=rf"^{name} is a link to .*disk.*mount --bind.*dvc cache dir"):
            check_links(clone)
        if name != "data/streets":
            (clone / name).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.stages.fetch", "--benchmark", "streets"],
        cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: data/streets is a link to")
    assert not [*disk.iterdir()]
    (clone / "data" / "streets").unlink()
    (clone / "weights").symlink_to(disk)  # of encoders: DVC has nothing in it
    check_links(clone)


def test_without_git_dvc_works_and_records_name_no_commit(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    shutil.rmtree(clone / ".git")
    if (reason := no_commit(clone)) is None:
        pytest.skip("the temporary folder lies inside a git checkout")
    assert "not a git checkout" in reason
    pipeline = Pipeline(clone)
    assert "fetch@streets" in pipeline.stages and "count" not in pipeline.changed()[0]


def test_code_in_no_commit_is_noted(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", clone)
    clean = machine.git_state()
    assert clean["commit"] and clean["dirty"] is False
    (clone / "notes.py").write_text("")  # is no part of a training
    assert machine.git_state() == clean
    mine = clone / "baselines" / "mine.py"
    mine.write_text("")
    assert machine.git_state() == clean | {"dirty": True}
    mine.unlink()
    file = clone / "pipelines" / "engine" / "train.py"
    file.write_text(file.read_text() + "\n")
    assert machine.git_state() == clean | {"dirty": True}


def test_a_repository_around_the_checkout_is_another(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = clone / "mine" / "suite"
    (inner / "pipelines").mkdir(parents=True)
    assert "does not hold its files" in (no_commit(inner) or "")
    monkeypatch.setattr(machine, "ROOT", inner)
    assert machine.git_state() == {"commit": None, "dirty": None}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_another_user_are_said_with_what_allows_them(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert no_commit(clone) is None
    monkeypatch.setenv("HOME", str(clone.parent))  # a developer may have allowed every folder
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for path in (clone, clone / ".git"):
        os.chown(path, 12345, 12345)
    assert f"git config --global --add safe.directory '{clone}'" in (no_commit(clone) or "")
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(clone)], check=True)
    assert no_commit(clone) is None
