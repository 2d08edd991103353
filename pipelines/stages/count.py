"""Stage ``count``: what the networks and methods of params.yaml cost (``runs/networks.json``).

Counted on torch's meta device: nothing is computed, no weights are read. What was counted before, by the same
code and libraries, is not counted again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import cli, config, files
from pipelines.config import ROOT, ConfigError, Network, Params
from pipelines.runs import counts
from pipelines.runs.fingerprint import code_sum

log = logging.getLogger(__name__)

COUNTING = ("stages/count.py", "networks.py")
LIBRARIES = ("torch", "timm", "segmentation-models-pytorch")


def count(params: Params, root: Path = ROOT) -> None:
    """Bring ``runs/networks.json`` up to date. :class:`ConfigError` when a network cannot be built."""
    with files.hold(root / ".scratch" / "locks" / "count.lock", "The count of networks"):
        files.clear_parts(root / "runs", below=False)
        _count(params, root)


def _count(params: Params, root: Path) -> None:
    mark = _mark()
    old = counts.read(root)
    known = old["networks"] if old.get("mark") == mark else {}
    found = {key: known.get(key) or measure(network) for key, (network, _) in counts.networks(params).items()}
    costs = old["methods"] if old.get("mark") == mark else {}
    wanted = counts.methods(params)
    due = [key for key, code in wanted.items() if costs.get(key, {}).get("code") != code]
    costs |= measure_methods(params, due) if due else {}
    content = {
        "mark": mark,
        "versions": {name: version(name) for name in LIBRARIES},
        "networks": found,
        "methods": {key: costs[key] | {"code": code} for key, code in wanted.items()},
    }
    files.write_sealed(root / counts.COUNTS, content)


def measure(network: Network) -> list[dict[str, Any]]:
    """``{size, classes, parameters, macs}`` of the deployed network at every size of ``counts.SIZES``."""
    from pipelines.networks import SegmentationNetwork, flops

    rows = []
    for classes in dict.fromkeys(classes for _, classes in counts.SIZES):
        built = SegmentationNetwork(network, classes).to("meta")
        rows += [
            {
                "size": list(size),
                "classes": classes,
                "parameters": built.deployed_parameters(),
                "macs": flops(built, size) // 2,
            }
            for size, wanted in counts.SIZES
            if wanted == classes
        ]
    return rows


def measure_methods(params: Params, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What each method taps, and what it adds to a training step of PSPNet.

    See :func:`pipelines.engine.cost.method_cost`. Of one whose loss cannot be computed without values, which
    trains all the same, ``failure`` says why.
    """
    import torch

    from pipelines.engine.cost import method_cost
    from pipelines.methods import configured, method_class
    from pipelines.networks import SegmentationNetwork, tap_shapes

    size, classes = counts.SIZES[0]

    def shapes(encoder: str) -> Any:
        network = Network(architecture="PSPNet", encoder=encoder, output_stride=8, weights=None)
        return tap_shapes(SegmentationNetwork(network, classes).to("meta"), size)

    student, teacher = shapes(counts.STUDENT_ENCODER), shapes(counts.TEACHER_ENCODER)
    found = dict[str, dict[str, Any]]()
    for key in keys:
        try:
            with torch.device("meta"), torch.random.fork_rng():
                own = method_class(params.module_key(key))(configured(params, key), student, teacher)
            cost = method_cost(own, student, teacher, (counts.BATCH, *size), classes)
        except ConfigError:
            raise
        except Exception as error:
            found[key] = {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            log.warning("what %s adds to a training step cannot be counted: %s", key, found[key]["failure"])
            continue
        found[key] = {
            "taps": sorted({*own.student_taps, *own.teacher_taps}),
            "flops": cost.flops,
            "memory_mb": round(cost.memory_mb, 1),
            "largest_mb": round(cost.largest_mb, 1),
            "parameters": cost.parameters,
        }
    return found


def _mark() -> str:
    """A hash of all that a count depends on beside the network."""
    parts = [*(version(name) for name in LIBRARIES), json.dumps(counts.SIZES)]
    parts += [code_sum(ROOT / "pipelines" / name) for name in COUNTING]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    count(config.load())


if __name__ == "__main__":
    cli.run(main)
