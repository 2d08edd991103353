"""Encoder weights from the wheels of packages: fetched by pip, renamed as timm names them.

Nothing of a wheel is installed, imported or executed. There is no list of renames: both sides hold the same
layers in the same order, which is checked as far as names and shapes tell; that the result is the file that
was tested says its sum in params.yaml.
"""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipelines import files
from pipelines.config import ConfigError, Wheel
from pipelines.datasets import archives

COUNTS = ".num_batches_tracked"  # which some files have and nothing here reads


def make(wheel: Wheel, target: Path, digest: str) -> None:
    """Write the weights in a wheel to ``target`` (safetensors), with timm's names.

    The wheel is taken from where it was put by hand, or else fetched by pip. ``digest`` is the sha256 of the
    result or how it begins. :class:`ConfigError` when the wheel cannot be had, or is not what it should be.
    """
    import timm
    from safetensors.torch import save

    with tempfile.TemporaryDirectory() as folder:
        path = _by_hand(wheel) or _by_pip(wheel, Path(folder))
        if (found := files.sha256(path.read_bytes())) != wheel.sha256:
            raise ConfigError(
                f"{path} has the sha256 {found} instead of {wheel.sha256}: it is damaged or another version; "
                f"put the right file in its place, or remove it and run the same command again."
            )
        state = _read(wheel, archives.read(archives.Zip(path), wheel.member))
    try:
        model = timm.create_model(wheel.timm, pretrained=False)
    except RuntimeError as error:
        raise ConfigError(
            f"timm has no network '{wheel.timm}' ({' '.join(str(error).split())[:200]}): correct `timm` of "
            f"the weights {target.name} in params.yaml."
        ) from None
    try:
        named = renamed(state, model.state_dict(), f"{model.default_cfg['classifier']}.")
    except ValueError as error:
        raise ConfigError(f"{wheel.member} of {wheel.package} is no {wheel.timm} of timm: {error}.") from None
    content = save(named)
    if not (found := files.sha256(content)).startswith(digest):
        raise ConfigError(
            f"The weights of {wheel.package} became a file with sha256 {found}, params.yaml says {digest}: "
            f"another version of timm or safetensors names or writes them in another way; install those of "
            f"requirements.lock, or correct the checksum if you trust this file."
        )
    files.write_bytes(target, content)


def renamed(state: Mapping[str, Tensor], network: Mapping[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """``state`` under the names of ``network``, tensor by tensor in their order; counts of batches are
    dropped.

    ValueError unless there are as many tensors, or all but those of the ``classifier`` (the prefix of their
    names), each of the same shape, type and kind (the last part of its name: weight, bias, running_mean, …)
    as the one at its place, and numbered layers follow their numbers.
    """
    theirs = [name for name in state if not name.endswith(COUNTS)]
    ours = [name for name in network if not name.endswith(COUNTS)]
    body = [name for name in ours if not name.startswith(classifier)]
    if len(theirs) not in (len(ours), len(body)):
        raise ValueError(f"it has {len(theirs)} tensors, not {len(ours)}, nor {len(body)} without classifier")
    if len(theirs) == len(body):
        ours = body
    for name, wanted in zip(theirs, ours, strict=True):
        found, here = state[name], network[wanted]
        if found.shape != here.shape or found.dtype != here.dtype:
            raise ValueError(
                f"{name} ({_form(found)}) stands where {wanted} ({_form(here)}) should, so the order or the "
                f"network is another"
            )
        if name.rpartition(".")[2] != wanted.rpartition(".")[2]:
            raise ValueError(f"{name} stands where {wanted} should, so the order is another")
    if (place := _counts_down(theirs)) is not None:
        raise ValueError(f"{place[1]} follows {place[0]}, so the order is another")
    return {
        wanted: state[name].clone(memory_format=torch.contiguous_format)
        for name, wanted in zip(theirs, ours, strict=True)
    }


def _counts_down(names: Sequence[str]) -> tuple[str, str] | None:
    """The first name, with the one before it, that has a smaller number where the two first differ."""
    for before, name in itertools.pairwise(names):
        pairs = zip(before.split("."), name.split("."), strict=False)
        first, second = next(((a, b) for a, b in pairs if a != b), ("", ""))
        if first.isdecimal() and second.isdecimal() and int(first) > int(second):
            return before, name
    return None


def _form(tensor: Tensor) -> str:
    return f"{'×'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def _read(wheel: Wheel, content: bytes) -> dict[str, Tensor]:
    """The tensors of a file of torch; nothing in it is ever executed."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles and archives raise whatever they like
        raise ConfigError(
            f"{wheel.member} of {wheel.package} cannot be read ({type(error).__name__}): it is damaged, or "
            f"holds more than tensors."
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ConfigError(f"{wheel.member} of {wheel.package} holds something else than named tensors.")
    return dict(state)


def _by_hand(wheel: Wheel) -> Path | None:
    """The wheel in a folder ``weights`` of ``ACFD_MIRROR`` or ``downloads/``, or in these themselves."""
    pattern = f"{re.sub(r'[-_.]+', '_', wheel.package)}-{wheel.version}-*.whl"
    places = archives.places(archives.mirror(), None, "weights")
    return next((file for place in places for file in sorted(place.glob(pattern))), None)


def _by_pip(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel alone, by its hash, from where the user's pip gets its packages."""
    wanted = f"{wheel.package}=={wheel.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["-r", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    problem = errors[-1].rstrip(".")[:200] if errors else "no reason given"
    raise ConfigError(
        f"pip could not fetch {wanted} with sha256 {wheel.sha256} ({problem}): check the network and the "
        f"settings of pip and run the same command again, or put the wheel into {archives.DOWNLOADS} or the "
        f"folder that ACFD_MIRROR names by hand."
    )
