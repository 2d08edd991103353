"""A tiny suite in a clone, and the commands of a user there: what the tests of reliability run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import OFFLINE, ROOT, copy_repository, read_params, tiny, write_params

from pipelines import files
from pipelines.runs.records import Cell

STUDENT = "streets/pspnet-resnet18"  # of the suites
TORTURE = bool(os.environ.get("ACFD_TORTURE"))
KILLS = 12
varied = pytest.mark.torture  # a short version runs with the other tests
slow = pytest.mark.torture(alone=True)  # runs there alone
RIVALS = ("none", "kd")  # of the suites, beside the paper's method and the teacher
ATTEMPTS = ".scratch/attempts"  # to connect, noted by tests/offline
# the commands of a clone, with its own modules
RUN_CELL = (
    "import sys; from pathlib import Path; from pipelines import cli, config\n"
    "from pipelines.engine.pack import run_cell; from pipelines.methods import checked\n"
    "from pipelines.runs.records import Cell\n"
    "root = Path(sys.argv[1]); params = checked(config.load(root / 'params.yaml'))\n"
    "cli.run(lambda: run_cell(Cell('streets', 'pspnet-resnet18', sys.argv[2], 0), params, root))\n"
)


def environment(root: Path = ROOT, **more: str) -> dict[str, str]:
    """Of a process in a clone, with the network blocked; analytics are off by its own settings."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = f"{OFFLINE}{os.pathsep}{root}"
    clean = {
        key: value for key, value in os.environ.items() if key not in ("DVC_NO_ANALYTICS", "DO_NOT_TRACK")
    }
    return {**clean, "PYTHONPATH": modules, "PATH": path, "ATTEMPTS": str(root / ATTEMPTS), **more}


def weights(root: Path) -> dict[str, bytes]:
    """The weights and what was counted on the way, by path."""
    kinds = ("weights.safetensors", "metrics.json", "confusion.npz", "history.csv")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for kind in kinds
        for path in (root / "runs").rglob(kind)
    }


def tables(root: Path) -> dict[str, bytes]:
    """The tables that hold no times."""
    return {
        path.name: path.read_bytes()
        for name in ("comparison", "ablation", "per_class")
        for path in (root / "reports" / "streets").glob(f"{name}.[cmt]*")  # a figure names its records
    }


def mlflow_runs(root: Path) -> list[str]:
    with sqlite3.connect(root / "mlflow.db") as store:
        rows = store.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
    return [status for (status,) in rows]


def new_suite(folder: Path) -> Path:
    """A clone with a tiny suite, of which nothing has run yet."""
    root = copy_repository(folder)
    for made in (root / "runs").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
    for made in (root / "reports").iterdir():
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    (root / "dvc.lock").unlink(
        missing_ok=True
    )  # of hundreds of stages, which every command of DVC would read
    raw = tiny(read_params(root))
    raw["methods"] = {key: raw["methods"][key] for key in RIVALS}
    raw["official"] = {}
    raw["suite"] |= {"methods": list(RIVALS), "controls": [1.5]}
    raw["tuning"]["methods"] = ["acfd-full"]
    write_params(root, raw)
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    del stages["stages"]["export"]  # times are never the same twice
    del stages["stages"]["count"]  # takes a minute, of networks that no cell here has
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a tiny suite")
    return root


def finished_suite(folder: Path, *, exports: bool) -> Path:
    """A clone where a tiny suite has run from nothing: none, its control, kd, acfd."""
    root = copy_repository(folder)
    (root / "dvc.lock").unlink(missing_ok=True)  # from nothing, without the committed records
    for made in (root / "runs").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
    for made in (root / "reports").iterdir():
        if made.is_dir():
            shutil.rmtree(made)
        elif made.suffix != ".yaml":
            made.unlink()
    raw = tiny(read_params(root))
    raw["suite"] |= {"methods": ["none", "kd"], "controls": [1.5]}
    write_params(root, raw)
    if not exports:
        drop_exports(root)
    git(root, "add", "-A")
    python(root, "-m", "pipelines.tools.readme")  # its results were those of the removed records
    git(root, "commit", "-qam", "a tiny suite")
    repro(root)
    return root


def lockfile(stages: int) -> bytes:
    """A dvc.lock as DVC writes it."""
    found = {
        f"distill@streets-pspnet-resnet18-kd-{seed}": {
            "cmd": f"python -m pipelines.stages.distill --method kd --seed {seed}",
            "deps": [{"path": "baselines/kd.py", "hash": "md5", "md5": f"f{seed:031x}", "size": 2000 + seed}],
            "params": {"params.yaml": {"engine": 1, "methods.kd": {"weight": 0.25, "mask": "none"}}},
            "outs": [
                {"path": f"runs/kd/{seed}/{name}", "hash": "md5", "md5": f"f{seed + size:031x}", "size": size}
                for size, name in enumerate(("confusion.npz", "history.csv", "metrics.json"), 1000)
            ],
        }
        for seed in range(stages)
    }
    return yaml.safe_dump({"schema": "2.0", "stages": found}, sort_keys=False).encode()


def dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def run_dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        dvc(*arguments), cwd=root, env=environment(root), capture_output=True, text=True, check=False
    )


def start(root: Path, *options: str, **more: str) -> subprocess.Popen[str]:
    """``make repro`` in a clone, as the leader of a process group, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.suite.repro", *options],
        cwd=root,
        env=environment(root, **more),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )


def repro(root: Path, *options: str, status: int = 0, **more: str) -> str:
    """What ``make repro`` says: lines of ours and nothing else."""
    process = start(root, *options, **more)
    _, text = process.communicate(timeout=900)
    assert process.returncode == status, text
    assert not unfamiliar(text), text
    return text


def unfamiliar(text: str) -> list[str]:
    """Lines that are not ours: of Dask, of DVC, of a traceback. Only an error may have several."""
    said = text.partition("error: ")[0]
    ours = ("info: ", "warning: ", "ERROR: ", "stopped; ")
    return [line for line in said.splitlines() if not line.startswith(ours)]


def until(true: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def trained_by(cell: Cell, root: Path) -> int | None:
    """The process that trains a cell now, or did last if it lives."""
    lock = cell.lock(root)
    pid = lock.read_text().split()[-1:] if lock.is_file() else []  # after the host
    return int(pid[0]) if pid and files.alive(int(pid[0])) else None


def change(root: Path, act: Callable[[dict[str, Any]], object]) -> None:
    """Change a clone's params.yaml."""
    raw = read_params(root)
    act(raw)
    write_params(root, raw)


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def processes_in(root: Path) -> list[int]:
    """Processes whose working directory is ``root``."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").readlink() == root and (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def python(root: Path, *arguments: str, status: int = 0) -> str:
    """What a command of a clone says."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def due(root: Path) -> set[str]:
    """The cells that `make repro` would train."""
    script = (
        "from pipelines import config; from pipelines.suite import plan; params = config.load()\n"
        "for cell in plan.due(params, 'streets').cells: print('due', cell.path)"
    )
    return {line.split()[1] for line in python(root, "-c", script).splitlines()}


def comparison(root: Path) -> dict[str, dict[str, str]]:
    with (root / "reports" / "streets" / "comparison.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert (reader.fieldnames or [])[:5] == ["student", "method", "n", "miou_mean", "miou_sd"]
        return {row["method"]: row for row in reader}


def scores(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "runs").rglob("metrics.json")}


def drop_exports(root: Path) -> None:
    """They take longer than all the rest."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    stages["stages"].pop("export", None)
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
