"""params.yaml, typed. Every stage reads its inputs here alone; a bad value is one clear sentence."""

from __future__ import annotations

import importlib
import re
import reprlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

ROOT = Path(__file__).resolve().parent.parent
PAPER = "acfd"  # the package and the section of params.yaml that hold the variants of the paper's method
TEACHER = "teacher"  # the folder of a benchmark's teacher, beside its students'
OFFICIAL = "-official"  # ends the key of a method that runs with its authors' weights
PHOTOS, TRUTH = "photos", "truth"  # sheets of the panels, beside those of the methods
EXPORTS = "exports"  # the folder of a benchmark's export records, in the same place


class ConfigError(ValueError):
    """A sentence for the user: what is wrong and what to change."""


def few_words(value: Any) -> str:
    """A value for a sentence, shortened."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


# What each kind of pydantic's errors is called here; its own words are for programmers.
PROBLEMS = {
    "bool": "it must be true or false",
    "dict": "it must be a section with entries of its own",
    "finite": "it must be a finite number",
    "float": "it must be a number",
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "int": "it must be a whole number",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "list": "it must be a list",
    "literal": "it must be {expected}",
    "model": "it must be a section with settings of its own",
    "path": "it must be a path",
    "string": "it must be text, in quotes where it looks like a number",
    "string_pattern": "it has a character that is not allowed here (the form is {pattern})",
    "string_too_long": "it must have at most {max_length} characters",
    "string_too_short": "it must have at least {min_length} characters",
    "too_long": "it has {actual_length} entries, and at most {max_length} are possible",
    "too_short": "it has {actual_length} entries, and at least {min_length} are needed",
    "tuple": "it must be a list",
    "value_error": "{error}",
}


SHOWN = 3  # problems of one file, of which there may be hundreds


def explain(section: str, error: ValidationError, file: str = "params.yaml") -> str:
    """A pydantic error as sentences that name the place in the file: the first few problems."""
    lines, found = [], error.errors()
    for item in found[:SHOWN]:
        kind, value, where = item["type"], few_words(item["input"]), [str(part) for part in item["loc"]]
        parts = [section, *(part for part in where if "[" not in part)]  # what is left out names a type
        place = ".".join(part if part.isprintable() else ascii(part) for part in parts).strip(".")[:200]
        if kind in ("extra_forbidden", "invalid_key"):
            lines.append(f"{place} is not a known setting: correct its spelling or remove it.")
        elif kind == "missing":
            lines.append(f"{place} is missing: add it.")
        elif "[key]" in where and kind.startswith("string_type"):
            lines.append(f"{place} is a name and must be text: write it in quotes, or in words.")
        else:
            known = max((start for start in PROBLEMS if kind.startswith(start)), key=len, default="")
            problem = PROBLEMS.get(known, "it is of another kind than this setting")
            problem = " ".join(problem.format_map(item.get("ctx", {})).split())[:200]
            lines.append(f"{place} = {value} is not allowed: {problem}.")
    more = f" … ({len(found)} problems in all)" if len(found) > SHOWN else ""
    return f"In {file}: {' '.join(lines)}{more}"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of this checkout. ConfigError when it cannot be read or is none."""
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8 text: save it as UTF-8.") from None
    if found is None:
        raise ConfigError(f"{path.name} is empty: restore it with git.")
    return found


def parse_yaml(text: str, name: str) -> Any:
    """YAML as DVC reads it (1.2: 6e-05 is a number), with no setting twice. ConfigError when it is none."""
    # that in C is four times as fast, and crashes at great depth: this is an upper limit of it
    depth = max(map(len, text.splitlines()), default=0) + text.count("[") + text.count("{")
    try:
        return YAML(typ="safe", pure=depth > 500).load(text)
    except MarkedYAMLError as error:  # its text has advice for programmers too
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        reason = f"{error.problem or error.context}{line}"
    except (YAMLError, ValueError, RecursionError, OverflowError) as error:  # impossible dates, depth, …
        reason = str(error)
    raise ConfigError(f"{name} is not valid YAML: {' '.join(reason.split())[:300]}.")


def metric_name(text: str) -> str:
    """``text``, a class say, as part of the name of a metric: what MLflow refuses there becomes ``_``."""
    return re.sub(r"[^\w. :/-]", "_", text)


def _distinct(keys: list[Any]) -> list[Any]:
    if len(set(keys)) < len(keys):
        raise ValueError("an entry stands there twice")
    return keys


def _as_written(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A number that is checked as a float, and stays 2 or 2.0: DVC names a cell by what stands there."""
    number = check(value)
    return value if isinstance(value, int) else number


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(gt=0, le=2**13)]
Size = tuple[Side, Side]  # height, width in pixels
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]  # DVC names stages by what is written
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
Keys = Annotated[list[Key], AfterValidator(_distinct)]
Control = Annotated[float, Field(gt=1, le=100, strict=True), WrapValidator(_as_written)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def written(self) -> dict[str, Any]:
        """The settings as they stand in params.yaml: an optional one that is absent stays absent."""
        return self.model_dump(mode="json", exclude_unset=True)


class Wheel(Model):
    """A package whose wheel holds the weights of a network of timm, in timm's order under other names."""

    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]*$", max_length=50)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the wheel, whole: pip checks it
    member: Annotated[str, Field(min_length=1, max_length=300)]  # the file in it, read with ``weights_only``
    timm: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]  # the network
    licence: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]


class Weights(Model):
    """A file of encoder weights (safetensors, or torch with ``weights_only``), where it comes from and its
    sum: an address or null, or the wheel of a package, of which the file is made.

    ``sha256``, of ``file``, may be its first 8 digits, which torch.hub writes into file names, or null as
    long as it is not known: then the file is refused, by a sentence that has the sum.
    """

    file: Path  # below the root of the project, or absolute
    url: str | None = None
    wheel: Wheel | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")] | None

    @model_validator(mode="after")
    def _from_one_place(self) -> Weights:
        if ("url" in self.model_fields_set) == (self.wheel is not None):
            raise ValueError("it has either `url`, an address or null, or `wheel`, a package")
        if self.wheel is not None and self.file.suffix != ".safetensors":
            raise ValueError("`file` of the weights of a `wheel` must end with .safetensors")
        return self


class Recipe(Model):
    """How a network trains that the protocol does not suit (transformers), in place of its values."""

    optimizer: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    auxiliary_weight: Annotated[float, Field(ge=0)]


class Network(Model):
    """A segmentation network of segmentation_models_pytorch: architecture, encoder, output stride, encoder
    weights (an entry of ``weights:``); ``recipe`` where the protocol's optimiser does not suit it."""

    architecture: Literal["PSPNet", "DeepLabV3", "Segformer", "FPN"]
    encoder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    output_stride: Literal[8, 16, 32]
    weights: Key | None
    recipe: Recipe | None = None

    @property
    def smallest(self) -> int:
        """The least pixels a side that the network can see: SegFormer's first stage reduces its keys, at a
        quarter of the size, by 8."""
        return 29 if self.encoder.startswith("mit_") else 1


class Augmentation(Model):
    """Joint image and label augmentation of one training sample; photometric jitter is torchvision's, image
    only."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    flip: Share
    brightness: Share
    contrast: Share
    saturation: Share
    hue: Annotated[float, Field(ge=0, le=0.5)]

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("the smaller scale comes first")
        return scale


class Sliding(Model):
    """Evaluation by a window (height, width) that moves by a stride; overlapping windows are averaged."""

    window: Size
    stride: Size

    @model_validator(mode="after")
    def _covers(self) -> Sliding:
        if self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
            raise ValueError("a stride larger than the window leaves pixels out")
        return self


class Training(Model):
    """One schedule: SGD with momentum, linear warm-up, then poly decay of the learning rate to zero.

    Evaluation sees whole images, or where ``sliding`` is given, windows of them.
    """

    steps: Positive
    batch_size: Annotated[int, Field(ge=2)]
    crop: Size
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    power: Annotated[float, Field(ge=0)]
    auxiliary_weight: Annotated[float, Field(ge=0)]
    precision: Literal["fp32", "bf16"]
    validate_every: Positive
    augmentation: Augmentation
    sliding: Sliding | None = None


class Teacher(Model):
    """The teacher: its network, its own (longer) schedule and its seed."""

    network: Network
    training: Training
    seed: Seed


class Benchmark(Model):
    """Data set + teacher + training protocol. ``data`` is checked by the data set's own ``Config``."""

    data: dict[str, Any]
    frames: Positive  # test images that follow each other in a video, and are resampled together
    teacher: Teacher
    training: Training


class Suite(Model):
    """What ``dvc repro`` runs."""

    benchmarks: Keys = Field(min_length=1)
    students: Keys = Field(min_length=1)
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] = Field(min_length=1)
    reference: Key  # the student alone, to which every method is compared
    controls: Annotated[list[Control], AfterValidator(_distinct)]  # it again, for so many times the steps
    methods: Keys = Field(min_length=1)
    official: Keys  # of the methods, those that run with their authors' weights too
    variants: Keys
    threads: Positive  # of a cell, on the CPU
    workers: Annotated[int, Field(ge=0)]  # processes that read a large data set for a cell
    pack: Positive  # cells that a process trains side by side, at most
    weights: Keys  # that are fetched before anything is trained
    strict: bool  # deterministic kernels on a GPU too, where torch has them


class Tuning(Model):
    """The search for loss weights: for every method the same number of short trainings, scored on validation.

    What is searched, and in which range, stands in the ``Config`` of each method.
    """

    benchmark: Key
    student: Key
    methods: Keys
    trials: Positive
    steps: Positive
    seed: Seed
    margin: NonNegative  # points of mIoU by which a trial must lead the first one to be chosen


class Params(Model):
    """The whole of params.yaml."""

    engine: Positive  # the version of what a training computes
    suite: Suite
    benchmarks: dict[Key, Benchmark]
    students: dict[Key, Network]
    weights: dict[Key, Weights]
    methods: dict[Key, dict[str, Any]]
    official: dict[Key, dict[str, Any]]  # of these methods: the loss weights of their authors
    acfd: dict[Key, dict[str, Any]]
    tuning: Tuning

    @property
    def method_keys(self) -> list[str]:
        """Every method of params.yaml: the controls after the reference, then ``kd``, …, ``kd-official``, …,
        ``acfd-full``, …"""
        reference = self.suite.reference
        others = [key for key in self.methods if key != reference]
        official = [f"{key}{OFFICIAL}" for key in self.official]
        return [reference, *self.controls, *others, *official, *(f"{PAPER}-{key}" for key in self.acfd)]

    @property
    def suite_methods(self) -> list[str]:
        """The methods that the suite runs, in the order of :attr:`method_keys`."""
        suite = self.suite
        chosen = {suite.reference, *self.controls, *suite.methods}
        chosen |= {f"{key}{OFFICIAL}" for key in suite.official} | {
            f"{PAPER}-{key}" for key in suite.variants
        }
        return [key for key in self.method_keys if key in chosen]

    @property
    def controls(self) -> dict[str, float]:
        """The keys of the reference trained longer (``none-x1.5``), with the factor on its steps."""
        return {f"{self.suite.reference}-x{factor}": factor for factor in self.suite.controls}

    def schedule(self, benchmark: str, method: str) -> Training:
        """How a student is trained by a method: the protocol of the benchmark, longer for a control."""
        training = self.benchmark(benchmark).training
        factor = self.controls.get(method)
        return training.model_copy(update={"steps": round(factor * training.steps)}) if factor else training

    def module_key(self, key: str) -> str:
        """The method whose file computes ``key``: ``kd`` for ``kd-official``, the reference for a control."""
        return self.suite.reference if key in self.controls else key.removesuffix(OFFICIAL)

    def method_values(self, key: str) -> dict[str, Any]:
        """The hyper-parameters of a method as they stand in params.yaml."""
        if key.startswith(f"{PAPER}-"):
            return self.acfd[key.removeprefix(f"{PAPER}-")]
        base = self.module_key(key)
        return self.methods[base] | (self.official[base] if key.endswith(OFFICIAL) else {})

    def benchmark(self, key: str) -> Benchmark:
        return self.benchmarks[known("benchmark", key, self.benchmarks)]

    def student(self, key: str) -> Network:
        return self.students[known("student", key, self.students)]

    def encoder_weights(self, key: str) -> Weights:
        return self.weights[known("file of weights", key, self.weights)]


def known(kind: str, key: str, have: Any) -> str:
    """``key`` if it is one of ``have``; else an error that lists what exists."""
    if key not in have:
        names = [*have][:20] + ["…"] * (len(have) > 20)
        raise ConfigError(
            f"There is no {kind} '{key}' in params.yaml; the ones that exist: {', '.join(names)}."
        )
    return key


def dataset(data: dict[str, Any], benchmark: str) -> tuple[Any, Any]:
    """The module ``pipelines/datasets/<data.dataset>.py`` and its checked ``Config`` for a benchmark."""
    module = dataset_module(data, benchmark)
    try:
        return module, module.Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(f"benchmarks.{benchmark}.data", error)) from None


@cache
def _datasets() -> list[str]:
    return sorted(
        p.stem
        for p in (ROOT / "pipelines" / "datasets").glob("[a-z]*.py")
        if p.stem not in ("archives", "folder", "pixels", "transforms", "writer")
    )


def dataset_module(data: dict[str, Any], benchmark: str) -> Any:
    """The module of a benchmark's data set."""
    name, have = data.get("dataset"), _datasets()
    if name not in have:
        raise ConfigError(
            f"There is no data set {few_words(name)} (benchmarks.{benchmark}.data.dataset); those that "
            f"exist: {', '.join(have)}."
        )
    return importlib.import_module(f"pipelines.datasets.{name}")


def load(path: Path | None = None) -> Params:
    """Read and check params.yaml: structure, names, and the settings of every data set. Those of methods are
    checked by :func:`pipelines.methods.checked`, which needs torch."""
    path = path or ROOT / "params.yaml"
    try:
        params = Params.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(explain("", error)) from None
    suite = params.suite
    networks = {f"students.{key}": network for key, network in params.students.items()}
    networks |= {
        f"benchmarks.{key}.teacher.network": b.teacher.network for key, b in params.benchmarks.items()
    }
    weights = {f"{place}.weights": [own.weights] for place, own in networks.items() if own.weights}
    missing: dict[tuple[str, str, str], list[str]] = {}  # kind, section, key: the places that name it
    for kind, section, have, places in (
        ("benchmark", "benchmarks", params.benchmarks, {"suite.benchmarks": suite.benchmarks}),
        ("student", "students", params.students, {"suite.students": suite.students}),
        (
            "method",
            "methods",
            params.methods,
            {
                "suite.reference": [suite.reference],
                "suite.methods": suite.methods,
                "official": params.official,
            },
        ),
        ("entry of official", "official", params.official, {"suite.official": suite.official}),
        ("variant", PAPER, params.acfd, {"suite.variants": suite.variants}),
        ("benchmark", "benchmarks", params.benchmarks, {"tuning.benchmark": [params.tuning.benchmark]}),
        ("student", "students", params.students, {"tuning.student": [params.tuning.student]}),
        ("method", "methods", params.method_keys, {"tuning.methods": params.tuning.methods}),
        ("file of weights", "weights", params.weights, {"suite.weights": suite.weights} | weights),
    ):
        for place, wanted in places.items():
            for key in wanted:
                if key not in have:
                    missing.setdefault((kind, section, key), []).append(place)
    for (kind, section, key), named in missing.items():
        try:
            known(kind, key, getattr(params, section))
        except ConfigError as error:
            raise ConfigError(
                f"{error} It is named in {' and '.join(named)}: take it out there, or add it to `{section}`."
            ) from None
    if suite.reference not in suite.methods:
        raise ConfigError(
            f"In params.yaml: suite.methods must hold suite.reference, {suite.reference}: every method is "
            "compared to it."
        )
    if fixed := [key for key in params.tuning.methods if key.endswith(OFFICIAL) or key in params.controls]:
        raise ConfigError(
            f"In params.yaml: tuning.methods must not hold {fixed[0]}, whose weights are given: take it out."
        )
    if params.tuning.seed in suite.seeds:
        raise ConfigError(
            "In params.yaml: tuning.seed must not be one of suite.seeds, whose scores are reported."
        )
    for name, holds in ((TEACHER, "the teacher"), (EXPORTS, "the records of exports")):
        if name in params.students:
            raise ConfigError(
                f"In params.yaml: no student may be called '{name}', that folder holds {holds}."
            )
    for key in params.methods:
        if (
            key in (PAPER, TEACHER, PHOTOS, TRUTH)
            or key.startswith(f"{PAPER}-")
            or key.endswith(OFFICIAL)
            or key in params.controls
        ):
            raise ConfigError(
                f"In params.yaml: methods.{key} takes a name that belongs to {PAPER} and its variants, to "
                f"the teacher, to the panels, to the controls or to the authors' weights: rename it."
            )
    for key in params.acfd:
        if f"{PAPER}-{key}".endswith(OFFICIAL):
            raise ConfigError(
                f"In params.yaml: {PAPER}.{key} takes a name that belongs to the authors' weights: rename it."
            )
    for name in suite.benchmarks:
        steps = [params.schedule(name, key).steps for key in (suite.reference, *params.controls)]
        if len({*steps}) < len(steps):
            raise ConfigError(
                f"In params.yaml: of the {min(steps)} steps of benchmarks.{name}.training, suite.controls "
                f"make trainings of equal length ({', '.join(map(str, steps))} steps): take one out."
            )
    for name, benchmark in params.benchmarks.items():
        dataset(benchmark.data, name)
        students = suite.students if name in suite.benchmarks else []
        for place, training, network in (
            (f"benchmarks.{name}.teacher.training", benchmark.teacher.training, benchmark.teacher.network),
            *((f"benchmarks.{name}.training", benchmark.training, params.students[key]) for key in students),
        ):
            window = training.sliding.window if training.sliding else training.crop
            if min(*training.crop, *window) < network.smallest:
                raise ConfigError(
                    f"In params.yaml: {place} has a crop or a window below {network.smallest} pixels a "
                    f"side, the least that the encoder {network.encoder} sees: enlarge it."
                )
    return params
