"""Six test images as the networks see them: ``reports/<benchmark>/panels/``.

The images are chosen from the records alone: by the gain of the best method over the student alone on each
image, the largest loss, the largest gain, and four in between, evenly spaced in rank. A sheet holds the six,
one below the other: at the left the classes, at the right what is wrong. panels.json has the sums of the
weights and of the sheets. A sheet is made where its weights and the data are present, and kept elsewhere as
long as both sums hold; what is neither is removed, and the page says so.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines import files
from pipelines.config import PHOTOS, TEACHER, TRUTH, ConfigError
from pipelines.datasets import folder as data_folder
from pipelines.datasets import pixels
from pipelines.reports.results import Results
from pipelines.runs.confusion import iou
from pipelines.runs.records import Record

IMAGES = 6
SIDES = (240, 192, 144, 96)  # pixels of a tile's longer side, the largest with which all fit
MOST = 1_500_000  # bytes of all sheets of a benchmark
FOLDER, INDEX = "panels", "panels.json"
_webp = partial(pixels.encoded, kind="WEBP", method=6)
WRONG, RIGHT, UNLABELLED = (213, 94, 0, 235), (255, 255, 255, 165), (0, 0, 0, 120)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which images are shown, of which cells: from the records."""

    student: str
    seed: int
    best: str  # the method that the images were chosen by
    cells: dict[str, Record]  # the teacher, the student alone, then the methods
    places: list[int]  # in the test split
    names: list[str]
    gains: list[float]  # of the best method on each image, points of mIoU


def choose(results: Results) -> Choice | None:
    """The images and cells of the first student that has a seed with a method and without."""
    for student in results.students:
        own: dict[str, dict[int, Record]] = {}
        for record in results.finished:
            if record.cell.student == student:
                own.setdefault(record.cell.method, {})[record.cell.seed] = record
        plain = own.get(results.reference, {})
        means = {m: results.mean(student, m) or 0.0 for m in results.tested(results.methods) if m in own}
        for seed in sorted(plain):
            rivals = [m for m in means if seed in own[m]]
            if not rivals:
                continue
            best = max(rivals, key=lambda m: means[m])
            chosen = {m: own[m][seed] for m in rivals}
            gains = scores(chosen[best]) - scores(plain[seed])
            order = np.argsort(gains, kind="stable")
            order = order[~np.isnan(gains[order])]
            if not len(order):
                return None
            ranks = np.linspace(0, len(order) - 1, min(IMAGES, len(order))).round().astype(int)
            places = [int(order[rank]) for rank in ranks]
            teacher = [r for r in results.finished if r.cell.is_teacher]
            first = {TEACHER: teacher[0]} if teacher else {}
            names = chosen[best].test_names()
            return Choice(
                student=student,
                seed=seed,
                best=best,
                cells=first | {results.reference: plain[seed]} | chosen,
                places=places,
                names=[names[place] for place in places],
                gains=[float(gains[place]) for place in places],
            )
    return None


def scores(record: Record) -> np.ndarray:
    """mIoU of every test image in percent, over the classes that it has; NaN without a labelled pixel."""
    found = [iou(counts) for counts in record.confusion("test")]
    return np.array([100 * np.nanmean(own) if (~np.isnan(own)).any() else np.nan for own in found])


def update(results: Results, root: Path) -> None:
    """Make the sheets that can be made, keep those that are right, remove all others."""
    folder, choice = place(results, root), choose(results)
    kept = valid(results, root, choice)
    if choice is not None:
        sheets = _sheets(kept)
        lacks = [m for m in choice.cells if m not in sheets]
        able = [m for m in lacks if (choice.cells[m].folder / "weights.safetensors").is_file()]
        data = root / "data" / results.benchmark
        same = choice.cells[results.reference].run["data_sha256"]
        if able and (data / data_folder.DESCRIPTION).is_file() and data_folder.describe(data).sha256 == same:
            try:
                _make(choice, able, kept, data, folder)
            except ConfigError as error:
                log.warning("The panels of %s are not made: %s", results.benchmark, error)
    if (index := valid(results, root, choice)) is not None:
        files.write_sealed(folder / INDEX, index)
    wanted = right(results, root)
    for path in folder.glob("*") if folder.is_dir() else ():
        if path not in wanted:
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()  # when nothing is left in it


def place(results: Results, root: Path) -> Path:
    return root / "reports" / results.benchmark / FOLDER


def right(results: Results, root: Path) -> set[Path]:
    """The files of a benchmark's panels that belong to the records of today."""
    folder, index = place(results, root), valid(results, root, choose(results))
    return {folder / f"{name}.webp" for name in _files(index)} | ({folder / INDEX} if index else set())


def valid(results: Results, root: Path, choice: Choice | None) -> dict[str, Any] | None:
    """panels.json with the sheets that belong to the records of today and are the files they were."""
    folder = place(results, root)
    try:
        index = files.unseal((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        return None
    if choice is None or index["chosen"] != _chosen(choice):
        return None
    whole = {name for name, total in index["files"].items() if _sum(folder / f"{name}.webp") == total}
    if not {PHOTOS, TRUTH} <= whole:
        return None
    current = {m: r.run["weights_sha256"] for m, r in choice.cells.items()}
    weights = {m: w for m, w in index["weights"].items() if m in whole and current.get(m) == w}
    totals = {name: index["files"][name] for name in sorted({PHOTOS, TRUTH, *weights})}
    return index | {"weights": weights, "files": totals}


def shown(results: Results, root: Path) -> dict[str, Any] | None:
    """What the page needs: the sheets, and the score of every tile; None where there is nothing to show."""
    choice = choose(results)
    index = valid(results, root, choice)
    if choice is None:
        return None
    sheets = _sheets(index)
    folder = place(results, root)
    rows: list[tuple[str, str, list[float]]] = []
    for method, record in choice.cells.items():
        if method in sheets:
            rows.append((method, results.label(method), scores(record)[choice.places].tolist()))
    return {
        "choice": choice,
        "best": results.label(choice.best),
        "index": index,
        "sheets": {name: folder / f"{name}.webp" for name in _files(index)},
        "rows": rows,
        "left_out": [results.label(m) for m in choice.cells if m not in sheets and m != TEACHER],
    }


def _make(
    choice: Choice, methods: Sequence[str], kept: dict[str, Any] | None, data: Path, folder: Path
) -> None:
    """Run the networks on the chosen images and write their sheets."""
    from pipelines.datasets.folder import Split

    split, meta = data_folder.load(data, "test"), data_folder.describe(data)
    samples = [
        (split.images[place], split.labels[place]) if isinstance(split, Split) else split.read(place)
        for place in choice.places
    ]
    seen = {method: _predictions(choice.cells[method], [image for image, _ in samples]) for method in methods}
    truth = [label.numpy() for _, label in samples]
    palette = np.zeros((256, 4), np.uint8)
    palette[: len(meta.palette), :3] = meta.palette
    palette[: len(meta.palette), 3] = 255

    def draw(side: int) -> dict[str, bytes]:
        shape = np.max([label.shape for label in truth], axis=0)
        tile = tuple(int(max(1, round(side * n / shape.max()))) for n in shape)

        def column(layers: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([_fitted(layer, tile) for layer in layers])

        def sheet(masks: Sequence[np.ndarray]) -> bytes:
            wrong = [
                _errors(mask, label, meta.ignore_index) for mask, label in zip(masks, truth, strict=True)
            ]
            both = np.concatenate([column([palette[mask] for mask in masks]), column(wrong)], axis=1)
            return _webp(Image.fromarray(both), lossless=True)

        made = {method: sheet(masks) for method, masks in seen.items()}
        if kept is None:
            photos = column([image.numpy().transpose(1, 2, 0) for image, _ in samples])
            made[PHOTOS] = _webp(Image.fromarray(photos), quality=80)
            made[TRUTH] = _webp(Image.fromarray(column([palette[label] for label in truth])), lossless=True)
        return made

    old = {name: (folder / f"{name}.webp").read_bytes() for name in _files(kept)}
    for side in (kept["side"],) if kept else SIDES:
        contents = old | draw(side)
        if sum(map(len, contents.values())) <= MOST:
            break
    else:
        raise ConfigError(f"they take more than {MOST / 1e6:g} MB: delete {folder.name}/ and try again.")
    for name, content in contents.items():
        files.write_bytes(folder / f"{name}.webp", content)
    with Image.open(io.BytesIO(contents[PHOTOS])) as photos:
        size = [photos.width, photos.height // len(choice.places)]
    index = {
        "chosen": _chosen(choice),
        "side": side,
        "tile": size,
        "classes": list(meta.classes),
        "palette": [list(colour) for colour in meta.palette],
        "weights": (kept or {"weights": {}})["weights"]
        | {m: choice.cells[m].run["weights_sha256"] for m in methods},
        "files": {name: files.sha256(content) for name, content in sorted(contents.items())},
    }
    files.write_sealed(folder / INDEX, index)


def _predictions(record: Record, images: Sequence[Any]) -> list[np.ndarray]:
    """The class of every pixel, as the evaluation of the cell saw it."""
    from pipelines.config import Training
    from pipelines.engine import deploy, machine
    from pipelines.engine.evaluate import predict

    training, device = Training.model_validate(record.run["config"]["training"]), machine.device()
    network = deploy.load(record.run, record.folder / "weights.safetensors").to(device)
    return [
        predict(network, image[None].to(device), training)[0].to("cpu").numpy().astype(np.uint8)
        for image in images
    ]


def _errors(mask: np.ndarray, label: np.ndarray, ignore_index: int) -> np.ndarray:
    """Over the photograph: what is wrong in one colour, what is right washed out, (H, W, 4) uint8."""
    found = np.where((mask == label)[..., None], RIGHT, WRONG)
    return np.where((label == ignore_index)[..., None], UNLABELLED, found).astype(np.uint8)


def _fitted(layer: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    """A layer of an image in a tile (height, width), as large as it fits; classes are never mixed."""
    how = Image.Resampling.BILINEAR if layer.shape[2] == 3 else Image.Resampling.NEAREST
    return np.asarray(ImageOps.pad(Image.fromarray(layer), (tile[1], tile[0]), how, 0, (0, 0)))


def _chosen(choice: Choice) -> dict[str, Any]:
    return {"student": choice.student, "seed": choice.seed, "best": choice.best, "images": choice.names}


def _sheets(index: Mapping[str, Any] | None) -> list[str]:
    """The cells that have a sheet."""
    return [*index["weights"]] if index else []


def _files(index: Mapping[str, Any] | None) -> list[str]:
    return [PHOTOS, TRUTH, *_sheets(index)] if index else []


def _sum(path: Path) -> str | None:
    return files.sha256(path.read_bytes()) if path.is_file() else None
