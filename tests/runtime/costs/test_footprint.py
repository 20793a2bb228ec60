"""The peak of a stage is that stage's own."""

from __future__ import annotations

import numpy as np
import pytest
from tightfit.runtime.costs.footprint import ATTENTION, END, Footprint, Trace, peak
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.process import ProcessPeak
from tightfit.runtime.units import parse_bytes, shown


def test_peak_sees_an_allocation_and_forgets_it():
    peak = ProcessPeak()
    if not peak.resets:
        pytest.skip("this system cannot reset the peak")
    before = peak.bytes()
    block = np.ones(200 * 2**20, np.uint8)
    assert peak.bytes() - before > 190 * 2**20
    del block
    peak.reset()
    assert peak.bytes() - before < 100 * 2**20


def test_what_is_loaded_later_is_not_beside_the_loading():
    """By hand: 1 held, 2 own, 8 while loading; then 4 that came later, and 3 to run."""
    own = Footprint((2,), 8, Trace(((1, 3), (1, END)), (), ()), (), 0)
    assert peak("cpu", (1,), own, (4,)) == 1 + 2 + 8
    assert peak("cpu", (1,), own, (6,)) == 1 + 2 + 6 + 3
    assert peak("cpu", (1, 4), own) == 1 + 4 + 2 + 8


def test_a_trace_is_shared_by_ways_of_attention():
    trace = Trace(((1, 3), (0, ATTENTION), (1, END)), ((1, 1, 1, 1, 1),), ())
    ways = (Footprint((2,), 0, trace, (scratch,)) for scratch in (5, 9, 5))
    assert [peak("cpu", (1,), way) for way in ways] == [1 + 2 + 3 + scratch for scratch in (5, 9, 5)]


def test_a_bare_number_is_bytes_and_not_a_few():
    for few, meant in (("8", "8GiB"), ("3.5", "3.5GiB"), (8, "8GiB"), ("4000", "4000MiB"), ("0.5", "0.5GiB")):
        with pytest.raises(TightfitError, match=f"did you mean {meant}"):
            parse_bytes(few, "--vram")
    assert parse_bytes("8GiB", "--vram") == 8 * 2**30
    assert parse_bytes("8 b", "--vram") == 8
    assert parse_bytes(2**20, "budget") == parse_bytes("1048576", "--ram") == 2**20
    with pytest.raises(TightfitError, match="must be an amount"):
        parse_bytes("0", "--vram")


def test_shown():
    assert [shown(n) for n in (1536, 5 * 2**20, 212 * 2**20, 3.65 * 2**30)] == [
        "1536 bytes",
        "5.0 MiB",
        "212 MiB",
        "3.65 GiB",
    ]
