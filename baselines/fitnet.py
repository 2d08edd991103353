"""FitNet: the student's features, through a 1x1 convolution, equal the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015, arXiv 1412.6550), eq. 3, on one map and
during the whole training, as the field uses it; compared with winycg/CIRKD, commit dab64db. With W = a 1x1
convolution without bias to the teacher's width, trained along with the student:

    L = mean over images, the teacher's channels and positions of (W student - teacher)²

Reduction: mean over everything, so that CIRKD's weight (10, on the last feature map) needs no conversion.
The paper has half the squared norm, in a first stage of its own. CIRKD's runs add KD with weight 1, which is
not in it here.

Differences from CIRKD's code: unequal sizes are brought to the smaller one by average pooling. W exists for
equal widths too, as in theirs. All pixels take part. Images are not coupled.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def fitnet_loss(adapted: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences of two maps (B, C, h, w) of one width.

    Unequal spatial sizes are brought to the smaller one by average pooling. Returns a float32 scalar. No
    gradient reaches the teacher.
    """
    return F.mse_loss(*same_size(adapted.float(), teacher.detach().float()))


class Method(Distiller):
    """FitNet on one tap: the map before the classifier in CIRKD."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        tap: Literal["fusion", "backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if config.weight:
            self.student_taps = self.teacher_taps = (config.tap,)
            width, wanted = student_shapes[config.tap][0], teacher_shapes[config.tap][0]
            self.conv = nn.Conv2d(width, wanted, 1, bias=False)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        tap = self.config.tap
        return {"fitnet": self.config.weight * fitnet_loss(self.conv(student[tap].float()), teacher[tap])}
