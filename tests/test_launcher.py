"""`make repro` and DVC, killed, stopped, in parallel: nothing is lost, mixed up or trained twice.

A short version runs with the other tests; ``make torture`` sets ACFD_TORTURE and runs each case many times.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, TALLY, read_params, write_params
from pipelines.engine.cell import run_cell
from pipelines.engine.lock import hold
from suites import (
    ATTEMPTS,
    KILLS,
    RIVALS,
    TORTURE,
    dvc,
    environment,
    launch,
    mlflow_runs,
    new_suite,
    processes_in,
    run_dvc,
    slow,
    tables,
    weights,
)

from pipelines import config, files
from pipelines import launch as launcher
from pipelines.methods import checked
from pipelines.runs import exports, records
from pipelines.runs.records import Cell, teacher_cell
from pipelines.stages import report


@pytest.fixture(scope="module")
def suite(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny suite of a teacher and a few cells after `dvc repro`; in the short version its cells one after
    the other in this process, without DVC. Do not change it."""
    root = new_suite(tmp_path_factory.mktemp("suite"))
    if TORTURE:
        subprocess.run(dvc("repro"), cwd=root, env=environment(root), check=True, capture_output=True)
        return root
    shutil.copytree(tiny_root / "data", root / "data")
    params = checked(config.load(root / "params.yaml"))
    for cell in (teacher_cell(params, "streets"), *records.expected_cells(params, "streets", root)):
        if cell.method in ("teacher", *RIVALS, "acfd-full"):
            run_cell(cell, params, root)
    report.report(params, root)
    return root


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("whom", ["dvc alone", "everything"])
def test_killed_dvc(whom: str, suite: Path, tmp_path: Path) -> None:
    """Of dvc alone: its child trains on as an orphan, while the next `dvc repro` begins at once."""
    root, draw = new_suite(tmp_path / "suite"), random.Random(whom)
    orphans = through = 0
    kills = 20
    for _ in range(kills):
        process = subprocess.Popen(
            dvc("repro"),
            cwd=root,
            env=environment(root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(1, 9))
        through += process.poll() is not None
        if whom == "everything":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        orphans += bool(processes_in(root))
    done = run_dvc(root, "repro")
    if healed := done.returncode != 0:  # killed while it wrote a file that it does not write whole
        assert "rwlock" in done.stderr or "dvc.lock" in done.stderr, done.stdout + done.stderr
        process = launch(root, 1)
        _, text = process.communicate(timeout=600)
        assert process.returncode == 0 and "is damaged" in text, text
    deadline = time.monotonic() + 60
    while processes_in(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    assert mlflow_runs(root) == ["FINISHED"] * (len(RIVALS) + 2)
    assert not list((root / "runs").rglob(".*.part"))
    assert subprocess.run(dvc("status", "-q"), cwd=root, env=environment(root), check=False).returncode == 0
    note = f", {orphans} times with a child left running" if whom == "dvc alone" else ""
    note += ", a file of DVC made whole" if healed else ""
    TALLY.append(f"kill, dvc repro, {whom}: {kills} kills{note}: the outcome is the same bit for bit")


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_training_that_finished_as_dvc_was_killed_is_not_done_again(suite: Path, tmp_path: Path) -> None:
    """Its record is there, but not in dvc.lock: DVC deletes it and asks for the cell again."""
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    raw = read_params(root)
    raw["benchmarks"]["streets"]["training"]["lr"] *= 0.5
    write_params(root, raw)
    record, stage = root / "runs/streets/pspnet-resnet18/none/0/run.json", "pspnet-resnet18-none-0"
    process = subprocess.Popen(
        dvc("repro", "-s", f"distill@streets-{stage}"),
        cwd=root,
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while record.is_file() and time.monotonic() < deadline:  # until DVC has deleted the old one
        time.sleep(0.01)
    while not record.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while processes_in(root) and time.monotonic() < deadline:
        time.sleep(0.1)
    whole = weights(root)
    process = launch(root, 1)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0, text
    said = (root / ".scratch" / "logs" / f"distill--streets-{stage}.log").read_text()
    assert "resumes at step 6 of 6" in said, said
    own = "runs/streets/pspnet-resnet18/none/0/"
    assert {k: v for k, v in weights(root).items() if k.startswith(own)} == {
        k: v for k, v in whole.items() if k.startswith(own)
    }
    assert not list((root / ".scratch").rglob("state.pt"))  # DVC has all records now
    TALLY.append("kill, dvc alone when a cell has its record: taken up, not a step is done again")


@pytest.mark.parametrize("kept", ["by the last run", "by git", "by nobody"])
def test_the_files_that_dvc_does_not_write_whole(
    kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill of dvc can cut off dvc.lock and its list of busy files."""
    lock, busy = tmp_path / "dvc.lock", tmp_path / ".dvc" / "tmp" / "rwlock"
    outs = "    outs:\n    - path: reports\n      md5: 1\n      size: 1\n"
    whole = f"schema: '2.0'\nstages:\n  report:\n    cmd: python\n{outs}"
    lock.write_text(whole)
    cut = "schema: '2.0'\nstages:\n  fetch:\n    cmd: fetch\n  report:\n    deps:\n    - path: 'pipel"
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    if kept == "by git":
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        for command in (["add", "dvc.lock"], [*identity, "commit", "-qm", "start"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
    elif kept == "by the last run":
        launcher.heal(tmp_path)
        assert not caplog.text and lock.read_text() == whole
    busy.parent.mkdir(parents=True)
    busy.write_text('{"write": {')
    lock.write_text(cut)
    launcher.heal(tmp_path)
    assert not busy.exists() and "rwlock is damaged" in caplog.text and "dvc.lock is damaged" in caplog.text
    assert (tmp_path / "dvc.lock.damaged").read_text() == cut
    found = yaml.safe_load(lock.read_text())["stages"]
    assert found["fetch"] == {"cmd": "fetch"}  # whole in the damaged one
    assert found.get("report", {}).get("cmd") == (None if kept == "by nobody" else "python")
    busy.write_text('{"write": {}, "read": {}}')
    launcher.heal(tmp_path)
    assert busy.exists()


def test_a_dvc_lock_that_is_cut_off_anywhere_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Most beginnings of a YAML file are YAML."""
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    content = yaml.safe_dump(
        {"schema": "2.0", "stages": dict(list(stages.items())[:12])}, sort_keys=False
    ).encode()
    lock = tmp_path / "dvc.lock"
    lock.write_bytes(content)
    launcher.heal(tmp_path)
    assert not caplog.text
    draw = random.Random(0)
    cuts = [
        *range(64, len(content), 2048 if TORTURE else 16384),
        *(draw.randrange(40, len(content)) for _ in range(KILLS)),
    ]
    for cut in cuts:
        lock.write_bytes(content[:cut])
        launcher.heal(tmp_path)
        assert yaml.safe_load(lock.read_text())["stages"] == yaml.safe_load(content)["stages"], cut
        assert "dvc.lock is damaged" in caplog.text
        caplog.clear()
    assert yaml.safe_load((tmp_path / ".scratch" / "dvc.lock").read_text()) == yaml.safe_load(content)
    TALLY.append(f"corruption, dvc.lock cut off: {len(cuts)} places: seen and made whole each")


def test_a_whole_dvc_lock_with_fewer_stages_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another commit, or without a stage that somebody took out."""
    outs = "    outs:\n    - path: {0}\n      md5: 1\n      size: 1\n"
    stages = [f"  {name}:\n    cmd: {name}\n{outs.format(name)}" for name in ("one", "two", "three")]
    lock, head = tmp_path / "dvc.lock", "schema: '2.0'\nstages:\n"
    older = head + stages[0] + stages[1].replace("md5: 1", "md5: 2")
    lock.write_text(older)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["add", "dvc.lock"], [*identity, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    def noted() -> None:
        lock.write_text(head + "".join(stages))
        launcher.heal(tmp_path)

    for whole in (older, head + stages[0] + stages[2], head + stages[2]):
        noted()
        lock.write_text(whole)
        launcher.heal(tmp_path)
        assert lock.read_text() == whole and not caplog.text
    noted()
    lock.write_text(head + stages[0] + stages[1])  # of which a kill may have cut the third one
    launcher.heal(tmp_path)
    assert list(yaml.safe_load(lock.read_text())["stages"]) == ["one", "two", "three"]
    assert "dvc.lock is damaged" in caplog.text


@slow
def test_a_damaged_dvc_lock_loses_no_training(suite: Path, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    content = (root / "dvc.lock").read_bytes()
    (root / "dvc.lock").write_bytes(content[: len(content) // 2] + b"\n- 'x")
    (root / ".dvc" / "tmp" / "rwlock").write_text("{")
    (root / ".scratch" / "dvc.lock").write_bytes(content)  # as the launcher leaves it
    assert run_dvc(root, "repro").returncode != 0
    process = launch(root, 2)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0 and "dvc.lock is damaged" in text, text
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    logs = "".join(path.read_text() for path in (root / ".scratch" / "logs").glob("*.log"))
    assert "step/s" not in logs
    TALLY.append("corruption, dvc.lock and rwlock: made whole, nothing trained again")


@slow
def test_damaged_objects_of_the_dvc_cache_are_made_anew(suite: Path, tmp_path: Path) -> None:
    """After `dvc checkout` would have put them into the workspace."""
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    shutil.rmtree(root / "data")
    for path in (root / "runs").rglob("weights.safetensors"):
        path.unlink()
    objects = [path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file()]
    for number, path in enumerate(sorted(objects)):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # read-only, perhaps a link
        if number % 4 < 3:
            path.write_bytes((content, content[: len(content) // 2], b"")[number % 4])
    done = subprocess.run(
        dvc("repro"), cwd=root, env=environment(root), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    TALLY.append(f"corruption, DVC cache: {len(objects)} objects: made anew, the same bit for bit")


def test_parallel_cells_give_the_tables_of_a_serial_run(suite: Path, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    process = launch(root, 4)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    assert mlflow_runs(root) == ["FINISHED"] * (len(RIVALS) + 2)
    assert subprocess.run(dvc("status", "-q"), cwd=root, env=environment(root), check=False).returncode == 0
    assert not (root / ATTEMPTS).exists(), (root / ATTEMPTS).read_text()
    TALLY.append("parallel, JOBS=4: tables and weights are those of the serial run; no attempt to connect")


@slow
def test_a_failing_cell_stops_no_other(suite: Path, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    (root / "baselines" / "bad.py").write_text(
        '"""Fails."""\n\nfrom pipelines.method import Distiller, MethodConfig\n\n\n'
        "class Method(Distiller):\n    Config = MethodConfig\n\n"
        "    def losses(self, student, teacher, batch):\n"
        '        raise RuntimeError("the paper left this out")\n'
    )
    raw = read_params(root)
    raw["methods"] |= {"bad": {}, "cwd": {"weight": 1.0, "tau": 4.0, "tap": "logits"}}
    write_params(root, raw)
    process = launch(root, 2)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "1 of the stages failed: distill@streets-pspnet-resnet18-bad-0. The others are done." in text
    with (root / "reports/streets/comparison.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["cwd"]["status"] == "complete"
    assert "failed: RuntimeError: the paper left this out" in rows["bad"]["status"]
    TALLY.append("parallel, one cell fails: the others are done, the table says why")


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_stopped_launcher_loses_nothing(suite: Path, tmp_path: Path) -> None:
    """By Ctrl-C, which a terminal sends to its whole group; by a signal to it alone; killed, so that what it
    started goes on and the next launcher begins beside that."""
    root = new_suite(tmp_path / "suite")
    draw, orphans = random.Random(3), 0
    ways = (
        lambda process: os.killpg(process.pid, signal.SIGINT),
        lambda process: process.send_signal(signal.SIGTERM),
        lambda process: process.kill(),
    )
    for stop in (ways[0], ways[1], ways[0], ways[2], ways[2]):
        process = launch(root, 2)
        time.sleep(draw.uniform(4, 14))
        stop(process)
        process.communicate(timeout=60)
        if stop is ways[2]:
            orphans += bool(processes_in(root))
        else:
            assert process.returncode in (0, 130)
            assert processes_in(root) == []
    process = launch(root, 2)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    assert mlflow_runs(root) == ["FINISHED"] * (len(RIVALS) + 2)
    TALLY.append(
        f"parallel, the launcher stopped: 2 times Ctrl-C, 1 SIGTERM, 2 SIGKILL ({orphans} with stages left "
        "running): the next run finishes, the same bit for bit"
    )


@slow
def test_a_record_that_dvc_takes_for_todays_and_is_not_is_made_anew(suite: Path, tmp_path: Path) -> None:
    """As after an edit just when the stage ended; and the note of a failure that has been put right goes."""
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    cell, other = (Cell("streets", "pspnet-resnet18", method, 0) for method in ("kd", "none"))
    raw = read_params(root)
    raw["methods"]["kd"]["temperature"] = 2.0
    write_params(root, raw)
    done = run_dvc(root, "commit", "-f", "distill@streets-pspnet-resnet18-kd-0")
    assert done.returncode == 0 and "kd-0" not in run_dvc(root, "status").stdout
    files.write_bytes(records.failure_note(other, root), b"a setting that was wrong")
    process = launch(root, 1)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "kd-0: done" in text and "none-0: done" not in text
    record = records.read(cell, root)
    assert record is not None and record.run["config"]["method"]["temperature"] == 2.0
    assert records.failure(other, root) is None
    process = launch(root, 1)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0 and "kd-0: done" not in text, text
    TALLY.append("stale state, DVC takes an old record for today's: the cell is trained again, once")


@slow
def test_two_launchers_at_once(suite: Path, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    both = [launch(root, 2) for _ in range(2)]
    texts = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    (waited,) = [text for text in texts if "`make repro` is being run by process" in text]
    assert "distill@" not in waited and "train_teacher@" not in waited  # it found them up to date
    assert weights(root) == weights(suite)
    assert tables(root) == tables(suite)
    assert mlflow_runs(root) == ["FINISHED"] * (len(RIVALS) + 2)
    TALLY.append("parallel, two launchers at once: the second waits, nothing is trained twice")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_waits_can_be_stopped(number: int, tmp_path: Path) -> None:
    root = new_suite(tmp_path / "suite")
    with hold(root / ".scratch" / "locks" / "launch.lock", "the test"):
        process = launch(root, 1)
        assert process.stderr is not None
        said = process.stderr.readline()
        assert f"`make repro` is being run by process {os.getpid()}: waiting" in said
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode in (130, -number)


@pytest.mark.parametrize(
    ("listed", "chosen", "slots"),
    [
        (["GPU 0: H100 (UUID: GPU-a)", "GPU 1: H100 (UUID: GPU-b)"], None, ["GPU-a", "GPU-b"]),
        (
            [
                "GPU 0: A100 (UUID: GPU-a)",
                "  MIG 3g.20gb     Device  0: (UUID: MIG-1)",
                "  MIG 3g.20gb     Device  1: (UUID: MIG-2)",
                "GPU 1: A100 (UUID: GPU-b)",
            ],
            None,
            ["MIG-1", "MIG-2", "GPU-b"],
        ),
        (["GPU 0: H100 (UUID: GPU-a)"], "2, 3", ["2", "3"]),
        (["GPU 0: H100 (UUID: GPU-a)"], "1,-1,2", ["1"]),
        (["GPU 0: H100 (UUID: GPU-a)"], "-1", []),
        (["GPU 0: H100 (UUID: GPU-a)"], "", []),
        (["No devices were found"], None, []),
    ],
)
def test_every_gpu_that_may_be_used_is_a_slot(
    listed: list[str], chosen: str | None, slots: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(listed) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert launcher.visible_gpus() == slots


STAGES = """
stages:
  export:
    foreach: [streets-a, streets-b]
    do:
      cmd: python stage.py ${item}
      outs:
      - runs/streets/exports/${item}.json: {cache: false}
"""


def test_a_stage_has_a_gpu_of_its_own_and_a_failing_export_loses_no_record(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "stage.py").write_text(
        "import os, sys, time\n"
        "open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len([name for name in os.listdir('.') if name.startswith('streets-')]) < 2:\n"
        "    time.sleep(0.05)\n"
        "sys.exit(1)\n"
    )
    subprocess.run(dvc("init", "-q", "--no-scm"), cwd=tmp_path, env=environment(), check=True)
    running = launcher.Launcher(2, ["GPU-a", "MIG-1"], tmp_path)
    running.exports = {f"export@streets-{s}": exports.path("streets", f"streets-{s}", tmp_path) for s in "ab"}
    for file in running.exports.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"measured {file.name}")
    assert sorted(running._all(list(running.exports))) == sorted(running.exports)
    assert {(tmp_path / f"streets-{s}").read_text() for s in "ab"} == {"GPU-a", "MIG-1"}
    assert [file.read_text() for file in running.exports.values()] == [
        f"measured {file.name}" for file in running.exports.values()
    ]


@slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_nothing_is_tried_or_lost_without_data(suite: Path, tmp_path: Path) -> None:
    """No mirror, no network: the stages behind the data are left alone, and so are their records."""
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    raw = read_params(root)
    raw["benchmarks"]["streets"]["data"] = {
        "dataset": "cityscapes", "mirror": None, "holdout": ["ulm"], "size": [32, 48]
    }  # fmt: skip
    write_params(root, raw)
    before = weights(root)
    process = launch(root, 2)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "fetch@streets failed: " in text and "leftImg8bit_trainvaltest.zip" in text
    assert "stages are not tried, because fetch@streets failed." in text
    assert "train_teacher@streets failed" not in text
    assert weights(root) == before


def test_the_record_of_a_cell_that_fails_again_comes_back(suite: Path, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    shutil.copytree(suite, root, symlinks=True)
    with (root / "baselines" / "none.py").open("a") as file:
        file.write("\n    def losses(self, student, teacher, batch):\n")
        file.write("        import os\n        os.kill(os.getpid(), 9)\n")
    before = weights(root)
    params = config.load(root / "params.yaml")
    running = launcher.Launcher(1, [], root)
    running.cells, _ = launcher.stages_of(params)
    stage = "distill@streets-pspnet-resnet18-none-0"
    environment_before = dict(os.environ)
    os.environ |= environment(root)
    try:
        assert not running._stage(stage, 1)
    finally:
        os.environ.clear()
        os.environ.update(environment_before)
    after = weights(root)
    assert {k: v for k, v in before.items() if not k.endswith("safetensors")} == {
        k: v for k, v in after.items() if not k.endswith("safetensors")
    }
    cell = running.cells[stage]
    assert "stopped, perhaps by the system" in (records.failure(cell, root) or "")
    report.report(params, root)
    status = pd.read_csv(root / "reports/streets/comparison.csv").set_index("method").loc["none", "status"]
    assert status.startswith("1 of 1; seed 0: an earlier record, a new training failed: it was stopped")
