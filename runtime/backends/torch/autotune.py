"""Which of several ways to compute the same is the fastest here: tried once for each device and shape, and
remembered.

`autotune.json` in the cache folder (runtime/files.py) has the name of the fastest way by

    device, its capability · torch's version · triton's version · operator, shapes, type

so that another card, another library or another shape is tried anew. Delete the file to have everything tried
again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ...errors import TightfitError, out_of_memory
from ...files import cache_folder, parsed, read_bytes, replacing

_TURNS = 3  # of which the fastest counts, after one that compiles
# A turn on a GPU, whose calls come one after the other: a launch and the wait for the end, some 20 µs, are
# then 1 % of it.
_TURN_SECONDS, _MOST_CALLS = 2e-3, 1024
_chosen: dict[str, str] | None = None
# Chosen while another way lacked memory, which it may have the next time: of this process alone.
_for_now: dict[str, str] = {}
Way = Callable[[], Tensor]


def fastest(what: str, device: torch.device, ways: Mapping[str, Way]) -> Tensor:
    """The answer of the way that is the fastest on `device` for `what`: an operator, its shapes and its type.

    A way that fails is left out: the device may lack registers or shared memory for it, as triton says, or
    memory, or a compiler may not know the device. If none is left, raises that there was no memory, where
    that was so, or what the last one raised. What is chosen while a way lacked memory is not written: to try
    it at every call would take longer than the slower way does, so this process keeps it, and the next one
    tries again.
    """
    global _chosen
    if _chosen is None:
        _chosen = _read()
    key = f"{_place(device)} · {what}"
    name = _chosen.get(key) or _for_now.get(key, "")
    if name not in ways:
        name, short = _tried(ways, device)
        if short:
            _for_now[key] = name
        else:
            _chosen[key] = name
            _write(_chosen)
    return ways[name]()


def _tried(ways: Mapping[str, Way], device: torch.device) -> tuple[str, bool]:
    """The name of the fastest, and whether another lacked memory."""
    best, failure, short = (float("inf"), ""), None, False
    for name, way in ways.items():
        try:
            best = min(best, (_seconds(way, device), name))
        except Exception as error:
            failure = failure if short else error
            short = short or isinstance(error, torch.OutOfMemoryError) or out_of_memory(error)
    if failure and not best[1]:
        raise failure
    return best[1], short


def _seconds(way: Way, device: torch.device) -> float:
    way()
    return min(turn_seconds(way, device) for _ in range(_TURNS))


@functools.cache
def _place(device: torch.device) -> str:
    name: Any = device.type
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, {major}.{minor}"
    return f"{name} · torch {torch.__version__} · triton {_version('triton')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read() -> dict[str, str]:
    """Nothing of a file that cannot be read, or is not ours: all is then tried again, and written."""
    try:
        known = parsed(read_bytes(cache_folder() / "autotune.json"))
        return {str(key): str(name) for key, name in known.items()}
    except (OSError, TightfitError, ValueError, AttributeError):
        return {}


def _write(chosen: Mapping[str, str]) -> None:
    """Where it cannot be written this process alone remembers."""
    file = cache_folder() / "autotune.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps(chosen, indent=1, sort_keys=True))


def turn_seconds(work: Callable[[], Any], device: Any) -> float:
    """Seconds of one call of `work` on a torch device, or on the CPU if that is None.

    On a GPU those of several calls between two waits, divided: one alone would be its launch and the wait,
    where these take longer than what is computed.
    """
    kind = "cpu" if device is None else device.type

    def wait() -> None:
        if kind != "cpu":
            getattr(torch, kind).synchronize(device)

    calls = 1
    while True:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        seconds = time.perf_counter() - start
        if kind == "cpu" or seconds >= _TURN_SECONDS or calls >= _MOST_CALLS:
            return seconds / calls
        calls *= 2
