"""A distilled student for use elsewhere, and stage ``export``: what it costs there.

With ``--method``, ``--seed`` and ``--output``: one trained student as ``student.onnx``, ``student.pt2`` (a
``torch.export`` program) and ``student.json``, which says what goes in and what comes out.

Without them, the stage, at the first seed of the suite: the students of all methods must consist of the same
tensors; that of the reference and that of one method, the paper's if it has finished, are exported into a
temporary folder, their outputs are compared, their parameters, FLOPs and latency measured. That makes the
record ``runs/<benchmark>/exports/<student>.json``. Latencies are those of the CPU, with ``suite.threads``
threads and in float32. Of a record that is there, what was measured is kept while those two students, the
way of measuring, machine and libraries are the same.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import cli, config, files
from pipelines.config import ROOT, ConfigError, Params, Size
from pipelines.files import json_bytes, sha256, write_bytes
from pipelines.methods import checked
from pipelines.reports.results import HEADLINE
from pipelines.runs import exports, records
from pipelines.runs.records import Cell, Record

log = logging.getLogger(__name__)


def export_student(
    cell: Cell, params: Params, output: Path, size: Size | None = None, root: Path = ROOT
) -> dict[str, Any]:
    """Write the three files of a cell's student for images of ``size`` (H, W), by default those of the data
    set, into ``output``, after a check on test images; the content of student.json."""
    from pipelines.datasets import folder as data_folder
    from pipelines.datasets.transforms import MEAN, STD
    from pipelines.engine import deploy

    config.known("student", cell.student, params.students)
    config.known("method", cell.method, params.method_keys)
    protocol = params.benchmark(cell.benchmark).training
    record = _record(cell, root)
    data = root / "data" / cell.benchmark
    description = data_folder.describe(data)
    size = size or description.size or protocol.crop
    deployed = deploy.Deployed(deploy.load(record.run, record.folder / "weights.safetensors"))
    names, images = deploy.samples(data_folder.load(data, "test"), size)
    files = (deploy.ONNX, deploy.PROGRAM)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        deploy.export(deployed, size, place)
        apart = deploy.differences(deployed, place, images, params.suite.threads)
        counted = deploy.count(deploy.program(place / deploy.PROGRAM), size)
        contents = {name: (place / name).read_bytes() for name in files}
    about = {
        "cell": record.run["cell"],
        "weights_sha256": record.run["weights_sha256"],
        "network": record.run["config"]["network"],
        "classes": list(description.classes),
        "palette": [list(colour) for colour in description.palette],
        "input": {
            "name": deploy.IMAGES,
            "type": "float32",
            "shape": ["batch", 3, *size],
            "channels": "RGB: each value / 255, less mean, over std",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "output": {
            "name": deploy.LOGITS,
            "type": "float32",
            "shape": ["batch", len(description.classes), *size],
            "meaning": "logits; the class of a pixel is the index of the largest",
        },
        **counted,
        "largest_difference": {**apart, "images": names, "tolerance": deploy.TOLERANCE},
        "files": {name: sha256(content) for name, content in contents.items()},
    }
    for name, content in contents.items():
        write_bytes(output / name, content)
    write_bytes(output / "student.json", json_bytes(about))
    return about


def check(benchmark: str, student: str, params: Params, root: Path = ROOT) -> dict[str, Any]:
    """The stage: write and return the export record of a student.

    A method whose cell has not finished is left out, with a warning. :class:`ConfigError` when the reference
    has not, when a runtime computes something else, and when a method's student costs more than the
    reference's.
    """
    place = root / ".scratch" / "locks" / f"{benchmark}--exports--{student}.lock"
    with files.hold(place, f"The export of {benchmark}, {student}"):
        for part in exports.path(benchmark, student, root).parent.glob(f".{student}.json.*.part"):
            part.unlink(missing_ok=True)  # of one that was killed
        return _check(benchmark, student, params, root)


def _check(benchmark: str, student: str, params: Params, root: Path) -> dict[str, Any]:
    from pipelines.datasets import folder as data_folder
    from pipelines.engine import deploy
    from pipelines.engine.machine import git_state, hardware, set_up, versions

    protocol, network = params.benchmark(benchmark).training, params.student(student)
    set_up(params.suite)
    data = root / "data" / benchmark
    description = data_folder.describe(data)
    size = description.size or protocol.crop
    seed, threads, reference = params.suite.seeds[0], params.suite.threads, params.suite.reference
    found: dict[str, dict[str, Any]] = {}
    deployed: dict[str, tuple[deploy.Deployed, Path]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        finished: dict[str, Record] = {}
        for method in params.suite_methods:
            try:
                finished[method] = _record(Cell(benchmark, student, method, seed), root)
            except UnfinishedError as error:
                if method == reference:
                    raise
                log.warning("%s It is left out.", error)
        # all are the same network: what is measured of one holds for the others
        pair = (reference, HEADLINE if HEADLINE in finished else [*finished][-1])
        about = {
            "benchmark": benchmark,
            "student": student,
            "seed": seed,
            "network": network.written(),
            "data_sha256": description.sha256,
            "input": list(size),
        }
        here = {
            "tolerance": deploy.TOLERANCE,
            "warm_up": deploy.WARM_UP,
            "hardware": {**hardware(), "device": "cpu"},
            "versions": versions() | {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")},
        }
        able = all((finished[method].folder / "weights.safetensors").is_file() for method in pair)
        if (kept := _kept(pair, finished, about | (here if able else {}), root)) is not None:
            return kept
        names, images = deploy.samples(data_folder.load(data, "test"), size)
        for method, record in finished.items():
            found[method] = known = _sums(record)
            if method not in pair:
                continue
            place = Path(temporary) / method
            place.mkdir()
            own = deploy.Deployed(deploy.load(record.run, record.folder / "weights.safetensors"))
            deploy.export(own, size, place)
            known |= {
                "graph_sha256": deploy.graph_sha256(place / deploy.ONNX),
                **deploy.count(deploy.program(place / deploy.PROGRAM), size),
                "logits": deploy.differences(own, place, images, threads),
            }
            deployed[method] = own, place
        taken = deploy.latencies(deployed, images[:1], threads)
    for method, times in taken.items():
        found[method]["ms"] = times
    rounds = len(taken[reference]["torch"])
    content = {
        **about,
        "images": names,
        "rounds": rounds,
        "methods": found,
        **here,
        "git": git_state(),
    }
    if wrong := exports.problems(content, reference):
        raise ConfigError(f"{benchmark}, {student}: {' '.join(wrong)}")
    exports.write(content, root)
    log.info("%s, %s: %d methods compared, %d rounds.", benchmark, student, len(found), rounds)
    return content


def _sums(record: Record) -> dict[str, Any]:
    """Of the weights of a cell and of the kinds of their tensors."""
    from pipelines.engine import deploy

    weights = record.folder / "weights.safetensors"
    deploy.check_file(record.run, weights)
    sums = {"weights_sha256": record.run["weights_sha256"]}
    return sums | {"tensors_sha256": deploy.tensors_sha256(weights)}


def _kept(
    pair: tuple[str, str], finished: Mapping[str, Record], frame: Mapping[str, Any], root: Path
) -> dict[str, Any] | None:
    """The record that is there with the methods that have come since; None when it is not in ``frame``, or
    when what it measured were not the students of ``pair`` as they are."""
    old = exports.read(frame["benchmark"], frame["student"], root)
    if old is None or any(old[key] != value for key, value in frame.items()):
        return None
    methods = {}
    for method, record in finished.items():
        known = old["methods"].get(method, {})
        same = known.get("weights_sha256") == record.run["weights_sha256"]
        if method in pair and not (same and "ms" in known):
            return None
        methods[method] = known if same else _sums(record)
    content = old | {"methods": methods}
    if exports.problems(content, pair[0]):
        return None
    exports.write(content, root)
    log.info(
        "%s, %s: %d methods compared; what was measured before is kept.",
        *(frame["benchmark"], frame["student"], len(methods)),
    )
    return content


class UnfinishedError(ConfigError):
    """A cell has no record yet."""


def _record(cell: Cell, root: Path) -> Record:
    record = records.read(cell, root)
    if record is None:
        raise UnfinishedError(f"{cell.path} has not finished: run `make repro`.")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stages.export",
        description="Export one trained student as ONNX and as a torch.export program, with a description in "
        "student.json. Without --method, --seed and --output: measure what the students of all methods cost "
        "when they are deployed, as `make repro` does.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    parser.add_argument("--student", required=True, help="an entry of `students` in params.yaml")
    parser.add_argument("--method", help="a key of `methods`, or acfd-<variant>")
    parser.add_argument("--seed", type=int, help="of the trained cell")
    parser.add_argument("--output", type=Path, help="folder for student.onnx, student.pt2 and student.json")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="input size in pixels; default: that of the data set",
    )
    options = parser.parse_args()
    params = checked(config.load())
    one = (options.method, options.seed, options.output)
    if one == (None, None, None) and options.size is None:
        check(options.benchmark, options.student, params)
    elif None in one:
        parser.error("--method, --seed and --output belong together (--size goes with them).")
    else:
        size = tuple(options.size) if options.size else None
        if size and min(size) < 1:
            parser.error("--size: both numbers must be 1 or more.")
        cell = Cell(options.benchmark, options.student, options.method, options.seed)
        about = export_student(cell, params, options.output, size)
        log.info("%s: %s written to %s.", cell.path, ", ".join(about["files"]), options.output)


if __name__ == "__main__":
    cli.run(main)
