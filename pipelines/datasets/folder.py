"""The on-disk form of every benchmark: how it is described, checked and read.

``data/<benchmark>/`` holds ``{train,val,test}/*.{png,jpg}`` (8-bit RGB), ``{train,val,test}annot/*.png``
(8-bit, one channel, the value is the class), ``{train,val,test}.txt`` (one sample per line: ``train/x.png
trainannot/x.png``) and ``dataset.json``, which names the classes and the sha256 of every other file. The
sha256 of dataset.json is *the* hash of the data. A small set whose images have one size is read into memory
(:class:`Split`), every other one is read from disk sample by sample (:class:`Stream`). Nothing here imports
torch before tensors are asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

AHEAD = 2  # batches that each worker process prepares in advance
SPLITS = ("train", "val", "test")
IN_MEMORY = 2**30  # bytes of pixels; a set with a larger split is read from disk sample by sample
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
    """dataset.json as read: ``size`` is (height, width), None where the images differ; ``splits`` the samples
    per split, ``sha256`` the data hash.
    """

    size: tuple[int, int] | None
    splits: dict[str, int]
    files: dict[str, str]
    sha256: str

    @property
    def streamed(self) -> bool:
        """Whether the set is read from disk sample by sample: decided by the data, not by the machine."""
        return self.size is None or 4 * max(self.splits.values()) * self.size[0] * self.size[1] > IN_MEMORY


@dataclass(frozen=True)
class Split:
    """One split in memory: ``images`` (N, 3, H, W) uint8, ``labels`` (N, H, W) uint8, ``names`` of the
    images.
    """

    images: Tensor
    labels: Tensor
    names: list[str]

    def to(self, device: Any) -> Split:
        return Split(self.images.to(device), self.labels.to(device), self.names)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, at most ``size`` at a time: images (B, 3, H, W), labels (B, H, W)."""
        for first in range(0, len(self.names), size):
            yield self.images[first : first + size], self.labels[first : first + size]


@dataclass(frozen=True)
class Stream:
    """One split on disk, read by ``workers`` processes (0: by this one). At most a few samples are in memory.

    Every file is checked against its sha256 when it is read.
    """

    root: Path
    description: Description
    pairs: list[tuple[str, str]]
    workers: int

    @property
    def names(self) -> list[str]:
        return [image for image, _ in self.pairs]

    def to(self, device: Any) -> Stream:
        """The same: samples come from disk on the CPU."""
        return self

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """A sample: image (3, H, W) uint8, label (H, W) uint8. ConfigError when it is damaged."""
        import torch

        image, label = _sample(self.root, self.description, self.pairs[index])
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label.copy())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, one at a time, as they may differ in size: (1, 3, H, W) and (1, H, W)."""
        yield from self.load(self.read, range(len(self.pairs)), 1)

    def load(
        self, read: Callable[[int], tuple[Tensor, Tensor]], indices: Sequence[int], size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``read`` of every index, by the workers and in order, in batches of ``size``."""
        import torch
        from torch.utils.data import DataLoader

        workers = min(self.workers, os.cpu_count() or 1)
        loader: DataLoader[Any] = DataLoader(
            _Reader(read),  # type: ignore[arg-type]
            batch_size=size,
            sampler=indices,
            num_workers=workers,
            collate_fn=_together,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=AHEAD if workers else None,
            generator=torch.Generator(),  # or it draws from the stream that dropout draws from
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ConfigError(batch)
            yield batch


@dataclass(frozen=True)
class _Reader:
    """What a worker process does. An error crosses as its sentence, not as a traceback."""

    read: Callable[[int], tuple[Tensor, Tensor]]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        try:
            return self.read(index)
        except ConfigError as error:
            return str(error)


def _together(samples: list[tuple[Tensor, Tensor] | str]) -> tuple[Tensor, Tensor] | str:
    import torch

    images, labels = [], []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.stack(labels)


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
            size=(int(raw["size"][0]), int(raw["size"][1])) if raw["size"] is not None else None,
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
    images = {image for pairs in samples.values() for image, _ in pairs}
    contents, sizes = {}, set()
    for path in sorted(set(paths)):
        try:
            content = (root / path).read_bytes()
        except OSError:
            raise ConfigError(
                f"{path} is named by a split list of {_place(root)} but cannot be read."
            ) from None
        contents[path] = sha256(content)
        if path in images:
            sizes.add(_claimed_size(content, path))
    record = asdict(meta) | {
        "size": list(sizes.pop()) if len(sizes) == 1 else None,
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
                    f"it must read `{split}/<name>.png {split}annot/<name>.png` (or .jpg for the image)."
                )
    if not pairs:
        raise ConfigError(f"{_place(root)}/{split}.txt names no sample. {_remedy(root)}")
    return pairs


def decode(content: bytes, path: str, mode: str) -> np.ndarray:
    """The pixels of a PNG, or a JPEG where the name says so, whose mode must be ``mode``: (H, W, 3) uint8 for
    "RGB", (H, W) uint8 for "L"."""
    kind = _kind(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=[kind])
        with image:
            image.load()
            # Pillow opens 16-bit colour as 8-bit RGB and 4-bit gray as L, both rescaled: ask the header.
            depth = content[24] if kind == "PNG" else 8
            if image.mode != mode or depth != 8:
                need = "8-bit RGB" if mode == "RGB" else "8-bit with one channel (L)"
                raise ConfigError(f"{path} has the mode {image.mode} with {depth} bits; it must be {need}.")
            return np.asarray(image)
    except (*BROKEN, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a whole {kind} file: {error}.") from None


def _claimed_size(content: bytes, path: str) -> tuple[int, int]:
    """(height, width) of an image by its header."""
    kind = _kind(path)
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as image:
            return image.height, image.width
    except (*BROKEN, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is not a whole {kind} file: {error}.") from None


def _kind(path: str) -> str:
    return "JPEG" if path.endswith(".jpg") else "PNG"


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


def load(root: Path, split: str, workers: int = 0) -> Split | Stream:
    """One split of a benchmark folder: in memory, every file checked against its sha256, or a stream that
    checks each file as it is read, by ``workers`` processes (their number has no influence on what is read).
    """
    import torch

    description = describe(root)
    if description.size is None or description.streamed:
        pairs = _pairs(root, description, split)
        _verify(root, description, [path for pair in pairs for path in pair], contents=False)
        return Stream(root, description, pairs, workers)
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


def _pairs(root: Path, description: Description, split: str) -> list[tuple[str, str]]:
    """The list of a split, if it is the one that was fetched."""
    _verify(root, description, [f"{split}.txt"])
    pairs = read_list(root, split)
    if len(pairs) != description.splits[split]:
        raise ConfigError(
            f"{_place(root)}/{split}.txt names {len(pairs)} samples, "
            f"{DESCRIPTION} {description.splits[split]}. {_remedy(root)}"
        )
    return pairs


def _samples(
    root: Path, description: Description, split: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every (name, image, label) of a split, after the files of the whole split were found there and
    unaltered.
    """
    pairs = _pairs(root, description, split)
    _verify(root, description, [path for pair in pairs for path in pair])
    for pair in pairs:
        yield pair[0], *_sample(root, description, pair, verified=True)


def _sample(
    root: Path, description: Description, pair: tuple[str, str], verified: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and label (H, W) of a sample, checked against the description and each other."""
    if not verified:
        _verify(root, description, list(pair))
    image_path, label_path = pair
    image = decode((root / image_path).read_bytes(), image_path, "RGB")
    label = decode((root / label_path).read_bytes(), label_path, "L")
    if image.shape[:2] != label.shape:
        raise ConfigError(f"{image_path} is {_size(image)} but its label {label_path} is {_size(label)}.")
    if description.size is not None and image.shape[:2] != description.size:
        raise ConfigError(f"{image_path} is {_size(image)}, {DESCRIPTION} says all have one size.")
    allowed = np.zeros(256, bool)
    allowed[: len(description.classes)] = True
    allowed[description.ignore_index] = True
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    if not allowed[present].all():
        raise ConfigError(
            f"{label_path} has the unknown value {present[~allowed[present]][0]}; the known ones are "
            f"0 to {len(description.classes) - 1} and {description.ignore_index} (ignored)."
        )
    return image, label


def _verify(root: Path, description: Description, paths: list[str], contents: bool = True) -> None:
    """Raise a ConfigError that names the files of ``paths`` that are missing, truncated or altered; without
    ``contents`` those that are missing."""
    bad: dict[str, list[str]] = {"missing": [], "truncated": [], "altered": [], f"not in {DESCRIPTION}": []}
    for path in paths:
        if path not in description.files:
            bad[f"not in {DESCRIPTION}"].append(path)
            continue
        try:
            content = (root / path).read_bytes() if contents else (root / path).stat()
        except OSError:
            bad["missing"].append(path)
            continue
        if isinstance(content, bytes) and sha256(content) != description.files[path]:
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
