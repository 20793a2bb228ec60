"""Blocks that a network repeats: a dry run follows each once, and writes it down again where it comes with
inputs of the same shapes. SDXL's U-Net has 70 transformer blocks of two shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...costs.footprint import ATTENTION, END, MOMENT, Operation, Shape

if TYPE_CHECKING:
    from .dryrun import Recorder

LEAST_PARTS = 8  # of a block and what is inside of it: less is followed as quickly
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
Calls = list[tuple[str, int, int]]


@dataclass(frozen=True)
class _Segment:
    """What a block did, counted from its beginning: events as a Trace has them, allocations by their order;
    and what it answered: the order and the layout of each."""

    events: tuple[tuple[int, int], ...]
    attentions: tuple[Shape, ...]
    operations: tuple[Operation, ...]
    calls: tuple[tuple[str, int, int], ...]
    answers: tuple[tuple[int, tuple[Any, ...]], ...]
    is_tuple: bool


def alike(module: torch.nn.Module) -> list[list[str]]:
    """The paths of its blocks that are there more than once, those that are alike together."""
    blocks: dict[Hashable, list[str]] = defaultdict(list)
    details = {part: tuple(_details(part)) for part in module.modules()}
    for path, part in module.named_modules():
        inside = [(name, details[inner]) for name, inner in part.named_modules()]
        if path and len(inside) >= LEAST_PARTS:
            blocks[tuple(inside)].append(path)
    return [paths for paths in blocks.values() if len(paths) > 1]


@contextmanager
def followed_once(
    module: torch.nn.Module, blocks: list[list[str]], recorder: Recorder, calls: Calls
) -> Iterator[None]:
    """While this lasts, `blocks` that are alike are followed once for inputs of the same shapes. `calls` are
    the modules in the order they begin, as a Trace has them."""
    changed: list[tuple[torch.nn.Module, Any]] = []
    for paths in blocks:
        known: dict[Hashable, _Segment | None] = {}
        for path in paths:
            part = module.get_submodule(path)
            changed.append((part, vars(part).get("forward")))
            part.forward = _Followed(part.forward, path, known, recorder, calls)
    try:
        yield
    finally:
        for part, forward in changed:
            if forward is None:
                del part.forward
            else:
                part.forward = forward


def _details(part: torch.nn.Module) -> Iterator[Hashable]:
    """All of a module, but for those inside of it, that decides what it does on `meta`."""
    yield type(part)
    for name, value in sorted(vars(part).items()):
        if name in ("_parameters", "_buffers"):
            yield tuple((n, t.shape, t.stride(), t.dtype) for n, t in value.items() if t is not None)
        elif _is_plain(value):
            yield name, value
        elif not name.startswith("_"):
            yield name, value if name == "adapted" else type(value)  # what adapters add is like nothing else


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


class _Followed:
    """The forward of one block."""

    def __init__(
        self,
        forward: Callable[..., Any],
        path: str,
        known: dict[Hashable, _Segment | None],
        recorder: Recorder,
        calls: Calls,
    ) -> None:
        self._forward, self._path, self._known = forward, path, known
        self._recorder, self._calls = recorder, calls

    def __call__(self, *args: Any, **named: Any) -> Any:
        key = signature((*args, *named.items()))
        try:
            segment = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return self._forward(*args, **named)
        if segment:
            return self._repeated(segment)
        begin = self._places()
        out = self._forward(*args, **named)
        self._known[key] = self._segment(begin, out)
        return out

    def _places(self) -> tuple[int, int, int, int]:
        recorder = self._recorder
        lists = recorder.events, recorder.attentions, recorder.operations, self._calls
        return tuple(map(len, lists))  # pyright: ignore[reportReturnType]

    def _segment(self, begin: tuple[int, int, int, int], out: Any) -> _Segment | None:
        """What was recorded since `begin`; None for what ends more, or answers other, than it has made."""
        recorder, (event, attention, operation, call) = self._recorder, begin
        made: dict[int, int] = {}
        living, events = set(), []
        for name, count in recorder.events[event:]:
            if count == END:
                if name not in living:
                    return None
                living.remove(name)
                events.append((made[name], END))
            elif count in (ATTENTION, MOMENT):
                events.append((name - (attention if count == ATTENTION else 0), count))
            else:
                made[name] = len(made)
                living.add(name)
                events.append((made[name], count))
        outs = out if isinstance(out, tuple) else (out,)
        if not all(isinstance(answer, torch.Tensor) and whole(answer) for answer in outs):
            return None
        names = [recorder.names.get(answer.untyped_storage()._cdata) for answer in outs]
        if {*names} != living or len(names) != len(living):
            return None
        layouts = [(answer.shape, answer.stride(), answer.dtype) for answer in outs]
        return _Segment(
            tuple(events),
            tuple(recorder.attentions[attention:]),
            tuple(recorder.operations[operation:]),
            tuple(
                (path.removeprefix(self._path), o - operation, a - attention)
                for path, o, a in self._calls[call:]
            ),
            tuple(
                (made[name], layout) for name, layout in zip(names, layouts, strict=True) if name is not None
            ),
            isinstance(out, tuple),
        )

    def _repeated(self, segment: _Segment) -> Any:
        """Write it down again, and answer what has its layouts."""
        recorder, (_, attention, operation, _) = self._recorder, self._places()
        alive, made = len(recorder.names), {}
        for name, count in segment.events:
            if count == END:
                alive -= 1
                recorder.events.append((made[name], END))
            elif count in (ATTENTION, MOMENT):
                recorder.events.append((name + (attention if count == ATTENTION else 0), count))
            else:
                made[name] = alive + len(recorder.events) + 1  # as the recorder names them
                alive += 1
                recorder.events.append((made[name], count))
        recorder.attentions += segment.attentions
        recorder.operations += segment.operations
        self._calls += ((f"{self._path}{path}", o + operation, a + attention) for path, o, a in segment.calls)
        with _disable_current_modes():
            outs = tuple(like(layout) for _, layout in segment.answers)
        for (name, _), answer in zip(segment.answers, outs, strict=True):
            recorder.adopt(answer, made[name])
        return outs if segment.is_tuple else outs[0]


def signature(values: Any) -> tuple[Any, ...]:
    """Everything that decides what an operator makes on `meta`. Types too, since 1 == 1.0 == True."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device.type)
        if isinstance(value, torch.Tensor)
        else signature(value)
        if isinstance(value, list | tuple)
        else (type(value), value)
        for value in values
    )


def like(layout: tuple[Any, ...]) -> torch.Tensor:
    """A tensor of that shape, strides and type, without values."""
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def whole(out: torch.Tensor) -> bool:
    """Whether the tensor covers its storage, so that shape and strides alone can recreate it."""
    reach = (
        sum((side - 1) * step for side, step in zip(out.shape, out.stride(), strict=True)) + 1
        if out.numel()
        else 0
    )
    return out.is_meta and out.untyped_storage().nbytes() == reach * out.element_size()
