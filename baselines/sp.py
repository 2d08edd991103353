"""SP: similarity-preserving distillation; which images of a step resemble each other.

Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019, arXiv 1907.09682), eqs. 1 to
4. No repository of the authors was found; compared is HobbitLong/RepDistiller, commit b84f547, which its
header says the original author verified. With X the maps of the step as (B, C h w), G(X) = X Xᵀ (B x B) and
its rows at unit L2 norm:

    L = 1 / B² * sum over pairs of images of (G(X_s) - G(X_t))²

Reduction: mean over the B x B entries, as in the paper and in RepDistiller, so that their weight carries
over in form. Theirs is 3000 for B = 64 in classification; it depends on B (for 2 images the matrix has
four entries, two of them near 1, and hardly a signal). None is published for segmentation.

**Images are coupled**: all images of a step are seen, and the value depends on the batch size.

No adapter. Widths and sizes may differ freely; all pixels count. After ReLU all similarities are
positive, and nothing is subtracted, as in the paper. With one image the loss is 0. No published term is
missing.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipelines.maps import unit
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pairs of images of the squared difference of their similarities (see the top).

    Maps (B, ...) with equal B. Returns a float32 scalar. No gradient reaches the teacher.
    """

    def similarities(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return unit(flat @ flat.T)

    difference = similarities(student.float()) - similarities(teacher.detach().float())
    return difference.square().mean()


class Method(Distiller):
    """SP on the last stage of the backbone."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(30.0, 3000.0)]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if config.weight:
            self.student_taps = self.teacher_taps = ("backbone.4",)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        return {"sp": self.config.weight * sp_loss(student["backbone.4"], teacher["backbone.4"])}
