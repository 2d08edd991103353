"""The networks of the paper's scale: widths and strides of the taps, training and evaluation, bf16."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from suites import slow
from torch import nn

from pipelines.config import ConfigError, Network
from pipelines.networks import SegmentationNetwork, flops, tap_shapes, upsample

CLASSES, SIZE = 19, (64, 128)
RESNET, BASIC = (256, 512, 1024, 2048), (64, 128, 256, 512)
DILATED, PYRAMID = (4, 8, 8, 8), (4, 8, 16, 32)
# architecture, encoder, output stride; widths and strides of the backbone's stages; width and stride of the
# fusion map: He (2016), Sandler (2018), Zhao (2017), Chen (2017), Xie (2021), Kirillov (2019), Liu (2020)
NETWORKS = {
    "pspnet-resnet101": ("PSPNet", "tu-resnet101", 8, RESNET, DILATED, 512, 8),
    "deeplabv3-resnet101": ("DeepLabV3", "tu-resnet101", 8, RESNET, DILATED, 256, 8),
    "segformer-b2": ("Segformer", "mit_b2", 32, (64, 128, 320, 512), PYRAMID, 768, 4),
    "segformer-b4": ("Segformer", "mit_b4", 32, (64, 128, 320, 512), PYRAMID, 768, 4),
    "pspnet-resnet18": ("PSPNet", "tu-resnet18", 8, BASIC, DILATED, 512, 8),
    "pspnet-mobilenetv2": ("PSPNet", "tu-mobilenetv2_100", 8, (24, 32, 96, 320), DILATED, 512, 8),
    "deeplabv3-resnet18": ("DeepLabV3", "tu-resnet18", 8, BASIC, DILATED, 256, 8),
    "segformer-b0": ("Segformer", "mit_b0", 32, (32, 64, 160, 256), PYRAMID, 256, 4),
    "fpn-efficientnet-lite2": ("FPN", "tu-tf_efficientnet_lite2", 32, (24, 48, 120, 352), PYRAMID, 128, 4),
    "fpn-mobilenetv2": ("FPN", "tu-mobilenetv2_100", 32, (24, 32, 96, 320), PYRAMID, 128, 4),
    "fpn-resnet18": ("FPN", "tu-resnet18", 32, BASIC, PYRAMID, 128, 4),
}

every_network = pytest.mark.parametrize("name", NETWORKS)


@lru_cache(maxsize=1)  # the tests go network by network
def build(name: str) -> SegmentationNetwork:
    torch.set_num_threads(1)
    architecture, encoder, stride = NETWORKS[name][:3]
    torch.manual_seed(0)
    config = Network(architecture=architecture, encoder=encoder, output_stride=stride, weights=None)
    return SegmentationNetwork(config, CLASSES)


@every_network
def test_taps(name: str) -> None:
    architecture, widths, strides, fusion, stride = NETWORKS[name][0], *NETWORKS[name][3:]
    expected = {
        f"backbone.{i}": (width, SIZE[0] // step, SIZE[1] // step)
        for i, (width, step) in enumerate(zip(widths, strides, strict=True), 1)
    }
    expected["fusion"] = (fusion, SIZE[0] // stride, SIZE[1] // stride)
    expected["logits"] = (CLASSES, SIZE[0] // stride, SIZE[1] // stride)
    expected["auxiliary"] = (CLASSES, *expected["backbone.3"][1:])
    assert tap_shapes(build(name), SIZE) == expected
    if architecture == "FPN":  # a side that is no multiple of 32 has the positions that begin inside
        odd = {name: shape[1:] for name, shape in tap_shapes(build(name), (45, 70)).items()}
        assert odd["fusion"] == odd["logits"] == odd["backbone.1"] == (12, 18)
        assert [odd[f"backbone.{i}"] for i in (2, 3, 4)] == [(6, 9), (3, 5), (2, 3)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow if "101" in name or "b4" in name else ()) for name in NETWORKS]
)
def test_modes(name: str) -> None:
    """An auxiliary head on the third stage in training alone, finite bf16, the same answer twice in eval."""
    network, images = build(name), torch.randn(2, 3, 32, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = network.train()(images)
    assert low["auxiliary"].shape == (2, CLASSES, *low["backbone.3"].shape[-2:])
    assert low["logits"].dtype == torch.bfloat16
    assert all(tap.isfinite().all() for tap in low.values())
    with torch.no_grad():
        first, second = network.eval()(images), network(images)
        with torch.autocast("cpu", torch.bfloat16):
            near = network(images)["logits"].float()
    assert "auxiliary" not in first
    assert all(torch.equal(first[tap], second[tap]) for tap in first)
    assert (near - first["logits"]).abs().max() < 0.1 * first["logits"].abs().max()
    assert network.predict(torch.randn(1, 3, 50, 70)).shape == (1, 50, 70)


@pytest.mark.parametrize("architecture", ["Segformer", "DeepLabV3"])
def test_smps_own_encoders_are_not_dilated(architecture: str) -> None:
    """Its dilation would also change the convolutions that reduce the keys of an attention."""
    config = Network(architecture=architecture, encoder="mit_b0", output_stride=8, weights=None)
    with pytest.raises(ConfigError, match=r"'mit_b0' cannot be built right at output stride 8: set .*32"):
        SegmentationNetwork(config, 3)


def fpn(auxiliary: bool = True) -> SegmentationNetwork:
    torch.manual_seed(0)
    config = Network(architecture="FPN", encoder="tu-test_resnet", output_stride=32, weights=None)
    return SegmentationNetwork(config, CLASSES, auxiliary).eval()


def test_padding_is_zeros_below_and_on_the_right_and_leaves_no_trace() -> None:
    """The taps are the first positions of those of an image that was padded before; training is no other."""
    network, images = fpn(), torch.randn(2, 3, 36, 52)
    padded = nn.functional.pad(images, (0, 12, 0, 28))
    with torch.no_grad():
        taps, wanted = network(images, auxiliary=True), network(padded, auxiliary=True)
        for name, tap in taps.items():
            assert torch.equal(tap, wanted[name][..., : tap.shape[-2], : tap.shape[-1]]), name
        assert tuple(taps["logits"].shape[-2:]) == (9, 13)
        assert torch.equal(network.predict(images), upsample(taps["logits"], (36, 52)).argmax(1))
        assert network.train()(images)["logits"].shape == taps["logits"].shape
    whole = images[..., :32, :32]
    assert network.eval()(whole)["logits"].shape[-2:] == (8, 8)
    assert flops(network, (36, 52)) == flops(network, (64, 64))  # what is computed is counted


def test_fusion_is_what_the_head_sees() -> None:
    """In training too, where the decoder drops channels of it, as PSPNet's does."""
    network = fpn(auxiliary=False).train()
    taps = network(torch.randn(4, 3, 64, 64))
    assert "auxiliary" not in taps and network.auxiliary is None
    assert torch.equal(network.head(taps["fusion"]), taps["logits"])
    dropped = (taps["fusion"] == 0).all((2, 3)).float().mean()
    assert 0.1 < dropped < 0.3
    assert not (network.eval()(torch.randn(4, 3, 64, 64))["fusion"] == 0).all((2, 3)).any()


def test_fpn_is_not_dilated() -> None:
    config = Network(architecture="FPN", encoder="tu-resnet18", output_stride=8, weights=None)
    with pytest.raises(ConfigError, match=r"FPN cannot be built at output stride 8, .*: set .*32"):
        SegmentationNetwork(config, 3)
