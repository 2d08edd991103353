"""Keep torch's compiler out of processes that never compile.

``torch._dynamo`` takes 4 to 5 s to import, and a suite that starts one process a cell pays that each time,
because small things import it on first use: every optimiser (``disable``, ``graph_break``), a predicate of
torchvision's ``roi_align``, a decorator in timm. :func:`install` puts a lazy module in its place that answers
these and makes way for the real one as soon as anything else is asked of it, so ``torch.compile`` in a method
still works.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _make_way()
        return getattr(importlib.import_module(self.__name__), name)


class _Finder(MetaPathFinder):
    """Import of another submodule: the real package is loaded first, which may bring the submodule along."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{NAME}.") or not isinstance(sys.modules.get(NAME), _Lazy):
            return None
        _make_way()
        importlib.import_module(NAME)
        module = sys.modules.get(name)
        return None if module is None else ModuleSpec(name, _Loaded(module))


class _Loaded(Loader):
    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _NotCompiled:
    """Stands for the class of compiled modules: nothing is an instance of it."""


def _make_way() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, _Lazy)]:
        del sys.modules[name]


def _disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _disable


def install() -> None:
    """Call before anything of torchvision, timm or an optimiser is used; no-op if the compiler is loaded."""
    if NAME in sys.modules:
        return
    dynamo, utils, eval_frame = _Lazy(NAME), _Lazy(f"{NAME}.utils"), _Lazy(f"{NAME}.eval_frame")
    dynamo.__path__ = [str(Path(torch.__path__[0]) / "_dynamo")]
    answers: dict[str, Any] = {"disable": _disable, "graph_break": lambda: None}
    vars(dynamo).update(answers, utils=utils, eval_frame=eval_frame)
    vars(utils).update(is_compile_supported=lambda device: False)
    vars(eval_frame).update(OptimizedModule=_NotCompiled)
    sys.modules.update({NAME: dynamo, f"{NAME}.utils": utils, f"{NAME}.eval_frame": eval_frame})
    sys.meta_path.insert(0, _Finder())
