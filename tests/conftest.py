"""A tiny benchmark that every test shares: real files in the real layout, seconds to train."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines import config, files
from pipelines.methods import checked
from pipelines.runs import records

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"  # in PYTHONPATH, it blocks the network
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads would only wait for each other
os.environ.pop("MLFLOW_TRACKING_URI", None)  # a team's server gets no toys
for _name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # of a hook that runs the tests
    os.environ.pop(_name, None)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STARTED = time.monotonic()
TALLY: list[str] = []  # one line a case of reliability: what was tried how often, and what came of it
LONGEST = [
    f"test_{name}" for name in ("suite", "verify", "report", "export", "reliability", "packs", "corruption")
]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """What is for `make torture` alone is skipped without it. The files that take longest go first, so that
    at the end no process works alone."""
    if not os.environ.get("ACFD_TORTURE"):
        for item in items:
            if any(mark.kwargs.get("alone") for mark in item.iter_markers("torture")):
                item.add_marker(pytest.mark.skip(reason="`make torture` runs it"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_sessionfinish(session: Any) -> None:
    """A process of pytest-xdist gives its lines to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = TALLY


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TALLY.extend(getattr(node, "workeroutput", {}).get("tally", []))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """`make torture` prints the cases, and when all hold puts them into the file that ACFD_TORTURE names."""
    wanted = os.environ.get("ACFD_TORTURE")
    if not wanted or hasattr(terminalreporter.config, "workeroutput"):  # which knows of its own tests alone
        return
    for line in sorted(TALLY):
        terminalreporter.write_line(line)
    if exitstatus == 0 and (ROOT / wanted).is_file():
        minutes = (time.monotonic() - STARTED) / 60
        head = f"The last `make torture`: {minutes:.0f} minutes on {os.cpu_count()} cores."
        put_figures(ROOT / wanted, [head, "", *(f"- {line}" for line in sorted(TALLY))])


def put_figures(path: Path, lines: list[str]) -> None:
    """Replace what stands between the markers of torture."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split("<!-- torture:begin -->\n")
    after = rest.split("<!-- torture:end -->")[1]
    new = [
        before,
        "<!-- torture:begin -->\n",
        *(f"{line}\n" for line in lines),
        "<!-- torture:end -->",
        after,
    ]
    files.write_bytes(path, "".join(new).encode())


TINY_STUDENT = "pspnet-resnet18"
TINY_DATA = {"dataset": "streets", "size": [32, 48], "train": 8, "val": 4, "test": 4, "seed": 0}
CIRKD = {"pixel_queue": 200, "region_queue": 20, "pixel_keys": 64, "region_keys": 16}  # seconds, else
TINY_TRAINING = {"steps": 6, "batch_size": 2, "crop": [32, 32], "warmup_steps": 2, "validate_every": 3}


def tiny(raw: dict[str, Any]) -> dict[str, Any]:
    """params.yaml with its default benchmark cut down to seconds; everything else as it stands."""
    benchmark = raw["benchmarks"]["streets"]
    benchmark["data"] = dict(TINY_DATA)
    benchmark["training"] = {**benchmark["training"], **TINY_TRAINING}
    benchmark["teacher"]["training"] = {**benchmark["teacher"]["training"], **TINY_TRAINING, "steps": 8}
    for network in (benchmark["teacher"]["network"], raw["students"]["pspnet-resnet18"]):
        network["encoder"] = "tu-test_resnet"  # of timm, half a million weights
    raw["suite"].update(benchmarks=["streets"], students=["pspnet-resnet18"], seeds=[0], variants=["full"])
    raw["suite"].update(methods=["none", "kd", "skd", "cwd"], official=[], controls=[1.5])
    return raw


def read_params(root: Path = ROOT) -> dict[str, Any]:
    return dict(config.read_yaml(root / "params.yaml"))


def write_params(root: Path, raw: dict[str, Any]) -> None:
    yaml = YAML(typ="safe")
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    with (root / "params.yaml").open("w") as file:
        yaml.dump(raw, file)


def rewrite(folder: Path, run: dict[str, Any] | None = None, **files: bytes) -> None:
    """Change parts of a record and give it right sums again: ``run`` updates run.json, ``metrics=…`` etc. are
    the new contents of the other files."""
    names = {"metrics": "metrics.json", "history": "history.csv", "confusion": "confusion.npz"}
    contents = {name: files.get(key, (folder / name).read_bytes()) for key, name in names.items()}
    records.write(folder, json.loads((folder / "run.json").read_text()) | (run or {}), contents)


def copy_repository(target: Path) -> Path:
    """What git would clone, with changes that are not committed yet, as a fresh repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgSign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "start"]):
        subprocess.run(["git", *command], cwd=target, check=True, capture_output=True)
    return target


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """A teacher would use all cores, see OMP_NUM_THREADS."""
    from pipelines.engine import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow takes seconds to make one: each process of the tests has one made, and copies it."""
    from pipelines.runs import tracking

    connect, empty = tracking.connect, tmp_path_factory.mktemp("store") / "mlflow.db"

    def with_store(root: Path) -> Any:
        if not empty.exists():
            connect(empty.parent)
        if not (root / empty.name).exists():
            with contextlib.suppress(OSError):  # where it cannot be written, the real one says so
                shutil.copy(empty, root)
        return connect(root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "connect", with_store)
        yield


@pytest.fixture(scope="session")
def tiny_root(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, the data and the trained teacher of the tiny benchmark. Do not change it."""
    from pipelines.engine.pack import run_cell
    from pipelines.runs.records import teacher_cell
    from pipelines.stages.fetch import fetch

    root = tmp_path_factory.mktemp("tiny")
    write_params(root, tiny(read_params()))
    params = checked(config.load(root / "params.yaml"))
    fetch(root / "data", "streets", params.benchmark("streets"))
    run_cell(teacher_cell(params, "streets"), params, root)
    return root


@pytest.fixture(scope="session")
def reported(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a tiny suite that has finished, two seeds of it, and its reports. Do not change it."""
    from pipelines.engine.pack import run_pack
    from pipelines.stages import report

    root = Path(shutil.copytree(tiny_root, tmp_path_factory.mktemp("reported") / "suite"))
    raw = read_params(root)
    raw["suite"] |= {"methods": ["none", "kd", "cwd", "at"], "seeds": [0, 1], "controls": [1.5, 2]}
    write_params(root, raw)
    (root / "reports").mkdir()
    for made in ("reports/claims.yaml", "reports/networks.yaml", "runs/networks.json", "runs/speed.json"):
        shutil.copy(ROOT / made, root / made)
    params = checked(config.load(root / "params.yaml"))
    for seed in params.suite.seeds:
        cells = [records.Cell("streets", TINY_STUDENT, method, seed) for method in params.suite_methods]
        assert not any(run_pack(cells, params, root).values())
    report.report(params, root)
    return root


@pytest.fixture
def place(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of the tiny benchmark that a test may change."""
    shutil.copytree(tiny_root, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def edit(place: Path) -> Callable[[Callable[[dict[str, Any]], None]], config.Params]:
    """Change the copied params.yaml and load it."""

    def apply(change: Callable[[dict[str, Any]], None]) -> config.Params:
        raw = read_params(place)
        change(raw)
        write_params(place, raw)
        return checked(config.load(place / "params.yaml"))

    return apply


def trained(params: config.Params, root: Path, *cells: records.Cell) -> dict[str, Any]:
    """Train a pack, without records: what was prepared for each method. What stops a cell is raised."""
    from pipelines.engine.pack import Prepared, bench, plan, teacher_of, train_plans

    shared, found = bench(params, cells[0].benchmark, root), dict[str, Prepared]()

    def finish(prepared: Prepared) -> None:
        found[prepared.plan.cell.method] = prepared

    teacher, plans = teacher_of(cells, params, shared, root), [plan(params, cell) for cell in cells]
    for failure in train_plans(plans, params, shared, teacher, finish, root=root).values():
        if failure is not None:
            raise failure
    return found
