"""Predicted bytes: peak bytes alive or reserved while a component runs, before any weight exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .allocator import Allocator, ExactAllocator, allocator

END, ATTENTION, MOMENT = -1, -2, -3
Shape = tuple[int, int, int, int, int]  # of an attention: batch, heads, queries, keys, head width


@dataclass(frozen=True, slots=True)
class Operation:
    """One arithmetic operator of a dry run: operations (a multiply-add is two) and bytes moved. `kind` is
    "product", "int8" for an integer product, "unpack" or "unpack4" for dequantising weights of 8 or 4 bits,
    whose operations are their values, or "" for everything else. `packed`: bytes of weights that a CPU puts
    in another order first."""

    flops: float
    bytes: float
    kind: str = ""
    packed: float = 0.0


@dataclass(frozen=True)
class Trace:
    """One call of a component as a dry run recorded it.

    `events` are (storage, bytes) for an allocation, (storage, END) when it is freed, (i, ATTENTION) when
    `attentions[i]` runs, with its output already allocated, and (bytes, MOMENT) for scratch that a kernel
    allocates and frees. `calls` are the modules in the order they begin: path, and how many operations and
    attentions came before. `kinds`: of blocks that torch's compiler
    tells apart, where they are compiled.
    """

    events: tuple[tuple[int, int], ...]
    attentions: tuple[Shape, ...]
    operations: tuple[Operation, ...]
    calls: tuple[tuple[str, int, int], ...] = ()
    kinds: int = 0

    def alive_bytes(self, scratch: tuple[int, ...]) -> int:
        """Peak bytes alive in the call, beside what was there before. `scratch` of each attention."""
        if scratch not in self._alive:
            memory = ExactAllocator()
            replay(memory, self.events, scratch)
            self._alive[scratch] = memory.peak
        return self._alive[scratch]

    @cached_property
    def readying(self) -> float:
        """What its products take to be made ready, one for each shape, in fourth roots of operations: 400
        times as many took 4 to 5 times as long."""
        different = {one for one in self.operations if one.kind in ("product", "int8")}
        return sum(one.flops**0.25 for one in different)

    @cached_property
    def unpacks(self) -> int:
        """How many weights of 8 or 4 bits it dequantises."""
        return sum(one.kind.startswith("unpack") for one in self.operations)

    @cached_property
    def _alive(self) -> dict[tuple[int, ...], int]:
        """Candidates share traces: 58 of 228 calls that are compared for SD 1.5."""
        return {}


NO_CALL = Trace((), (), ())


@dataclass(frozen=True, slots=True)
class Arrival:
    """Streamed weights: `unit`, of `bytes`, is needed before this operation and this attention of a call,
    both by index."""

    unit: str
    bytes: int
    operation: int
    attention: int


@dataclass(frozen=True)
class Footprint:
    """Memory of a component on its device.

    `held`: bytes of each allocation that stays while it is loaded. `loading`: host bytes while it is read.
    `trace`: one call. `scratch`: bytes that each attention takes for itself. `host`: bytes of host memory
    beside a GPU's. `kept`: bytes of a call that stay as long as the component is loaded. If it is streamed:
    `arrivals` are the weights that flow through in a call, in order; `units` their bytes, largest first;
    `ring` the bytes of the buffer they flow through; `stored` the files' bytes that they are read from.
    `patching_seconds`: to apply patches to what is read, of a streamed one in each call on a CPU, else once;
    `kept_patching_seconds`: to those of its weights that do not flow, once. `flowing`: tensors that flow, and
    `converted` those of their values which are stored in another type than they are held in. `modules`: that
    are built, and meet an input.
    """

    held: tuple[int, ...]
    loading: int
    trace: Trace
    scratch: tuple[int, ...]
    host: int = 0
    kept: int = 0
    arrivals: tuple[Arrival, ...] = ()
    units: tuple[int, ...] = ()
    ring: int = 0
    stored: int = 0
    patching_seconds: float = 0.0
    kept_patching_seconds: float = 0.0
    flowing: int = 0
    converted: int = 0
    modules: int = 0

    @property
    def held_bytes(self) -> int:
        return sum(self.held)


def peak(device: str, held: Iterable[int], component: Footprint, later: Iterable[int] = ()) -> int:
    """Peak bytes that torch's allocator on `device` reserves (on the CPU: peak bytes alive) while `component`
    is loaded and called. `held` was allocated before it, `later` between its loading and its call."""
    memory = allocator(device)
    names = iter(range(-1, -(10**9), -1))  # storages in a trace have positive names
    for count in (*held, *component.held):
        memory.allocate(next(names), count)
    if device == "cpu":
        memory.moment(component.loading)
    for count in later:
        memory.allocate(next(names), count)
    if isinstance(memory, ExactAllocator):  # adds up, whatever was there before
        memory.moment(component.trace.alive_bytes(component.scratch))
    else:
        replay(memory, component.trace.events, component.scratch)
    return memory.peak


def replay(memory: Allocator, events: Sequence[tuple[int, int]], scratch: Sequence[int]) -> None:
    """Replay a trace's allocations and frees, and its kernels' scratch."""
    for name, count in events:
        if count == END:
            memory.free(name)
        elif count == ATTENTION:
            memory.moment(scratch[name])
        elif count == MOMENT:
            memory.moment(name)
        else:
            memory.allocate(name, count)
