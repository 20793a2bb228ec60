"""Repeated blocks, compiled: each kind once, with the answers and within the bytes of the same as they are;
in plans where it is asked for, refused where it cannot run."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tightfit.runtime.backends.torch import compiled
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.backends.torch.meter import CountingMeter
from tightfit.runtime.costs.latency import compiling_seconds
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.machine.remembered import TORCH, Said
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.planner.choose import plan
from tightfit.runtime.planner.plan import Plan
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request
from torch import _dynamo, nn

REQUEST = Request("a red heart", num_inference_steps=4, width=64, height=64)
ONE_WAY: dict[str, Any] = {
    "precision": "fp32",
    "residency": "resident",
    "attention": "sdpa",
    "tiling": "whole",
}


class OwnTransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.narrow(nn.functional.silu(self.wide(x)).sin())


class Net(nn.Module):
    """Three blocks that are alike, the last with another input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OwnTransformerBlock(64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](x))[:, :8])


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="without a compiler of C++")
def test_kinds_are_compiled_once_and_answer_alike(allocated):
    """By torch's compiler. The first call runs as it is, and is counted; compiled ones take no more."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    module, x = Net().eval().requires_grad_(False), torch.randn(2, 64, 64)
    with torch.inference_mode(), compiled.kinds_counted(module) as kinds:
        right = module.double()(x.double()).float()
    module.float()
    meter = CountingMeter("cpu")
    session = TorchSession(
        module, lambda module, sample: (module(sample),), torch.float32, torch.device("cpu"), meter
    )
    session.compile()
    counters.clear()
    first = session(sample=x.numpy())[0]
    assert not counters["stats"]["unique_graphs"]
    counted = meter.bytes() - compiled.COMPILER_BYTES
    second = session(sample=x.numpy())[0]
    assert counters["stats"]["unique_graphs"] == len(kinds) == 2
    assert not counters["graph_break"]
    for answer in (first, second):
        assert torch.allclose(torch.from_numpy(answer), right, atol=1e-5)
    assert 0 < allocated(lambda: session(sample=x.numpy())) <= counted


def test_threads_have_the_limit_of_kinds_and_do_not_stop_one_another():
    """By blocks whose compiled calls are noted alone. What one session counts, another's are compiled in."""
    called: list[str] = []

    def made(name: str, forward) -> TorchSession:
        module = Net().requires_grad_(False)
        session = TorchSession(module, forward, torch.float32, torch.device("cpu"), CountingMeter("cpu"))
        session.compile()
        for block in module.blocks:
            block._compiled_call_impl = lambda x, b=block: called.append(name) or b._call_impl(x)
        return session

    x = torch.zeros(1, 64, 64).numpy()
    inner = made("inner", lambda module, sample: (module(sample),))
    inner(sample=x)
    assert not called

    def outer(module: nn.Module, sample: torch.Tensor):
        inner(sample=x)
        return (module(sample),)

    made("outer", outer)(sample=x)
    assert called == ["inner"] * 3

    limits: list[int] = []
    limited = made("limited", lambda _, sample: limits.append(_dynamo.config.recompile_limit) or (sample,))
    thread = threading.Thread(target=lambda: limited(sample=x))
    thread.start()
    thread.join()
    assert limits == [compiled._MOST_KINDS]


@pytest.fixture
def compiles(monkeypatch):
    monkeypatch.setattr(compiled, "compiler_problem", lambda _: None)


def test_plans_have_it_where_it_is_asked_for(sd1, compiles):
    """With a CPU's bytes for the compiler, and seconds by kinds of blocks, which many requests share."""
    machine, spec = Hardware("cpu", "a machine", 2**34, 2**34, ("fp32",)), inspect(sd1)
    plain, fast = (plan(machine, spec, REQUEST, Wishes(compile=on, **ONE_WAY))[0] for on in (False, True))
    assert "blocks compiled" in fast.summary()
    assert "compiled" not in plain.summary()
    assert [name for name, own in fast.placements.items() if own.compiled] == [spec.denoiser.name]
    assert fast.predicted.peak_bytes == plain.predicted.peak_bytes + compiled.COMPILER_BYTES
    seconds = fast.predicted.compiling_seconds
    assert seconds and seconds % compiling_seconds("cpu", 1) == 0
    assert fast.predicted.seconds == pytest.approx(plain.predicted.seconds + seconds, rel=0.2)
    assert plain.predicted.compiling_seconds == 0
    many = Wishes(compile=True, requests=10, **ONE_WAY)
    assert plan(machine, spec, REQUEST, many)[0].predicted.compiling_seconds == pytest.approx(seconds / 10)
    assert Plan.from_json(json.dumps(fast.to_json())) == fast
    with pytest.raises(TightfitError, match="it has compiled 1"):
        Plan.from_json(json.dumps(fast.to_json()).replace('"compiled": true', '"compiled": 1'))


def test_weights_in_onednns_order_are_not_compiled(sd1, compiles, monkeypatch):
    """So no plan counts the seconds of ordering them, or takes them."""
    said = Said("2", 2, "AVX512", ("fp32", "bf16"), True)
    monkeypatch.setattr(TORCH, "said", lambda: said)
    moves = {"bf16/order": 1e6}  # 1 s for each MB
    machine = Hardware("cpu", "a machine", 2**34, 2**34, ("fp32", "bf16"), moves=moves)
    asked = Wishes(prefer="balanced", compile=True, **ONE_WAY)
    (packed,) = {one.cause for one in plan(machine, inspect(sd1), REQUEST, asked) if one.denoiser.packed}
    assert "in torch's order" in packed
    in_bf16 = replace(Wishes(**ONE_WAY), precision="bf16")
    plain, fast = (
        plan(machine, inspect(sd1), REQUEST, replace(in_bf16, compile=on))[0] for on in (False, True)
    )
    assert fast.predicted.reading_seconds < plain.predicted.reading_seconds / 2


@pytest.mark.parametrize(
    "asked", [{"residency": "streamed"}, {"precision": "int8"}, {"attention": "chunked"}]
)
def test_what_it_cannot_run_is_refused(sd1, compiles, asked):
    """With one cure in all rows, which runs."""
    card, common = profile("rtx-3060-12gb"), {"compile": True, "tiling": "whole", "cfg": "batched"}
    plans = plan(card, inspect(sd1), REQUEST, Wishes(**common, **asked))
    assert not any(each.fits for each in plans)
    (cause,) = {each.cause for each in plans if "int8-dynamic" not in each.cause}
    assert "choose --precision fp16 --attention sdpa, without --prefer and streaming" in cause
    cured = Wishes(**common, precision="fp16", attention="sdpa")
    assert plan(card, inspect(sd1), REQUEST, cured)[0].fits


def test_a_machine_without_a_compiler_says_so(sd1, monkeypatch):
    monkeypatch.setattr(compiled, "compiler_problem", lambda _: "no working C++ compiler found")
    machine = replace(Hardware.detect("cpu"), free_bytes=2**33)
    (cause,) = {each.cause for each in plan(machine, inspect(sd1), REQUEST, Wishes(compile=True, **ONE_WAY))}
    assert cause == (
        "torch's compiler does not run here (no working C++ compiler found): leave out --compile"
    )
