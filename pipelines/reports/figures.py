"""The figures of a benchmark: scores, gain against compute, differences per class; and ranks over several.

Drawn from the same results as the tables; a method has the look of :mod:`pipelines.reports.looks`. The bytes
are the same every time on one machine; every file carries the digest of the records it was drawn from, to be
checked on any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import files, fonts

os.environ["MPLBACKEND"] = "Agg"  # that of a notebook would stop the import

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.config import OFFICIAL, metric_name
from pipelines.reports import statistics
from pipelines.reports.looks import Look, looks
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import COMPUTE, SCORE, Results, label
from pipelines.runs.tracking import digest

STYLE: dict[Any, Any] = {
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.titlepad": 10,
}
GREY = "0.45"
CLASSES = 40  # that a figure holds
TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # multiples of the compute of the student alone
LINE = 0.19  # inches between two names
SOURCE = "Source"  # the PNG text chunk with the digest of the records
PIXELS = "Comment"  # and the one with the sum of the pixels (RGBA)


def write(results: Results, folder: Path) -> None:
    """Draw every figure of a benchmark into ``folder``."""
    style = STYLE | fonts.style("".join(results.classes()))
    with _look(sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"}) | style):
        for name, draw in NAMES.items():
            _save(draw(results), folder / f"{name}.png", source([results]))


def write_ranks(found: Ranks, every: Sequence[Results], folder: Path) -> None:
    """Draw the critical-difference diagram of all benchmarks and students."""
    with _look(STYLE):
        _save(critical_difference(found, looks(every[0])), folder / "ranks.png", source(every))


@contextlib.contextmanager
def _look(style: dict[Any, Any]) -> Iterator[None]:
    """The same figures whatever a user's matplotlibrc says."""
    with plt.rc_context():
        plt.rcdefaults()
        plt.rcParams.update(style)
        yield


def source(every: Sequence[Results]) -> str:
    """sha256 over the records that a figure is drawn from."""
    total = hashlib.sha256()
    for record in sorted((r for results in every for r in results.finished), key=lambda r: r.cell.path):
        total.update(f"{record.cell.path} {digest(record)}\n".encode())
    return total.hexdigest()


def scores(results: Results) -> Figure:
    """Test mIoU, the best mean first: every seed a point, the mean a bar, one line a method."""
    rows = [_ordered(results, student) for student in results.students]
    size = (6.6, 0.27 * max(map(len, rows)) + 1.3)
    figure, axes = _panels(len(rows), size)
    look, teacher = looks(results), results.teacher(SCORE)
    for axis, student, methods in zip(axes, results.students, rows, strict=True):
        for y, key in enumerate(methods):
            values = list(results.by_seed(student, key).values())
            own = look[key]
            if values:
                axis.scatter(
                    values,
                    [y] * len(values),
                    s=26,
                    color=own.colour,
                    marker=own.marker,
                    alpha=0.7,
                    linewidth=0,
                    zorder=3,
                )
                axis.vlines(
                    statistics.mean(values) or 0,
                    y - 0.36,
                    y + 0.36,
                    color=own.colour,
                    linewidth=2.5,
                    zorder=4,
                )
            else:
                axis.text(0.02, y, "not run", transform=axis.get_yaxis_transform(), va="center", color=GREY)
        if (alone := results.mean(student, results.reference)) is not None:
            axis.axvline(alone, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        axis.set_yticks(range(len(methods)), [_name(results, key) for key in methods])
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        above = "" if teacher is None else f" (teacher: {teacher:.1f})"
        axis.set(xlabel="test mIoU (%)", title=f"{student}: every seed{above}")
    return figure


def per_class(results: Results) -> Figure:
    """IoU minus that of the student alone, method × class, mean over paired seeds; of many classes
    those that differ most."""
    names, rows, grids = results.classes(), [], []
    for student in results.students:
        rows.append([key for key in _ordered(results, student) if key != results.reference])
        cells = [
            [results.paired(student, key, f"test/iou/{metric_name(name)}").mean for name in names]
            for key in rows[-1]
        ]
        grids.append(np.array(cells, dtype=np.float64).reshape(len(cells), len(names)))
    known = np.abs(np.concatenate([grid.ravel() for grid in grids]))
    limit = max(1.0, float(np.nanmax(known, initial=0.0)))
    if len(names) > CLASSES:
        most = np.max([np.nan_to_num(np.abs(grid)).max(axis=0, initial=0.0) for grid in grids], axis=0)
        kept = sorted(np.argsort(-most, kind="stable")[:CLASSES])
        names, grids = [names[i] for i in kept], [grid[:, kept] for grid in grids]
    size = (0.52 * len(names) + 2.6, 0.27 * max(map(len, rows)) + 1.9)
    figure, axes = _panels(len(grids), size)
    for axis, grid, student, methods in zip(axes, grids, results.students, rows, strict=True):
        if not grid.size:
            axis.set(title=f"{student}: nothing to compare yet", xticks=[], yticks=[])
            continue
        sns.heatmap(
            grid,
            ax=axis,
            cmap=sns.color_palette("vlag_r", as_cmap=True),
            vmin=-limit,
            vmax=limit,
            annot=np.vectorize(_difference, otypes=[object])(grid),
            fmt="",
            annot_kws={"fontsize": 8},
            linewidths=1,
            xticklabels=names,
            yticklabels=[_name(results, key) for key in methods],
            cbar=axis is axes[-1],
            cbar_kws={"label": f"IoU − {results.reference} (points)"},
        )
        axis.set_facecolor("0.9")  # shows where there is nothing to compare
        axis.tick_params(length=0)
        axis.tick_params(axis="y", rotation=0)
        axis.set_xticks(axis.get_xticks(), names, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_title(f"{student}: gain by class")
    return figure


def _difference(value: float) -> str:
    """``+1.3``; ``0`` for what rounds to nothing, as for a class that neither network finds."""
    return "" if np.isnan(value) else "0" if abs(value) < 0.05 else f"{value:+.1f}"


def compute(results: Results) -> Figure:
    """Mean gain over the student alone against the compute of the training, in multiples of its own:
    the student alone, trained ever longer, is a curve."""
    rows = max(sum(bool(results.by_seed(s, m)) for m in results.methods) for s in results.students)
    size = (6.8, max(3.6, 0.21 * rows + 1.2))
    figure, axes = _panels(len(results.students), size, shared=True)
    look, alone = looks(results), {results.reference, *results.controls}
    gains = [_gains(results, student) for student in results.students]
    most = max([2.0, *(x for points in gains for x, _ in points.values())])
    ticks = [tick for tick in TICKS if tick <= most]
    for axis, student, points in zip(axes, results.students, gains, strict=True):
        curve = sorted(points[m] for m in alone & points.keys())
        if len(curve) > 1:
            axis.plot(*zip(*curve, strict=True), color=GREY, linestyle=":", linewidth=1.8, zorder=2)
        for key, (x, y) in points.items():
            own = look[key]
            marker = "d" if key.endswith(OFFICIAL) else own.marker
            axis.scatter(x, y, s=64, color=own.colour, marker=marker, edgecolor="white", zorder=3)
        axis.axhline(0, color="0.8", linewidth=1, zorder=1)
        axis.set(
            xlabel=f"FLOPs of the training (× {results.reference})", title=f"{student}: gain and its cost"
        )
        names = {key: _name(results, key) for key in points}
        lines = {names[key]: look[key].colour for key in points}
        _margin_labels(axis, {names[key]: point for key, point in points.items()}, lines, size[1])
    axes[0].set_ylabel(f"gain over {results.reference} (points of test mIoU)")
    axes[0].set_xscale("log")  # as the student alone is interpolated
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_xlim(0.93, 1.08 * most)
    return figure


def critical_difference(found: Ranks, look: Mapping[str, Look]) -> Figure:
    """Mean ranks, the best first, one line a method; a bar joins methods that are not told apart."""
    methods, last = list(found.ranks), len(found.ranks)
    height = 0.27 * last + 1.3
    figure, axis = plt.subplots(figsize=(6.8, height), layout="constrained")
    for y, method in enumerate(methods):
        rank = found.ranks[method]
        axis.hlines(y, 1, rank, color="0.85", linewidth=1, zorder=1)
        axis.scatter(rank, y, s=40, color=look[method].colour, marker=look[method].marker, zorder=3)
    for level, group in enumerate(found.cliques):
        places = [methods.index(method) for method in group]
        x = last + 0.6 + 0.35 * level
        axis.vlines(x, min(places) - 0.25, max(places) + 0.25, color=GREY, linewidth=3)
    axis.set_yticks(range(last), [f"{label(m)} ({found.ranks[m]:.1f})" for m in methods])
    axis.set_ylim(last - 0.4, -0.6)
    axis.set_xlim(0.5, last + 1 + 0.35 * len(found.cliques))
    axis.set_xlabel(f"mean rank over {len(found.blocks)} blocks (1 is the best)")
    axis.set_title("Place among the methods; a bar joins those that are not told apart")
    return figure


def sentence(name: str, results: Results) -> str:
    """What there is to see in a figure, from the same numbers, and how to read it."""
    seen = [_SENTENCES[name](results, student) for student in results.students]
    return " ".join([*seen, _READ[name].format(results.reference)])


def _say_scores(results: Results, student: str) -> str:
    alone = results.by_seed(student, results.reference)
    tested = {m: own for m in results.tested(results.methods) if (own := results.by_seed(student, m))}
    if not tested or not alone:
        return f"{student}: nothing to compare yet."
    mean = results.mean(student, results.reference) or 0
    above = [m for m in tested if (results.mean(student, m) or 0) > mean]
    clear = [m for m, own in tested.items() if min(own.values()) > max(alone.values())]
    if len(alone) == 1:
        return (
            f"{student}: {len(above)} of {len(tested)} methods score above {results.reference} with the one "
            "seed that there is."
        )
    return (
        f"{student}: {len(above)} of {len(tested)} methods have a higher mean than {results.reference}; for "
        f"{len(clear)} of them, every seed is above every seed of {results.reference}."
    )


def _say_compute(results: Results, student: str) -> str:
    points = _gains(results, student)
    curve = sorted(points[m] for m in (results.reference, *results.controls) if m in points)
    rivals = {m: points[m] for m in results.tested(results.methods) if m in points}
    if len(curve) < 2 or not rivals:
        return f"{student}: there is no curve of the student alone to compare with yet."
    inside = {m: xy for m, xy in rivals.items() if curve[0][0] <= xy[0] <= curve[-1][0]}
    steps, gains = zip(*curve, strict=True)
    over = [m for m, (x, y) in inside.items() if y > np.interp(np.log(x), np.log(steps), gains)]
    outside = ", ".join(results.label(m) for m in rivals if m not in inside)
    return (
        f"{student}: by the mean, {len(over)} of {len(inside)} methods {'lies' if len(over) == 1 else 'lie'} "
        "above the dotted curve." + f" Beyond its ends: {outside}." * bool(outside)
    )


def _say_classes(results: Results, student: str) -> str:
    found = {
        (name, m): mean
        for name in results.classes()
        for m in results.tested(results.methods)
        if (mean := results.paired(student, m, f"test/iou/{metric_name(name)}").mean) is not None
    }
    if not found:
        return f"{student}: nothing to compare yet."
    parts = []
    for word, pick in (("largest gain of a method", max), ("largest loss", min)):
        name, method = pick(found, key=lambda key: found[key])
        value = found[name, method]
        if (value > 0) == (pick is max):
            parts.append(f"{word} {value:+.1f} ({results.label(method)} on {name})")
    return f"{student}: {'; '.join(parts)}."


def _gains(results: Results, student: str) -> dict[str, tuple[float, float]]:
    """By method, its training compute over that of the reference and its mean gain."""
    own = results.mean(student, results.reference, COMPUTE)
    found: dict[str, tuple[float, float]] = {}
    for method in results.methods:
        flops = results.mean(student, method, COMPUTE)
        gain = results.paired(student, method).mean
        if own and flops is not None and gain is not None:
            found[method] = (flops / own, gain)
    return found


def _ordered(results: Results, student: str) -> list[str]:
    """The methods by their mean, the best first; those without a score last."""
    means = {m: results.mean(student, m) for m in results.rows(student)}
    return sorted(means, key=lambda m: (means[m] is None, -(means[m] or 0.0)))


def _name(results: Results, method: str) -> str:
    return results.label(method).replace("authors' weight", "authors'")


def _margin_labels(
    axis: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str], height: float
) -> None:
    """The names beside the axis, in the order of their points and far enough from each other, with a line of
    its colour to each point; ``height`` is that of the figure, in inches."""
    if not points:
        return
    low, high = axis.get_ylim()
    step = (high - low) * LINE / (height - 1.2)
    order = sorted(points, key=lambda name: points[name][1])
    places = np.array([points[name][1] for name in order])
    for _ in range(1000):  # neighbours that are too close push each other apart
        lack = np.clip(step - np.diff(places), 0, None) / 2
        if lack.max(initial=0) < step / 100:
            break
        places[:-1] -= lack
        places[1:] += lack
    axis.set_ylim(min(low, places[0] - step), max(high, places[-1] + step))
    for name, place in zip(order, places, strict=True):
        axis.annotate(
            name,
            points[name],
            xytext=(1.04, place),
            textcoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            annotation_clip=False,
            zorder=1,
            arrowprops={
                "arrowstyle": "-",
                "color": colours[name],
                "alpha": 0.5,
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )


def _panels(columns: int, size: tuple[float, float], shared: bool = False) -> tuple[Figure, Any]:
    """Axes side by side, each of ``size`` inches."""
    size = (size[0] * columns, size[1])
    figure, axes = plt.subplots(
        1, columns, figsize=size, squeeze=False, sharex=shared, sharey=shared, layout="constrained"
    )
    return figure, axes[0]


def _save(figure: Figure, path: Path, origin: str) -> None:
    sns.despine(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    with Image.open(drawn) as image:
        about = PngInfo()
        about.add_text(SOURCE, origin)
        about.add_text(PIXELS, pixels(image))
        content = io.BytesIO()
        image.save(content, format="png", pnginfo=about, dpi=image.info["dpi"])
    files.write_bytes(path, content.getvalue())


def pixels(image: Image.Image) -> str:
    """sha256 of the pixels of an image."""
    return files.sha256(image.convert("RGBA").tobytes())


NAMES = {draw.__name__: draw for draw in (scores, compute, per_class)}
_SENTENCES = {"scores": _say_scores, "compute": _say_compute, "per_class": _say_classes}
_READ = {
    "scores": "A point is a seed, a bar the mean, the dotted line the mean of {}.",
    "compute": "The dotted curve is {} trained longer; below it, longer training gains more than the method.",
    "per_class": "Blue is better than {}, red worse.",
}
