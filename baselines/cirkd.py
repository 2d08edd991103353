"""CIRKD: a pixel's similarities to the pixels of all images, and to a memory of the teacher's features.

Source: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation" (CVPR 2022,
arXiv 2204.06986); the authors' code is compared at winycg/CIRKD, commits dab64db and 2d8ad0f. Features have
unit length per pixel; similarities are cosines / ``temperature``; KL(teacher || student) is over the keys of
a pixel:

- ``batch``: for every ordered pair of images of the step (i, j), also i = j, the keys of a pixel of i are all
  pixels of j; mean over pixels and pairs. No T². ``pool``: average pooling before it (theirs: off; 2 or 4).
- ``pixel`` and ``region``: the keys are drawn from queues of teacher features, one queue a class, the same
  slots for all classes; the student's features go through H = 1x1 convolution, batch norm, ReLU, 1x1
  convolution, without biases. Mean over the labelled pixels, times ``kd_temperature``². Before the draw, each
  class in an image adds ``pixels_per_class`` of its pixels to its pixel queue, and the unit vector of their
  mean to its region queue. Queues start as random unit vectors, and these serve as keys until overwritten.
- ``kd``: pixel-wise KD on logits at ``kd_temperature``, mean over all pixels; their weight is 1.

Images are coupled: ``batch`` sees all images of a step, theirs the 2 of a process. With P positions it works
on (B * P)² similarities; they are made image by image, and again in the backward pass, so that P * B * P of
them live at once: at P = 64 * 128 and 16 images 4 GiB for each copy. Use ``pool`` on maps that are larger.

Differences from the authors' code: ``pixels: own`` adds pixels of the class and the queue is a ring. Theirs
(``pixels: authors``, for their published numbers) takes the first positions of the *image*, as many as the
class has pixels, so that the keys are of other classes; and entries that would reach the end of the queue
overwrite its last ones. Queues and H are part of the resume state here. Unequal sizes are brought to the
smaller one by average pooling. A dead pixel has no direction and no gradient. In theirs the student's map
passes dropout first.

Reduction: means, so that the weights (1, 1, 0.1, 0.1 on Cityscapes; pixel and region 0.01 on VOC) need no
conversion. All terms of the paper are in it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipelines.maps import direction, labels_at, one_hot, pixel_kl
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps, same_size


def relation_kl(
    s: Tensor, t: Tensor, s_keys: Tensor, t_keys: Tensor, temperature: float, kd_temperature: float = 1.0
) -> Tensor:
    """KL over the keys of each group, mean over groups, for the pixels of an image: s, t (C, P) and keys
    (groups, C, N), all unit vectors, to (P,). Similarities are not kept for the backward pass."""

    def kl(s: Tensor, t: Tensor, s_keys: Tensor, t_keys: Tensor) -> Tensor:
        near = [torch.einsum("cp,gcn->png", x, y) / temperature for x, y in ((s, s_keys), (t, t_keys))]
        return pixel_kl(near[0], near[1], kd_temperature).mean(dim=1)

    return checkpoint(kl, s, t, s_keys, t_keys, use_reentrant=False, preserve_rng_state=False)


def batch_loss(student: Tensor, teacher: Tensor, temperature: float, pool: int = 1) -> Tensor:
    """``batch`` for maps (B, C, h, w) of one size. No gradient reaches the teacher."""
    x, y = (F.avg_pool2d(x.float(), pool, ceil_mode=True) for x in (student, teacher.detach()))
    s, t = direction(x).flatten(2), direction(y).flatten(2)
    return torch.stack([relation_kl(*pair, s, t, temperature) for pair in zip(s, t, strict=True)]).mean()


def memory_loss(
    student: Tensor, teacher: Tensor, keys: Tensor, valid: Tensor, temperature: float, kd_temperature: float
) -> Tensor:
    """``pixel`` or ``region`` for unit maps (B, C, h, w) of one shape, keys (N, C), and the labelled pixels
    ``valid`` (B, h * w): 0 if there is none. No gradient reaches the teacher."""
    s, t, key = student.flatten(2), teacher.detach().flatten(2), keys.detach().T.unsqueeze(0)
    pairs = zip(s, t, strict=True)
    kl = torch.stack([relation_kl(*pair, key, key, temperature, kd_temperature) for pair in pairs])
    return (kl * valid).sum() / valid.sum().clamp(min=1)


def draw(eligible: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Up to ``most`` random positions of each row of ``eligible`` (..., P): (..., n), and how many count."""
    score = torch.rand(eligible.shape, device=eligible.device).masked_fill(~eligible, -1.0)
    count = eligible.sum(dim=-1)
    return score.topk(min(most, eligible.shape[-1]), dim=-1).indices, count.clamp(max=most)


def enqueue(queue: Tensor, pointer: Tensor, entries: Tensor, count: Tensor, ring: bool) -> None:
    """Write the first ``count`` (B, K) of the entries (B, K, n, C) into the queues (K, S, C), image by image,
    and move the pointers (K,). Not ``ring``: what would reach the end overwrites the last ones instead."""
    step = torch.arange(entries.shape[2], device=queue.device)
    row = torch.arange(len(queue), device=queue.device).unsqueeze(1)
    for new, n in zip(entries, count, strict=True):
        start = pointer if ring else torch.where(pointer + n >= queue.shape[1], queue.shape[1] - n, pointer)
        slot = (start.unsqueeze(1) + step) % queue.shape[1]
        queue[row, slot] = torch.where((step < n.unsqueeze(1)).unsqueeze(2), new, queue[row, slot])
        pointer.copy_((start + n) % queue.shape[1])


class Method(Distiller):
    """CIRKD on the map before the classifier (``fusion``) and, for KD, the logits."""

    class Config(MethodConfig):
        weight_kd: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_batch: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_pixel: Annotated[float, Field(ge=0), Search(0.01, 1.0)]
        weight_region: Annotated[float, Field(ge=0), Search(0.01, 1.0)]
        temperature: float = Field(gt=0)  # of similarities
        kd_temperature: float = Field(gt=0)
        pool: int = Field(ge=1)
        pixel_queue: int = Field(ge=1)  # slots a class
        region_queue: int = Field(ge=1)
        pixel_keys: int = Field(ge=1)  # drawn at a step, over all classes: 1 + this // classes for each
        region_keys: int = Field(ge=1)
        pixels_per_class: int = Field(ge=1)  # that an image adds to the queue
        pixels: Literal["own", "authors"]

    config: Config
    pixel_queue: Tensor
    pixel_pointer: Tensor
    region_queue: Tensor
    region_pointer: Tensor

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        memory = config.weight_pixel or config.weight_region
        fusion = ("fusion",) if memory or config.weight_batch else ()
        self.student_taps = self.teacher_taps = fusion + (("logits",) if config.weight_kd else ())
        width, wanted = student_shapes["fusion"][0], teacher_shapes["fusion"][0]
        sizes = {"pixel": config.pixel_queue, "region": config.region_queue} if memory else {}
        for name, size in sizes.items():
            queue = F.normalize(torch.randn(student_shapes["logits"][0], size, wanted), dim=2)
            self.register_buffer(f"{name}_queue", queue)
            self.register_buffer(f"{name}_pointer", torch.zeros(len(queue), dtype=torch.long))
        if memory:
            layers = [nn.Conv2d(width, wanted, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Conv2d(wanted, wanted, 1, bias=False))

    @torch.no_grad()
    def remember(self, teacher: Tensor, labels: Tensor, positions: Tensor | None = None) -> None:
        """Add a step's features to the queues: unit maps (B, C, h, w), labels (B, h, w). ``positions`` (B,
        classes, n): of the pixels, instead of drawing them."""
        pixels = teacher.flatten(2).transpose(1, 2)  # (B, P, C)
        member = one_hot(labels, len(self.pixel_queue))
        count = member.sum(dim=2).long()
        mean = member @ pixels / count.clamp(min=1).unsqueeze(2)
        present = count.clamp(max=1)
        enqueue(self.region_queue, self.region_pointer, direction(mean, dim=2).unsqueeze(2), present, True)
        own = self.config.pixels == "own"
        eligible = torch.arange(member.shape[2], device=count.device) < count.unsqueeze(2)
        drawn, most = draw(
            member > 0 if own else eligible, min(self.config.pixels_per_class, self.pixel_queue.shape[1])
        )
        image = torch.arange(len(pixels), device=count.device).view(-1, 1, 1)
        entries = pixels[image, drawn if positions is None else positions]
        enqueue(self.pixel_queue, self.pixel_pointer, entries, most, ring=own)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_kd:
            kl = pixel_kl(
                *same_size(student["logits"].float(), teacher["logits"].float()), config.kd_temperature
            )
            terms["kd"] = config.weight_kd * kl.mean()
        if "fusion" not in self.student_taps:
            return terms
        ours, theirs = same_size(student["fusion"].float(), teacher["fusion"].detach().float())
        if config.weight_batch:
            terms["batch"] = config.weight_batch * batch_loss(ours, theirs, config.temperature, config.pool)
        if not (config.weight_pixel or config.weight_region):
            return terms
        labels, theirs = labels_at(batch.labels, ours.shape[-2:]), direction(theirs)
        self.remember(theirs, labels)
        projected, valid = direction(self.head(ours)), (labels != batch.ignore_index).flatten(1)
        for name, weight, queue, keys in (
            ("pixel", config.weight_pixel, self.pixel_queue, config.pixel_keys),
            ("region", config.weight_region, self.region_queue, config.region_keys),
        ):
            if weight:
                slots = torch.randperm(queue.shape[1], device=queue.device)[: keys // len(queue) + 1]
                key = queue[:, slots].flatten(0, 1)
                loss = memory_loss(projected, theirs, key, valid, config.temperature, config.kd_temperature)
                terms[name] = weight * loss
        return terms
