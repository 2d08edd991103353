"""No distillation: the student alone, through the same loop as every method. The teacher is not run."""

from __future__ import annotations

from pipelines.method import Distiller, MethodConfig


class Method(Distiller):
    """The undistilled student: no taps, no terms, no parameters."""

    class Config(MethodConfig):
        """No hyper-parameters."""
