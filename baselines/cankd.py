"""CanKD: the student's map is completed by what every position finds in the teacher's map, then compared.

Source: Sun and Ohyama, "CanKD: Cross-Attention-based Non-local Operation for Feature-based Knowledge
Distillation" (WACV 2026, arXiv 2511.21503); the authors' code is compared at tori-hotaru/CanKD, commit
f951e3a. With v = W s (1x1 convolution with bias) the student's map at the teacher's width, and theta, phi, g
1x1 convolutions from the teacher's width to half of it:

    a_ij = theta(v)_i . phi(t)_j / J                       J = number of keys j; there is no softmax
    z_i  = v_i + BN(W_z sum_j a_ij g(t)_j)
    L    = 1/2 * mean over images, channels and positions of (IN(z) - IN(t))²

phi(t) and g(t) are max-pooled 2x2 before they serve as keys and values (an odd border is dropped). IN
brings every channel of every image to mean 0 and variance 1 (biased, eps 1e-5, no scale or shift). BN
starts at 0, so that z = v at first.

Reduction: the mean of everything and the half, as in the authors' code. Their weight therefore carries
over: 10 in the configurations (20 for PSPNet -> DeepLabV3-R18; their README counts the half in and calls
these 5 and 10). Their task loss divides by all pixels, also the unlabelled ones, ours by the labelled
ones.

Differences from the authors' code: two biases are left out, that of W_z and that of BN, since the
instance norm removes whatever is constant over positions: their gradient is rounding noise. Without a
softmax the products associate: g phi is summed over j first, which gives the same z without a matrix of
positions by positions. The authors take maps of equal size only; here unequal ones meet at the smaller by
average pooling. All pixels count. The layer is the last stage after ReLU. No published term is missing:
the tables are this term beside the task loss.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

EPSILON = 1e-5  # under the root of the instance norm


def instance_norm(x: Tensor) -> Tensor:
    """Every channel of every image at mean 0 and variance 1; a constant channel becomes 0, also one
    position."""
    x = x - x.mean(dim=(2, 3), keepdim=True)
    return x * (x.square().mean(dim=(2, 3), keepdim=True) + EPSILON).rsqrt()


def cankd_loss(completed: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean of squares between two instance-normalised maps (B, C, h, w) of one size and width.

    Returns a float32 scalar. No gradient reaches the teacher.
    """
    return F.mse_loss(instance_norm(completed.float()), instance_norm(teacher.detach().float())) / 2


class CrossAttention(nn.Module):
    """z of the formula: the student's map ``v`` and what it reads in the teacher's, both ``width`` wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.theta, self.phi, self.g = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, width, 1, bias=False)
        self.scale = nn.BatchNorm2d(width)
        nn.init.zeros_(self.scale.weight)
        self.scale.bias = None  # type: ignore[assignment]

    def forward(self, v: Tensor, teacher: Tensor) -> Tensor:
        pool = (min(2, teacher.shape[-2]), min(2, teacher.shape[-1]))
        keys, values = (F.max_pool2d(conv(teacher), pool).flatten(2) for conv in (self.phi, self.g))
        mixed = values @ keys.transpose(1, 2) / keys.shape[2]  # (B, D, D)
        read = mixed @ self.theta(v).flatten(2)  # (B, D, h * w)
        return v + self.scale(self.out(read.unflatten(2, v.shape[-2:])))


class Method(Distiller):
    """CanKD on the last stage of the backbone."""

    class Config(MethodConfig):
        weight: Annotated[float, Field(ge=0), Search(1.0, 100.0)]

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        if not config.weight:
            return
        self.student_taps = self.teacher_taps = ("backbone.4",)
        width = teacher_shapes["backbone.4"][0]
        self.connector = nn.Conv2d(student_shapes["backbone.4"][0], width, 1)
        nn.init.kaiming_normal_(self.connector.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.connector.bias)  # type: ignore[arg-type]
        self.attention = CrossAttention(width)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        s, t = same_size(student["backbone.4"].float(), teacher["backbone.4"].detach().float())
        return {"cankd": self.config.weight * cankd_loss(self.attention(self.connector(s), t), t)}
