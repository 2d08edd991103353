"""What the docstring of a method says, in HTML: a summary, its formula, its paper, its differences."""

from __future__ import annotations

import ast
import re
import textwrap
from html import escape
from typing import Any

from markupsafe import Markup

from pipelines import config
from pipelines.config import PAPER, Params
from pipelines.reports import method_table
from pipelines.runs import records

LINKS = method_table.PAPERS | {  # what a text names, and where that is
    r"(?<=compared at )([\w-]+/[\w.-]+), commits? ([0-9a-f]{7,})": r"https://github.com/\1/tree/\2",
    r"(?<!/)github\.com/([\w-]+/[\w.-]*\w)": r"https://github.com/\1",
    r"\b(?:baselines|acfd|pipelines)/[\w/]+\.(?:py|md)": r"../\g<0>",
}


def about(method: str, params: Params) -> dict[str, Any]:
    """What the docstring of a method's file says: a summary, the formula or the terms, the paper and what
    follows its name, the differences from the authors' code, and the rest."""
    file = f"{PAPER}/method.py" if records.is_variant(method) else f"baselines/{params.module_key(method)}.py"
    path = config.ROOT / file
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    parts = (text or "").split("\n\n")
    formula = next((part for part in parts if part.startswith(("    ", "- ``"))), "")
    if formula.startswith("- "):  # terms: the first sentence of each
        formula = "\n".join("- " + term.split(". ")[0].rstrip(".") for term in _items(formula)[1:])
    source = next((part for part in parts if part.startswith("Source: ")), "").removeprefix("Source: ")
    cited = re.match(r".*?\([^()]*\d{4}[^()]*\)", source, re.DOTALL)
    paper = cited[0] if cited else source
    symbols = source[len(paper) :].lstrip(".;, \n")
    differences = [part for part in parts if part.startswith(("Differences", "Not in it"))]
    shown = [part for part in parts if part.startswith("Source: ")] + differences
    if formula.startswith("    "):
        shown.append(formula)
    return {
        "file": file,
        "summary": marked(parts[0]),
        "formula": _block(formula),
        "paper": marked(paper),
        "symbols": marked(symbols[:1].upper() + symbols[1:]),
        "differences": [marked(_differs(part)) for part in differences],
        "rest": Markup("").join(_block(part) for part in parts[1:] if part not in shown),
    }


def _differs(text: str) -> str:
    """A paragraph of differences without the words that stand in its heading."""
    text = re.sub(r"^Differences from (?:the\s+authors'\s+code:\s+)?", "", text)
    return text[:1].upper() + text[1:]


def marked(text: str) -> Markup:
    """The text of a docstring with its ``code``, **bold**, and links to papers, code and our own files."""
    text = re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text, quote=False), flags=re.DOTALL)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w*])\*(\w[^*]*\w)\*(?![\w*])", r"<em>\1</em>", text)
    for pattern, address in LINKS.items():
        text = re.sub(pattern, rf'<a href="{address}">\g<0></a>', text)
    return Markup(text)


def _block(text: str) -> Markup:
    """A paragraph of a docstring: a formula, a list, or prose."""
    if not text:
        return Markup("")
    if text.startswith("    "):
        return Markup("<pre tabindex=0>{}</pre>").format(textwrap.dedent(text).replace("``", ""))
    head, *items = _items(text)
    found = Markup("<p>{}</p>").format(marked(head)) if head else Markup("")
    if items:
        found += Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(marked(item)) for item in items)
        )
    return found


def _items(text: str) -> list[str]:
    """What stands before the items of a list, then the items."""
    return re.split(r"^- ", text, flags=re.MULTILINE)
