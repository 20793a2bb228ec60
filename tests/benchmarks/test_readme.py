"""The README says what the results say."""

from __future__ import annotations

import pytest
from tightfit.benchmarks import readme


def test_tables_are_not_stale():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    if readme.replaced(text) != text:
        pytest.fail("README.md is stale: run python -m tightfit.benchmarks.readme")


def test_what_was_lost_stays(tmp_path, monkeypatch):
    """A plan that ran out of memory, and a contender that failed, are rows."""
    request = {"width": 512, "height": 512, "steps": 4}
    row = {"summary": "torch fp32", "outcome": "out of memory", "model": "m", "command": "tightfit bench", "request": request}
    assert "| torch fp32 | out of memory |" in readme.of_model([row])
    rows = {"diffusers bf16": {"peak_bytes": 4, "step_seconds": 2.0, "seconds": 9.0}, "sd.cpp f16": {"failed": "no"},
            "tightfit": {"peak_bytes": 8, "step_seconds": 1.0, "seconds": 9.0}}  # fmt: skip
    found = {"rows": rows, "model": "sd15", "size": 512, "steps": 4, "rounds": 2}
    monkeypatch.setattr(readme, "whole_peers", lambda: found)
    assert "| sd.cpp f16 | failed: no |" in readme.peers()
    assert "| **tightfit** | 8 bytes, 2.00 | 1.00 s, 0.50 | 9.0 s |" in readme.peers()
