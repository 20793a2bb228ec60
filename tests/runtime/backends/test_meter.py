"""What is counted, and predicted, is what torch's own profiler sees allocated."""

from __future__ import annotations

import pytest
import torch
from tightfit.runtime.backends import dryrun, networks, weights
from tightfit.runtime.backends.cpu_kernels import own_bytes
from tightfit.runtime.backends.meter import CountingMeter, LiveBytes, spilled
from tightfit.runtime.backends.quantised import workspace
from tightfit.runtime.errors import OutOfMemoryError
from tightfit.runtime.hardware import Hardware
from tightfit.runtime.hub import inspect
from tightfit.runtime.memory import Footprint, peak
from tightfit.runtime.plan import Placement
from torch.profiler import ProfilerActivity, profile

CPU = Hardware("cpu", "here", 2**34, 2**34, ("fp32",))


def profiled(call) -> int:
    """Most bytes that torch's allocator had handed out at once during `call`, beyond those before it."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept
    return most


@pytest.mark.parametrize(
    ("precision", "compute"),
    [
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("int8", "bf16"),
        ("int4", "fp32"),
        ("int8-dynamic", "bf16"),
        ("int8-dynamic", "fp32"),
    ],
)
@pytest.mark.parametrize(
    ("component", "attention", "tiling", "batch"),
    [
        ("text_encoder", "sdpa", "whole", 1),
        ("unet", "sdpa", "whole", 1),
        ("unet", "sliced", "whole", 2),
        ("unet", "chunked", "whole", 2),
        ("vae_decoder", "sdpa", "whole", 1),
        ("vae_decoder", "sdpa", "tiled", 1),
    ],
)
@pytest.mark.parametrize("model", ["emoji", "sd2", "sdxl"])
def test_against_the_profiler(tiny_models, model, component, attention, tiling, batch, precision, compute):
    if precision == "int8-dynamic" and component != "unet":
        pytest.skip("only U-Nets run so")
    if precision == "int8-dynamic" and "int8" not in Hardware.detect("cpu").rates:
        pytest.skip("this processor has no VNNI")
    spec = inspect(tiny_models.get(model, model))
    part, placement = spec.components[component], Placement("torch", precision, compute, "staged", attention, tiling)
    size = (batch, 128, 192)
    footprint = dryrun.footprint(spec, part, placement, CPU, size)
    call, dtype, cpu = networks.forward(spec, part, placement), weights.DTYPES[compute], torch.device("cpu")
    module = networks.build(part, placement, "cpu")
    weights.fill(module, weights.match(part, module), dtype, cpu)
    shapes = spec.inputs(part, *size)
    tensors = {n: torch.zeros(s, dtype=torch.int64 if n == "tokens" else torch.float32) for n, s in shapes.items()}
    run = lambda: dryrun.run(module, call, tensors, dtype, cpu)  # noqa: E731
    seen = profiled(run)
    with torch.inference_mode(), LiveBytes("cpu") as live:
        run()
    parts = (*module.parameters(), *module.buffers(), workspace(module).buffer)
    opaque = [each for each in parts if each.layout is not torch.strided]
    held = sum(each.nbytes for each in parts if each.layout is torch.strided) + sum(map(torch.ops.mkldnn._nbytes, opaque))
    assert footprint.held_bytes == pytest.approx(held, rel=0.02 if opaque else 0)  # oneDNN keeps sums in them
    predicted = peak("cpu", (), Footprint((), 0, footprint.trace, footprint.scratch, 0))
    for count in (live.peak, predicted):
        assert count + held == pytest.approx(seen + held, rel=0.05)


def answer_and_own(func, *args):
    """Bytes by the profiler beside the answer, and by our formula."""
    with torch.inference_mode():
        out = func(*args)
    return profiled(lambda: func(*args)) - out.nbytes, own_bytes(func, args, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "weight"),
    [((1, 64, 64, 64), (32, 64, 3, 3)), ((2, 320, 16, 16), (640, 320, 3, 3)), ((1, 16, 64, 64), (3, 16, 3, 3))],
)
def test_convolutions(x, weight, dtype):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the formula was found on AVX-512")
    seen, formula = answer_and_own(
        torch.ops.aten.conv2d.default, torch.randn(x).to(dtype), torch.randn(weight).to(dtype), None, [1, 1], [1, 1]
    )
    assert seen == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (64, 64), (16, 8), (8, 64)])
def test_upsampling(size):
    x = torch.randn(1, 32, *size)
    seen, formula = answer_and_own(torch.ops.aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    assert seen == pytest.approx(formula, abs=0.01 * x.nbytes * 5)


def test_views_and_what_was_there_count_nothing():
    before = torch.ones(1000)
    with LiveBytes("cpu") as live:
        views = before[10:].view(-1, 10).T
        assert (live.now, live.peak) == (0, 0)
        twice = before * 2
        del twice
        assert (live.now, live.peak) == (0, 4000)
        kept = views + 1
    assert live.now == kept.nbytes


def test_limits():
    meter = CountingMeter("cpu")
    meter.limit(10_000)
    meter.hold(6000)
    known = {}
    assert meter.during(known, "a", lambda: torch.ones(500).sum().item()) == 500
    assert 8000 <= meter.bytes() < 8100
    with pytest.raises(OutOfMemoryError, match="are allowed"):
        meter.during(known, "b", lambda: torch.ones(2000))
    with pytest.raises(OutOfMemoryError):
        meter.hold(5000)
    meter.hold(-6000)
    meter.hold(9000)
    with pytest.raises(OutOfMemoryError):
        meter.during(known, "a", lambda: pytest.fail("known to take too much"))
    meter.limit(None)
    meter.during(known, "a", lambda: None)


@pytest.mark.parametrize(
    ("reserved", "used", "free", "expected"),
    [
        (3 << 30, 3 << 30, 2 << 30, 0),
        (3 << 30, 2 << 30, 2 << 30, 0),  # others gave some back; the card has room
        (3 << 30, 2 << 30, 1 << 20, 1 << 30),  # the card is full, and a gibibyte of ours is not on it
        (3 << 30, (3 << 30) - (64 << 20), 1 << 20, 0),
    ],
)
def test_spill(reserved, used, free, expected):
    """Bytes since the start: what we reserved, what the driver says is used, and what is free now."""
    assert spilled(reserved, used, free) == expected


class FakeCuda:
    """As much of torch.cuda as the meter asks, on a card of 6 GiB of which another program took one."""

    def __init__(self) -> None:
        self.reserved, self.peak, self.share, self.emptied = 100, 100, 1.0, 0

    def memory_reserved(self):
        return self.reserved

    def max_memory_reserved(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.reserved

    def empty_cache(self):
        self.emptied += 1

    def mem_get_info(self):
        return 5 * 2**30 - self.reserved, 6 * 2**30

    def current_device(self):
        return 0

    def get_device_properties(self, _):
        from types import SimpleNamespace

        return SimpleNamespace(total_memory=6 * 2**30)

    def set_per_process_memory_fraction(self, share):
        self.share = share


def test_the_allocators_cap_and_peak_are_ours_alone(monkeypatch):
    from tightfit.runtime.backends.meter import AllocatorMeter

    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    meter = AllocatorMeter(torch.device("cuda"))
    for count in (10**9, 2 * 2**30, 4 * 10**9 + 1):
        meter.limit(count)
        assert count + 100 <= int(fake.share * 6 * 2**30) <= count + 102
    meter.reset()
    assert (fake.emptied, meter.bytes()) == (1, 0)
    fake.peak = 5100
    assert meter.bytes() == 5000
    meter.limit(None)
    assert fake.share == 1.0
