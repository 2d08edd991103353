"""The methods of params.yaml: their classes, and their settings checked by each one's own ``Config``."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import OFFICIAL, PAPER, ROOT, ConfigError, Params, explain, known
from pipelines.method import Distiller, MethodConfig


def checked(params: Params) -> Params:
    """``params``, if the settings of all methods are right."""
    for key in params.method_keys:
        configured(params, key)
    reference = params.suite.reference
    if method_class(reference).teacher_taps:
        raise ConfigError(
            f"In params.yaml: suite.reference = {reference} learns from a teacher, and the reference is the "
            "student alone: name a method without teacher, as none is."
        )
    return params


def configured(params: Params, key: str) -> MethodConfig:
    """The checked hyper-parameters of a method of params.yaml."""
    known("method", key, params.method_keys)
    own = f"official.{key.removesuffix(OFFICIAL)}" if key.endswith(OFFICIAL) else None
    return method_config(params.module_key(key), params.method_values(key), own)


def method_class(key: str) -> type[Distiller]:
    """The class ``Method`` of a baseline ``<key>`` or of the paper's method (``acfd-<variant>``)."""
    module = f"{PAPER}.method" if key.startswith(f"{PAPER}-") else f"baselines.{key}"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever stands in the file
        if not (isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0])):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{module.replace('.', '/')}.py cannot be imported ({reason}): correct it, or take its entry "
                "out of params.yaml."
            ) from error
        have = sorted(p.stem for p in (ROOT / "baselines").glob("[a-z]*.py"))
        raise ConfigError(
            f"There is no method file baselines/{key}.py; the methods that exist: {', '.join(have)}."
        ) from None
    if not (isinstance(cls := getattr(found, "Method", None), type) and issubclass(cls, Distiller)):
        raise ConfigError(f"{module.replace('.', '/')}.py must define `class Method(Distiller)`.")
    return cls


def method_config(key: str, values: Mapping[str, Any], section: str | None = None) -> MethodConfig:
    """The values that ``section`` of params.yaml gives a method, checked against the method's own
    ``Config``."""
    own = f"{PAPER}.{key.removeprefix(PAPER + '-')}" if key.startswith(f"{PAPER}-") else f"methods.{key}"
    try:
        return method_class(key).Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(section or own, error)) from None


def reason(error: Exception) -> str:
    """What stopped a cell, in one line: a sentence as it stands; of any other error its kind, its text and
    the line of the method's file that it comes from."""
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    rooms = (ROOT / "baselines", ROOT / PAPER)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename).parent in rooms]
    if frames and not isinstance(error, ConfigError):
        text += f" ({Path(frames[-1].filename).relative_to(ROOT)}, line {frames[-1].lineno})"
    return " ".join(text.split())
