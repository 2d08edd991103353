"""`make bench`: what the default benchmark costs from nothing, in a temporary clone. Asserts nothing."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import copy_repository


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = copy_repository(Path(folder))
        for record in root.glob("runs/*/**/metrics.json"):  # from nothing: no committed record
            record.unlink()
        environment = {**os.environ, "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
        environment.pop("OMP_NUM_THREADS", None)  # the tests' one thread is not what a user has
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipelines.suite.repro"], cwd=root, env=environment, check=True)
        total = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        runs = [json.loads(path.read_text()) for path in sorted(root.glob("runs/streets/**/run.json"))]
    parts = ("training", "validation", "test")
    working = sum(run["seconds"][part] for run in runs for part in parts)
    print(f"\nmake repro from nothing: {total:.0f} s for {len(runs)} trainings on {os.cpu_count()} cores")
    print(f"  training and inference: {working:.0f} s")
    print(f"  everything else:        {total - working:.0f} s ({100 * (total - working) / total:.0f} %)")
    print(f"  peak memory of a stage: {peak:.0f} MB")
    for run in runs:
        cell, seconds = run["cell"], run["seconds"]
        name = f"{cell['student']}/{cell['method']}/{cell['seed']}"
        print(
            f"  {name:32} {seconds['wall']:6.1f} s  step {1000 * seconds['step_median']:6.1f} ms  "
            f"{run['memory_peak_mb']:7.0f} MB"
        )
    start = time.perf_counter()
    subprocess.run(["make", "test"], check=False)
    print(f"make test: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
