"""Stage ``count``: parameters and multiply-adds of every network of params.yaml (``runs/networks.json``).

Counted on torch's meta device: nothing is computed, no weights are read. A network that was counted before,
by the same code and libraries, is not counted again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines import cli, config
from pipelines.config import ROOT, Network, Params
from pipelines.engine import lock
from pipelines.results import records, sizes

LIBRARIES = ("torch", "timm", "segmentation-models-pytorch")


def count(params: Params, root: Path = ROOT) -> None:
    """Bring ``runs/networks.json`` up to date. :class:`ConfigError` when a network cannot be built."""
    with lock.hold(root / ".scratch" / "locks" / "count.lock", "The count of networks"):
        records.clear_parts(root / "runs", below=False)
        _count(params, root)


def _count(params: Params, root: Path) -> None:
    mark = _mark()
    old = sizes.read(root)
    known = old["networks"] if old.get("mark") == mark else {}
    found = {key: known.get(key) or measure(network) for key, (network, _) in sizes.networks(params).items()}
    content = {"mark": mark, "versions": {name: version(name) for name in LIBRARIES}, "networks": found}
    records.write_bytes(root / sizes.COUNTS, records.json_bytes(records.sealed(content)))


def measure(network: Network) -> list[dict[str, Any]]:
    """``{size, classes, parameters, macs}`` of the deployed network at every size of ``sizes.SIZES``."""
    from pipelines.networks import SegmentationNetwork, flops

    rows = []
    for classes in dict.fromkeys(classes for _, classes in sizes.SIZES):
        built = SegmentationNetwork(network, classes).to("meta")
        rows += [
            {
                "size": list(size),
                "classes": classes,
                "parameters": built.deployed_parameters(),
                "macs": flops(built, size) // 2,
            }
            for size, wanted in sizes.SIZES
            if wanted == classes
        ]
    return rows


def _mark() -> str:
    """A hash of all that a count depends on beside the network."""
    parts = [*(version(name) for name in LIBRARIES), json.dumps(sizes.SIZES)]
    parts += [(ROOT / "pipelines" / name).read_text(encoding="utf-8") for name in ("count.py", "networks.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    count(config.load(methods=False))


if __name__ == "__main__":
    cli.run(main)
