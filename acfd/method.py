"""ACFD: the teacher's channels rebuilt in the backbone, correlated in the fusion, located in the logits.

Source: "Adaptive channel-wise feature distillation in semantic segmentation" (Journal of Jiangsu University,
Natural Science Edition, 46, no. 5, 2025, doi 10.3969/j.issn.1671-7775.2025.05.009). Only its abstract is
public: acfd/README.md says what is stated, inferred and chosen, acfd/losses.py has the losses. With s_c and
t_c = channel c of the student's and the teacher's map, over the positions:

    L     = weight_afd * L_AFD + weight_ccd * L_CCD + weight_csd * L_CSD
    L_AFD = mean over stages, images and the teacher's channels of w_c |r_c / |r_c| - t_c / |t_c||²,
            r_c = the student's channels of that backbone stage, weighted by the attention of t_c
    L_CCD = mean over images and pairs of channels of the fusion layer of (G_s - G_t)²,
            G = Pearson correlation of the two channels over positions
    L_CSD = tau² * mean over images and classes of v_c KL(p_t || p_s),
            p = softmax over positions of the logits of class c / tau

w_c is small for a hub, a channel that others resemble more than they resemble each other; v_c is the
teacher's peak probability of class c; both have mean 1.

A component with weight 0 is not computed, its taps are not asked for and its adapters are not built. All
adapters are for training only.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from acfd.losses import (
    adaptive_feature_loss,
    channel_correlation_loss,
    channel_significance_loss,
    peak_class_weights,
)
from pipelines.method import Batch, Distiller, MethodConfig, Search, Shapes, Taps


class AttentionBias(nn.Module):
    """The learned part of AFD's cross-attention, Q(D_t) K(D_s)^T / sqrt(d).

    Descriptors (B, Ct, g) and (B, Cs, g) to (B, Ct, Cs). K starts at zero, so that training starts from plain
    similarity; Q then receives its first non-zero gradient in the second step.
    """

    def __init__(self, cells: int, dimension: int) -> None:
        super().__init__()
        self.query = nn.Linear(cells, dimension, bias=False)
        self.key = nn.Linear(cells, dimension, bias=False)
        nn.init.zeros_(self.key.weight)

    def forward(self, teacher_descriptors: Tensor, student_descriptors: Tensor) -> Tensor:
        query, key = self.query(teacher_descriptors), self.key(student_descriptors)
        return query @ key.transpose(1, 2) / query.shape[-1] ** 0.5


class Method(Distiller):
    """ACFD and, by weights of 0, every variant of its ablation."""

    class Config(MethodConfig):
        weight_afd: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        weight_ccd: Annotated[float, Field(ge=0), Search(1.0, 100.0)]
        weight_csd: Annotated[float, Field(ge=0), Search(0.1, 10.0)]
        stages: list[Annotated[int, Field(ge=1, le=4)]] = Field(min_length=1)  # of the backbone, for AFD
        grid: int = Field(ge=1)  # cells per side of AFD's channel descriptors
        dimension: int = Field(ge=1)  # of AFD's learned queries and keys
        attention_tau: float = Field(gt=0)
        alignment: Literal["attention", "conv1x1"]
        redundancy_weighting: bool | Literal["votes"]  # true: by column mass
        csd_tau: float = Field(gt=0)
        class_weighting: Literal["peak", "uniform"]

        @field_validator("stages")
        @classmethod
        def _unique(cls, stages: list[int]) -> list[int]:
            if len(set(stages)) < len(stages):
                raise ValueError("each stage may be named once")
            return stages

        @model_validator(mode="after")
        def _something_to_do(self) -> Self:
            if not (self.weight_afd or self.weight_ccd or self.weight_csd):
                raise ValueError("at least one of weight_afd, weight_ccd, weight_csd must be above 0")
            return self

    config: Config

    def __init__(self, config: Config, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        super().__init__(config, student_shapes, teacher_shapes)
        self.stages = tuple(f"backbone.{stage}" for stage in config.stages) if config.weight_afd else ()
        fusion = ("fusion",) if config.weight_ccd else ()
        logits = ("logits",) if config.weight_csd else ()
        self.student_taps = self.teacher_taps = self.stages + fusion + logits
        self.aligners = nn.ModuleList()
        for tap in self.stages:
            (width, *size), (wanted, *teacher_size) = student_shapes[tap], teacher_shapes[tap]
            if config.alignment == "conv1x1":
                self.aligners.append(nn.Conv2d(width, wanted, 1))
            else:
                rows, columns = (min(config.grid, *sides) for sides in zip(size, teacher_size, strict=True))
                self.aligners.append(AttentionBias(rows * columns, config.dimension))
        self.fusion_adapter: nn.Module = nn.Identity()
        if fusion and (width := student_shapes["fusion"][0]) != (wanted := teacher_shapes["fusion"][0]):
            # no bias: correlation does not see a shift, so that a bias would never get a gradient
            self.fusion_adapter = nn.Conv2d(width, wanted, 1, bias=False)

    def losses(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.weight_afd:
            stages = [
                self._afd(aligner, student[tap], teacher[tap])
                for tap, aligner in zip(self.stages, self.aligners, strict=True)
            ]
            terms["afd"] = config.weight_afd * torch.stack(stages).mean()
        if config.weight_ccd:
            ccd = channel_correlation_loss(self.fusion_adapter(student["fusion"]), teacher["fusion"])
            terms["ccd"] = config.weight_ccd * ccd
        if config.weight_csd:
            weights = peak_class_weights(teacher["logits"]) if config.class_weighting == "peak" else None
            csd = channel_significance_loss(student["logits"], teacher["logits"], config.csd_tau, weights)
            terms["csd"] = config.weight_csd * csd
        return terms

    def _afd(self, aligner: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        """AFD of one stage, with the learned part of the configured alignment."""
        config = self.config
        convolution = config.alignment == "conv1x1"
        return adaptive_feature_loss(
            student,
            teacher,
            config.grid,
            config.attention_tau,
            attention_bias=None if convolution else aligner,
            redundancy_weighting=config.redundancy_weighting,
            projection=aligner if convolution else None,
        )
