"""The contract of a method, and the only room of ours that a method may import.

A method is a file ``baselines/<key>.py`` with a class ``Method(Distiller)`` and an entry ``methods.<key>`` in
params.yaml. The engine feeds it named feature maps (*taps*) of student and teacher and adds up the *terms*
that it returns. Variants of the paper's method come from ``acfd/method.py`` in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

AUXILIARY = "auxiliary"  # logits of the auxiliary head, where a network has one
TAPS = ("backbone.1", "backbone.2", "backbone.3", "backbone.4", "fusion", "logits", AUXILIARY)

Taps = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Search:
    """The range of a loss weight in tuning, searched on a logarithmic scale. ValueError for a range that has
    none."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < 1.26 * self.low <= self.high < float("inf"):  # the grid of tuning has ten values a decade
            raise ValueError(
                f"Search({self.low:g}, {self.high:g}) is no range: give a low above 0, and a high that is at "
                "least 1.26 times as large"
            )


class MethodConfig(BaseModel):
    """Typed hyper-parameters of a method. Values live in params.yaml only: give no field a default.

    By convention the loss weights are the fields whose name is ``weight`` or begins with ``weight_``. Those
    that ``make tune`` searches carry their range: ``Annotated[float, Field(ge=0), Search(0.1, 10)]``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def ranges(cls) -> dict[str, Search]:
        """The fields that tuning searches, with their ranges."""
        return {
            name: mark
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Search)
        }


@dataclass(frozen=True)
class Batch:
    """What a step is trained on: ``images`` (B, 3, H, W) float32 normalised, ``labels`` (B, H, W) int64."""

    images: Tensor
    labels: Tensor
    classes: int
    ignore_index: int

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Pixels that carry a label, at a tap's ``size`` (h, w): (B, h, w) bool, nearest neighbour."""
        mask = (self.labels != self.ignore_index).unsqueeze(1).float()
        return F.interpolate(mask, size=size, mode="nearest").squeeze(1) > 0.5


class Distiller(nn.Module):
    """Base class of every method. On its own it is the student alone: no taps, no terms.

    The engine guarantees: the teacher is loaded strictly, frozen and in eval mode, its score was checked;
    every parameter of the method without an optimiser of its own is trained by the main optimiser; all
    learning rates follow the schedule; taps arrive in float32 with autocast off; no parameter of the method
    is exported with the student. The teacher's taps carry no gradient; a method detaches them all the same,
    as its losses may be used elsewhere, and the contract tests look.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()  # () = the teacher is not run at all
    # terms that these networks do not allow (no auxiliary head): in the record
    left_out: tuple[str, ...] = ()

    def __init__(self, config: MethodConfig, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """``*_shapes`` map every tap to (C, H, W) at the training crop: build adapters from them, never from
        constants. ``auxiliary`` is among them only if the network has an auxiliary head.

        ``student_taps`` and ``teacher_taps`` may be set here, on the instance, when they depend on the
        configuration.
        """
        super().__init__()
        self.config = config

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted, scalar terms. The engine adds the task loss, sums, and logs each by its name.

        Draw from torch's global generator (on the device of the taps): the engine seeds it by (seed, step),
        so that cells are paired and a resumed training repeats the draws. State that a step changes belongs
        into buffers, which are part of the resume state.
        """
        return {}

    def own_optimizers(self) -> dict[str, Optimizer]:
        """Optimisers that the method steps itself in ``after_step`` (a critic's). Parameters in them are left
        to it."""
        return {}

    def after_step(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        """Runs after the student's update on the detached taps of the same step. The values are logged, not
        summed."""
        return {}


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps (B, C, H, W) to one spatial size, the smaller of the two in each direction, by average
    pooling."""
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    return tuple(x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))  # type: ignore[return-value]
