"""Predicted bytes: what is alive, or reserved, at most while a component runs, before any weight exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .allocator import Allocator, allocator

END, ATTENTION, MOMENT = -1, -2, -3
Shape = tuple[int, int, int, int, int]  # of an attention: batch, heads, queries, keys, width of a head


@dataclass(frozen=True, slots=True)
class Operation:
    """One arithmetic operator of a dry run: its operations (multiply and add are two) and bytes moved. `kind`
    is product, int8 if that is of whole numbers, unpack for weights in few bits, or "" for all else."""

    flops: float
    bytes: float
    kind: str = ""


@dataclass(frozen=True)
class Trace:
    """One call of a component as a dry run saw it.

    `events` are (storage, bytes) where one is made, (storage, END) where it ends, (i, ATTENTION) where
    `attentions[i]` runs, its answer being there, and (bytes, MOMENT) where a kernel takes and frees some for
    itself. `calls` are the modules in the order in which they begin: path, and how many operations and
    attentions came before.
    """

    events: tuple[tuple[int, int], ...]
    attentions: tuple[Shape, ...]
    operations: tuple[Operation, ...]
    calls: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """Weights that stream in, `unit` of `bytes`, needed before a call's operation and attention of these
    numbers."""

    unit: str
    bytes: int
    operation: int
    attention: int


@dataclass(frozen=True)
class Footprint:
    """What a component takes on its device: `held`, the bytes of each allocation that stays while it is
    loaded; `loading`, bytes of host memory while it is read; `trace`, one call; `scratch`, what each
    attention takes for itself; `host`, what it takes of the host's memory beside a GPU's; `kept`, bytes of a
    call that stay with a component that stays loaded. Of one that is streamed `arrivals` are the weights that
    flow through in each call, in order, `units` their bytes, the largest first, `ring` those of the buffer
    that they flow through, and `stored` their bytes in the files."""

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

    @property
    def held_bytes(self) -> int:
        return sum(self.held)


def peak(device: str, held: Iterable[int], own: Footprint, later: Iterable[int] = ()) -> int:
    """Peak bytes that torch's allocator on `device` reserves (on the CPU: that are alive) while `own` is
    loaded and called. `held` was allocated before it, `later` between its loading and its call."""
    memory = allocator(device)
    names = iter(range(-1, -(10**9), -1))  # those of storages in a trace are positive
    for count in (*held, *own.held):
        memory.allocate(next(names), count)
    if device == "cpu":
        memory.moment(own.loading)
    for count in later:
        memory.allocate(next(names), count)
    replay(memory, own.trace.events, own.scratch)
    return memory.peak


def replay(memory: Allocator, events: Sequence[tuple[int, int]], scratch: Sequence[int]) -> None:
    """Have the storages of a trace come and go, and what kernels take for a moment."""
    for name, count in events:
        if count == END:
            memory.free(name)
        elif count == ATTENTION:
            memory.moment(scratch[name])
        elif count == MOMENT:
            memory.moment(name)
        else:
            memory.allocate(name, count)
