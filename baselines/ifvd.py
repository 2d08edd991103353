"""IFVD: how far each pixel is from the centre of its class, in the student as in the teacher.

Source: Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation" (ECCV 2020, doi
10.1007/978-3-030-58571-6_21); the authors' code is compared at YukangWang/IFVD, commit 950a7a5. The centre of
class k in image b is the sum of its pixels' features over (their number + 1e-6), with the labels brought to
the map's size by nearest neighbour. With v_i = the cosine of pixel i and the centre of its class in its own
image:

    L = mean over images and positions of (v_i(student) - v_i(teacher))²

The gradient flows through the centres too.

Reduction: mean over all positions. An unlabelled pixel adds 0 but is counted: in their code it is its own
centre. The weight (200) needs no conversion; over labelled pixels alone it would be 200 times their share.

Differences from the authors' code: classes by one matrix product instead of a loop over masks; a pixel or
centre that is dead (norm below 1e-6) has cosine 0 and no gradient; unequal sizes are brought to the smaller
one by average pooling. The widths may differ. Images are not coupled.

"IFVD" in the published tables is this term, plus pixel-wise KD (10 with the element mean, that is 10 / 19 per
pixel), plus an adversarial term (0.001). Neither is in it here. CIRKD's "IFVD" has 20, KD 1 and a hinge GAN.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from pipelines.maps import direction, labels_at, one_hot
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def variation(x: Tensor, members: Tensor) -> Tensor:
    """Cosine of each pixel of a map (B, C, h, w) and the centre of its class in its image: (B, h * w), 0
    where no class is. ``members`` are the indicators of the classes, (B, K, h * w)."""
    pixels = x.flatten(2)
    centres = pixels @ members.transpose(1, 2) / (members.sum(dim=2).unsqueeze(1) + 1e-6)  # (B, C, K)
    cosines = direction(centres).transpose(1, 2) @ direction(pixels)  # (B, K, h * w)
    return (cosines * members).sum(dim=1)


def ifvd_loss(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean over images and positions of the squared difference of the variations (see the top).

    Maps (B, C, h, w), the widths may differ; ``labels`` (B, H, W) int64, those outside of the classes have no
    centre. Returns a float32 scalar. No gradient reaches the teacher.
    """
    student, teacher = same_size(student.float(), teacher.detach().float())
    members = one_hot(labels_at(labels, student.shape[-2:]), classes)
    return (variation(student, members) - variation(teacher, members)).square().mean()


class Method(Distiller):
    """IFVD on one tap: the map before the classifier in the authors' code."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(20.0, 2000.0)]
        tap: Literal["fusion", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.student_taps = self.teacher_taps = (config.tap,) if config.weight else ()

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        tap = self.config.tap
        loss = ifvd_loss(student[tap], teacher[tap], batch.labels, batch.classes)
        return {"ifvd": self.config.weight * loss}
