"""The figures of a benchmark: scores, differences per class, learning curves, score against compute and time.

Drawn from the same results as the tables (the curves from ``history.csv``). The bytes are the same every time
on one machine; every file carries the digest of the records it was drawn from, to be checked on any other.
"""

from __future__ import annotations

import hashlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from pipelines import files, fonts

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.config import OFFICIAL
from pipelines.reports import statistics
from pipelines.reports.ranks import Ranks
from pipelines.reports.results import COMPUTE, HEADLINE, SCORE, Results, label, variant
from pipelines.runs.records import Record
from pipelines.runs.tracking import digest, metric_name

STYLE: dict[Any, Any] = {
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.titlepad": 10,
}
GREY = "0.45"
SOURCE = "Source"  # the PNG text chunk with the digest of the records
PIXELS = "Comment"  # and the one with the sum of the pixels (RGBA)


def write(results: Results, folder: Path) -> None:
    """Draw every figure of a benchmark into ``folder``."""
    style = STYLE | fonts.style("".join(results.classes()))
    with sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"}), plt.rc_context(style):
        for name, draw in NAMES.items():
            _save(draw(results), folder / f"{name}.png", source([results]))


def write_ranks(found: Ranks, every: Sequence[Results], folder: Path) -> None:
    """Draw the critical-difference diagram of all benchmarks and students."""
    with plt.rc_context(STYLE):
        _save(critical_difference(found), folder / "ranks.png", source(every))


def source(every: Sequence[Results]) -> str:
    """sha256 over the records that a figure is drawn from."""
    total = hashlib.sha256()
    for record in sorted((r for results in every for r in results.finished), key=lambda r: r.cell.path):
        total.update(f"{record.cell.path} {digest(record)}\n".encode())
    return total.hexdigest()


def scores(results: Results) -> Figure:
    """Test mIoU: every seed a point, the mean a bar; beside it the paper's variants, where there are any."""
    variants = [key for key in results.variants if any(results.by_seed(s, key) for s in results.students)]
    groups = [("Methods", results.methods, results.label)]
    if set(variants) - {HEADLINE}:
        reference = [key for key in results.methods if key == results.reference]
        groups.append((f"Variants of {label(HEADLINE)}", reference + variants, variant))
    widths = [1 + len(keys) for _, keys, _ in groups]
    figure, axes = _panels(
        len(results.students), len(groups), (0.75 * sum(widths) + 1.5, 3.8), widths, sharey=True
    )
    colours, teacher = _colours(results), results.teacher(SCORE)
    for row, student in zip(axes, results.students, strict=True):
        for axis, (title, keys, name) in zip(row, groups, strict=True):
            for x, key in enumerate(keys):
                values = list(results.by_seed(student, key).values())
                if values:
                    offsets = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]
                    axis.scatter(
                        x + np.asarray(offsets),
                        values,
                        s=34,
                        color=colours[key],
                        alpha=0.75,
                        linewidth=0,
                        zorder=3,
                    )
                    axis.hlines(
                        statistics.mean(values) or 0,
                        x - 0.3,
                        x + 0.3,
                        color=colours[key],
                        linewidth=2.5,
                        zorder=4,
                    )
                else:
                    axis.text(
                        x,
                        0.03,
                        "not run",
                        transform=axis.get_xaxis_transform(),
                        rotation=90,
                        ha="center",
                        va="bottom",
                        color=GREY,
                    )
            if teacher is not None:
                axis.axhline(teacher, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
                axis.text(
                    len(keys) - 0.45, teacher, "teacher", color=GREY, ha="right", va="bottom", fontsize=9
                )
            axis.set_xticks(
                range(len(keys)), [name(key) for key in keys], rotation=0 if len(keys) < 7 else 30
            )
            axis.set_xlim(-0.6, len(keys) - 0.4)
            axis.grid(visible=False, axis="x")
            axis.set_title(f"{title} · {student}")
        row[0].set_ylabel("test mIoU (%)")
    _title(figure, results, "test mIoU at the last iterate; a point is a seed, a bar the mean")
    return figure


def per_class(results: Results) -> Figure:
    """Heat map of IoU differences to the undistilled student, class × method, mean over paired seeds."""
    names, methods = results.classes(), [key for key in results.methods if key != results.reference]
    grids = []
    for student in results.students:
        cells = [
            [results.paired(student, key, f"test/iou/{metric_name(name)}").mean for key in methods]
            for name in names
        ]
        grids.append(np.array(cells, dtype=np.float64).reshape(len(names), len(methods)))
    known = np.abs(np.concatenate([grid.ravel() for grid in grids]))
    limit = max(1.0, float(np.nanmax(known, initial=0.0)))
    size = (0.95 * len(methods) + 2.2, 0.36 * len(names) + 1.6)
    figure, axes = _panels(1, len(grids), (size[0] * len(grids), size[1]), None, sharey=True)
    for axis, grid, student in zip(axes[0], grids, results.students, strict=True):
        sns.heatmap(
            grid,
            ax=axis,
            cmap=sns.color_palette("vlag_r", as_cmap=True),
            vmin=-limit,
            vmax=limit,
            annot=np.vectorize(_difference, otypes=[object])(grid),
            fmt="",
            annot_kws={"fontsize": 9},
            linewidths=1,
            xticklabels=[results.label(key) for key in methods],
            yticklabels=names,
            cbar=axis is axes[0][-1],
            cbar_kws={"label": f"IoU − IoU of {results.reference} (points)"},
        )
        axis.set_facecolor("0.9")  # shows where there is nothing to compare
        axis.tick_params(length=0)
        axis.tick_params(axis="y", rotation=0)
        axis.set_title(student)
    text = f"IoU on the test split minus that of {results.reference}, mean over paired seeds"
    _title(figure, results, text)
    return figure


def _difference(value: float) -> str:
    """``+1.3``; ``0`` for what rounds to nothing, as for a class that neither network finds."""
    return "" if np.isnan(value) else "0" if abs(value) < 0.05 else f"{value:+.1f}"


def learning_curves(results: Results) -> Figure:
    """Validation mIoU and the task loss against the step: each seed thin, the mean over the seeds thick."""
    figure, axes = _panels(len(results.students), 2, (10.5, 3.8), None, sharey=False)
    colours = _colours(results)
    for row, student in zip(axes, results.students, strict=True):
        for key in (key for key in results.methods if key not in results.controls):
            own = [r for r in results.finished if (r.cell.student, r.cell.method) == (student, key)]
            for axis, column in zip(row, ("val_miou", "task"), strict=True):
                _curves(axis, own, column, colours[key], results.label(key))
        row[0].set_xlim(row[1].get_xlim())
        row[0].set(xlabel="step", ylabel="validation mIoU (%)", title=f"Validation · {student}")
        row[1].set(
            xlabel="step", ylabel="task loss (cross-entropy)", title=f"Training, task term · {student}"
        )
        if row[1].get_legend_handles_labels()[0]:
            row[1].legend(loc="upper right")  # a loss falls: this corner is free in every panel
    _title(figure, results, "learning curves; thick is the mean over seeds, thin a seed")
    return figure


def compute(results: Results) -> Figure:
    """Test mIoU against the compute of the training: the student alone, trained ever longer, is a curve."""
    figure = _against(results, COMPUTE, 1e-12, "training compute (TFLOP)")
    for axis, student in zip(figure.axes, results.students, strict=False):
        own = [
            {s: (flops[s] / 1e12, score) for s, score in results.by_seed(student, key).items() if s in flops}
            for key in (results.reference, *results.controls)
            if (flops := results.by_seed(student, key, COMPUTE))
        ]
        for seed in set.intersection(*map(set, own)) if own else ():
            axis.plot(
                *zip(*(points[seed] for points in own), strict=True), color="0.8", linewidth=0.8, zorder=1
            )
        means = [np.mean(list(points.values()), axis=0) for points in own if points]
        if len(means) > 1:
            axis.plot(*np.transpose(means), color=GREY, linestyle=":", linewidth=1.8, zorder=2)
    _title(
        figure,
        results,
        "score against training compute; large is the mean over seeds, small a seed; lines: "
        f"{results.reference} alone, trained ever longer (dotted: mean, thin: a seed); squares: where it was "
        "measured; diamonds: official weights",
    )
    return figure


def cost(results: Results) -> Figure:
    """Test mIoU against the training time of a cell: each seed small, the mean large."""
    figure = _against(results, "seconds/training", 1 / 60, "training time of a cell (minutes)")
    _title(figure, results, "score against training time; large is the mean over seeds, small a seed")
    return figure


def critical_difference(found: Ranks) -> Figure:
    """Mean ranks on a line, 1 at the left; a bar joins methods that are not told apart."""
    methods = list(found.ranks)
    half = (len(methods) + 1) // 2
    depth = 0.35 * (half + 1)
    bars = 0.16 * (len(found.cliques) + 1)
    figure, axis = plt.subplots(figsize=(7.5, 1.6 + depth + bars), layout="constrained")
    last = len(methods)
    axis.hlines(0, 1, last, color="black", linewidth=1.2)
    for tick in range(1, last + 1):
        axis.vlines(tick, 0, 0.08, color="black", linewidth=1.2)
        axis.text(tick, 0.12, str(tick), ha="center", va="bottom")
    width = found.critical_difference
    axis.plot([1, 1 + width], [0.62, 0.62], color=GREY, linewidth=2, marker="|", markersize=9)
    axis.text(1, 0.7, f"critical difference {width:.2f}", ha="left", va="bottom", color=GREY)
    for level, group in enumerate(found.cliques):
        ends = [found.ranks[m] for m in group]
        y = -0.16 * (level + 1)
        axis.hlines(y, min(ends) - 0.03, max(ends) + 0.03, color="black", linewidth=4)
    for place, method in enumerate(methods):
        left = place < half
        y = -bars - 0.35 * ((place if left else last - 1 - place) + 1)
        edge = 0.8 if left else last + 0.2
        axis.plot([found.ranks[method]] * 2 + [edge], [0, y, y], color=GREY, linewidth=1)
        text = f"{label(method)} ({found.ranks[method]:.2f})"
        axis.text(edge, y, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center")
    axis.set_xlim(-0.6, max(last, 1 + width) + 1.6)
    axis.axis("off")
    title = f"mean ranks over {len(found.blocks)} blocks (student on benchmark), 1 is the best; a bar joins "
    title += "methods that are not told apart (Nemenyi, 5 %)"
    figure.suptitle(textwrap.fill(title, 90), fontsize=10, color="0.25")
    return figure


def _against(results: Results, metric: str, factor: float, text: str) -> Figure:
    """Test mIoU against a metric of the cells, times ``factor``."""
    figure, axes = _panels(1, len(results.students), (6.2 * len(results.students), 4.2), None, sharey=True)
    colours = _colours(results)
    for axis, student in zip(axes[0], results.students, strict=True):
        for key in results.methods:
            score, other = results.by_seed(student, key), results.by_seed(student, key, metric)
            points = [(other[seed] * factor, score[seed]) for seed in sorted(score.keys() & other.keys())]
            if not points:
                continue
            x, y = (np.asarray(values) for values in zip(*points, strict=True))
            alone = key == results.reference or key in results.controls
            look = {"color": colours[key], "edgecolor": "white"}
            look["marker"] = "s" if alone else "D" if key.endswith(OFFICIAL) else "o"
            axis.scatter(x.mean(), y.mean(), s=130, zorder=3, label=results.label(key), **look)
            axis.scatter(x, y, s=24, linewidth=0.8, zorder=4, **look)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.set_xlim(left=0)
        axis.set(xlabel=text, title=student)
    axes[0][0].set_ylabel("test mIoU (%)")
    return figure


def _curves(axis: Axes, finished: Sequence[Record], column: str, colour: Any, name: str) -> None:
    """Thin lines of the seeds, and their mean over the steps that all of them have."""
    curves = []
    for record in finished:
        points = {
            int(row["step"] or 0): value for row in record.history if (value := row.get(column)) is not None
        }
        if points:
            curves.append(points)
            axis.plot(list(points), list(points.values()), color=colour, alpha=0.3, linewidth=0.8)
    if curves:
        steps = sorted(set.intersection(*(set(points) for points in curves)))
        means = [float(np.mean([points[step] for points in curves])) for step in steps]
        marker = "o" if len(steps) <= 20 else ""
        axis.plot(steps, means, color=colour, linewidth=2, marker=marker, markersize=5, label=name)


def _panels(
    rows: int, columns: int, size: tuple[float, float], widths: list[int] | None, sharey: bool
) -> tuple[Figure, Any]:
    """A grid of axes; ``size`` is that of one row."""
    return plt.subplots(
        rows,
        columns,
        figsize=(size[0], size[1] * rows),
        squeeze=False,
        sharey=sharey,
        width_ratios=widths,
        layout="constrained",
    )


def _colours(results: Results) -> dict[str, Any]:
    """The undistilled student and its controls grey, each method its own colour, which it keeps with official
    weights; variants that of the paper's method."""
    others = results.tested(results.methods)
    palette = sns.color_palette("colorblind", 10) if len(others) <= 10 else sns.husl_palette(len(others))
    colours: dict[str, Any] = dict(zip(others, palette, strict=False))
    colours |= {key: colours.get(HEADLINE, palette[0]) for key in results.variants}
    colours |= {key: colours.get(key.removesuffix(OFFICIAL), GREY) for key in results.methods}
    return colours | {results.reference: "0.35"} | dict.fromkeys(results.controls, "0.55")


def _title(figure: Figure, results: Results, text: str) -> None:
    seeds = max((len(results.by_seed(s, m)) for s in results.students for m in results.methods), default=0)
    title = f"{results.benchmark}: {text} (up to {seeds} seeds)"
    figure.suptitle(textwrap.fill(title, round(12 * figure.get_figwidth())), fontsize=10, color="0.25")


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


NAMES = {draw.__name__: draw for draw in (scores, compute, per_class, learning_curves, cost)}
