"""Predicted bytes: what is alive, or reserved, at most while a component runs, before any weight exists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .allocator import Allocator, allocator
from .errors import TightfitError

END, ATTENTION, MOMENT = -1, -2, -3
Shape = tuple[int, int, int, int, int]  # of an attention: batch, heads, queries, keys, width of a head
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {unit: 2**bits for bits, units in ((10, ("k", "kib")), (20, ("m", "mib")), (30, ("g", "gib"))) for unit in units}


@dataclass(frozen=True, slots=True)
class Operation:
    """One arithmetic operator of a dry run: its operations (multiply and add are two) and bytes moved. `kind` is product, int8 if
    that is of whole numbers, unpack for weights in few bits, or "" for all else."""

    flops: float
    bytes: float
    kind: str = ""


@dataclass(frozen=True)
class Trace:
    """One call of a component as a dry run saw it.

    `events` are (storage, bytes) where one is made, (storage, END) where it ends, (i, ATTENTION) where `attentions[i]` runs,
    its answer being there, and (bytes, MOMENT) where a kernel takes and frees some for itself. `calls` are the modules in the
    order in which they begin: path, and how many operations and attentions came before.
    """

    events: tuple[tuple[int, int], ...]
    attentions: tuple[Shape, ...]
    operations: tuple[Operation, ...]
    calls: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """Weights that stream in, `unit` of `bytes`, needed before a call's operation and attention of these numbers."""

    unit: str
    bytes: int
    operation: int
    attention: int


@dataclass(frozen=True)
class Footprint:
    """What a component takes on its device: `held`, the bytes of each allocation that stays while it is loaded;
    `loading`, bytes of host memory while it is read; `trace`, one call; `scratch`, what each attention takes for itself;
    `host`, what it takes of the host's memory beside a GPU's; `kept`, bytes of a call that stay with a component that stays
    loaded. Of one that is streamed `arrivals` are the weights that flow through in each call, in order, `units` their bytes, the
    largest first, `ring` those of the buffer that they flow through, and `stored` their bytes in the files."""

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
    """Peak bytes that torch's allocator on `device` reserves (on the CPU: that are alive) while `own` is loaded and called. `held`
    was allocated before it, `later` between its loading and its call."""
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


def parse_bytes(text: str | float, option: str) -> int:
    """Bytes from '4GiB', '3.5GB', '800 MiB' or a number of bytes, of which there are a million at least, as nobody means 8 of
    them; raises TightfitError naming `option`."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text).lower())
    if not found or found[2] not in _UNITS or float(found[1]) == 0 or (found[2] and float(found[1]) * _UNITS[found[2]] < 1):
        raise TightfitError(f"{option} must be an amount such as 4GiB or 3500MB, not {str(text)!r}")
    count = int(float(found[1]) * _UNITS[found[2]])
    if not found[2] and count < 2**20:
        raise TightfitError(f"{option} is {found[1]} bytes: did you mean {found[1]}{'GiB' if count < 1000 else 'MiB'}?")
    return count


def shown(count: float) -> str:
    """Bytes for people: '212 MiB', '3.65 GiB'."""
    if count < 2**15:
        return f"{count:.0f} bytes"
    mebibytes = count / 2**20
    return (
        f"{mebibytes / 1024:.2f} GiB"
        if mebibytes >= 1000
        else f"{mebibytes:.0f} MiB"
        if mebibytes >= 10
        else f"{mebibytes:.1f} MiB"
    )
