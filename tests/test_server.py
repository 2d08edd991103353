"""A team's MLflow server: real, on the loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import rewrite
from suites import slow

from pipelines import config
from pipelines.runs import records, tracking
from pipelines.runs.records import Record


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{place / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(place / "artifacts")]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=place, env=clean, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield address
        process.terminate()


def own(root: Path) -> list[Record]:
    record = records.read(records.teacher_cell(config.load(root / "params.yaml"), "streets"), root)
    assert record is not None
    return [record]


def runs_of(server: str) -> list[tuple[str, str, float]]:
    client = tracking._client(server)
    experiment = client.get_experiment_by_name("streets")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return [(run.info.status, run.data.tags["record"], run.data.metrics["test/miou"]) for run in found]


@slow
def test_two_checkouts_report_a_cell_once_and_a_new_record_replaces_it(
    place: Path, server: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(place, other)
    for root in (place, other, place):
        assert tracking.publish(server, own(root)) is None
    ((status, digest, _),) = runs_of(server)
    assert (status, digest) == ("FINISHED", tracking.digest(own(place)[0]))
    rewrite(own(other)[0].folder, {"started": "2026-01-01T00:00:00+00:00"})
    assert tracking.publish(server, own(other)) is None
    ((_, again, _),) = runs_of(server)
    assert again == tracking.digest(own(other)[0]) != digest


def test_a_server_that_is_away_is_one_sentence(place: Path) -> None:
    said = tracking.publish(f"http://127.0.0.1:{free_port()}", own(place))
    assert said is not None and said.startswith("MLflow's server could not be used (")
