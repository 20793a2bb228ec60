"""What is counted, and predicted, is what torch's own profiler sees allocated."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from tightfit.kernels import onednn
from tightfit.runtime.backends.torch import dryrun, networks
from tightfit.runtime.backends.torch import loading as weights
from tightfit.runtime.backends.torch.cpu_kernels import own_bytes
from tightfit.runtime.backends.torch.meter import AllocatorMeter, CountingMeter, LiveBytes, spilled
from tightfit.runtime.backends.torch.quantised import workspace
from tightfit.runtime.costs.footprint import Footprint, peak
from tightfit.runtime.errors import OutOfMemoryError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement

CPU = Hardware("cpu", "here", 2**34, 2**34, ("fp32",))
MIB = 2**20


ARITHMETIC = (
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("int8", "bf16"),
    ("int4", "fp32"),
    ("int8-dynamic", "bf16"),
    ("int8-dynamic", "fp32"),
)
CALLS = (
    ("text_encoder", "sdpa", "whole", 1),
    ("unet", "sdpa", "whole", 1),
    ("unet", "sliced", "whole", 2),
    ("unet", "chunked", "whole", 2),
    ("vae_decoder", "sdpa", "whole", 1),
    ("vae_decoder", "sdpa", "tiled", 1),
)
MODELS = ("emoji", "sd2", "sdxl")
TILES = "oneDNN's scratch for AMX's tiles, 0.1 to 2.2 MiB a convolution, is in no formula (docs/decisions.md)"


# Any two of model, call and arithmetic meet.
@pytest.mark.parametrize(
    ("model", "component", "attention", "tiling", "batch", "precision", "compute"),
    [
        (MODELS[(row + column) % 3], *called, *arithmetic)
        for row, called in enumerate(CALLS)
        for column, arithmetic in enumerate(ARITHMETIC)
        if called[0] == "unet" or arithmetic[0] != "int8-dynamic"  # only U-Nets run so
    ],
)
def test_against_the_profiler(
    allocated, tiny_models, model, component, attention, tiling, batch, precision, compute
):
    if precision == "int8-dynamic" and "int8" not in Hardware.detect("cpu").rates:
        pytest.skip("this processor has no VNNI")
    if (
        (component, compute) == ("vae_decoder", "bf16")
        and tiling == "whole"
        and onednn.in_tiles(torch.bfloat16)
    ):
        pytest.skip(TILES)
    spec = inspect(tiny_models.get(model, model))
    part, placement = (
        spec.components[component],
        Placement("torch", precision, compute, "staged", attention, tiling),
    )
    size = (batch, 128, 192)
    footprint = dryrun.footprint(spec, part, placement, CPU, Extent(*size))
    call, dtype, cpu = networks.forward(part, placement), weights.DTYPES[compute], torch.device("cpu")
    module = networks.build(part, placement, "cpu")
    weights.fill(module, weights.match(part, module), dtype, cpu)
    shapes = spec.inputs(part, *size)
    tensors = {
        n: torch.zeros(s, dtype=torch.int64 if n == "tokens" else torch.float32) for n, s in shapes.items()
    }
    run = lambda: dryrun.run(module, call, tensors, dtype, cpu)  # noqa: E731
    seen = allocated(run)
    with torch.inference_mode(), LiveBytes("cpu") as live:
        run()
    parts = (*module.parameters(), *module.buffers(), workspace(module).buffer)
    opaque = [each for each in parts if each.layout is not torch.strided]
    held = sum(each.nbytes for each in parts if each.layout is torch.strided) + sum(
        map(torch.ops.mkldnn._nbytes, opaque)
    )
    assert footprint.held_bytes == pytest.approx(held, rel=0.02 if opaque else 0)  # oneDNN keeps sums in them
    predicted = peak("cpu", (), Footprint((), 0, footprint.trace, footprint.scratch, 0))
    for count in (live.peak, predicted):
        assert count + held == pytest.approx(seen + held, rel=0.05)


def answer_and_own(allocated, func, *args):
    """Bytes by the profiler beside the answer, and by our formula."""
    with torch.inference_mode():
        out = func(*args)
    return allocated(lambda: func(*args)) - out.nbytes, own_bytes(func, args, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((1, 64, 64, 64), (32, 64, 3, 3)),
        ((2, 320, 16, 16), (640, 320, 3, 3)),
        ((1, 16, 64, 64), (3, 16, 3, 3)),
    ],
)
def test_convolutions(allocated, x, weight, dtype):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the formula was found on AVX-512")
    if onednn.in_tiles(dtype):
        pytest.skip(TILES)
    seen, formula = answer_and_own(
        allocated,
        torch.ops.aten.conv2d.default,
        torch.randn(x).to(dtype),
        torch.randn(weight).to(dtype),
        None,
        [1, 1],
        [1, 1],
    )
    assert seen == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (64, 64), (16, 8), (8, 64)])
def test_upsampling(allocated, size):
    x = torch.randn(1, 32, *size)
    seen, formula = answer_and_own(allocated, torch.ops.aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
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


def test_nothing_is_left_with_what_was_there():
    """A process that lives long looks at the same weights many times."""
    weight = torch.ones(1000)
    storage = weight.untyped_storage()
    with LiveBytes("cpu") as live:
        kept = weight * 2
    seen = weakref.ref(live)
    del live
    gc.collect()
    assert seen() is None
    assert weakref.getweakrefcount(storage) == weakref.getweakrefcount(kept.untyped_storage()) == 0


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
    """As much of torch.cuda as the meter asks, on a card of 6 GiB of which another program took one: an
    allocator that keeps what is freed in segments, to be used again by what fits, and cuBLAS's workspace,
    which the first product makes."""

    TOTAL = 6 * 2**30

    def __init__(self, monkeypatch) -> None:
        self.segments: list[list[int]] = []  # size, and how much of it is used
        self.workspace: list[int] | None = None
        self.peak, self.share = 0, 1.0
        monkeypatch.setattr(torch, "cuda", self)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)

    def take(self, count: int) -> list[int]:
        free = [segment for segment in self.segments if not segment[1] and segment[0] >= count]
        if not free:
            size = 20 * MIB if count < 10 * MIB else -(-count // (2 * MIB)) * 2 * MIB
            if self.memory_reserved() + size > int(self.share * self.TOTAL):
                self.empty_cache()
            if self.memory_reserved() + size > int(self.share * self.TOTAL):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            free = [[size, 0]]
            self.segments += free
        segment = min(free)
        segment[1] = count
        self.peak = max(self.peak, self.memory_reserved())
        return segment

    def give(self, segment: list[int]) -> None:
        segment[1] = 0

    def product(self) -> None:
        self.workspace = self.workspace or self.take(8_519_680)

    def clear_workspaces(self) -> None:
        if self.workspace:
            self.give(self.workspace)
        self.workspace = None

    def memory_reserved(self) -> int:
        return sum(size for size, _ in self.segments)

    def max_memory_reserved(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.memory_reserved()

    def empty_cache(self) -> None:
        self.segments = [segment for segment in self.segments if segment[1]]

    def mem_get_info(self) -> tuple[int, int]:
        return self.TOTAL - 2**30 - self.memory_reserved(), self.TOTAL

    def current_device(self) -> int:
        return 1

    def get_device_properties(self, number: int):
        return SimpleNamespace(total_memory={1: self.TOTAL}[number])

    def set_per_process_memory_fraction(self, share: float) -> None:
        self.share = share

    def stage(self, meter: AllocatorMeter) -> int:
        """100 MiB of weights are loaded, called with 30 MiB and a product, called again, and freed: what was
        measured."""
        meter.reset()
        meter.hold(100 * MIB)
        weights = self.take(100 * MIB)
        for _ in range(2):
            self.product()
            self.give(self.take(30 * MIB))
        measured = meter.bytes()
        self.give(weights)
        meter.hold(-100 * MIB)
        self.empty_cache()  # as a session does that is closed
        return measured


STAGE = (100 + 20 + 30) * 2**20  # the workspace takes a segment of 20 MiB
CUDA = torch.device("cuda")


def test_the_allocators_cap_and_peak_are_ours_alone(monkeypatch):
    """Of any number of bytes, exactly; what another library holds comes on top, what it left in the cache
    does not."""
    cuda = FakeCuda(monkeypatch)
    cuda.take(50 * MIB)
    left = cuda.take(500 * MIB)
    cuda.product()
    cuda.give(left)
    meter = AllocatorMeter(CUDA)
    assert meter.held() == 0
    for count in (10**9, 2 * 2**30, 4 * 10**9 + 1):
        meter.limit(count)
        assert count + 50 * MIB <= int(cuda.share * cuda.TOTAL) <= count + 50 * MIB + 2
    meter.limit(200 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.take(202 * MIB)
    assert cuda.stage(meter) == STAGE
    meter.limit(None)
    assert cuda.share == 1.0


def test_pipelines_one_after_another(monkeypatch):
    """Each measures the same, stage by stage, with the workspace that the one before it left, and has the
    same cap."""
    cuda = FakeCuda(monkeypatch)
    for _ in range(3):
        meter = AllocatorMeter(CUDA)
        meter.limit(160 * MIB)
        assert [cuda.stage(meter) for _ in range(3)] == [STAGE] * 3
        assert int(cuda.share * cuda.TOTAL) == pytest.approx(160 * MIB + 1, abs=1)
        meter.limit(None)


def test_another_library_between_two_stages(monkeypatch):
    """It left 500 MiB in the cache and 40 in use: what is measured and allowed stays ours."""
    cuda = FakeCuda(monkeypatch)
    meter = AllocatorMeter(CUDA)
    meter.limit(160 * MIB)
    assert cuda.stage(meter) == STAGE
    cuda.share = 1.0
    left, kept = cuda.take(500 * MIB), cuda.take(40 * MIB)
    cuda.give(left)
    assert cuda.stage(meter) == STAGE
    assert int(cuda.share * cuda.TOTAL) == pytest.approx(200 * MIB + 1, abs=1)
    cuda.give(kept)
    assert cuda.stage(meter) == STAGE
    assert int(cuda.share * cuda.TOTAL) == pytest.approx(160 * MIB + 1, abs=1)


def test_what_is_loaded_stays_ours(monkeypatch):
    """Between stages too, with its workspace, which is not made anew meanwhile."""
    cuda = FakeCuda(monkeypatch)
    meter = AllocatorMeter(CUDA)
    meter.hold(100 * MIB)
    weights = cuda.take(100 * MIB)
    cuda.product()
    workspace = cuda.workspace
    cuda.give(cuda.take(30 * MIB))
    meter.reset()
    assert (meter.bytes(), meter.held()) == (120 * MIB, 120 * MIB)
    assert cuda.workspace is workspace
    cuda.give(weights)
    meter.hold(-100 * MIB)
    meter.reset()
    assert (meter.bytes(), cuda.memory_reserved()) == (0, 0)


def test_two_pipelines_in_turns(monkeypatch):
    """Each may take 300 MiB and holds 250: a stage that begins lowers no cap under what both hold, and what
    is left of its own."""
    card = FakeCuda(monkeypatch)
    meters = []
    for _ in range(2):
        meter = AllocatorMeter(torch.device("cuda"))
        meter.limit(300 * MIB)
        meter.reset()
        meter.hold(250 * MIB)
        meters.append((meter, card.take(250 * MIB)))
    for meter, _ in [*meters, *meters]:
        meter.reset()
        card.give(card.take(40 * MIB))
        meter.limit(300 * MIB)
        card.give(card.take(40 * MIB))
        card.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        card.take(60 * MIB)
