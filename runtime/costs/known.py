"""Footprints kept between processes: what dry runs found out, so that the next process builds no network to
plan."""

from __future__ import annotations

import atexit
import hashlib
import json
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from ..files import JSON_BYTES, cache_folder, read_bytes, replacing
from ..models.families.family import Network
from ..models.spec import Component
from ..versions import installed
from .footprint import Arrival, Footprint, Operation, Trace

_PACKAGE = Path(__file__).parent.parent.parent
_SOURCES = ("kernels", "runtime/backends", "runtime/costs", "runtime/models")
_MOST_FILES = 64  # each a network at one size, 0.1 to 3 MB
_MOST_OPEN = 12


class Known:
    """Footprints by what they depend on: a file in the cache folder for each network and size.

    Nothing is read or written before `keep`, which commands call: a test, or a program that changes what
    this package computes, would find what was computed before. What is broken in a file, or of other versions
    of the libraries or of this package, is computed again. Used by one thread at a time (budget.BUILDING).
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, _File] = {}

    def keep(self) -> None:
        """From here on, in the cache folder."""
        if self._folder is None:
            self._folder = cache_folder() / "dry-runs"
            atexit.register(self.write)

    def get(
        self,
        component: Component,
        environment: Hashable,
        way: Sequence[Any],
        compute: Callable[[], Footprint],
    ) -> Footprint:
        """The footprint of a component that is run in a `way`, computed if it is not known. `environment` is
        what else it depends on, alike for all ways of a file. Both are told apart by their texts."""
        content = _content(component) if self._folder else None
        if not self._folder or content is None:
            return compute()
        name = hashlib.sha256(repr((versions(), content, environment)).encode()).hexdigest()
        if name not in self._files:
            if len(self._files) >= _MOST_OPEN:
                self._files.pop(next(iter(self._files))).write()
            self._files[name] = _File(self._folder / f"{name}.json")
        return self._files[name].get(repr(way), compute)

    def write(self) -> None:
        """What is new, and no more files than there may be, the last used of them."""
        if not self._folder:
            return
        for file in self._files.values():
            file.write()
        with suppress(OSError):
            files = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_MOST_FILES]:
                file.unlink()


class _File:
    """Footprints of one component, by the way that it is run. Their traces, which many share, are stored
    once."""

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, False
        self._known: dict[str, Footprint] = {}
        with suppress(OSError, ValueError, TypeError, LookupError, RecursionError, TightfitError):
            self._known = _read(path)
            path.touch()

    def get(self, way: str, compute: Callable[[], Footprint]) -> Footprint:
        if way not in self._known:
            self._known[way] = compute()
            self._new = True
        return self._known[way]

    def write(self) -> None:
        if not self._new:
            return
        self._new = False
        text = json.dumps(_encoded(self._known), separators=(",", ":"))
        if len(text) < JSON_BYTES - 100:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self._path) as partial:
                    partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def _read(path: Path) -> dict[str, Footprint]:
    """Raises an error of many kinds for what is no such file, or is damaged."""
    digest, _, text = read_bytes(path).partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError(path)
    return _decoded(json.loads(text))


_PLAIN = [field.name for field in fields(Footprint) if field.name not in ("trace", "arrivals")]


def _encoded(known: Mapping[str, Footprint]) -> dict[str, Any]:
    traces = list({id(one.trace): one.trace for one in known.values()}.values())
    numbers = {id(trace): number for number, trace in enumerate(traces)}
    operations = list(dict.fromkeys(one for trace in traces for one in trace.operations))
    places = {one: place for place, one in enumerate(operations)}
    return {
        "operations": [(one.flops, one.bytes, one.kind, one.packed) for one in operations],
        "traces": [
            (one.events, one.attentions, [places[each] for each in one.operations], one.calls, one.kinds)
            for one in traces
        ],
        "footprints": {
            way: {
                **{name: getattr(one, name) for name in _PLAIN},
                "arrivals": [tuple(asdict(arrival).values()) for arrival in one.arrivals],
                "trace": numbers[id(one.trace)],
            }
            for way, one in known.items()
        },
    }


def _decoded(stored: Mapping[str, Any]) -> dict[str, Footprint]:
    operations = [Operation(*one) for one in stored["operations"]]
    traces = [
        Trace(_rows(events), _rows(attentions), tuple(operations[p] for p in places), _rows(calls), kinds)
        for events, attentions, places, calls, kinds in stored["traces"]
    ]
    return {
        way: Footprint(
            trace=traces[one.pop("trace")],
            arrivals=tuple(Arrival(*arrival) for arrival in one.pop("arrivals")),
            **_values(one),
        )
        for way, one in stored["footprints"].items()
    }


def _values(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}


def _rows(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(map(tuple, rows))


def _content(component: Component) -> str | None:
    """What a component is, as far as its footprint depends on it. None for what is not kept: networks that
    are not of this package, and those with what adapters and encodings change, of which there are too
    many."""
    changed = any(one.patches or one.encoding for one in component.tensors.values())
    if not is_own(component.network) or component.words or changed:
        return None
    return component.once("content", lambda: _described(component))


def is_own(network: Network) -> bool:
    """Whether it is of this package, whose version says what it computes."""
    package = __name__.partition(".runtime.")[0]
    return all(one.__module__.startswith(f"{package}.runtime.") for one in (network.build, network.call))


def _described(component: Component) -> str:
    network = component.network
    tensors = [
        (name, one.dtype, one.shape, one.stored_bytes, one.transposed)
        for name, one in component.tensors.items()
    ]
    functions = [
        f"{one.__module__}.{one.__qualname__}"
        for one in (network.build, network.call, network.call_in_strips)
        if one
    ]
    told = (network.name, network.role.name, network.in_strips, network.least_bits, *functions)
    config = json.dumps(dict(component.config), sort_keys=True, default=str)
    formats = sorted(component.formats.items()) if component.formats is not None else None
    return repr((told, config, formats, tensors))


@cache
def versions() -> tuple[Any, ...]:
    """Of all that computes footprints, and answers: the libraries, Python, and the files of this package."""
    stamps = [
        (str(file.relative_to(_PACKAGE)), file.stat().st_size, file.stat().st_mtime_ns)
        for room in _SOURCES
        for file in sorted((_PACKAGE / room).rglob("*.py"))
    ]
    libraries = [installed(name) for name in ("torch", "diffusers", "transformers")]
    return (*libraries, platform.python_version(), platform.machine(), str(_PACKAGE), stamps)


KNOWN = Known()  # those of this process
