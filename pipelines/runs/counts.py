"""What the networks and methods of params.yaml cost, as counted: ``runs/networks.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import ROOT, Network, Params
from pipelines.runs.fingerprint import code_sum, method_sum

COUNTS = Path("runs") / "networks.json"
# Size and classes: Cityscapes' training crop first, then those at which published counts were made
SIZES = (((512, 1024), 19), ((512, 512), 150), ((1024, 2048), 150))
COMMAND = "`dvc repro -s count`"
# What a method adds to a step is counted between these encoders of PSPNet, at the paper's batch and SIZES[0]
TEACHER_ENCODER, STUDENT_ENCODER, BATCH = "tu-resnet101", "tu-resnet18", 16


def read(root: Path = ROOT) -> dict[str, Any]:
    """``runs/networks.json``; empty where it is not there or damaged: it can be made again."""
    try:
        found = files.unseal((root / COUNTS).read_bytes())
        if isinstance(found["networks"], dict) and isinstance(found["methods"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"networks": {}, "methods": {}}


def networks(params: Params) -> dict[str, tuple[Network, list[str]]]:
    """Every network of params.yaml by its name, with what it is used as. Weights and recipe do not matter."""
    found: dict[str, tuple[Network, list[str]]] = {}
    teachers = {f"teacher of {name}": own.teacher.network for name, own in params.benchmarks.items()}
    for use, network in {**teachers, **params.students}.items():
        plain = network.model_copy(update={"weights": None, "recipe": None})
        key = f"{network.architecture}-{encoder_name(network)}, stride {network.output_stride}"
        found.setdefault(key, (plain, []))[1].append(use)
    return found


def missing(params: Params, root: Path = ROOT) -> list[str]:
    """Networks of params.yaml that have not been counted."""
    have = read(root)["networks"]
    return [key for key in networks(params) if key not in have]


def encoder_name(network: Network) -> str:
    """The encoder without the prefix of its library."""
    return network.encoder.removeprefix("tu-")


def methods(params: Params) -> dict[str, str]:
    """Every method of params.yaml but the reference, with a sum of its code, its settings and what counts."""
    keys = [key for key in params.method_keys if params.module_key(key) != params.suite.reference]
    counting = code_sum(ROOT / "pipelines" / "engine" / "cost.py")
    return {
        key: method_sum(params.module_key(key), {"own": params.method_values(key), "counting": counting})
        for key in keys
    }
