"""Picks the fastest of several implementations of one operation, once per device and shape, and remembers it.

`autotune.json` in the cache folder (runtime/files.py) maps

    device, its capability · torch's version · triton's version · operator, shapes, dtype

to the name of the fastest implementation, so another card, library or shape is timed anew. Delete the file to
time everything again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...errors import TightfitError, out_of_memory
from ...files import cache_folder, parsed, read_bytes, replacing
from ...versions import installed

_TURNS = 3  # the fastest counts; an untimed call before them compiles
# A turn on a GPU is many calls back to back, so that one launch and one wait, some 20 µs, are 1 % of it.
_TURN_SECONDS, _MOST_CALLS = 2e-3, 1024
_chosen: dict[str, str] | None = None
# Chosen while a faster one may have lacked memory: valid for this process only.
_for_now: dict[str, str] = {}
Way = Callable[[], Tensor]


def fastest(operation: str, device: torch.device, variants: Mapping[str, Way]) -> Tensor:
    """Run the fastest of `variants` on `device` and return its output. `operation` names the operator, its
    shapes and its dtype.

    A variant that fails is left out: it may need more registers or shared memory than the device has (as
    Triton reports), more memory, or a device that its compiler knows. If all fail, raises the out-of-memory
    error if there was one, else the last error. A choice made while a variant was out of memory is not
    written: this process keeps it, because trying again at each call would cost more than the slower variant,
    and the next process tries again.
    """
    global _chosen
    if _chosen is None:
        _chosen = _read()
    key = f"{_place(device)} · {operation}"
    name = _chosen.get(key) or _for_now.get(key, "")
    if name not in variants:
        name, short = _tried(variants, device)
        if short:
            _for_now[key] = name
        else:
            _chosen[key] = name
            _write(_chosen)
    return variants[name]()


def _tried(variants: Mapping[str, Way], device: torch.device) -> tuple[str, bool]:
    """The name of the fastest variant, and whether any ran out of memory."""
    best, failure, short = (float("inf"), ""), None, False
    for name, variant in variants.items():
        try:
            best = min(best, (_seconds(variant, device), name))
        except Exception as error:
            failure = failure if short else error
            short = short or isinstance(error, torch.OutOfMemoryError) or out_of_memory(error)
    if failure and not best[1]:
        raise failure
    return best[1], short


def _seconds(variant: Way, device: torch.device) -> float:
    variant()
    return min(turn_seconds(variant, device) for _ in range(_TURNS))


@functools.cache
def _place(device: torch.device) -> str:
    name: Any = device.type
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, {major}.{minor}"
    return f"{name} · torch {torch.__version__} · triton {installed('triton') or 'none'}"


def _read() -> dict[str, str]:
    """Empty if the file cannot be read or is not ours. Everything is then timed again and the file
    rewritten."""
    try:
        names = parsed(read_bytes(cache_folder() / "autotune.json"))
        return {str(key): str(name) for key, name in names.items()}
    except (OSError, TightfitError, ValueError, AttributeError):
        return {}


def _write(chosen: Mapping[str, str]) -> None:
    """If the file cannot be written, only this process remembers."""
    file = cache_folder() / "autotune.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps(chosen, indent=1, sort_keys=True))


def turn_seconds(work: Callable[[], Any], device: Any) -> float:
    """Seconds per call of `work` on a torch device, or on the CPU if `device` is None.

    On a GPU this is the mean of many calls between two waits: a single short call would measure its launch
    and the wait.
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
