"""The student as it is deployed: its weights alone, as ONNX and as a ``torch.export`` program.

Both take normalised images (B, 3, H, W) float32, any B, the one size (H, W) that they were exported for, and
give logits (B, classes, H, W). No teacher, adapter or auxiliary head is in them.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import ConfigError, Network, explain
from pipelines.datasets.folder import Split, Stream
from pipelines.datasets.transforms import normalise
from pipelines.engine.teacher import load_state
from pipelines.networks import SegmentationNetwork, file_sha256, read_state, taps_of, upsample

ONNX, PROGRAM = "student.onnx", "student.pt2"
IMAGES, LOGITS = "images", "logits"  # the names of input and output
TOLERANCE = 1e-4  # of the logits' scale, their largest absolute value: how far apart two runtimes may be
CHECKED = 4  # test images on which they are compared
WARM_UP, ROUNDS, FEWEST_ROUNDS = 3, 40, 10  # inferences of each student
SECONDS = 900  # that the rounds take at most, unless the fewest take longer


class Deployed(nn.Module):
    """The deployed part of a network: ``images`` (B, 3, H, W) normalised → logits (B, classes, H, W)."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = network.encoder, network.decoder, network.head
        self.multiple = network.multiple
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return upsample(taps_of(self, images)["logits"], images.shape[-2:])


def check_file(run: Mapping[str, Any], weights: Path) -> None:
    """:class:`ConfigError` unless ``weights`` is exactly the file that a record tells of; ``run`` is the
    content of its run.json."""
    if not weights.is_file():
        raise ConfigError(f"There is no file {weights}: run `make repro`, which trains it.")
    if (found := file_sha256(weights)) != run["weights_sha256"]:
        raise ConfigError(
            f"{weights} is truncated or altered: its sha256 is {found[:12]}…, run.json says "
            f"{run['weights_sha256'][:12]}…. Delete it and run `make repro`."
        )


def load(run: Mapping[str, Any], weights: Path) -> SegmentationNetwork:
    """The network of a record with its weights, in eval mode on the CPU; a teacher's file has its auxiliary
    head too.

    ``run`` is the content of run.json. :class:`ConfigError` unless ``weights`` is exactly the file that it
    tells of.
    """
    check_file(run, weights)
    state = read_state(weights)
    try:  # the file has all weights: those of ImageNet, where the training began, are not needed
        network = SegmentationNetwork(
            Network.model_validate({**run["config"]["network"], "weights": None}),
            len(run["classes"]),
            auxiliary=any(name.startswith("auxiliary.") for name in state),
        )
    except ValidationError as error:
        said = explain("config.network", error, "run.json")
        raise ConfigError(f"run.json beside {weights} describes no known network. {said}") from None
    load_state(network, network.state_dict(), state, str(weights), "Train the cell again.")
    return network.eval()


def export(deployed: Deployed, size: tuple[int, int], folder: Path) -> None:
    """Write ``folder/student.onnx`` and ``folder/student.pt2`` for images of ``size`` (H, W)."""
    batch = {IMAGES: {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of both exporters, about their own parts
        program = torch.export.export(deployed, (torch.zeros(2, 3, *size),), dynamic_shapes=batch)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        exported = torch.onnx.export(
            program, dynamo=True, input_names=[IMAGES], output_names=[LOGITS], verbose=False
        )
        assert exported is not None  # as no file was named
        for node in exported.model.graph:
            node.metadata_props.clear()
        exported.save(folder / ONNX)
        torch.export.save(program, folder / PROGRAM)


def session(file: Path, threads: int) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def program(file: Path) -> nn.Module:
    """The module of a ``torch.export`` program."""
    return torch.export.load(file).module()


def graph_sha256(file: Path) -> str:
    """The sum of an ONNX file without the values of its weights: what it computes, and what that costs."""
    import onnx

    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims):
            tensor.ClearField("raw_data")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def tensors_sha256(weights: Path) -> str:
    """The sum of the names, shapes and types of the tensors of a file: what network it is of."""
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as file:
        names = sorted(file.keys())
        found = [[name, file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()] for name in names]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def count(module: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Parameters, and FLOPs (2 per multiply-add) of one image of ``size``, of an exported program."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, *size))
    parameters = sum(p.numel() for p in module.parameters())
    return {"parameters": parameters, "flops": int(counter.get_total_flops())}


@torch.no_grad()
def differences(deployed: Deployed, folder: Path, images: Tensor, threads: int) -> dict[str, float]:
    """How far the files of :func:`export` are from the network on ``images`` (N, 3, H, W), normalised.

    ``scale``: the largest absolute logit of the network; ``torch.export``, ``onnxruntime``: the largest
    absolute difference to it, over all images, classes and pixels. ConfigError above TOLERANCE × scale.
    """
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.export": program(folder / PROGRAM),
        "onnxruntime": _by_onnx(session(folder / ONNX, threads)),
    }
    found = dict.fromkeys(("scale", *runs), 0.0)
    for index in range(len(images)):
        image = images[index : index + 1]
        wanted = deployed(image)
        apart = {name: run(image) - wanted for name, run in runs.items()}
        for name, values in {"scale": wanted, **apart}.items():
            found[name] = float(np.maximum(found[name], values.abs().max()))  # NaN stays NaN
    for name in runs:
        if not found[name] <= TOLERANCE * found["scale"]:  # nor if NaN
            raise ConfigError(
                f"The student as run by {name} differs from the trained one: logits by up to "
                f"{found[name]:.3g}, more than {TOLERANCE:g} of their scale ({found['scale']:.3g}). Do not "
                "deploy it; try another version of torch, onnx or onnxruntime."
            )
    return found


def samples(split: Split | Stream, size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """Names of at most CHECKED images, evenly spaced over a split, and the images (N, 3, H, W) normalised,
    those of another size resized."""
    total = len(split.names)
    chosen = sorted({index * total // CHECKED for index in range(CHECKED)})
    images = []
    for index in chosen:
        pixels = split.images[index] if isinstance(split, Split) else split.read(index)[0]
        image = normalise(pixels[None])
        images.append(image if tuple(image.shape[-2:]) == size else upsample(image, size))
    return [split.names[index] for index in chosen], torch.cat(images)


def latencies(
    students: Mapping[str, tuple[Deployed, Path]], image: Tensor, threads: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of one inference of ``image`` (1, 3, H, W) on the CPU, per student, runtime and round.

    A round runs every student once with either runtime, in an order of its own, so that whatever else slows
    the machine down for a while slows all of them.
    """
    pixels = image.contiguous(memory_format=torch.channels_last)
    array = image.numpy()
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (deployed, folder) in students.items():
        own = session(folder / ONNX, threads)
        deployed.to(memory_format=torch.channels_last)
        runs[name, "onnxruntime"] = partial(own.run, None, {IMAGES: array})
        runs[name, "torch"] = partial(deployed, pixels)
    found: dict[str, dict[str, list[float]]] = {name: {"onnxruntime": [], "torch": []} for name in students}
    with torch.inference_mode():
        for _ in range(WARM_UP):
            start = time.perf_counter()
            for run in runs.values():
                run()
            once = time.perf_counter() - start
        rounds = int(np.clip(SECONDS / once, FEWEST_ROUNDS, ROUNDS))
        for number in range(rounds):
            for name, runtime in random.Random(number).sample(sorted(runs), len(runs)):
                start = time.perf_counter()
                runs[name, runtime]()
                found[name][runtime].append(round(1000 * (time.perf_counter() - start), 4))
    return found


def _by_onnx(own: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.from_numpy(own.run(None, {IMAGES: images.numpy()})[0])
