"""The mirror of the records in MLflow, and the frames that the tables are made from.

The files of a cell are the truth, MLflow is rebuilt from them: an experiment per benchmark, a run per cell. A
run carries the digest of its record, so that an unchanged cell is skipped and a changed one replaces its run.
One process at a time writes here: several that create the database at once break it. No failure of MLflow
ever stops anything: what it gives back is compared with the frames of the same entries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import files
from pipelines.config import metric_name
from pipelines.runs.records import RECORD_FILES, Record

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

LAYOUT = 1  # of the entries below: raise it when their names change, and every run is mirrored anew
HISTORY = "history/"  # the metrics that have one value per logged step; all others have one value
MOST = 50_000  # runs of an answer, of which MLflow gives no more
BATCH = {"metrics": 800, "params": 100, "tags": 100}  # of a call of log_batch, which takes 1000 in all


@dataclass(frozen=True)
class Entry:
    """What a record becomes in MLflow: strings, and metrics, which are doubles there and stay exact."""

    params: dict[str, str]  # the resolved configuration, flattened: training.steps, method.weight, …
    metrics: dict[str, float]  # test/miou, test/iou/<class>, seconds/wall, student/parameters, …
    tags: dict[str, str]  # cell, benchmark, student, method, seed, fingerprint, git.commit, data_sha256, …


def entry(record: Record) -> Entry:
    """The configuration, final numbers and origin of a cell."""
    cell = record.cell
    metrics: dict[str, float] = {}
    tags = {
        "cell": cell.path,
        "benchmark": cell.benchmark,
        "student": cell.student,
        "method": cell.method,
        "seed": str(cell.seed),
        "record": digest(record),
    }
    run = {key: value for key, value in record.run.items() if key not in ("cell", "config")}
    for path, value in [*_leaves(record.metrics), *_leaves(run)]:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            metrics[metric_name("/".join(path))] = float(value)
        elif value is not None:
            tags[metric_name(".".join(path))] = _text(value)
    settings = _leaves(record.run["config"])  # with names of the user's own classes
    params = {metric_name(".".join(path)): _text(value) for path, value in settings}
    return Entry(params, metrics, tags)


def frame(entries: Iterable[Entry]) -> pd.DataFrame:
    """One row per cell: ``student``, ``method``, ``seed``, metrics by name, ``params.*``, ``tags.*``.

    Sorted by cell, columns sorted by name, so that it does not depend on where the entries come from.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for item in sorted(entries, key=lambda item: item.tags["cell"]):
        row: dict[str, Any] = {key: item.tags[key] for key in ("student", "method")}
        row["seed"] = int(item.tags["seed"])
        row |= {key: value for key, value in sorted(item.metrics.items()) if not key.startswith(HISTORY)}
        row |= {f"params.{key}": value for key, value in sorted(item.params.items())}
        row |= {f"tags.{key}": value for key, value in sorted(item.tags.items())}
        rows.append(row)
    first = ["student", "method", "seed"]
    others = {key for row in rows for key in row} - set(first)
    return pd.DataFrame(rows, columns=[*first, *sorted(others)])


def collect(root: Path, records: Mapping[str, Sequence[Record]]) -> dict[str, pd.DataFrame]:
    """Mirror the records of every benchmark to MLflow and query them back: a frame per benchmark.

    When the store cannot be written or read, the same frames come straight from the records, and a warning
    says why. A store that holds other numbers than the records is made anew.
    """
    if not records:
        return {}
    direct = {benchmark: frame(map(entry, wanted)) for benchmark, wanted in records.items()}
    try:
        client, found = connect(root), {}
        for benchmark, wanted in records.items():
            sync(client, root, benchmark, wanted)
            found[benchmark] = query(client, benchmark)
            if not found[benchmark].equals(direct[benchmark]):  # bits have flipped in its file
                log.warning("MLflow had other numbers of %s than the records: made anew.", benchmark)
                sync(client, root, benchmark, wanted, anew=True)
                found[benchmark] = query(client, benchmark)
            if not found[benchmark].equals(direct[benchmark]):
                raise ValueError(f"it does not give back what was written for {benchmark}")
        return found
    except Exception as error:  # whatever a tracker may raise, the results do not depend on it
        log.warning(
            "MLflow could not be used (%s): %s; the tables are made from the run records. mlflow.db may be "
            "deleted, it is rebuilt.",
            type(error).__name__,
            _first_line(error),
        )
        return direct


def connect(root: Path) -> MlflowClient:
    """A client of the store of this checkout, which is created when there is none. ValueError where the path
    means something else in an address."""
    if {"?", "%"} & {*str(root.resolve())}:
        raise ValueError("its address takes no ? or % in the path of the checkout")
    store = root.resolve() / "mlflow.db"  # absolute: a relative one would be new in every working directory
    files.probe(store)
    return _client(f"sqlite:///{store}")


def _client(address: str) -> MlflowClient:
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the import sets its own level
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=address)


def sync(
    client: MlflowClient, root: Path, benchmark: str, records: Iterable[Record], anew: bool = False
) -> None:
    """Make the experiment hold exactly one finished run per record, each written ``anew`` or only where it
    changed. Runs of others in it are left alone."""
    experiment = _experiment(client, root, benchmark)
    wanted = {record.cell.path: record for record in records}
    for run in _runs(client, experiment):
        record = None if anew else wanted.get(run.data.tags["cell"])
        if record is not None and _holds(run, record):
            del wanted[record.cell.path]
        else:  # changed, no longer expected, a duplicate, or cut off in the middle of an earlier sync
            client.delete_run(run.info.run_id)
    for record in wanted.values():
        _write(client, experiment, record)


def publish(address: str, records: Iterable[Record]) -> str | None:
    """Report records to a team's MLflow server, one run a fingerprint; why it could not be done, or None.

    A run that the server has of the same fingerprint is replaced if its record is another one, so that two
    checkouts that report the same cells do not double them. Runs of others are left alone, and no table is
    made from the server.
    """
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    os.environ |= {key: os.environ.get(key, value) for key, value in limits.items()}
    try:
        client = _client(address)
        for record in records:
            found = client.get_experiment_by_name(record.cell.benchmark)
            experiment = found.experiment_id if found else client.create_experiment(record.cell.benchmark)
            same = f"tags.fingerprint = '{record.run['fingerprint']}'"
            known = list(client.search_runs([experiment], filter_string=same))
            current = [run for run in known if _holds(run, record)]
            for run in known:
                if run not in current[:1]:
                    client.delete_run(run.info.run_id)
            if not current:
                _write(client, experiment, record)
    except Exception as error:  # a server that is away, refuses, or has another version
        return f"MLflow's server could not be used ({type(error).__name__}: {_first_line(error)[:200]})"
    return None


def query(client: MlflowClient, benchmark: str) -> pd.DataFrame:
    """The cells of a benchmark as MLflow has them, in the form of :func:`frame`."""
    experiment = client.get_experiment_by_name(benchmark)
    entries = []
    for run in _runs(client, experiment.experiment_id) if experiment else ():
        tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
        entries.append(Entry(dict(run.data.params), dict(run.data.metrics), tags))
    return frame(entries)


def digest(record: Record) -> str:
    """sha256 over the files of a record: its inputs' fingerprint is in there, and so is what came out."""
    total = hashlib.sha256(f"layout {LAYOUT}".encode())
    for name in RECORD_FILES:
        total.update(hashlib.sha256((record.folder / name).read_bytes()).digest())
    return total.hexdigest()


def _write(client: MlflowClient, experiment: str, record: Record) -> None:
    from mlflow.entities import Metric, Param, RunTag

    start = round(datetime.fromisoformat(record.run["started"]).timestamp() * 1000)
    end = start + round(record.run["seconds"]["wall"] * 1000)
    item, last = entry(record), int(record.run["steps"])
    points = [Metric(key, value, end, last) for key, value in item.metrics.items()]
    for row in record.history:
        step = int(row["step"] or 0)
        points += [
            Metric(metric_name(HISTORY + key), value, start, step)
            for key, value in row.items()
            if key != "step" and value is not None
        ]
    params = [Param(key, value) for key, value in item.params.items()]
    tags = [RunTag(key, value) for key, value in item.tags.items()]

    run = client.create_run(
        experiment, start_time=start, tags={"cell": record.cell.path}, run_name=record.cell.path
    )
    run_id = run.info.run_id
    for name in RECORD_FILES:
        client.log_artifact(run_id, str(record.folder / name))
    values = {"params": params, "metrics": points, "tags": tags}
    for call in range(max(math.ceil(len(values[kind]) / most) for kind, most in BATCH.items())):
        client.log_batch(
            run_id, **{kind: values[kind][call * most : (call + 1) * most] for kind, most in BATCH.items()}
        )
    client.set_terminated(run_id, "FINISHED", end_time=end)


def _holds(run: Run, record: Record) -> bool:
    """Whether a run is a record's, whole."""
    return run.info.status == "FINISHED" and run.data.tags.get("record") == digest(record)


def _experiment(client: MlflowClient, root: Path, benchmark: str) -> str:
    """The experiment of a benchmark, whose artefacts lie in this checkout."""
    location = (root.resolve() / "mlartifacts" / benchmark).as_uri()
    found = client.get_experiment_by_name(benchmark)
    if found and found.lifecycle_stage == "active" and found.artifact_location == location:
        return str(found.experiment_id)
    if (
        found
    ):  # deleted by hand, or the checkout was moved: the old place of the artefacts stands in the store
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        client.rename_experiment(found.experiment_id, f"{benchmark} (old {found.experiment_id})")
        client.delete_experiment(found.experiment_id)
    return str(client.create_experiment(benchmark, artifact_location=location))


def _runs(client: MlflowClient, experiment: str) -> list[Run]:
    """Every run of this suite in an experiment."""
    found = client.search_runs([experiment], max_results=MOST, order_by=["attributes.start_time"])
    return [run for run in found if "cell" in run.data.tags]


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
