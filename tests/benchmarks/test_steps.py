"""Calls in turns: which count, and how they are compared."""

from __future__ import annotations

import argparse
import json

import pytest
from tightfit.benchmarks import readme, steps


def test_a_call_is_compared_with_those_around_it():
    """A host that becomes twice as slow between two calls changes no ratio much."""
    first = {"seconds": [1.0, 1.0, 4.0, 4.0], "others": [0.0] * 4}
    assert steps.beside({"seconds": [0.5, 1.0, 2.0], "others": [0.0] * 3}, first) == [0.5, 0.5, 0.5]


def test_rounds_that_others_disturbed_are_left_out():
    first = {"seconds": [1.0] * 6, "others": [0.0, 0.0, 0.2, 0.0, 0.0, 0.0]}
    row = {"seconds": [1.0, 9.0, 9.0, 1.1, 1.2], "others": [0.0] * 5}
    assert steps.beside(row, first) == [1.0, 1.1, 1.2]
    row["others"][0] = 0.3
    assert steps.beside(row, first) == [1.0, 9.0, 9.0, 1.1, 1.2]  # too few are left


def test_what_is_no_contender_is_refused():
    for text, said in {
        "emoji:bf16:openvin": "unknown program 'openvin': choose torch, onnx, openvino",
        "emoji:bf99": "unknown precision 'bf99': choose fp32, bf16",
        "emoji::diffusers": "unknown precision '': choose fp32, bf16$",
        "nosuch:fp32": "nosuch",
        "emoji:fp32:converted": "emoji has no unet.xml",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            steps.contender(text)


def test_lost_turns_stay_in_the_table(tmp_path, monkeypatch):
    def line(**ratios: list[float]) -> str:
        rows = {name: {"seconds": [2.0, 3.0], "ratios": of} for name, of in ratios.items()}
        run = {"first": "OpenVINO", "size": 512, "isa": "", "rows": {"OpenVINO": {"seconds": [1.0]}} | rows}
        return json.dumps({"hardware": {"name": readme.MACHINE}, "results": run}) + "\n"

    lines = line(lost=[1.0, 1.2, 1.6], won=[0.5]), line(won=[0.8, 0.9, 1.0])
    (tmp_path / "steps.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    *_, won, lost = readme.in_turns().strip().splitlines()
    assert won == "| won | 0.90, 0.85 to 0.95 | 3 | 2.00 s |"  # the newer run's
    assert lost == "| lost | 1.20, 1.10 to 1.40 | 3 | 2.00 s |"
