"""Where the cells are trained: processes of this machine, a running Dask cluster, or jobs of a queue."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from pipelines.cli import OFFLINE
from pipelines.config import ROOT, ConfigError

QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "htcondor": "HTCondorCluster"}
# Memory that is freed stays with the process (given back, every step would fault its pages in again), also
# that of the thread which trains (an arena of its own has no such threshold), in pages of 2 MB.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
SETTINGS = {
    "distributed.nanny.pre-spawn-environ": {**ALLOCATOR, "OMP_NUM_THREADS": "1", **OFFLINE},
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.comm.timeouts.connect": "60s",
    "distributed.scheduler.allowed-failures": 5,
    "distributed.scheduler.worker-ttl": "30 minutes",  # a step may hold the interpreter for long
    "distributed.admin.low-level-log-length": 100,
    # What Dask does many times a second beside the training, in each process.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "1 minute",
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.profile.enabled": False,
}


def some(jobs: int | None) -> int | None:
    """:class:`ConfigError` for JOBS that are none."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"JOBS = {jobs}: it must be 1 or more.")
    return jobs


def room(gpus: list[str], threads: int) -> int:
    """How many processes of so many threads this machine has room for: one a GPU, or as many as its cores
    and the quota of its container allow."""
    from dask.system import cpu_count

    return len(gpus) or max(1, int(cpu_count()) // threads)


@contextmanager
def local(jobs: int, gpus: list[str], dashboard: bool, root: Path = ROOT) -> Iterator[Any]:
    """A client of a cluster on this machine: ``jobs`` processes, each with a GPU of its own where there are
    any (several share one if there are more jobs), reached through 127.0.0.1 by temporary TLS credentials."""
    import dask
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster

    _quiet()
    routes: dict[str, Any] = {} if dashboard else {"distributed.scheduler.http.routes": []}
    with dask.config.set(SETTINGS | routes):
        security = Security.temporary()
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        safe = {"host": "127.0.0.1", "protocol": "tls", "security": security}
        alone = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.CRITICAL}
        alone |= safe | {"local_directory": str(root / ".scratch" / "dask")}
        workers = {}
        for job in range(jobs):
            env = {"PYTHONPATH": path}
            if gpus:
                env["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
            workers[job] = {"cls": Nanny, "options": alone | {"env": env}}
        shown = {"dashboard": dashboard, "dashboard_address": "127.0.0.1:0"}
        scheduler = {"cls": Scheduler, "options": safe | shown}
        # Of processes that are stopped; Python reads it when it starts.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        with contextlib.ExitStack() as stack:
            with _without_ctrl_c():
                try:
                    own = SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL)
                except (TimeoutError, RuntimeError) as error:
                    because = " ".join(f"{type(error).__name__} {error}".split())[:200]
                    raise ConfigError(
                        f"The processes that train did not start ({because}): this machine is busy or short "
                        "of memory. Run the same command again, or with fewer JOBS."
                    ) from None
                stack.enter_context(own)
            client = stack.enter_context(Client(own, security=security))
            client.run(_leave_at_once)
            yield client


def _leave_at_once() -> None:
    """A worker here ends without the interpreter's search for garbage, which takes seconds after an import of
    torch. What is registered later comes before this."""

    def leave() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    atexit.register(leave)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Threads that start meanwhile, and their processes, never get the Ctrl-C that a terminal sends to all:
    the head ends them."""
    resource_tracker.ensure_running()  # which would let go of the signal here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet() -> None:
    """What matters of what these log reaches us as an exception; their import sets levels of its own."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


ANSWER = "20s"  # that a scheduler gets to answer
JOIN = 120  # seconds that the first worker gets


@contextmanager
def running(address: str) -> Iterator[Any]:
    """A client of a Dask cluster that runs already; its TLS credentials come from Dask's configuration."""
    import dask
    from distributed import Client

    _quiet()
    with dask.config.set({key: value for key, value in SETTINGS.items() if "timeouts" in key}):
        try:
            client = Client(address, timeout=ANSWER)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"No scheduler of Dask answers at {address} ({' '.join(str(error).split())[:150]}): start "
                "one by `dask scheduler`, and workers by `dask worker`."
            ) from None
        with client:
            yield client


@contextmanager
def queue(kind: str, jobs: int) -> Iterator[Any]:
    """A client of a cluster that submits ``jobs`` jobs to a queue, as Dask's own configuration
    (``jobqueue.<kind>``) says."""
    import dask
    from distributed import Client

    _quiet()
    if kind not in QUEUES:
        raise ConfigError(f"CLUSTER = {kind} is not known; those that are: {', '.join(QUEUES)}.")
    try:
        import dask_jobqueue
    except ImportError:
        raise ConfigError(
            "CLUSTER needs the package dask-jobqueue, which is optional: install it into .venv by "
            "`.venv/bin/python -m uv pip install dask-jobqueue`."
        ) from None
    with dask.config.set({key: value for key, value in SETTINGS.items() if "memory" not in key}):
        try:
            cluster = getattr(dask_jobqueue, QUEUES[kind])()
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ConfigError(
                f"The {kind} cluster cannot be started ({' '.join(str(error).split())[:200]}): set "
                f"jobqueue.{kind} in Dask's configuration."
            ) from None
        with cluster, Client(cluster) as client:
            cluster.scale(jobs=jobs)
            yield client


def await_worker(client: Any, forever: bool) -> None:
    """Wait for the first worker; ``forever`` where a queue has to start it."""
    try:
        client.wait_for_workers(1, timeout=None if forever else JOIN)
    except TimeoutError:
        raise ConfigError(
            f"No worker of Dask has joined in {JOIN} seconds: start some, by `dask worker` with the address "
            "of the scheduler."
        ) from None


def lost(error: Exception) -> str:
    """Why a task came to nothing, of which the cluster itself says no more than its kind of error."""
    if type(error).__name__ == "KilledWorker":
        return (
            "its worker was killed again and again, perhaps by the system for want of memory: try fewer JOBS"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"a worker cannot import this checkout ({error}): start it in the checkout, with PYTHONPATH=$PWD"
        )
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def visible_gpus() -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them, without importing torch; of one
    that is split (MIG) its parts."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
        return list(itertools.takewhile(lambda gpu: not gpu.startswith("-"), named))  # as CUDA reads it
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    found: list[list[str]] = []  # a GPU, then its parts
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if (identity := re.search(r"\(UUID: (\S+)\)", line)) is None:
            continue
        if line.startswith("GPU"):
            found.append([])
        if found:
            found[-1].append(identity[1])
    return [name for gpu, *parts in found for name in parts or [gpu]]
