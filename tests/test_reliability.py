"""Kills at any moment, changes meanwhile, full disks: nothing is lost, mixed up or silently wrong.

A short version runs with the other tests; ``make torture`` sets ACFD_TORTURE and runs each case many times.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TALLY, copy_repository, read_params, tiny, write_params
from suites import (
    KILLS,
    RUN_CELL,
    environment,
    mlflow_runs,
    slow,
    varied,
    weights,
)

from pipelines import cli, config
from pipelines.engine.pack import run_cell
from pipelines.methods import checked
from pipelines.runs import records
from pipelines.runs.records import Cell, teacher_cell

pytestmark = varied
CELL = Cell("streets", "pspnet-resnet18", "skd", 0)


def killable(part: str, root: Path, kills: int, **more: str) -> tuple[str, str]:
    """The kills and the outcome of tests/killable.py."""
    command = [sys.executable, str(ROOT / "tests" / "killable.py"), part, str(root), str(kills), "1"]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kills_line, outcome = done.stdout.splitlines()[-2:]
    return kills_line, outcome


@slow
@pytest.mark.parametrize("part", ["fetch", "pack"])
def test_a_kill_at_any_moment_changes_nothing(part: str, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("killed", "whole")]
    for root in roots:
        root.mkdir()
        write_params(root, tiny(read_params()))
        if part == "pack":
            killable("fetch", root, 0)
    kills, outcome = killable(part, roots[0], KILLS)  # which compares the runs with one that nobody kills
    for whole in roots[1:]:  # params.yaml says how many threads, not this
        assert killable(part, whole, 0, OMP_NUM_THREADS="3")[1] == outcome
    TALLY.append(f"kill, {part}: {kills}: all survived, the outcome is the same bit for bit")


@slow
def test_a_killed_report_is_made_whole_by_the_next(place: Path) -> None:
    params = checked(config.load(place / "params.yaml"))
    for method in ("none", "kd"):
        run_cell(Cell("streets", "pspnet-resnet18", method, 0), params, place)
    (place / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    kills, _ = killable("report", place, KILLS)
    assert mlflow_runs(place) == ["FINISHED"] * 3
    TALLY.append(f"kill, report: {kills}: all survived, no run of MLflow twice or RUNNING")


@slow
def test_a_second_process_waits_and_keeps_the_record(place: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN_CELL, str(place), "kd"]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    first = start()
    lock = Cell("streets", "pspnet-resnet18", "kd", 0).lock(place)
    while not (lock.is_file() and lock.read_text().strip()):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)  # however busy this machine is, it has not ended
    second, two = start(), ""
    while "waiting" not in two:
        line = second.stderr.readline() if second.stderr else ""
        assert line, two
        two += line
    os.kill(first.pid, signal.SIGCONT)
    _, one = first.communicate(timeout=120)
    two += second.communicate(timeout=120)[1]
    assert first.returncode == second.returncode == 0, one + two
    assert f"is being run by process {first.pid}: waiting" in two and f"`kill {first.pid}`" in two
    assert "has finished before, with exactly these inputs" in two
    assert "waiting" not in one


def test_a_changed_setting_is_never_answered_by_an_old_record(place: Path) -> None:
    cell = Cell("streets", "pspnet-resnet18", "kd", 0)
    run_cell(cell, checked(config.load(place / "params.yaml")), place)
    before = weights(place)
    raw = read_params(place)
    raw["methods"]["kd"]["weight"] += 1
    write_params(place, raw)
    run_cell(cell, checked(config.load(place / "params.yaml")), place)
    assert weights(place) != before
    record = records.read(cell, place)
    assert record is not None and record.run["config"]["method"]["weight"] == raw["methods"]["kd"]["weight"]


MEDDLER = """
import errno
import os
from pathlib import Path

from pipelines.method import Distiller, MethodConfig


class Method(Distiller):
    class Config(MethodConfig):
        weight: float

    student_taps = ("logits",)
    steps = 0

    def losses(self, student, teacher, batch):
        self.steps += 1
        if self.steps == 3 and (name := os.environ.get("MEDDLE")):
            file = Path(name)
            old, new = os.environ["CHANGE"].split("|")
            file.write_text(file.read_text().replace(old, new, 1))
        return {"own": self.config.weight * student["logits"].square().mean()}
"""


@slow
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("baselines/meddler.py", "square()|abs()"),
        ("params.yaml", "weight: 0.125|weight: 12.5"),
        ("params.yaml", "weight: 0.125|weight: ["),
        ("data/streets/dataset.json", '"streets"|"other"'),
    ],
)
def test_what_changes_while_a_cell_trains_is_never_taken_for_its_input(
    file: str, change: str, tiny_root: Path, tmp_path: Path
) -> None:
    """DVC notes code, data and settings as they are after a stage."""
    root = copy_repository(tmp_path / "clone")
    shutil.copytree(tiny_root / "data", root / "data")
    (root / "baselines" / "meddler.py").write_text(MEDDLER)
    raw = tiny(read_params(root))
    raw["methods"]["meddler"] = {"weight": 0.125}
    write_params(root, raw)
    cell = Cell("streets", "pspnet-resnet18", "meddler", 0)
    command = [sys.executable, "-m", "pipelines.stages.distill", "--benchmark", "streets"]
    command += ["--student", "pspnet-resnet18", "--method", "meddler", "--seed", "0"]
    shutil.rmtree(root / "runs" / "streets", ignore_errors=True)
    shutil.copytree(tiny_root / "runs", root / "runs", dirs_exist_ok=True)

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=root, env=environment(root, **more), capture_output=True, text=True, check=False
        )

    before = (root / file).read_bytes()
    done = run(MEDDLE=file, CHANGE=change)
    assert (root / file).read_bytes() != before, done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = f"Since {cell.path} began, its settings, its method's file or its data changed: "
    assert said in done.stderr.splitlines()[-1]
    assert records.read(cell, root) is None
    (root / file).write_bytes(before)
    done = run()
    assert done.returncode == 0, done.stderr
    assert records.read(cell, root) is not None


@pytest.fixture
def limited(place: Path) -> Iterator[Any]:
    """Run the cell in a process that may write files of so many bytes at most."""

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN_CELL, str(place), "none"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    yield run


@slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(place: Path, limited: Any) -> None:
    cell = Cell("streets", "pspnet-resnet18", "none", 0)
    limits = (0, 300, 4_000, 1_000_000, 2_000_000)
    for limit in limits:
        done = limited(limit)
        assert done.returncode == 1, (limit, done.stderr)
        assert "error: a file could not be written" in done.stderr and "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert records.read(cell, place) is None
        assert not list(place.rglob("*.part"))
    assert limited(resource.RLIM_INFINITY).returncode == 0
    assert records.read(cell, place) is not None
    TALLY.append(f"full disk: {len(limits)} limits: a clear error each, nothing half written")


OTHERS = {  # command: how it is called, a limit that it meets, what it makes
    "fetch": ("fetch.fetch(root / 'data', 'streets', params.benchmark('streets'))", 300, "data/streets"),
    "tune": ("tune.tune(params, root)", 60, "reports/streets/tuning.csv"),
    "report": ("report.report(params, root)", 300, "reports/streets/comparison.md"),
    "count": ("count.count(params, root)", 300, "runs/networks.json"),
    "export": ("export.check('streets', 'pspnet-resnet18', params, root)", 300, "runs/streets/exports"),
}


RUN_OTHER = (
    "import sys; from pathlib import Path; from pipelines import cli, config\n"
    "from pipelines.stages import count, export, fetch, report; from pipelines.tools import tune\n"
    "from pipelines.methods import checked\n"
    "root = Path(sys.argv[1]); params = checked(config.load(root / 'params.yaml'))\n"
    "cli.run(lambda: {})\n"
)


@slow
@pytest.mark.parametrize("command", OTHERS)
def test_a_full_disk_stops_every_command_by_one_sentence(command: str, place: Path) -> None:
    call, limit, made = OTHERS[command]
    raw = read_params(place)
    raw["tuning"].update(benchmark="streets", student="pspnet-resnet18", methods=["kd"], trials=1, steps=2)
    raw["suite"]["variants"] = []
    raw["methods"], raw["official"] = {key: raw["methods"][key] for key in ("none", "kd")}, {}
    raw["suite"]["methods"] = ["none", "kd"]
    raw["students"] = {"pspnet-resnet18": raw["students"]["pspnet-resnet18"]}
    raw["benchmarks"] = {"streets": raw["benchmarks"]["streets"]}
    write_params(place, raw)
    if command == "fetch":
        shutil.rmtree(place / "data")
    if command in ("report", "export"):
        run_cell(
            Cell("streets", "pspnet-resnet18", "none", 0), checked(config.load(place / "params.yaml")), place
        )
    before = weights(place)

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN_OTHER.format(call), str(place)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    done = run(limit)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a "), done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(place.rglob("*.part*")) and not (place / made).is_file()
    done = run(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    assert (place / made).exists() and weights(place) == before
    TALLY.append(f"full disk, {command}: one sentence, the next run is whole")


def _bound_read_only(place: Path) -> list[str]:
    """A shell in which a folder is read-only, also for root."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(place)]


def _may_bind(place: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run([*_bound_read_only(place), "true"], capture_output=True, check=False).returncode == 0
    )


def test_a_read_only_folder_is_one_sentence(place: Path) -> None:
    command, folders = [sys.executable, "-c", RUN_CELL, str(place), "none"], list[Path]()
    if os.geteuid() == 0:  # no permission stops root
        if not _may_bind(place):
            pytest.skip("needs to mount a folder read-only")
        command = [*_bound_read_only(place), *command]
    else:
        folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    for folder in folders:
        folder.chmod(0o755)
    assert done.returncode == 1, done.stderr
    forbidden = "error: a file could not be read or written: " in done.stderr
    assert ("Permission denied" if forbidden else "Read-only file system") in done.stderr
    assert forbidden or "error: a file could not be written (" in done.stderr
    assert "Traceback" not in done.stderr
    TALLY.append("read-only folder: one sentence")


def test_a_file_that_may_not_be_read_is_no_full_disk() -> None:
    def read() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/x.png")

    with pytest.raises(SystemExit) as stop:
        cli.run(read)
    said = str(stop.value.code)
    assert "could not be read or written: /data/x.png: Permission denied. " in said and "room" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_user_without_a_name_gets_one() -> None:
    """As in a container that runs under a bare number: DVC and MLflow ask for it."""
    code = "import getpass, os; from pipelines import cli; os.setuid(54321); "
    code += "cli.run(lambda: print(getpass.getuser()))"
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    nameless = {key: value for key, value in environment().items() if key not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=nameless, capture_output=True, text=True, check=True)
    assert done.stdout == "54321\n"


def test_the_teacher_is_a_cell_like_any_other(place: Path) -> None:
    """A second training of a finished teacher is no training."""
    params = checked(config.load(place / "params.yaml"))
    before = weights(place)
    stamp = (teacher_cell(params, "streets").folder(place) / "run.json").stat().st_mtime_ns
    run_cell(teacher_cell(params, "streets"), params, place)
    assert weights(place) == before
    assert (teacher_cell(params, "streets").folder(place) / "run.json").stat().st_mtime_ns == stamp
