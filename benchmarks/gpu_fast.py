"""What a GPU's own fast paths give a U-Net, each beside what runs today: group norm and SiLU in one kernel,
the whole call as a CUDA graph, repeated blocks compiled, weights that stream while others compute.

No plan takes the graph or the compiled blocks: no GPU has run them yet. Each function yields rows as the
sections of gpu_sections.py do, with `wrong` answers, `seconds`, and `predicted` beside `measured` bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.norms import fused_runs, group_norm_silu
from ..runtime.backends.torch import dryrun
from ..runtime.backends.torch.backend import TorchSession
from ..runtime.backends.torch.patches import BLOCKS
from ..runtime.backends.torch.tf32 import tf32_off
from .gpu_card import Card
from .gpu_probe import SUMMED, _judged, off
from .layers import microseconds

Row = dict[str, Any]
# Batch, channels, height, width: the U-Net's largest, widest and deepest maps at 512x512, and the VAE's.
MAPS = ((2, 320, 64, 64), (2, 960, 64, 64), (2, 1280, 16, 16), (1, 512, 128, 128), (1, 128, 512, 512))
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
_TURNS = 3
_RECOMPILED = 64  # a block is compiled once for each shape, and torch gives up after 8


@torch.inference_mode()
def norms(card: Card) -> Iterator[Row]:
    """Microseconds of group norm and SiLU: as two operators, with the answer overwritten, and at once."""
    from ..kernels import triton_norms  # importing triton costs memory

    device = torch.device(card.device)
    fused = card.is_gpu and fused_runs(device)
    if card.is_gpu and not fused:
        yield {"kernel": "group norm, SiLU", "failed": "is not right, or does not run: two operators do it"}
    for shape in MAPS:
        for dtype in (torch.float16, torch.bfloat16) if card.is_gpu else (torch.float32,):
            for name, layout in LAYOUTS.items():
                x = torch.randn(shape, device=device).add(1).to(dtype).contiguous(memory_format=layout)
                weight, bias = torch.randn(2, shape[1], device=device).to(dtype)
                norm = 32, weight, bias, 1e-5
                ways: dict[str, Callable[[], Tensor]] = {
                    "two operators us": lambda x=x, n=norm: functional.silu(functional.group_norm(x, *n)),
                    "overwritten us": partial(group_norm_silu, x, norm),
                }
                for block, warps in BLOCKS if fused else ():
                    run = partial(triton_norms.group_norm_silu_triton, x, norm, block, num_warps=warps)
                    ways[f"at once, {block} us"] = run
                exact = functional.silu(
                    functional.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
                )
                row: Row = {"kernel": f"group norm, SiLU {shape} {dtype}, channels {name}"}
                row |= _judged([off(way(), exact) for way in ways.values()], SUMMED[dtype])
                yield row | {name: microseconds(way, card.device) for name, way in ways.items()}


def graphs(
    card: Card, session: TorchSession, arrays: Mapping[str, Any], predicted_bytes: int
) -> Iterator[Row]:
    """A call as a CUDA graph beside the same call operator by operator. `predicted_bytes` is what the call
    takes beside the weights: a graph keeps as much for itself."""
    if card.device != "cuda":
        yield {"pipeline": "CUDA graph", "skipped": "CUDA alone has graphs of what was launched"}
        return
    if session.streamer:
        yield {
            "pipeline": "CUDA graph",
            "skipped": "weights that stream are copied by the host, call by call",
        }
        return
    call = calling(session, arrays)
    with torch.inference_mode(), tf32_off(session.device):
        right, plain = call().clone(), _seconds(card, call)
        card.clear()
        before = torch.cuda.memory_reserved()
        graph, answer = captured(call)
        card.clear()  # what warming up has left
        row: Row = {
            "pipeline": "CUDA graph",
            "predicted": predicted_bytes,
            "measured": (kept := torch.cuda.memory_reserved() - before),
            "error": predicted_bytes / kept - 1 if kept else 0.0,
        }
        graph.replay()
        row |= _judged([off(answer, right)], SUMMED[session.dtype])
        seconds = _seconds(card, graph.replay)
    yield row | {"seconds": seconds, "times": round(seconds / plain, 3), "of": "each operator launched"}


def captured(call: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """The graph of a call, and the answer that it writes anew each time it is replayed. Three calls before
    choose kernels, which may allocate and wait."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    with torch.cuda.graph(graph):
        answer = call()
    return graph, answer


def compiled(card: Card, session: TorchSession, arrays: Mapping[str, Any]) -> Iterator[Row]:
    """Repeated blocks compiled, each once for all that are alike, beside the same call as it is: seconds, and
    those that compiling took."""
    call = calling(session, arrays)
    blocks = repeated(session.module)
    with torch.inference_mode(), tf32_off(session.device):
        right, plain = call().clone(), _seconds(card, call)
        torch._dynamo.config.recompile_limit = _RECOMPILED
        for block in blocks:
            block.compile(dynamic=False)
        try:
            start = time.perf_counter()
            answer = call()
            took = time.perf_counter() - start
            seconds = _seconds(card, call)
        finally:
            for block in blocks:
                block._compiled_call_impl = None
    row = {"pipeline": f"{len(blocks)} blocks compiled", "compiling s": round(took, 1)}
    row |= _judged([off(answer, right)], SUMMED[session.dtype])
    yield row | {"seconds": seconds, "times": round(seconds / plain, 3), "of": "the same blocks as they are"}


def repeated(module: Any) -> list[Any]:
    """The blocks that diffusers says a network repeats, and its ResNet blocks."""
    names = {*getattr(module, "_repeated_blocks", ()), "ResnetBlock2D"}
    return [part for part in module.modules() if type(part).__name__ in names]


def overlap(
    card: Card, resident: TorchSession, streamed: TorchSession, arrays: Mapping[str, Any], moved_bytes: int
) -> Iterator[Row]:
    """How much of the copies of `moved_bytes` a streamed call hides behind its products: 1 is all, or as much
    as there are products to hide it behind."""
    with torch.inference_mode(), tf32_off(resident.device):
        computing, both = (_seconds(card, calling(one, arrays)) for one in (resident, streamed))
        right, answer = (calling(one, arrays)() for one in (resident, streamed))
        copying = _copying(card, moved_bytes)
    hidden = (computing + copying - both) / min(computing, copying)
    row: Row = {"pipeline": "streamed", "computing s": computing, "copying s": copying, "seconds": both}
    yield row | {"hidden": round(hidden, 2), **_judged([off(answer, right)], SUMMED[resident.dtype])}


def _copying(card: Card, count: int) -> float:
    """Seconds that the host's memory takes to send so many bytes, in pinned pieces of 64 MiB."""
    piece = torch.empty(min(count, 2**26), dtype=torch.uint8, pin_memory=card.is_gpu)
    there = torch.empty_like(piece, device=card.device)
    return _seconds(card, lambda: there.copy_(piece, non_blocking=True)) * count / max(len(piece), 1)


def calling(session: TorchSession, arrays: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The session's first answer, of inputs that are on its device already."""
    tensors = {
        name: dryrun.on_device(torch.from_numpy(np.ascontiguousarray(array)), session.dtype, session.device)
        for name, array in arrays.items()
    }
    return lambda: session.forward(session.module, **tensors)[0]


def _seconds(card: Card, call: Callable[[], Any]) -> float:
    """The least of a few turns, after one that may choose kernels."""
    least = float("inf")
    for turn in range(_TURNS + 1):
        card.clear() if turn == 0 else None
        start = time.perf_counter()
        call()
        if card.is_gpu:
            card.torch.synchronize()
        least = min(least, time.perf_counter() - start) if turn else least
    return float(f"{least:.4g}")  # not 0, which `overlap` divides by
