"""Small drawings inside the page: seeds on an axis, gains with their intervals, learning curves. The numbers
stand beside them in words, so they are hidden from screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor

from pipelines.reports.statistics import Interval

WIDTH, HEIGHT, MARGIN = 150, 22, 7


@dataclass(frozen=True)
class Scale:
    """A linear axis from ``low`` to ``high`` over the width of a drawing."""

    low: float
    high: float
    width: float = WIDTH

    def at(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{MARGIN + min(max(share, 0), 1) * (self.width - 2 * MARGIN):.1f}"


def scale(values: Sequence[float], width: float = WIDTH) -> Scale:
    """The axis that holds all values, in whole numbers."""
    low, high = floor(min(values, default=0)), ceil(max(values, default=1))
    return Scale(low, high if high > low else low + 1, width)


def axis(over: Scale) -> str:
    """The ends of an axis, and 0 where it lies well inside."""
    ends = [(over.low, "start"), (over.high, "end")]
    if over.low < 0 < over.high and min(-over.low, over.high) > 0.15 * (over.high - over.low):
        ends.append((0.0, "middle"))
    texts = (f'<text x="{over.at(x)}" y="11" text-anchor="{side}">{x:g}</text>' for x, side in ends)
    return _svg(over.width, 14, "".join(texts), "axis")


def dots(scores: Sequence[float], mean: float, reference: float | None, over: Scale, colour: str) -> str:
    """Every seed a dot, their mean a bar, the reference's mean a dashed line."""
    parts = [_line(MARGIN, WIDTH - MARGIN, HEIGHT / 2, "rail")]
    if reference is not None:
        parts.append(_stroke(over.at(reference), 1, HEIGHT - 1, "dashed"))
    parts.append(_stroke(over.at(mean), 4, HEIGHT - 4, "mean", colour))
    parts += (f'<circle cx="{over.at(x)}" cy="{HEIGHT / 2:g}" r="3.2" fill="{colour}"/>' for x in scores)
    return _svg(WIDTH, HEIGHT, "".join(parts))


def bar(
    mean: float | None,
    seeds: Interval | None,
    images: Interval | None,
    over: Scale,
    colour: str,
    claimed: float | None = None,
) -> str:
    """A mean with its interval over seeds (thick) and over images (thin below), an arrow where one goes on
    beyond the axis; a claim is a tick, alone where nothing was measured."""
    parts = [_line(MARGIN, WIDTH - MARGIN, HEIGHT / 2, "rail"), _stroke(over.at(0), 1, HEIGHT - 1, "dashed")]
    for interval, y, kind in ((images, HEIGHT - 4, "thin"), (seeds, HEIGHT / 2, "thick")):
        if interval is not None:
            parts.append(_line(over.at(interval.low), over.at(interval.high), y, kind, colour))
            if interval.low < over.low:
                parts.append(_arrow(over, y, -1, colour))
            if interval.high > over.high:
                parts.append(_arrow(over, y, 1, colour))
    if mean is not None:
        parts.append(f'<circle cx="{over.at(mean)}" cy="{HEIGHT / 2:g}" r="4" fill="{colour}" class="ring"/>')
    if claimed is not None:
        parts.append(_stroke(over.at(claimed), 1, HEIGHT - 1, "claim"))
    return _svg(WIDTH, HEIGHT, "".join(parts))


def curves(lines: Sequence[tuple[Sequence[tuple[float, float]], str, bool]], label: str) -> str:
    """Lines over steps as (points, colour, thick), with the ends of both axes; its text is ``label``."""
    width, height = 360, 170
    points = [point for line, _, _ in lines for point in line]
    if not points:
        return ""
    x, y = scale([0, *(p[0] for p in points)], width - 30), scale([p[1] for p in points], height - 20)
    parts = []
    for line, colour, thick in lines:
        path = " ".join(f"{30 + float(x.at(a)):.1f},{height - 20 - float(y.at(b)):.1f}" for a, b in line)
        kind = "curve" if thick else "curve faint"
        parts.append(f'<polyline points="{path}" stroke="{colour}" class="{kind}"/>')
    for text, left, top, side in (
        (f"{y.high:g}", 28, 14, "end"),
        (f"{y.low:g}", 28, height - 24, "end"),
        ("0", 36, height - 4, "middle"),
        (f"step {x.high:g}", width - 6, height - 4, "end"),
    ):
        parts.append(f'<text x="{left}" y="{top}" text-anchor="{side}">{text}</text>')
    return _svg(width, height, "".join(parts), "chart", f'role="img" aria-label="{escape(label)}"')


def _svg(width: float, height: float, content: str, kind: str = "", role: str = 'aria-hidden="true"') -> str:
    look = f' class="{kind}"' if kind else ""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<svg viewBox="0 0 {width:g} {height:g}" {size} {role}{look}>{content}</svg>'


def _line(left: float | str, right: float | str, y: float, kind: str, colour: str = "") -> str:
    stroke = f' stroke="{colour}"' if colour else ""
    return f'<line x1="{left}" x2="{right}" y1="{y:g}" y2="{y:g}" class="{kind}"{stroke}/>'


def _arrow(over: Scale, y: float, end: int, colour: str) -> str:
    """A head at an end of the axis."""
    x = MARGIN - 1 if end < 0 else over.width - MARGIN + 1
    return f'<path d="M{x + 6 * end:g} {y:g}l{-6 * end} -5v10z" fill="{colour}"/>'


def _stroke(x: str, top: float, bottom: float, kind: str, colour: str = "") -> str:
    stroke = f' stroke="{colour}"' if colour else ""
    return f'<line x1="{x}" x2="{x}" y1="{top:g}" y2="{bottom:g}" class="{kind}"{stroke}/>'
