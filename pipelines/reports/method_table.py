"""What each method adds to a training step, before anybody rents a GPU: ``reports/methods.md``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipelines.config import ROOT, Params
from pipelines.reports.results import label
from pipelines.reports.table import Table, number, render
from pipelines.runs import counts

PAPERS = {  # how a text names a paper, and where that is
    r"arXiv\s(\d{4}\.\d{4,5})": r"https://arxiv.org/abs/\1",
    r"doi\s(10\.[\w./-]*\w)": r"https://doi.org/\1",
}


def table(params: Params, root: Path = ROOT) -> Table:
    """One row a method of params.yaml that was counted."""
    known, (size, classes) = counts.read(root)["methods"], counts.SIZES[0]
    shown = [
        key
        for key in counts.methods(params)
        if "flops" in known.get(key, {}) and not key.endswith("-official")
    ]
    data: list[dict[str, Any]] = [
        {"method": key} | known[key] | {"taps": " ".join(known[key].get("taps", ()))} for key in shown
    ]
    rows = [
        {
            "method": label(row["method"], params.controls),
            "TFLOP a step": number(row["flops"] / 1e12, ".2f"),
            "memory (GiB)": number(row["memory_mb"] / 1024, ".2f"),
            "largest tensor (GiB)": number(row["largest_mb"] / 1024, ".2f"),
            "parameters (M)": number(row["parameters"] / 1e6, ".2f"),
        }
        for row in data
    ]
    notes = [
        f"Counted, not measured, for PSPNet-ResNet101 to PSPNet-ResNet18 at {size[0]}×{size[1]}, "
        f"{counts.BATCH} images, {classes} classes: the method's own part, without student and teacher.",
    ]
    return Table("methods", "what each method adds to a step", data, rows, notes)


def compares(taps: Collection[str]) -> str:
    """What of student and teacher a method compares, by the taps that it asks for."""
    kinds = {"logits" if tap in ("logits", "auxiliary") else "features" for tap in taps}
    return " and ".join(sorted(kinds)) or "not counted"


def write(params: Params, folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/methods.{md,csv,tex}``."""
    known, warnings = counts.read(root)["methods"], []
    if absent := [key for key in counts.methods(params) if key not in known]:
        warnings.append(f"not counted yet, run {counts.COMMAND}: {', '.join(absent)}.")
    for key in counts.methods(params):
        if why := known.get(key, {}).get("failure"):
            warnings.append(f"{key} cannot be counted without values: {why}.")
    render(table(params, root), folder, "all methods", warnings=warnings)
