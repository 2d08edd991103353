"""Parameters and multiply-adds of the networks as counted (``runs/networks.json``), beside published ones
(``reports/networks.yaml``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipelines import config
from pipelines.config import ROOT, ConfigError, Model, Params, Positive, Size
from pipelines.reports.published import Source
from pipelines.reports.table import Table, number, render
from pipelines.runs import counts

PUBLISHED = Path("reports") / "networks.yaml"


class Count(Model):
    """Multiply-adds (10⁹) of one image of ``size``; None where the source does not state the size."""

    size: Size | None
    classes: Positive
    gmacs: Annotated[float, Field(gt=0)]


class Difference(Model):
    """What the published network has more than this suite's, and at which stride its weights are used."""

    what: str
    parameters: int
    stride: Positive | None


class Publication(Model):
    """What a source says of a network, the encoder without the prefix of its library."""

    architecture: str
    encoder: str
    source: str
    parameters: Annotated[float, Field(gt=0)]  # 10⁶
    counts: list[Count] = Field(min_length=1)
    differences: list[Difference]


class Published(Model):
    """The whole of networks.yaml."""

    sources: dict[str, Source]
    networks: list[Publication]


def load(path: Path) -> Published:
    """Read and check networks.yaml. :class:`ConfigError`, one sentence that says what to correct."""
    try:
        found = Published.model_validate(config.read_yaml(path))
    except ValidationError as error:
        raise ConfigError(config.explain("", error, path.name)) from None
    for entry in found.networks:
        if entry.source not in found.sources:
            raise ConfigError(
                f"In {path.name}: {entry.architecture}-{entry.encoder} names the source '{entry.source}', "
                f"which does not exist; those that do: {', '.join(found.sources)}."
            )
    return found


def table(published: Published, params: Params, root: Path = ROOT) -> Table:
    """One row for every network and published count, and for every network without one."""
    counted = counts.read(root)["networks"]
    data = []
    for key, (network, uses) in counts.networks(params).items():
        own = counted.get(key, [])
        base = _at(own, *counts.SIZES[0])
        row: dict[str, Any] = {"network": key, "used_as": "; ".join(uses)}
        row |= {"parameters": base.get("parameters"), "macs": base.get("macs")}
        same = (network.architecture, counts.encoder_name(network))
        entries = [entry for entry in published.networks if (entry.architecture, entry.encoder) == same]
        beside = [_beside(entry, count, own) for entry in entries for count in entry.counts]
        data += [row | more for more in beside or [{}]]
    notes = [
        f"Counted on the deployed network, {counts.SIZES[0][1]} classes. Beside a published count stands the "
        "suite's own at the same input, adjusted: with what the source's network is known to have more or "
        "less. These differences, and the sources behind the keys, are in networks.yaml beside this file.",
    ]
    wide, text = frozenset({"used as"}), [_cells(row) for row in data]
    return Table("networks", "parameters and multiply-adds", data, text, notes, wide)


def write(published: Published, params: Params, folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/networks.{md,csv,tex}``."""
    absent = counts.missing(params, root)
    warnings = [f"not counted yet, run {counts.COMMAND}: {', '.join(absent)}."] if absent else []
    render(table(published, params, root), folder, "all networks", warnings=warnings)


def _beside(entry: Publication, count: Count, own: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a published count, and of the suite's own at its size."""
    size = count.size
    same = next((row for row in own if row["classes"] == count.classes), {})
    here, parameters = (_at(own, size, count.classes) if size else {}), same.get("parameters")
    extra = None
    if size and here:
        area = size[0] * size[1]
        extra = here["macs"] + sum(d.parameters * area // d.stride**2 for d in entry.differences if d.stride)
    more = sum(difference.parameters for difference in entry.differences)
    return {
        "source": entry.source,
        "published_size": "×".join(map(str, size)) if size else None,
        "published_classes": count.classes,
        "published_parameters_m": entry.parameters,
        "parameters_there": parameters,
        "parameters_with_differences": None if parameters is None else parameters + more,
        "published_gmacs": count.gmacs,
        "macs_there": here.get("macs"),
        "macs_with_differences": extra,
        "differences": "; ".join(f"{d.what} ({d.parameters / 1e6:+.2f} M)" for d in entry.differences),
    }


def _at(own: list[dict[str, Any]], size: tuple[int, int], classes: int) -> dict[str, Any]:
    return next((row for row in own if tuple(row["size"]) == size and row["classes"] == classes), {})


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def scaled(name: str, unit: float, form: str) -> str:
        return number(None if row[name] is None else row[name] / unit, form)

    def beside(published: str, *own: Any) -> str:
        return f"{row[published]:.1f} / {scaled(*own)}" if known else "–"

    size, known = "×".join(map(str, counts.SIZES[0][0])), "source" in row  # else nothing was published
    where = f"{row['published_size'] or 'not stated'}, {row['published_classes']}" if known else "–"
    parameters = beside("published_parameters_m", "parameters_with_differences", 1e6, ".2f")
    return {
        "network": row["network"],
        "used as": row["used_as"],
        "parameters (M)": scaled("parameters", 1e6, ".2f"),
        f"GMACs, {size}": scaled("macs", 1e9, ".1f"),
        "published by": row.get("source", "–"),
        "input, classes": where,
        "published / here, adjusted (M)": parameters,
        "published / here, adjusted (GMACs)": beside("published_gmacs", "macs_with_differences", 1e9, ".1f"),
    }
