"""The peak of a stage is that stage's own."""

from __future__ import annotations

import numpy as np
import pytest
from tightfit.runtime.memory import END, Footprint, Trace, peak, shown
from tightfit.runtime.process import ProcessPeak


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


def test_shown():
    assert [shown(n) for n in (1536, 5 * 2**20, 212 * 2**20, 3.65 * 2**30)] == ["1536 bytes", "5.0 MiB", "212 MiB", "3.65 GiB"]
