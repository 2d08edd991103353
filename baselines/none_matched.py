"""No distillation, matched compute: the student alone, trained for as long as the dearest method costs.

The control for "equal iterations are not equal compute" (Ali et al., arXiv 2604.25530): a distilled step also
runs the teacher and the method, so a method should beat what the student reaches on its own with the same
FLOPs. The engine lengthens the schedule (warm-up as before, the decay stretched over all steps); counting
FLOPs and not seconds makes it the same on every machine. The teacher is not run.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.method import Distiller, MethodConfig


class Method(Distiller):
    """The undistilled student on a longer schedule: no taps, no terms, no parameters."""

    class Config(MethodConfig):
        match: list[str] = Field(min_length=1)  # the methods that it has to match: the dearest of them counts

        def matched(self) -> tuple[str, ...]:
            return tuple(self.match)
