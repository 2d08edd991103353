"""A table of a report: its CSV, Markdown and TeX, and how numbers look in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from pipelines import files
from pipelines.reports.statistics import Interval

TEMPLATES = Path(__file__).with_name("templates")
CONDITIONS = "conditions.md"  # of a benchmark, beside its tables
MOST = 8  # columns that are read at a glance
LINES = 45  # rows of a TeX table that fit a page
NUMBER = re.compile(r"[-+<]?\d.*|–.*|")

environment = partial(
    jinja2.Environment,
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Table:
    """``data`` are the lines of the CSV; ``cells`` the text of the Markdown table, a row by column (at most
    ``MOST``), and of the TeX table without the columns ``wide``; ``notes`` (at most two) stand above it."""

    name: str
    title: str
    data: list[dict[str, Any]]
    cells: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    wide: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        return list(self.cells[0]) if self.cells else ["–"]

    @property
    def rows(self) -> list[list[str]]:
        return [list(row.values()) for row in self.cells]

    @property
    def right(self) -> list[bool]:
        """Which columns hold numbers; a status may begin with one."""
        return [
            name != "status" and all(NUMBER.fullmatch(row[name]) for row in self.cells)
            for name in self.columns
        ]

    @property
    def csv(self) -> bytes:
        import pandas as pd

        return pd.DataFrame(self.data, dtype=object).to_csv(index=False, lineterminator="\n").encode()

    @property
    def markdown(self) -> list[str]:
        """The lines of the table alone."""
        head, *lines = (" | ".join(map(escape_markdown, row)) for row in (self.columns, *self.rows))
        rule = "|".join("--:" if own else "---" for own in self.right)
        return [f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in lines)]

    def narrow(self) -> Table:
        """What TeX prints."""
        cells = [{name: text for name, text in row.items() if name not in self.wide} for row in self.cells]
        return replace(self, cells=cells)

    @property
    def pages(self) -> list[list[list[str]]]:
        """The rows, as many as fit a page at a time."""
        return [self.rows[start : start + LINES] for start in range(0, len(self.rows), LINES)] or [[]]


def render(
    table: Table,
    folder: Path,
    benchmark: str,
    facts: Sequence[tuple[str, str]] = (),
    warnings: Sequence[str] = (),
    up: str = "../",
) -> None:
    """Write one table as ``folder/<name>.{csv,md,tex}``. ``benchmark`` stands before its title; the ``facts``
    are comments in TeX; ``up`` leads from the folder to the repository."""
    files.write_bytes(folder / f"{table.name}.csv", table.csv)
    name, anchor = escape_markdown(table.name), table.name.replace("_", "-")
    how = f", [what was measured, and how]({CONDITIONS})" * bool(facts)
    lines = [f"# {escape_markdown(benchmark)}: {escape_markdown(table.title)}", ""]
    lines += [f"> **Warning:** {escape_markdown(text)}\n" for text in warnings]
    lines += [f"- {escape_markdown(text)}" for text in table.notes if text]
    lines += [f"- [What the columns mean]({up}docs/tables.md#{anchor}){how}, [all columns]({name}.csv).", ""]
    files.write_bytes(folder / f"{table.name}.md", "\n".join([*lines, *table.markdown, ""]).encode())
    # Every value that the template prints goes through `escape_tex`; what stands in the template does not.
    tex = environment(finalize=escape_tex, comment_start_string="<#", comment_end_string="#>")
    head = {"benchmark": benchmark, "facts": facts, "warnings": warnings}
    content = tex.get_template("table.tex.j2").render(table=table.narrow(), **head)
    if any(character > "\u024f" and character.isalpha() for character in content):
        content = f"{SCRIPTS}\n{content}"
    files.write_bytes(folder / f"{table.name}.tex", content.encode())


def plus_minus(mean: float | None, sd: float | None) -> str:
    """``41.20 ± 0.30``; without ± where there is no sd (one seed), ``–`` where there is nothing."""
    if mean is None:
        return "–"
    return f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def between(interval: Interval | None, form: str = "+.2f") -> str:
    """``[-0.40, +1.20]``; ``–`` where there is no interval."""
    return "–" if interval is None else f"[{interval.low:{form}}, {interval.high:{form}}]"


def interval(row: Mapping[Any, Any], name: str) -> Interval | None:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return None if low is None else Interval(low, high)


def ends(name: str, of: Interval | None) -> dict[str, float | None]:
    """``{name_low: …, name_high: …}``: what :func:`interval` reads."""
    return {f"{name}_low": of.low if of else None, f"{name}_high": of.high if of else None}


def number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to six decimals: what is written to the CSV should not hang on the last bit of a mean."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}


def escape_markdown(value: Any) -> str:
    """Text that keeps its line, its table cell and its look in Markdown."""
    return re.sub(r"([\\`*_|<>\[\]&$~])", r"\\\1", " ".join(str(value).split()))


def escape_tex(value: Any) -> str:
    """Text that TeX prints as it stands, in one line."""
    return " ".join(str(value).split()).translate(TEX)


# Above a table with letters that pdfLaTeX does not have.
SCRIPTS = (
    r"% Names in other scripts: XeLaTeX or LuaLaTeX, \usepackage{fontspec}, \setmainfont{one that has them}."
)


TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "Δ": r"$\Delta$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "−": "$-$",
        "–": "--",
    }
)
