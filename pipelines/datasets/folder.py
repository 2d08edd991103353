"""The on-disk form of every benchmark: how it is described, checked and read.

``data/<benchmark>/`` holds ``{train,val,test}/*.{png,jpg}`` (8-bit RGB), ``{train,val,test}annot/*.png``
(8-bit, one channel, the value is the class), ``{train,val,test}.txt`` (one sample per line: ``train/x.png
trainannot/x.png``) and ``dataset.json``, which names the classes and the sha256 of every other file. The
sha256 of dataset.json is *the* hash of the data. A small set whose images have one size is read into memory
(:class:`Split`), every other one is read from disk sample by sample (:class:`Stream`). Nothing here imports
torch before tensors are asked for.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from pipelines.config import ConfigError, Positive
from pipelines.datasets import pixels
from pipelines.files import sha256

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

AHEAD = 2  # batches that each worker process prepares in advance
SPLITS = ("train", "val", "test")
IN_MEMORY = 2**30  # bytes of pixels; a set with a larger split is read from disk sample by sample
DESCRIPTION = "dataset.json"
PART = r"[\w+@(),=-][\w+@(),=.-]*"  # of a path in a list: it does not begin with a dot
PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every whole PNG file

log = logging.getLogger(__name__)

Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class Meta:
    """What a data set knows about itself: its name, class names, one RGB colour a class, and the label to
    ignore."""

    name: str
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    palette: tuple[tuple[Byte, Byte, Byte], ...]
    ignore_index: Byte


@dataclass(frozen=True)
class Description(Meta):
    """dataset.json as read: ``size`` is (height, width), None where the images differ; ``splits`` the samples
    per split, ``sha256`` the data hash; ``absent`` the classes without a pixel, by split, and ``names`` what
    the user calls an image that has another name here."""

    size: tuple[Positive, Positive] | None
    splits: Annotated[dict[str, Positive], Field(min_length=len(SPLITS), max_length=len(SPLITS))]
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    sha256: str
    absent: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def streamed(self) -> bool:
        """Whether the set is read from disk sample by sample: decided by the data, not by the machine."""
        return self.size is None or streams(max(self.splits.values()), self.size)


READ = TypeAdapter(Description)


def streams(count: int, size: tuple[int, int]) -> bool:
    """Whether a set whose largest split has ``count`` images of one size is too large for the memory."""
    return 4 * count * size[0] * size[1] > IN_MEMORY


@dataclass(frozen=True)
class Split:
    """One split in memory: ``images`` (N, 3, H, W) uint8, ``labels`` (N, H, W) uint8, ``names`` of the
    images."""

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

    @cached_property
    def names(self) -> list[str]:
        return [self.description.names.get(image, image) for image, _ in self.pairs]

    @property
    def processes(self) -> int:
        """How many read: no more than there are cores."""
        return min(self.workers, os.cpu_count() or 1)

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

        if self.processes:  # those of Dask are daemons, which Python lets have no children
            multiprocessing.current_process().daemon = False
        loader: DataLoader[Any] = DataLoader(
            _Reader(read),  # type: ignore[arg-type]
            batch_size=size,
            sampler=indices,
            num_workers=self.processes,
            collate_fn=_together,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=AHEAD if self.processes else None,
            generator=torch.Generator(),  # or it draws from the stream that dropout draws from
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ConfigError(batch)
            images, labels = batch
            yield images, labels


@dataclass(frozen=True)
class _Reader:
    """What a worker process does. An error crosses as its sentence, not as a traceback."""

    read: Callable[[int], tuple[Tensor, Tensor]]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        try:
            return self.read(index)
        except ConfigError as error:
            return str(error)


def _together(samples: list[Any]) -> Any:
    from torch.utils.data import default_collate

    return next((sample for sample in samples if isinstance(sample, str)), None) or default_collate(samples)


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
            f"There is no data in {_place(root)}: {DESCRIPTION} is missing. Run `python -m "
            f"pipelines.stages.fetch --benchmark {_benchmark(root)}` in .venv, or delete a folder without it."
        ) from None
    try:
        found = READ.validate_python({**json.loads(content), "sha256": sha256(content)})
        if set(found.splits) != set(SPLITS):
            raise ValueError(found.splits)
        return found
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f"{_place(root)}/{DESCRIPTION} is damaged. {_remedy(root)}") from None


def write_description(
    root: Path,
    meta: Meta,
    names: Mapping[str, str] | None = None,
    absent: Mapping[str, list[str]] | None = None,
) -> Description:
    """Write ``root/dataset.json`` for the images, labels and split lists in ``root``, and return it.

    ``names`` and ``absent``, see :class:`Description`, stand there where there are any.
    """
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
            with _opened(content, path) as image:
                sizes.add(image.size[::-1])
    record = asdict(meta) | {
        "size": list(sizes.pop()) if len(sizes) == 1 else None,
        "splits": {split: len(pairs) for split, pairs in samples.items()},
        "files": contents,
    }
    record |= {key: dict(value) for key, value in (("names", names), ("absent", absent)) if value}
    (root / DESCRIPTION).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return describe(root)


def read_list(root: Path, split: str) -> list[tuple[str, str]]:
    """The samples of ``root/<split>.txt`` as (image, label) paths relative to ``root``."""
    try:
        lines = (root / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{_place(root)}/{split}.txt is missing or damaged. {_remedy(root)}") from None
    name = rf"(?:{PART}/)*{PART}"
    sample = re.compile(rf"({split}/{name}\.(?:png|jpg))\s+({split}annot/{name}\.png)")
    pairs = []
    for number, line in enumerate(lines, 1):
        if (found := sample.fullmatch(line.strip())) is None:
            raise ConfigError(
                f"Line {number} of {_place(root)}/{split}.txt is {reprlib.repr(line)}; "
                f"it must read `{split}/<name>.png {split}annot/<name>.png` (or .jpg for the image)."
            )
        pairs.append((found[1], found[2]))
    if not pairs:
        raise ConfigError(f"{_place(root)}/{split}.txt names no sample. {_remedy(root)}")
    return pairs


def decode(content: bytes, path: str, mode: str) -> np.ndarray:
    """The pixels of a PNG, or a JPEG where the name says so, whose mode must be ``mode``: (H, W, 3) uint8 for
    "RGB", (H, W) uint8 for "L"."""
    with _opened(content, path) as image:
        depth = pixels.bits(image)
        if image.mode != mode or depth != 8:
            need = "8-bit RGB" if mode == "RGB" else "8-bit with one channel (L)"
            raise ConfigError(f"{path} has the mode {image.mode} with {depth} bits; it must be {need}.")
        with pixels.reading(path):
            return np.asarray(image)


def _opened(content: bytes, path: str) -> Image.Image:
    """An image of the kind that its name says, whose pixels are not decoded yet."""
    return pixels.opened(content, path, ("JPEG" if path.endswith(".jpg") else "PNG",), exact=True)


def check(root: Path, published: bool = False, smallest: int = 1) -> Description:
    """Check a whole benchmark folder against its description; the first thing that is wrong raises a
    ConfigError. The classes that were found ``absent`` are those of what is returned.

    Every file is there and unaltered, every image has a label of its size, labels hold only classes and the
    ignore index, every split has a labelled pixel and *train* one of every class, no image of *val* and
    *test* has a side below ``smallest``, the split lists name no file twice, and no image of one split is
    found in another, pixel for pixel. Of splits that are ``published``, which nobody here can change, the
    last (by bytes) and an absent class are warnings.
    """
    description = describe(root)
    owner: dict[str, str] = {}
    counts = {split: np.zeros(256, np.int64) for split in SPLITS}
    pictures = dict(description.files)
    for split in SPLITS:
        for pair in read_list(root, split):
            for path in pair:
                if path in owner:
                    raise ConfigError(f"{path} is named twice in the split lists of {_place(root)}.")
                owner[path] = split
        for name, image, label in _samples(root, description, split):
            if not published:  # of two encodings of one picture the files differ
                pictures[name] = sha256(str(image.shape).encode() + image.tobytes())
            counts[split] += np.bincount(label.ravel(), minlength=256)
            if split != "train" and min(label.shape) < smallest:
                raise ConfigError(
                    f"{description.names.get(name, name)} is {_size(label)}, and a network of this benchmark "
                    f"sees nothing below {smallest} pixels a side: enlarge the images or set a larger "
                    "`size`, or take a convolutional network in place of the transformer."
                )
    seen: dict[str, str] = {}
    leaks = []
    for path, split in owner.items():
        if path.startswith(f"{split}/"):
            other = seen.setdefault(pictures[path], path)
            if owner[other] != split:
                leaks.append(" and ".join(description.names.get(name, name) for name in (other, path)))
    if leaks and not published:
        raise ConfigError(f"{leaks[0]} are the same image: a split of {_place(root)} leaks into another.")
    if leaks:
        text = "%s: the published splits share %d images, byte for byte: %s."
        log.warning(text, _place(root), len(leaks), few(leaks))
    return replace(description, absent=_absent(root, description, counts, published))


def _absent(
    root: Path, description: Description, counts: Mapping[str, np.ndarray], published: bool
) -> dict[str, list[str]]:
    """The classes without a pixel by split, from the ``counts`` of label values. ConfigError where nothing
    could be learned or scored."""
    found = {}
    for split, values in counts.items():
        known = values[: len(description.classes)]
        missing = [name for name, count in zip(description.classes, known, strict=True) if not count]
        if not known.any() or (missing and split == "train" and not published):
            what = f"No pixel is of {few(missing)} in" if known.any() else "No pixel has a label in"
            raise ConfigError(
                f"{what} {split} of {_place(root)}, whose labels hold the values "
                f"{few(map(str, np.flatnonzero(values)), 8)} ({description.ignore_index} is ignored): "
                + (
                    "in black and white masks 255 is a class, as a rule. Give that class the colour [255, "
                    "255, 255] and set `masks: colours`, which reads masks by the colours in `classes`."
                    if description.ignore_index == 255 and {*np.flatnonzero(values)} == {0, 255}
                    else "correct the labels, `ignore_index`, `size` or the split, or take the class out."
                )
            )
        if missing:
            found[split] = missing
            log.warning(
                "%s: the split %s has no pixel of %s: no score there; the mean is over the other classes.",
                _place(root), split, few(missing),
            )  # fmt: skip
    return found


def load(root: Path, split: str, workers: int = 0, in_memory: bool = False) -> Split | Stream:
    """One split of a benchmark folder: in memory, every file checked against its sha256, or a stream that
    checks each file as it is read, by ``workers`` processes (their number has no influence on what is read).
    ``in_memory``: not as a stream, if its images are of one size."""
    import torch

    description = describe(root)
    if description.size is None or (description.streamed and not in_memory):
        pairs = _pairs(root, description, split)
        files = [path for pair in pairs for path in pair]
        _refuse(root, {path: "" if (root / path).is_file() else "missing" for path in files})
        return Stream(root, description, pairs, workers)
    height, width = description.size
    count = description.splits[split]
    images = np.empty((count, 3, height, width), np.uint8)
    labels = np.empty((count, height, width), np.uint8)
    names = []
    for index, (name, image, label) in enumerate(_samples(root, description, split)):
        images[index] = image.transpose(2, 0, 1)
        labels[index] = label
        names.append(description.names.get(name, name))
    return Split(torch.from_numpy(images), torch.from_numpy(labels), names)


def _pairs(root: Path, description: Description, split: str) -> list[tuple[str, str]]:
    """The list of a split, if it is the one that was fetched."""
    _refuse(root, {f"{split}.txt": _read(root, description, f"{split}.txt")[1]})
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
    unaltered."""
    pairs = _pairs(root, description, split)
    _refuse(root, {path: _read(root, description, path)[1] for pair in pairs for path in pair})
    for pair in pairs:
        yield pair[0], *_sample(root, description, pair)


def _sample(root: Path, description: Description, pair: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and label (H, W) of a sample, checked against the description and each other."""
    image_path, label_path = pair
    found = {path: _read(root, description, path) for path in pair}
    _refuse(root, {path: fault for path, (_, fault) in found.items()})
    image, label = (
        decode(found[image_path][0], description.names.get(image_path, image_path), "RGB"),
        decode(found[label_path][0], label_path, "L"),
    )
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


def _read(root: Path, description: Description, path: str) -> tuple[bytes, str]:
    """The content of a file, and what is wrong with it: missing, truncated, …, or nothing."""
    if path not in description.files:
        return b"", f"not in {DESCRIPTION}"
    try:
        content = (root / path).read_bytes()
    except OSError:
        return b"", "missing"
    if sha256(content) == description.files[path]:
        return content, ""
    return content, "truncated" if path.endswith(".png") and not content.endswith(PNG_END) else "altered"


def _refuse(root: Path, faults: Mapping[str, str]) -> None:
    """Raise a ConfigError that names the files that have a fault."""
    kinds = ("missing", "truncated", "altered", f"not in {DESCRIPTION}")
    named = {kind: [path for path, fault in faults.items() if fault == kind] for kind in kinds}
    if found := "; ".join(f"{kind}: {few(paths)}" for kind, paths in named.items() if paths):
        raise ConfigError(f"The data in {_place(root)} is not what was fetched ({found}). {_remedy(root)}")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _place(root: Path) -> str:
    return f"{root.parent.name}/{_benchmark(root)}"


def _benchmark(root: Path) -> str:
    return root.name.partition(".")[0]  # fetch builds in <benchmark>.part-<pid>


def _remedy(root: Path) -> str:
    fetch = f"python -m pipelines.stages.fetch --benchmark {_benchmark(root)}"
    return f"Delete {_place(root)} and run `{fetch}` in .venv."
