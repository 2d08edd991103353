"""The on-disk form of every benchmark: how it is described, checked and read.

``data/<benchmark>/`` holds ``{train,val,test}/*.png`` (8-bit RGB), ``{train,val,test}annot/*.png`` (8-bit,
one channel, the value is the class), ``{train,val,test}.txt`` (one sample per line: ``train/x.png
trainannot/x.png``) and ``dataset.json``, which names the classes and the sha256 of every other file. The
sha256 of dataset.json is *the* hash of the data. Nothing here imports torch before tensors are asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "test")
DESCRIPTION = "dataset.json"
# What Pillow raises for broken files beside OSError; a claimed size that is absurd is a warning or an error.
BROKEN = (Image.DecompressionBombError, Image.DecompressionBombWarning, struct.error, zlib.error, IndexError)
PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every whole PNG file


@dataclass(frozen=True)
class Meta:
    """What a data set knows about itself: its name, class names, one RGB colour a class, and the label to
    ignore.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int


@dataclass(frozen=True)
class Description(Meta):
    """dataset.json as read: ``size`` is (height, width), ``splits`` the samples per split, ``sha256`` the
    data hash.
    """

    size: tuple[int, int]
    splits: dict[str, int]
    files: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split in memory: ``images`` (N, 3, H, W) uint8, ``labels`` (N, H, W) uint8, ``names`` of the
    images.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def few(names: Iterable[str], shown: int = 5) -> str:
    """The first few of many names, and how many there are."""
    names = list(names)
    rest = f", … ({len(names)} in all)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def describe(root: Path) -> Description:
    """Read ``root/dataset.json``. A folder without it is absent or incomplete: ConfigError."""
    try:
        content = (root / DESCRIPTION).read_bytes()
    except OSError:
        raise ConfigError(
            f"There is no data in {_place(root)}: {DESCRIPTION} is missing. {_remedy(root)}"
        ) from None
    try:
        raw: dict[str, Any] = json.loads(content)
        return Description(
            name=raw["name"],
            classes=tuple(raw["classes"]),
            palette=tuple((int(r), int(g), int(b)) for r, g, b in raw["palette"]),
            ignore_index=int(raw["ignore_index"]),
            size=(int(raw["size"][0]), int(raw["size"][1])),
            splits={split: int(raw["splits"][split]) for split in SPLITS},
            files=dict(raw["files"]),
            sha256=sha256(content),
        )
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(f"{_place(root)}/{DESCRIPTION} is damaged. {_remedy(root)}") from None


def write_description(root: Path, meta: Meta) -> Description:
    """Write ``root/dataset.json`` for the images, labels and split lists in ``root``, and return it."""
    samples = {split: read_list(root, split) for split in SPLITS}
    paths = [f"{split}.txt" for split in SPLITS] + [
        path for pairs in samples.values() for pair in pairs for path in pair
    ]
    contents = {}
    for path in sorted(set(paths)):
        try:
            contents[path] = sha256((root / path).read_bytes())
        except OSError:
            raise ConfigError(
                f"{path} is named by a split list of {_place(root)} but cannot be read."
            ) from None
    first = samples["train"][0][0]
    record = asdict(meta) | {
        "size": list(decode((root / first).read_bytes(), first, "RGB").shape[:2]),
        "splits": {split: len(pairs) for split, pairs in samples.items()},
        "files": contents,
    }
    (root / DESCRIPTION).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return describe(root)


def read_list(root: Path, split: str) -> list[tuple[str, str]]:
    """The samples of ``root/<split>.txt`` as (image, label) paths relative to ``root``."""
    try:
        lines = (root / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{_place(root)}/{split}.txt is missing or damaged. {_remedy(root)}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        match line.split():
            case [image, label] if image.startswith(f"{split}/") and label.startswith(f"{split}annot/"):
                pairs.append((image, label))
            case _:
                raise ConfigError(
                    f"Line {number} of {_place(root)}/{split}.txt is {line!r}; "
                    f"it must read `{split}/<name>.png {split}annot/<name>.png`."
                )
    if not pairs:
        raise ConfigError(f"{_place(root)}/{split}.txt names no sample. {_remedy(root)}")
    return pairs


def decode(content: bytes, path: str, mode: str) -> np.ndarray:
    """The pixels of a PNG whose mode must be ``mode``: (H, W, 3) uint8 for "RGB", (H, W) uint8 for "L"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=["PNG"])
        with image:
            image.load()
            # Pillow opens 16-bit colour as 8-bit RGB and 4-bit gray as L, both rescaled: ask the header.
            depth = content[24]
            if image.mode != mode or depth != 8:
                need = "8-bit RGB" if mode == "RGB" else "8-bit with one channel (L)"
                raise ConfigError(f"{path} has the mode {image.mode} with {depth} bits; it must be {need}.")
            return np.asarray(image)
    except (*BROKEN, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a whole PNG file: {error}.") from None


def check(root: Path) -> Description:
    """Check a whole benchmark folder against its description; the first thing that is wrong raises a
    ConfigError.

    Every file is there and unaltered, every image has a label of its size, labels hold only classes and the
    ignore index, the split lists name no file twice, and no image of one split is found, byte for byte, in
    another.
    """
    description = describe(root)
    owner: dict[str, str] = {}
    for split in SPLITS:
        for pair in read_list(root, split):
            for path in pair:
                if path in owner:
                    raise ConfigError(f"{path} is named twice in the split lists of {_place(root)}.")
                owner[path] = split
        for _ in _samples(root, description, split):
            pass
    seen: dict[str, str] = {}
    for path, split in owner.items():
        if path.startswith(f"{split}/"):
            other = seen.setdefault(description.files[path], path)
            if owner[other] != split:
                raise ConfigError(
                    f"{other} and {path} are the same image: a split of {_place(root)} leaks into another."
                )
    return description


def load(root: Path, split: str) -> Split:
    """Read one split of a benchmark folder into memory, checking every file against its sha256 (see
    :class:`Split`).
    """
    import torch

    description = describe(root)
    height, width = description.size
    count = description.splits[split]
    images = np.empty((count, 3, height, width), np.uint8)
    labels = np.empty((count, height, width), np.uint8)
    names = []
    for index, (name, image, label) in enumerate(_samples(root, description, split)):
        images[index] = image.transpose(2, 0, 1)
        labels[index] = label
        names.append(name)
    return Split(torch.from_numpy(images), torch.from_numpy(labels), names)


def _samples(
    root: Path, description: Description, split: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every (name, image, label) of a split, after the files of the whole split were found there and
    unaltered.
    """
    _verify(root, description, [f"{split}.txt"])
    pairs = read_list(root, split)
    _verify(root, description, [path for pair in pairs for path in pair])
    if len(pairs) != description.splits[split]:
        raise ConfigError(
            f"{_place(root)}/{split}.txt names {len(pairs)} samples, "
            f"{DESCRIPTION} {description.splits[split]}. {_remedy(root)}"
        )
    allowed = np.zeros(256, bool)
    allowed[: len(description.classes)] = True
    allowed[description.ignore_index] = True
    for image_path, label_path in pairs:
        image = decode((root / image_path).read_bytes(), image_path, "RGB")
        label = decode((root / label_path).read_bytes(), label_path, "L")
        if image.shape[:2] != label.shape:
            raise ConfigError(f"{image_path} is {_size(image)} but its label {label_path} is {_size(label)}.")
        if image.shape[:2] != description.size:
            raise ConfigError(f"{image_path} is {_size(image)}; the images of one benchmark have one size.")
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
        if not allowed[present].all():
            raise ConfigError(
                f"{label_path} has the unknown value {present[~allowed[present]][0]}; the known ones are "
                f"0 to {len(description.classes) - 1} and {description.ignore_index} (ignored)."
            )
        yield image_path, image, label


def _verify(root: Path, description: Description, paths: list[str]) -> None:
    """Raise a ConfigError that names the files of ``paths`` that are missing, truncated or altered."""
    bad: dict[str, list[str]] = {"missing": [], "truncated": [], "altered": [], f"not in {DESCRIPTION}": []}
    for path in paths:
        try:
            content = (root / path).read_bytes()
        except OSError:
            bad["missing"].append(path)
            continue
        if path not in description.files:
            bad[f"not in {DESCRIPTION}"].append(path)
        elif sha256(content) != description.files[path]:
            bad["truncated" if path.endswith(".png") and not content.endswith(PNG_END) else "altered"].append(
                path
            )
    if any(bad.values()):
        found = "; ".join(f"{what}: {few(names)}" for what, names in bad.items() if names)
        raise ConfigError(f"The data in {_place(root)} is not what was fetched ({found}). {_remedy(root)}")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _place(root: Path) -> str:
    return f"{root.parent.name}/{_benchmark(root)}"


def _benchmark(root: Path) -> str:
    return root.name.partition(".")[0]  # fetch builds in <benchmark>.part-<pid>


def _remedy(root: Path) -> str:
    return f"Delete {_place(root)}, put {_benchmark(root)} into suite.benchmarks and run `make repro`."
