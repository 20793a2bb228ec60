"""Weights that come to a device as they are needed: all of a module's, or those that there is no room to
keep."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...models.tensors import Tensor as Stored
from ...ring import Ring, ahead
from . import loading as weights
from .loading import own_dtype

_ALIGNED = 256  # bytes between tensors, which suits every kernel
# Bytes pinned at a time: torch's allocator rounds each request up to a power of two, 1639 MiB to 2208.
CHUNK = 64 * 2**20
Parts = Mapping[nn.Module, "Unit"]


@dataclass(frozen=True)
class Unit:
    """A part of a module whose weights come and go together: its path, and (submodule, name, stored tensor,
    place in a buffer) of each."""

    path: str
    weights: tuple[tuple[nn.Module, str, Stored, int], ...]
    bytes: int


def units(module: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype) -> dict[nn.Module, Unit]:
    """`module` in parts, each as large as can be without taking more bytes than the largest single layer
    does."""
    paths = {part: path for path, part in module.named_modules()}
    leaves = [part for part in module.modules() if part._parameters]
    limit = max(_unit(leaf, paths[leaf], stored, dtype).bytes for leaf in leaves)
    found: dict[nn.Module, Unit] = {}

    def divide(part: nn.Module) -> None:
        unit = _unit(part, paths[part], stored, dtype)
        callable_here = not isinstance(part, nn.ModuleList | nn.ModuleDict)
        if callable_here and (part._parameters or 0 < unit.bytes <= limit):
            found[part] = unit
        else:
            for child in part.children():
                divide(child)

    divide(module)
    return found


def _unit(part: nn.Module, path: str, stored: Mapping[str, Stored], dtype: torch.dtype) -> Unit:
    weights, end = [], 0
    for inner, owner in part.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                weights.append((owner, leaf, stored[".".join(filter(None, (path, inner, leaf)))], end))
                count = parameter.numel() * own_dtype(owner, leaf, dtype).itemsize
                end += -(-count // _ALIGNED) * _ALIGNED
    return Unit(path, tuple(weights), end)


def split(parts: Parts, kept_bytes: int) -> tuple[dict[nn.Module, Unit], dict[nn.Module, Unit]]:
    """The units that stay loaded when they may take `kept_bytes`, and those that stream. The largest stay:
    they are the deepest, which compute the least for their bytes, and the buffer need not be as large
    then."""
    kept, streamed = {}, dict(parts)
    for part, unit in sorted(parts.items(), key=lambda each: -each[1].bytes):
        kept_bytes -= unit.bytes
        if kept_bytes < 0:
            break
        kept[part] = streamed.pop(part)
    return kept, streamed


def ring_bytes(parts: Parts, device: torch.device) -> int:
    """The buffer that a Streamer keeps on the device: of a GPU room for the largest unit twice, as one is
    copied while another computes."""
    return max((unit.bytes for unit in parts.values()), default=0) * (2 if device.type == "cuda" else 1)


def host_bytes(parts: Parts) -> int:
    """What a HostStore of these units takes."""
    return sum(_chunks(sum(unit.bytes for unit in parts.values())))


def _chunks(count: int) -> list[int]:
    whole, rest = divmod(count, CHUNK)
    return [CHUNK] * whole + ([1 << (rest - 1).bit_length()] if rest else [])


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


class HostStore:
    """Units one behind the other in chunks of the host's memory, from where a GPU copies them: pinned up to
    `most` bytes, or as far as the system allows, which WSL does to 0.5 or 1 GiB. Of the rest `pageable_bytes`
    is the size: it is copied slower."""

    def __init__(
        self,
        parts: Parts,
        dtype: torch.dtype,
        scratch: Tensor,
        most: float = float("inf"),
        pin: Callable[[int], Tensor] = _pinned,
    ) -> None:
        """`scratch` is uint8, as long as the longest of the tensors in their files."""
        self._places: dict[str, tuple[int, int]] = {}
        self._chunks: list[Tensor] = []
        self.pinned_bytes = self.pageable_bytes = 0
        for count in _chunks(sum(unit.bytes for unit in parts.values())):  # before anything is read
            chunk = None
            if not self.pageable_bytes and self.pinned_bytes + count <= most:
                try:
                    chunk = pin(count)
                    self.pinned_bytes += count
                # "out of memory", though there may be plenty: the host's, or of what may be pinned.
                except RuntimeError:
                    chunk = None
            if chunk is None:
                chunk = torch.empty(count, dtype=torch.uint8)
                self.pageable_bytes += count
            self._chunks.append(chunk)
        end = 0
        for unit in parts.values():
            self._places[unit.path] = end, end + unit.bytes
            for owner, leaf, tensor, start in unit.weights:
                self._read(tensor, own_dtype(owner, leaf, dtype), end + start, scratch)
            end += unit.bytes

    def pieces(self, unit: Unit) -> Iterator[Tensor]:
        """The unit's bytes in order."""
        return self._pieces(*self._places[unit.path])

    def _pieces(self, start: int, end: int) -> Iterator[Tensor]:
        while start < end:
            number, offset = divmod(start, CHUNK)
            piece = self._chunks[number][offset : offset + end - start]
            yield piece
            start += len(piece)

    def _read(self, tensor: Stored, dtype: torch.dtype, start: int, scratch: Tensor) -> None:
        pieces = list(self._pieces(start, start + tensor.count * dtype.itemsize))
        if len(pieces) == 1:
            weights.read_into(pieces[0].view(dtype), tensor, scratch)
            return
        whole = torch.empty(tensor.count, dtype=dtype)
        weights.read_into(whole, tensor, scratch)
        for piece, part in zip(
            pieces, whole.view(torch.uint8).split([len(piece) for piece in pieces]), strict=True
        ):
            piece.copy_(part)


class Lane(Protocol):
    """How units come into the ring: copied beside the computing, which is told by marks what to wait for."""

    beside: bool
    """Whether copies go on while something computes, so that it pays to begin early."""

    def copy(self, out: Tensor, unit: Unit, after: Sequence[Any]) -> Any:
        """Begin to fill `out`, uint8, once what computes has passed the marks `after`; answers the mark of
        its end."""
        ...

    def mark(self) -> Any:
        """Where the computing is now."""
        ...

    def wait(self, mark: Any) -> None:
        """Let what computes from now on wait for the mark."""
        ...

    def finish(self) -> None:
        """Return when every copy that was begun is done."""
        ...


class CudaLane:
    """From a HostStore, in a stream of its own."""

    beside = True

    def __init__(self, store: HostStore) -> None:
        self._store, self._stream = store, torch.cuda.Stream()
        # the ring may have been another tensor's, with which something still computes
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, out: Tensor, unit: Unit, after: Sequence[Any]) -> Any:
        for mark in after:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            pieces = list(self._store.pieces(unit))
            for part, piece in zip(out.split([len(piece) for piece in pieces]), pieces, strict=True):
                part.copy_(piece, non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> Any:
        return torch.cuda.current_stream().record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream().wait_event(mark)

    def finish(self) -> None:
        self._stream.synchronize()


class FileLane:
    """From the files each time, at once, so that a model larger than all memory runs."""

    beside = False

    def __init__(self, dtype: torch.dtype, scratch: Tensor) -> None:
        self._dtype, self._scratch = dtype, scratch

    def copy(self, out: Tensor, unit: Unit, after: Sequence[Any]) -> None:  # noqa: ARG002
        views = _views(unit, out, self._dtype)
        with _disable_current_modes():  # what reading takes is held all the time, by way of the meter
            for (_, _, tensor, _), view in zip(unit.weights, views, strict=True):
                weights.read_into(view, tensor, self._scratch)

    def mark(self) -> None: ...

    def wait(self, mark: None) -> None: ...

    def finish(self) -> None: ...


def _views(unit: Unit, buffer: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The unit's weights in its bytes."""
    found = []
    for owner, leaf, _, start in unit.weights:
        like, own = owner._parameters[leaf], own_dtype(owner, leaf, dtype)
        assert like is not None
        found.append(buffer[start : start + like.numel() * own.itemsize].view(own).view(like.shape))
    return found


class Streamer:
    """Brings each unit's weights into a ring when the unit is called, and takes them away after. Meanwhile
    what comes next, as it came in the pass before, is copied as far as there is room.

    What is copied over waits until what computed with it is done, whatever the order of calls: a unit that is
    called twice, in another order, or whose pass failed has its weights all the same, at worst later. Whoever
    calls the module says before that a pass begins.
    """

    def __init__(
        self,
        parts: Parts,
        lane: Lane,
        dtype: torch.dtype,
        buffer: Tensor,
        order: Sequence[str] = (),
    ) -> None:
        """`buffer` is uint8, of `ring_bytes`; `order` are the paths of parts in the order of a pass, as far
        as it is known."""
        self._parts, self._lane, self._dtype, self._buffer = parts, lane, dtype, buffer
        self._ring: Ring[nn.Module] = Ring(len(buffer))
        self._sizes = {part: unit.bytes for part, unit in parts.items()}
        self._meta = {
            part: [owner._parameters[leaf] for owner, leaf, _, _ in unit.weights]
            for part, unit in parts.items()
        }
        self._used: dict[nn.Module, Any] = {}
        self._copied: dict[nn.Module, Any] = {}
        by_path = {unit.path: part for part, unit in parts.items()}
        self._order = [by_path[path] for path in order if path in by_path]
        self._orders: dict[Hashable, list[nn.Module]] = {}  # of each way through the module
        self._seen: list[nn.Module] = []
        self._open: nn.Module | None = None
        self._failed: list[Any] = []
        # A block with some of its layers has the hooks of the whole one, which is the unit.
        self._hooks: list[Any] = [
            part.register_forward_pre_hook(partial(self._bring, part)) for part in parts
        ]
        self._hooks += [part.register_forward_hook(partial(self._take, part)) for part in parts]

    def close(self) -> None:
        """Let go of the module, which holds on to this by its hooks, once the copies that are under way are
        done."""
        for hook in self._hooks:
            hook.remove()
        self._orders.clear()
        if self._open is not None:
            self._put_away(self._open)
        self._lane.finish()

    def begin(self, way: Hashable = None) -> None:
        """A new pass; what the last one this way called is what this one is expected to."""
        self._seen = []
        self._order, self._orders[way] = self._orders.get(way) or self._order, self._seen

    def _bring(self, part: nn.Module, *_given: Any) -> None:
        if self._open is not None:  # its pass failed
            self._put_away(self._open)
        if part not in self._ring:
            self._copy(part, self._ring.put(part, self._sizes[part]) or [])
        self._lane.wait(self._copied[part])
        unit, start = self._parts[part], self._ring.start(part)
        views = _views(unit, self._buffer[start : start + unit.bytes], self._dtype)
        for (owner, leaf, _, _), view in zip(unit.weights, views, strict=True):
            owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)
        self._open = part
        self._seen.append(part)

    def _upcoming(self, part: nn.Module) -> Iterator[nn.Module]:
        """What came after `part` in the last pass, and begins the next; nothing if this pass takes another
        way."""
        at = len(self._seen)
        if self._order[at - 1 : at] == [part]:
            yield from self._order[at:]
            yield from self._order[:at]

    def _take(self, part: nn.Module, *_given: Any) -> None:
        self._put_away(part)
        # Once the device has been told to compute: copies from memory that is not pinned hold up the host.
        if self._lane.beside:
            for other, gone in ahead(self._ring, part, self._upcoming(part), self._sizes):
                self._copy(other, gone)

    def _put_away(self, part: nn.Module) -> None:
        self._used[part], self._open = self._lane.mark(), None
        for (owner, leaf, _, _), meta in zip(self._parts[part].weights, self._meta[part], strict=True):
            owner._parameters[leaf] = meta

    def _copy(self, part: nn.Module, gone: Sequence[nn.Module]) -> None:
        unit, start = self._parts[part], self._ring.start(part)
        after = [*self._failed, *(self._used[other] for other in gone if other in self._used)]
        try:
            self._copied[part] = self._lane.copy(self._buffer[start : start + unit.bytes], unit, after)
        except BaseException:
            # Its weights are not there, and those that went for it may still be computed with.
            self._ring.drop(part)
            self._failed = [self._lane.mark()]
            raise
