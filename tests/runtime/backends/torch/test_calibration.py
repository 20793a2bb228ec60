"""What calibration divides by."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tightfit.runtime.backends.torch import calibration, dryrun, firsts
from tightfit.runtime.costs.latency import call_seconds, filling_seconds
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.planner.estimate import ESTIMATOR
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request


def test_seconds_of_an_operator_are_those_of_ten_divided(monkeypatch):
    """Two group norms, SiLUs, convolutions, layer norms and linear layers, as a dry run counts them."""
    monkeypatch.setattr(calibration, "_fastest", lambda *_: 5e-4)
    with torch.inference_mode():
        assert calibration.operator_seconds(torch.device("cpu"), torch.float32) == 5e-5


def test_what_makes_a_product_ready_is_what_its_first_call_takes_more(monkeypatch):
    """Convolutions 3 s more and linear layers 1 s, of as many operations each."""
    seconds = iter([*(4.0, 2.0, 1.0, 3.0) * 2, *(2.0, 1.0, 1.0, 1.0) * 2])
    monkeypatch.setattr(firsts, "_seconds", lambda _: next(seconds))
    monkeypatch.setattr(firsts, "_MAPS", ((8, 2),) * 2)
    monkeypatch.setattr(firsts, "_LINEARS", ((36, 8, 16),) * 2)  # 9216, as 9 taps of 2 maps of 2x2 by 8 by 8
    assert firsts.readying(torch.float32) == pytest.approx((3 + 1) / 2 / 9216**0.25)


def test_what_is_measured_of_a_network_is_what_is_predicted_of_it(monkeypatch):
    """Of each kind of weights: loaded, called first, and called again. int4 is int8 in some layers."""
    taken = {"fill": 0.05} | {
        f"{kind}/{what}": base * factor
        for kind, base in (("fp32", 1.0), ("int8", 2.0), ("int4", 4.0))
        for what, factor in (("load", 0.2), ("call", 0.3), ("count", 0.1))
    }
    monkeypatch.setattr(firsts, "_turn", lambda _: taken)
    moves = {"fresh": math.inf, "int8/quantise": 1e9, "int4/quantise": 1e8}
    rates, ready = {"fp32": 1e12, "unpack": 1e9, "unpack4": 1e9}, {"fp32/first": 0.0}
    cpu = Hardware("cpu", "CPU", 2**34, 2**34, ("fp32",), rates=rates, starts=ready, moves=moves)
    cpu = replace(cpu, starts=ready | firsts.network_starts(cpu))
    spec, component, extent = firsts.network()
    estimate = ESTIMATOR.estimate(cpu, Request("a", None, 64, 64, 1).resolve(spec), Wishes())
    for kind, way in firsts._ways(cpu).items():
        own = dryrun.footprint(spec, component, way, cpu, extent)
        assert call_seconds(cpu, way, own) == pytest.approx(taken[f"{kind}/call"])
        filling = filling_seconds(cpu, way, own, len(component.tensors), component.is_ordered(way))
        loading = filling + estimate._quantising_seconds(component, way)
        trace = own.trace
        counting = len(trace.operations) * cpu.starts["count"] + trace.unpacks * cpu.starts["unpack/count"]
        assert loading - counting == pytest.approx(taken[f"{kind}/load"])
        if kind != "int4":
            assert counting == pytest.approx(taken[f"{kind}/count"])
