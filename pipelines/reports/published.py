"""``reports/claims.yaml``: what papers report, with its sources and conditions, checked."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipelines import config
from pipelines.config import ConfigError, Key, Model, Positive, Size

FILE = Path("reports") / "claims.yaml"


class Entry(Model):
    """A part of claims.yaml: no value is converted to another type."""

    model_config = ConfigDict(strict=True)


class Source(Entry):
    """A publication and the place where its numbers were read."""

    cite: str
    where: str


class Protocol(Entry):
    """The conditions of a published training; None where the source does not state one."""

    text: str
    images: Literal["original"] | None
    crop: Annotated[Size, Field(strict=False)] | None  # YAML has lists, not tuples
    batch_size: Positive | None
    steps: Positive | None
    lr: Annotated[float, Field(gt=0)] | None
    weight_decay: Annotated[float, Field(ge=0)] | None
    pretrained: bool | None


class Architecture(Entry):
    """A network by architecture and encoder, the latter without the prefix of its library."""

    architecture: str
    encoder: str


Percent = Annotated[float, Field(ge=0, le=100)]


class Claim(Entry):
    """What a source says about a method: a gain in mIoU, or an unchanged inference cost."""

    id: Key
    kind: Literal["gain", "cost"] = "gain"
    method: str
    published_as: str | None = None
    terms: Annotated[list[str], Field(min_length=1)] | None = None
    other_loss: str | None = None
    dataset: Key | None
    split: Literal["train", "val", "test"] | None
    student: str | None
    teacher: str | None
    gain: float | None = None
    unit: Literal["points"] | None = "points"
    score: Percent | None
    baseline: Percent | None
    teacher_score: Percent | None
    source: str
    protocol: str
    evidence: str
    note: str | None = None

    @property
    def claimed(self) -> float | None:
        """The gain as stated, else score - baseline; None where the source gives neither."""
        if self.gain is not None or self.score is None or self.baseline is None:
            return self.gain
        return round(self.score - self.baseline, 6)


class Claims(Entry):
    """The whole of claims.yaml."""

    methods: list[Key]  # that claims may be about, whether or not params.yaml has them
    sources: dict[Key, Source]
    protocols: dict[Key, Protocol]
    evidence: dict[Key, str]
    networks: dict[str, Architecture]
    claims: list[Claim]


def load(path: Path) -> Claims:
    """Read and check claims.yaml. Raises ConfigError, one sentence that says what to correct."""
    return _load(path, path.read_bytes() if path.is_file() else b"")


@lru_cache(maxsize=2)
def _load(path: Path, content: bytes) -> Claims:
    """``content`` says whether the file is still the one that was read."""
    try:
        claims = Claims.model_validate(config.read_yaml(path))
    except ValidationError as error:
        raise ConfigError(config.explain("", error, path.name)) from None
    seen: set[str] = set()
    for claim in claims.claims:
        if claim.id in seen:
            raise ConfigError(f"In {path.name}: two claims are called '{claim.id}': rename one.")
        seen.add(claim.id)
        for kind, key, have in (
            ("method", claim.method, claims.methods),
            ("source", claim.source, claims.sources),
            ("protocol", claim.protocol, claims.protocols),
            ("evidence level", claim.evidence, claims.evidence),
            ("network", claim.student, claims.networks),
            ("network", claim.teacher, claims.networks),
        ):
            if key is not None and key not in have:
                raise ConfigError(
                    f"In {path.name}: claim '{claim.id}' names the {kind} '{key}', which does not exist; "
                    f"those that do: {', '.join(have)}."
                )
    return claims
