"""The peak of a stage is that stage's own."""

from __future__ import annotations

import numpy as np
import pytest
from tightfit.runtime.memory import shown
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


def test_shown():
    assert [shown(n) for n in (1536, 5 * 2**20, 212 * 2**20, 3.65 * 2**30)] == ["1536 bytes", "5.0 MiB", "212 MiB", "3.65 GiB"]
