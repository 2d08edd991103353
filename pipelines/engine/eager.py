"""Keep torch's compiler out of processes that never compile.

``torch._dynamo`` takes 4 to 5 s to import, and a suite that starts one process a cell pays that each time,
because small things import it on first use: every optimiser (``disable``, ``graph_break``), a predicate of
torchvision's ``roi_align``, a decorator in timm. :func:`install` puts a lazy module in its place that answers
these and becomes the real one as soon as anything else is asked of it, so ``torch.compile`` in a method still
works.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            for key in [key for key, module in sys.modules.items() if isinstance(module, _Lazy)]:
                del sys.modules[key]
        return getattr(importlib.import_module(self.__name__), name)


class _NotCompiled:
    """Stands for the class of compiled modules: nothing is an instance of it."""


def _disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _disable


def install() -> None:
    """Call before anything of torchvision, timm or an optimiser is used. Does nothing when the compiler is
    loaded already."""
    if NAME in sys.modules:
        return
    dynamo, utils, eval_frame = _Lazy(NAME), _Lazy(f"{NAME}.utils"), _Lazy(f"{NAME}.eval_frame")
    dynamo.__path__ = []  # a package
    dynamo.disable = _disable  # type: ignore[attr-defined]
    dynamo.graph_break = lambda: None  # type: ignore[attr-defined]
    utils.is_compile_supported = lambda device: False  # type: ignore[attr-defined]
    eval_frame.OptimizedModule = _NotCompiled  # type: ignore[attr-defined]
    dynamo.utils, dynamo.eval_frame = utils, eval_frame  # type: ignore[attr-defined]
    sys.modules.update({NAME: dynamo, f"{NAME}.utils": utils, f"{NAME}.eval_frame": eval_frame})
