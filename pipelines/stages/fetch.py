"""Stage ``fetch``: make ``data/<benchmark>/`` complete, or leave it absent."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipelines import cli, config, files
from pipelines.config import ConfigError
from pipelines.datasets import archives, folder
from pipelines.place import check_links


def fetch(
    data: Path, benchmark: str, settings: config.Benchmark, students: Sequence[config.Network] = ()
) -> folder.Description:
    """Build ``data/<benchmark>`` beside its place, check it, then rename it into place.

    An older folder stays until the new one is complete. Whatever goes wrong raises and leaves no half of
    either; what a killed run left behind is cleared by the next. The mirror named by ``ACFD_MIRROR`` is
    passed to the data set. The images to be scored must suit the teacher and the ``students``.
    """
    module, checked = config.dataset(settings.data, benchmark)
    networks = [*students, *([settings.teacher.network] if "teacher" in settings.model_fields_set else [])]
    smallest = max((network.smallest for network in networks), default=1)
    with files.hold(data.parent / ".scratch" / "locks" / f"data--{benchmark}.lock", f"data/{benchmark}"):
        target = data / benchmark
        part = data / f"{benchmark}.part-{os.getpid()}"
        clear_leftovers(data, benchmark)
        try:
            part.mkdir(parents=True)
            names = module.prepare(checked, part, archives.mirror())
            folder.write_description(part, module.meta(checked), names)
            description = folder.check(part, hasattr(module, "TEST"), smallest)
            if description.absent:
                description = folder.write_description(part, module.meta(checked), names, description.absent)
            if target.exists():
                target.rename(f"{part}-old")  # a rename cannot be interrupted half way, a removal can
            part.rename(target)
        except OSError as error:
            if error.errno in cli.NO_ROOM:
                raise
            raise ConfigError(
                f"{target.parent.name}/{benchmark} could not be made: {error}. Nothing incomplete is left: "
                "mend this and run the same command again."
            ) from None
        finally:
            for rest in (part, Path(f"{part}-old")):
                shutil.rmtree(rest, ignore_errors=True)
        return description


def clear_leftovers(data: Path, benchmark: str) -> None:
    """Remove the unfinished folders of runs that are no longer alive."""
    for rest in data.glob(f"{benchmark}.part-*"):
        pid = rest.name.removeprefix(f"{benchmark}.part-").removesuffix("-old")
        if not files.another(pid):
            shutil.rmtree(rest, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stages.fetch",
        description="Fetch and check the data of a benchmark, and write it to data/<benchmark>/. Nothing "
        "half finished is left there.",
    )
    parser.add_argument("--benchmark", required=True, help="an entry of `benchmarks` in params.yaml")
    benchmark = parser.parse_args().benchmark
    from pipelines.methods import checked  # needs torch, which the rest here has no use for

    check_links()
    params = checked(config.load())
    students = [params.student(key) for key in params.suite.students]
    fetch(config.ROOT / "data", benchmark, params.benchmark(benchmark), students)


if __name__ == "__main__":
    cli.run(main)
