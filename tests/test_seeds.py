"""Named random streams: stable numbers, and streams that differ whenever their names do."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.seeds import derive, generator

names = st.lists(st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=8)), max_size=4)


def test_numbers_are_pinned():
    """A change of these would silently unpair new cells from old ones."""
    assert derive(0, "order", 0) == 4450048964101087113
    assert derive(7, "augment", 12345) == 8253945729969201345
    assert torch.rand(2, generator=generator(0, "order", 0)).tolist() == [
        0.6915640830993652,
        0.07576996088027954,
    ]


def test_same_in_another_process():
    """Python salts ``hash()`` per process; the streams must not inherit that."""
    code = "from pipelines.engine.seeds import derive; print(derive(3, 'augment', 5))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == derive(3, "augment", 5)


@given(st.integers(0, 2**31), names, st.integers(0, 2**31), names)
def test_streams_differ_exactly_when_their_names_do(seed, one, other_seed, other):
    same = (seed, one) == (other_seed, other)
    assert (derive(seed, *one) == derive(other_seed, *other)) is same
    assert 0 <= derive(seed, *one) < 2**63


def test_names_do_not_run_together():
    assert (
        len({derive(1, "a", 1), derive(1, "a1"), derive(1, "a", "1"), derive(1, "a", 1, 0), derive(11, "a")})
        == 5
    )


def test_generator_ignores_and_leaves_the_global_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(5, generator=generator(4, "x"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(5, generator=generator(4, "x")), first)
    assert not torch.equal(torch.rand(5, generator=generator(4, "y")), first)
