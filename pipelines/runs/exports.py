"""The record of an export, ``runs/<benchmark>/exports/<student>.json``: one student, deployed.

It holds the tensors of the student after every method; for the reference and one method, the paper's, also
how far each runtime is from the trained network, parameters, FLOPs and the time of every inference. Medians,
quartiles and ratios are made from these here. It is sealed like run.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import files
from pipelines.config import EXPORTS, ROOT, ConfigError

RUNTIMES = ("onnxruntime", "torch")  # whose times are recorded


def path(benchmark: str, student: str, root: Path = ROOT) -> Path:
    return root / "runs" / benchmark / EXPORTS / f"{student}.json"


def read(benchmark: str, student: str, root: Path = ROOT) -> dict[str, Any] | None:
    """The record, None if there is none. ConfigError if it is damaged."""
    file = path(benchmark, student, root)
    if not file.is_file():
        return None
    try:
        found = files.unseal(file.read_bytes())
        if (found["benchmark"], found["student"]) != (benchmark, student):
            raise ValueError
    except (ValueError, KeyError):
        name = file.relative_to(root).as_posix()
        raise ConfigError(
            f"{name} is damaged or was changed by hand: restore it by `git checkout -- {name}`, or delete it "
            "and run `make repro`."
        ) from None
    return found


def write(record: Mapping[str, Any], root: Path = ROOT) -> None:
    """Write a record whole, with its seal."""
    file = path(record["benchmark"], record["student"], root)
    files.write_sealed(file, record)


def timing(
    record: Mapping[str, Any], method: str, reference: str, runtime: str
) -> tuple[float, float, float, float | None]:
    """Milliseconds of one inference: median and quartiles over the rounds; ratio of the median to that of the
    student alone (None for that student itself). The graphs are equal: what differs from 1 is noise of the
    machine, of which the rounds of one session do not show the size."""
    own, plain = (np.asarray(record["methods"][key]["ms"][runtime]) for key in (method, reference))
    low, median, high = (float(value) for value in np.percentile(own, [25, 50, 75]))
    return median, low, high, None if method == reference else median / float(np.median(plain))


def difference(record: Mapping[str, Any], method: str) -> float:
    """The largest difference of a logit between the trained network and its exports, over the scale."""
    found = record["methods"][method]["logits"]
    return float(np.max([value for name, value in found.items() if name != "scale"]) / found["scale"])


def problems(record: Mapping[str, Any], reference: str) -> list[str]:
    """What a record itself says against the deployed students costing the same and computing the same."""
    methods = record["methods"]
    listed = [
        f"{method}: its student has other tensors than that of {reference}."
        for method, own in methods.items()
        if own["tensors_sha256"] != methods[reference]["tensors_sha256"]
    ]
    measured = {method: own for method, own in methods.items() if "ms" in own}
    listed += [
        f"{method}: {name} {own[name]:,}, {reference} has {methods[reference][name]:,}."
        for method, own in measured.items()
        for name in ("parameters", "flops")
        if own[name] != methods[reference][name]
    ]
    listed += [
        f"{method}: its ONNX graph is another than that of {reference}."
        for method, own in measured.items()
        if own["graph_sha256"] != methods[reference]["graph_sha256"]
    ]
    listed += [
        f"{method}: logits differ by {value:.3g} of their scale, more than {record['tolerance']:g}."
        for method in measured
        if not (value := difference(record, method)) <= record["tolerance"]
    ]
    counts = {len(own["ms"][runtime]) for own in measured.values() for runtime in RUNTIMES}
    if counts != {record["rounds"]}:
        listed.append("not every method has the time of every round.")
    return listed
