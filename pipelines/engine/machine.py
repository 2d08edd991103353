"""What a training ran on: device, processor, libraries, commit. Recorded and shown beside every result."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipelines.config import PAPER, ROOT, Suite
from pipelines.place import git, holds_code

LIBRARIES = ("torch", "timm", "segmentation-models-pytorch", "numpy")


def set_up(suite: Suite, threads: int | None = None) -> None:
    """The settings of torch that move the last digits of a score; ``threads`` in place of the suite's."""
    torch.set_num_threads(threads or suite.threads)
    torch.use_deterministic_algorithms(suite.strict, warn_only=True)
    if suite.strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of the GPU


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cores() -> int:
    """How many this process may use: of its affinity, and of the CPU quota of its container."""
    try:
        from dask.system import cpu_count
    except ImportError:  # a machine that only trains
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(cpu_count())


def hardware() -> dict[str, Any]:
    """The device, processor, cores and threads of this machine: what a time in a table was measured on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines}
        if "model name" in about:  # which may hide what kernels depend on
            numbers = [f"{key} {about[key]}" for key in ("cpu family", "model") if key in about]
            name = ", ".join([about["model name"], *numbers, torch.backends.cpu.get_cpu_capability()])
    return name


def memory_peak_mb() -> float:
    """Of the GPU, or of this process on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 numbers itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def git_state() -> dict[str, Any]:
    """The commit of the code and whether it had changes, or files that are in no commit (settings are
    recorded by themselves); nulls outside of a git checkout."""
    commit = git(ROOT, "rev-parse", "HEAD")
    code = [f":(glob){package}/**/*.py" for package in (PAPER, "baselines", "pipelines")]
    changed = git(ROOT, "status", "--porcelain", "--untracked-files=all", "--", *code)
    if commit is None or changed is None or not holds_code(ROOT):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(changed)}
