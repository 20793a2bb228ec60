"""Weights that stream: each unit computes with its own, whatever runs before what, and none is read once it
was copied over."""

from __future__ import annotations

import random
from collections import deque
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tightfit.runtime.backends.torch import loading as weights
from tightfit.runtime.backends.torch import streaming
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.models.tensors import Tensor as Stored
from torch import nn

F32 = torch.float32


class Device:
    """Two queues, as those of a GPU: what is at the head of either may run next, but for what waits for a
    mark. A lane beside."""

    beside = True

    def __init__(self, chance: random.Random) -> None:
        self.queues = {"compute": deque(), "copies": deque()}
        self.passed, self.chance, self.marks = set(), chance, 0
        self.copies_left = 0  # until one fails; for 0 none does

    def copy(self, out, unit, after):
        self.copies_left -= 1
        if self.copies_left == 0:
            raise ArithmeticError
        queue = self.queues["copies"]
        queue.extend(("wait", mark) for mark in after)
        for (owner, *_), view in zip(unit.weights, streaming._views(unit, out, F32), strict=True):
            queue.append(("run", lambda view=view, value=owner.value: view.fill_(value)))
        return self._mark("copies")

    def mark(self):
        return self._mark("compute")

    def wait(self, mark) -> None:
        self.queues["compute"].append(("wait", mark))

    def finish(self) -> None:
        self.run()

    def _mark(self, name):
        self.marks += 1
        self.queues[name].append(("mark", self.marks))
        return self.marks

    def run(self, count: int = 10**9) -> None:
        """Up to `count` entries, in any order that the marks allow."""
        while count:
            able = [
                q
                for q in self.queues.values()
                if q and not (q[0][0] == "wait" and q[0][1] not in self.passed)
            ]
            if not able:
                assert not any(self.queues.values()), "each waits for the other"
                return
            what, value = self.chance.choice(able).popleft()
            if what == "mark":
                self.passed.add(value)
            elif what == "run":
                value()
            count -= 1


class Layer(nn.Module):
    """Its weights are all `value`, which it looks at twice, with time between."""

    def __init__(self, value: int, size: int, device: Device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
        self.value, self.device, self.called, self.ran = float(value), device, 0, 0

    def forward(self, fails: bool = False) -> None:
        self.called += 1
        self.device.queues["compute"].extend([("run", lambda: None), *[("run", self._look(self.weight))] * 2])
        if fails:
            raise ArithmeticError

    def _look(self, weight):
        def look() -> None:
            assert (weight == self.value).all(), (
                f"layer {self.value:.0f} computes with {weight.unique().tolist()}"
            )
            self.ran += 1

        return look


class Network(nn.Module):
    def __init__(self, sizes, device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i + 1, size, device) for i, size in enumerate(sizes))
        self.device = device

    def forward(self, order) -> None:
        for i in order:
            self.layers[max(i, ~i)](fails=i < 0)
            self.device.run(self.device.chance.randint(0, 6))  # how far the device is behind the host


def passes(chance: random.Random, count: int, kind: str):
    usual = list(range(count))
    for _ in range(6):
        order = list(usual)
        if kind == "twice":
            order = [i for i in usual for _ in range(chance.choice((1, 1, 2, 3)))]
        elif kind == "in turns":  # as a feed-forward in parts calls its layers
            order = [*usual[:2], *usual[:2], *usual[2:]]
        elif kind == "another order":
            chance.shuffle(order)
        elif kind == "some left out":
            order = [i for i in usual if chance.random() < 0.6]
        elif kind == "failed":
            order[chance.randrange(count)] ^= -1  # below 0: fails while it computes
        yield order


@pytest.mark.parametrize(
    "kind", ["usual", "twice", "in turns", "another order", "some left out", "failed", "a copy failed"]
)
def test_each_unit_computes_with_its_own_weights(kind):
    for seed in range(30):
        chance = random.Random(seed)
        device = Device(chance)
        network = Network([chance.randint(1, 2000) for _ in range(chance.randint(2, 9))], device)
        stored = {
            n: Stored("F32", tuple(p.shape), None, 0, 4 * p.numel()) for n, p in network.named_parameters()
        }
        parts = streaming.units(network, stored, F32)
        buffer = torch.empty(2 * max(unit.bytes for unit in parts.values()), dtype=torch.uint8)
        streamer = streaming.Streamer(parts, device, F32, buffer)
        for order in passes(chance, len(network.layers), kind):
            if kind == "a copy failed":
                device.copies_left = chance.randint(0, 2 * len(order))
            streamer.begin()
            with suppress(ArithmeticError):
                network(order)
        streamer.close()
        device.run()
        assert [layer.ran for layer in network.layers] == [2 * layer.called for layer in network.layers]
        assert all(layer.weight.is_meta for layer in network.layers)


class Unordered(Device):
    """A lane that does not wait for what computes: the simulation must see that."""

    def copy(self, out, unit, after):
        return super().copy(out, unit, ())


def test_the_simulation_can_fail():
    with pytest.raises(AssertionError, match="computes with"):
        for seed in range(60):
            device = Unordered(random.Random(seed))
            network = Network([300, 300, 300, 300], device)
            stored = {
                n: Stored("F32", tuple(p.shape), None, 0, 4 * p.numel())
                for n, p in network.named_parameters()
            }
            parts = streaming.units(network, stored, F32)
            streamer = streaming.Streamer(parts, device, F32, torch.empty(2 * 1280, dtype=torch.uint8))
            for _ in range(4):
                streamer.begin()
                network(range(4))
            device.run()


def test_what_comes_next_is_there_before_it_is_called():
    """From the third pass on nothing is copied when it is called, though a unit is called twice in turns with
    another."""
    device = Device(random.Random(0))
    network = Network([64] * 6, device)
    stored = {n: Stored("F32", tuple(p.shape), None, 0, 4 * p.numel()) for n, p in network.named_parameters()}
    streamer = streaming.Streamer(
        streaming.units(network, stored, F32), device, F32, torch.empty(512, dtype=torch.uint8)
    )
    late, put = [], streamer._ring.put
    streamer._ring.put = lambda part, count, needed=None: (
        needed is None and late.append(part),
        put(part, count, needed or ()),
    )[1]
    order = [0, 1, 0, 1, 2, 3, 4, 5]

    def called():
        streamer.begin()
        network(order)
        return len(late)

    assert called() == 6
    assert called() == 7  # whose first unit nobody could foretell
    assert [called() for _ in range(3)] == [7, 7, 7]


def test_the_largest_stay():
    network = Network([10, 500, 20, 300], Device(random.Random(0)))
    stored = {n: Stored("F32", tuple(p.shape), None, 0, 4 * p.numel()) for n, p in network.named_parameters()}
    parts = streaming.units(network, stored, F32)
    sizes = {unit.path: unit.bytes for unit in parts.values()}
    assert sizes == {"layers.0": 256, "layers.1": 2048, "layers.2": 256, "layers.3": 1280}
    for kept_bytes, stay in ((0, ()), (2047, ()), (2048, (1,)), (3328, (1, 3)), (10**9, (0, 1, 2, 3))):
        kept, rest = streaming.split(parts, kept_bytes)
        assert {unit.path for unit in kept.values()} == {f"layers.{i}" for i in stay}
        assert {**kept, **rest}.keys() == parts.keys()


def written(tmp_path, shapes):
    tensors = {f"layers.{i}.weight": torch.randn(size, dtype=torch.float16) for i, size in enumerate(shapes)}
    save_file(tensors, tmp_path / "x.safetensors")
    return tensors, read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("refused_after", [0, 1, 2, 99])
def test_a_store_is_filled_across_chunks_pinned_or_not(tmp_path, monkeypatch, refused_after):
    """Chunks as small as the tensors; from some chunk on the system pins no more."""
    monkeypatch.setattr(streaming, "CHUNK", 1024)
    tensors, stored = written(tmp_path, [300, 700, 100, 450])
    network = Network([300, 700, 100, 450], Device(random.Random(0)))
    parts = streaming.units(network, stored, F32)
    pinned = []

    def pin(count):
        if len(pinned) >= refused_after:
            raise RuntimeError("CUDA error: out of memory")
        pinned.append(count)
        return torch.empty(count, dtype=torch.uint8)

    store = streaming.HostStore(parts, F32, torch.empty(1400, dtype=torch.uint8), pin=pin)
    whole = sum(unit.bytes for unit in parts.values())
    assert whole <= sum(pinned) + store.pageable_bytes == streaming.host_bytes(parts) < whole + 1024
    for part, unit in parts.items():
        read = torch.cat(list(store.pieces(unit)))[: 4 * part.weight.numel()].view(F32)
        assert torch.equal(read, tensors[f"{unit.path}.weight"].float())


def test_no_more_is_pinned_than_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1024)
    _, stored = written(tmp_path, [700, 700])
    network = Network([700, 700], Device(random.Random(0)))
    counts = []
    store = streaming.HostStore(
        streaming.units(network, stored, F32),
        F32,
        torch.empty(1400, dtype=torch.uint8),
        most=2048,
        pin=lambda n: (counts.append(n), torch.empty(n, dtype=torch.uint8))[1],
    )
    assert counts == [1024, 1024]
    assert store.pageable_bytes == streaming.host_bytes(streaming.units(network, stored, F32)) - 2048


def test_files_are_read_each_time(tmp_path):
    """Without a GPU: one buffer, filled when a unit is called."""
    tensors, stored = written(tmp_path, [30, 70, 10])
    seen = []

    class Reader(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)

        def forward(self):
            seen.append(self.weight.clone())

    network = nn.Sequential()
    network.layers = nn.ModuleList(Reader(size) for size in (30, 70, 10))
    network.forward = lambda: [layer() for layer in network.layers]
    parts = streaming.units(network, stored, F32)
    buffer = torch.empty(streaming.ring_bytes(parts, torch.device("cpu")), dtype=torch.uint8)
    lane = streaming.FileLane(
        F32, torch.empty(weights.scratch_bytes(network, stored, F32, torch.device("cpu")), dtype=torch.uint8)
    )
    streaming.Streamer(parts, lane, F32, buffer)
    network()
    network()
    assert all(
        torch.equal(got, want.float()) for got, want in zip(seen, [*tensors.values()] * 2, strict=True)
    )


def test_the_order_may_be_known_before(tmp_path):
    """Then what comes next is copied from the first pass on."""
    device = Device(random.Random(0))
    network = Network([64] * 6, device)
    stored = {n: Stored("F32", tuple(p.shape), None, 0, 4 * p.numel()) for n, p in network.named_parameters()}
    order = ["", "layers", *(f"layers.{i}" for i in range(6))]
    buffer = torch.empty(512, dtype=torch.uint8)
    streamer = streaming.Streamer(streaming.units(network, stored, F32), device, F32, buffer, order)
    late, put = [], streamer._ring.put
    streamer._ring.put = lambda part, count, needed=None: (
        needed is None and late.append(part),
        put(part, count, needed or ()),
    )[1]
    network(range(6))
    assert late == [network.layers[0]]


def test_each_call_of_a_session_is_a_pass():
    """Also of a network whose parts are called one by one."""
    from types import SimpleNamespace

    from tightfit.runtime.backends.torch.backend import TorchSession
    from tightfit.runtime.backends.torch.meter import meter

    device, ways = torch.device("cpu"), []
    module = nn.Sequential(nn.Identity())
    session = TorchSession(module, lambda parts, sample: (parts[0](sample),), F32, device, meter(device))
    session.streamer = SimpleNamespace(begin=ways.append)
    for _ in range(2):
        session(sample=np.zeros((1, 2), np.float32))
    assert ways == [(False, (), "sample")] * 2


def test_one_store_for_a_pipeline(sd1, monkeypatch):
    """Filled once for all requests of one plan, and gone before that of another is made; gone too when
    nothing streams any more."""
    import weakref
    from types import SimpleNamespace

    from tightfit.runtime.backends.torch.backend import TorchBackend
    from tightfit.runtime.models.hub import inspect
    from tightfit.runtime.placement import Placement

    made = []

    class Store:
        pageable_bytes = pinned_bytes = 0

        def __init__(self, *_):
            assert all(store() is None for store in made)
            made.append(weakref.ref(self))

    backend, unet = TorchBackend("cpu"), inspect(str(sd1)).components["unet"]
    backend.device = torch.device("cuda")
    monkeypatch.setattr(streaming, "HostStore", Store)
    monkeypatch.setattr(streaming, "CudaLane", lambda store: None)
    monkeypatch.setattr("tightfit.runtime.backends.torch.backend._empty_cache", lambda _: None)
    session = SimpleNamespace(notices=())
    for precision in ("fp16", "fp32"):
        placement = Placement("torch", precision, precision, "streamed", "sdpa", "whole")
        backend.keep({"unet": placement})
        for _ in range(3):
            backend._lane(session, unet, placement, {}, torch.empty(0))
            backend.keep({"unet": placement, "vae_decoder": placement})
    assert len(made) == 2
    backend.keep({"unet": Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole")})
    assert made[-1]() is None
