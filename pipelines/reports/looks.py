"""One colour and one marker a method, the same in every figure, on the page and over all benchmarks.

Six colours that the colour-blind can tell apart (Okabe and Ito; Wong 2011), then the same with another
marker; a name always stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import OFFICIAL
from pipelines.reports.results import HEADLINE, Results

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d")
MARKERS = ("o", "^", "D", "v", "P", "X")  # of Matplotlib
PAPER_COLOUR, ALONE = "#d55e00", "#7a7a7a"


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


def looks(results: Results) -> dict[str, Look]:
    """The look of every method of params.yaml: the student alone is grey, however long it trains, the paper's
    variants share one colour, and a method keeps its own with official weights."""
    alone = {results.reference, *results.controls}
    fixed = {key: Look(ALONE, "s") for key in alone} | {
        key: Look(PAPER_COLOUR, "o" if key == HEADLINE else "*") for key in results.variants
    }
    rivals = [key for key in results.weights if key not in fixed and not key.endswith(OFFICIAL)]
    found = fixed | {
        key: Look(COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)])
        for i, key in enumerate(rivals)
    }
    return found | {key: found[key.removesuffix(OFFICIAL)] for key in results.weights if key not in found}
