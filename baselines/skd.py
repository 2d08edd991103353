"""SKD: structured knowledge distillation = pixel-wise + pair-wise + holistic (adversarial).

Source: Liu et al., "Structured Knowledge Distillation for Semantic Segmentation" (CVPR 2019; TPAMI 2020,
arXiv 1903.04197), eqs. 1 to 5. Differences are from irfanICMLL/structure_knowledge_distillation, commit
ce208e1. Many tables call the pair-wise term alone "SKD"; set the other weights to 0 for that.

- ``pixel``: KL(teacher || student) over classes at T = 1, mean over all pixels. Theirs: cross-entropy summed
  over all pixels and divided by H * W but not by the N images of a process, so ``weight_pixel`` = N * their
  lambda_pi.
- ``pair``: ``pairwise_loss`` on the map before the classifier. Theirs divides by (h * w)² and by N, the same
  reduction, but detaches the L2 norms (the gradient then also changes lengths, which cosine similarity
  ignores); here it is the true gradient. CIRKD's "SKD" pools 2x2 patches instead, thousands of nodes: another
  algorithm.
- ``holistic``: minus the mean score that a critic gives to the student's output. The critic is trained after
  every step as a Wasserstein critic with gradient penalty (WGAN-GP), teacher = real. Theirs is the
  discriminator of SAGAN (spectral norm, self-attention, fixed 65 x 65 input) on batch-normalised logits
  without the image, trained by SGD under the same lambda_d. Here: a plain convolutional critic for any size,
  on class probabilities together with the image that they belong to (the conditioning that the paper
  describes), Adam with betas (0, 0.9), and no lambda on the critic's own objective. A published lambda_d
  therefore does not convert.

A term with weight 0 is not computed and its taps are not asked for.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size

SILENT = 1e-6  # L2 norm at or below which a node has no direction


def pixelwise_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over all pixels of KL(teacher || student) over classes, T = 1; logits (B, C, h, w)."""
    student, teacher = same_size(student_logits.float(), teacher_logits.detach().float())
    log_p, log_q = torch.log_softmax(student, dim=1), torch.log_softmax(teacher, dim=1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1).mean()


def pairwise_loss(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Mean over images and pairs of nodes of the squared difference of cosine similarities (eq. 2).

    Maps (B, C, h, w), the widths may differ; unequal spatial sizes are brought to the smaller one by average
    pooling. A node is a max-pooled patch of ``scale`` (0 < scale <= 1) times the map in each direction; a
    border that is left over makes a node too. Returns a float32 scalar in 0..4. No gradient reaches the
    teacher.
    """
    student, teacher = same_size(student.float(), teacher.detach().float())
    kernel = tuple(max(1, int(size * scale)) for size in student.shape[-2:])

    def similarity(features: Tensor) -> Tensor:
        nodes = F.max_pool2d(features, kernel, stride=kernel, ceil_mode=True).flatten(2)  # (B, C, nodes)
        norm = nodes.norm(dim=1, keepdim=True)
        nodes = nodes / norm.clamp_min(SILENT) * (norm > SILENT)  # a silent node: no direction, no gradient
        return nodes.transpose(1, 2) @ nodes

    return (similarity(student) - similarity(teacher)).square().mean()


class Critic(nn.Module):
    """A score (B,) for class probabilities given the image: three strided convolutions, global mean, linear.

    No normalisation across images (the gradient penalty is per image) and no fixed input size.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3 + classes
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
            channels = out
        self.features = nn.Sequential(*layers)
        # no bias: only differences of scores count, and Adam would let it drift on rounding errors
        self.score = nn.Linear(channels, 1, bias=False)

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """``probabilities`` (B, C, h, w) and ``image`` (B, 3, h, w) to scores (B,)."""
        return self.score(self.features(torch.cat([image, probabilities], dim=1)).mean(dim=(2, 3))).squeeze(1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, image: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017, eq. 3): mean of (||gradient|| - 1)² between real and fake."""
    mix = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, image).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Method(Distiller):
    """SKD on the map before the classifier (``fusion``) and the logits before upsampling."""

    class Config(MethodConfig):
        weight_pixel: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_pair: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_holistic: Annotated[float, Field(ge=0), Search(0.001, 0.1)]
        scale: float = Field(gt=0, le=1)  # of a node of the pair-wise term, as a share of the map
        critic_lr: float = Field(gt=0)
        gradient_penalty: float = Field(ge=0)  # its weight in the critic's objective

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        fusion = ("fusion",) if config.weight_pair else ()
        logits = ("logits",) if config.weight_pixel or config.weight_holistic else ()
        self.student_taps = self.teacher_taps = fusion + logits
        self.critic: Critic | None = None
        self.optimizers: dict[str, Optimizer] = {}
        if config.weight_holistic:
            self.critic = Critic(student_shapes["logits"][0])

    def own_optimizers(self) -> dict[str, Optimizer]:
        # built at the first call, when the parameters are on their device; the same object ever after
        if self.critic is not None and not self.optimizers:
            self.optimizers["critic"] = Adam(
                self.critic.parameters(), lr=self.config.critic_lr, betas=(0.0, 0.9)
            )
        return self.optimizers

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_pixel:
            terms["pixel"] = config.weight_pixel * pixelwise_loss(student["logits"], teacher["logits"])
        if config.weight_pair:
            pair = pairwise_loss(student["fusion"], teacher["fusion"], config.scale)
            terms["pair"] = config.weight_pair * pair
        if self.critic is not None:
            # detached parameters: the student must not leave a gradient in the critic
            frozen = {name: value.detach() for name, value in self.critic.named_parameters()}
            fake, _, image = self._critic_inputs(student, teacher, batch)
            terms["holistic"] = (
                -config.weight_holistic * functional_call(self.critic, frozen, (fake, image)).mean()
            )
        return terms

    def after_step(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        """One step of the critic: raise score(teacher) - score(student), with the gradient penalty."""
        if self.critic is None:
            return {}
        optimizer = self.own_optimizers()["critic"]
        with torch.enable_grad():
            fake, real, image = (x.detach() for x in self._critic_inputs(student, teacher, batch))
            gap = self.critic(real, image).mean() - self.critic(fake, image).mean()
            penalty = gradient_penalty(self.critic, real, fake, image)
            optimizer.zero_grad()
            (self.config.gradient_penalty * penalty - gap).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"critic_gap": gap.detach(), "critic_penalty": penalty.detach()}

    @staticmethod
    def _critic_inputs(student: Taps, teacher: Taps, batch: Batch) -> tuple[Any, Any, Any]:
        """Class probabilities of student and teacher, and the image, all at the logits' size."""
        fake, real = same_size(student["logits"].float(), teacher["logits"].detach().float())
        image = F.adaptive_avg_pool2d(batch.images.float(), (fake.shape[-2], fake.shape[-1]))
        return fake.softmax(dim=1), real.softmax(dim=1), image
