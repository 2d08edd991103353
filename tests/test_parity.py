"""Every method against values and gradients that its authors' own code gave (``tests/parity/*.npz``).

``ACFD_PARITY=<folder>`` takes the files of that folder instead. A file without a module in ``parity_cases/``,
and a loss or gradient that the module does not compute, is a failure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("ACFD_PARITY") or Path(__file__).parent / "parity")
VALUE, GRADIENT = 2e-5, 1e-4  # relative to the largest entry
RESULTS = ("loss", "grad", "after/", "out/")  # what begins with these has to be computed


def stored() -> Iterator[tuple[str, str]]:
    """The methods and cases in the folder."""
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path) as file:
            yield from ((path.stem, case) for case in dict.fromkeys(key.split("/")[0] for key in file))


def distance(computed: Tensor, expected: np.ndarray) -> float:
    """The largest difference relative to the largest entry; NaN counts as infinite."""
    ours, theirs = computed.detach().double().numpy(), expected.astype(np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} instead of {theirs.shape}"
    largest = np.abs(theirs).max(initial=0.0)
    return float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max(initial=0.0) / (largest or 1.0))


def test_there_are_cases() -> None:
    assert list(stored()), f"{FOLDER} has no fixtures"


@pytest.mark.parametrize(("method", "case"), stored())
def test_a_method_is_its_authors(method: str, case: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with np.load(FOLDER / f"{method}.npz") as file:
        data = {key.split("/", 1)[1]: file[key] for key in file if key.split("/")[0] == case}
    compared = set()
    for key, computed, expected in importlib.import_module(f"parity_cases.{method}").compare(case, data):
        assert key in data and np.array_equal(expected, data[key]), f"{key} is not a value of the file"
        if np.issubdtype(expected.dtype, np.integer):
            assert torch.equal(computed.long(), torch.from_numpy(expected.astype(np.int64))), key
        else:
            far = distance(computed, expected)
            assert far <= (GRADIENT if key.startswith("grad") else VALUE), f"{key} is {far:.1e} off"
        compared.add(key)
    missed = {key for key in data if key.startswith(RESULTS)} - compared
    assert not missed, f"not compared: {sorted(missed)}"
    assert compared, "nothing was compared"
