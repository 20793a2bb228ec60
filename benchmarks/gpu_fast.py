"""What a GPU's own fast paths give a U-Net, each beside what runs today: group norm and SiLU in one kernel,
the whole call as a CUDA graph, repeated blocks compiled, weights that stream while others compute.

No plan takes any of it unasked (--cuda-graphs, --compile): no GPU has run it yet. Each yields rows as the
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
from ..runtime.errors import first_line
from .gpu_card import Card
from .gpu_probe import SUMMED, _judged, off
from .layers import microseconds

Row = dict[str, Any]
# Batch, channels, height, width: the U-Net's largest, widest and deepest maps at 512x512, and the VAE's.
MAPS = ((2, 320, 64, 64), (2, 960, 64, 64), (2, 1280, 16, 16), (1, 512, 128, 128), (1, 128, 512, 512))
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
_TURNS = 3


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
    card: Card, plain: TorchSession, recorded: TorchSession, arrays: Mapping[str, Any], predicted_bytes: int
) -> Iterator[Row]:
    """A call as a CUDA graph, as plans with --cuda-graphs have it, beside the same call operator by operator.
    `predicted_bytes` is what plans count of a graph, which keeps what its call takes."""
    right, seconds_plain = plain(**arrays)[0], _seconds(card, lambda: plain(**arrays))
    recorded(**arrays)  # as it is
    card.clear()
    before = torch.cuda.memory_reserved()
    recorded(**arrays)
    card.clear()
    row: Row = {
        "pipeline": "CUDA graph",
        "predicted": predicted_bytes,
        "measured": (kept := torch.cuda.memory_reserved() - before),
        "error": predicted_bytes / kept - 1 if kept else 0.0,
        **({"failed": recorded.notices[-1]} if recorded.notices else {}),
    }
    answer = recorded(**arrays)[0]
    row |= _judged([off(torch.from_numpy(answer), torch.from_numpy(right))], SUMMED[plain.dtype])
    seconds = _seconds(card, lambda: recorded(**arrays))
    yield row | {
        "seconds": seconds,
        "times": round(seconds / seconds_plain, 3),
        "of": "each operator launched",
    }


def compiled(
    card: Card, plain: TorchSession, blocks: TorchSession, arrays: Mapping[str, Any], predicted_seconds: float
) -> Iterator[Row]:
    """Repeated blocks compiled, as plans with --compile have them, beside the same call as it is: seconds,
    and those that compiling took."""
    right, seconds_plain = plain(**arrays)[0], _seconds(card, lambda: plain(**arrays))
    start = time.perf_counter()
    if not card.is_gpu:  # whose first call is counted, operator by operator
        blocks(**arrays)
    answer = blocks(**arrays)[0]
    took = time.perf_counter() - start
    seconds = _seconds(card, lambda: blocks(**arrays))
    row: Row = {"pipeline": "blocks compiled", "compiling s": (round(predicted_seconds, 1), round(took, 1))}
    row |= _judged([off(torch.from_numpy(answer), torch.from_numpy(right))], SUMMED[plain.dtype])
    yield row | {
        "seconds": seconds,
        "times": round(seconds / seconds_plain, 3),
        "of": "the same blocks as they are",
    }


def layouts(card: Card, session: TorchSession, arrays: Mapping[str, Any]) -> Iterator[Row]:
    """A U-Net's call as it is, with channels last, with q, k and v in one product, and with both: ms, bytes
    that the call takes, and decibels beside the first. No plan takes any but the first on a GPU."""
    module, call, right = session.module, calling(session, arrays), None
    assert module is not None
    move: Any = module.to
    with torch.inference_mode(), tf32_off(session.device):
        for name in ("as it is", "channels last", "q, k, v fused", "both"):
            try:
                if name == "channels last":
                    move(memory_format=torch.channels_last)
                elif name == "q, k, v fused":
                    move(memory_format=torch.contiguous_format)
                    fuse(module)
                elif name == "both":
                    move(memory_format=torch.channels_last)
                answer = call()
                right = answer.clone() if right is None else right
                row: Row = {"pipeline": f"U-Net, {name}", "ms": round(1e3 * _seconds(card, call), 3)}
                if card.is_gpu:
                    row["bytes"] = card.most(call)[0]
                if name != "as it is":
                    bound = SUMMED[session.dtype]
                    row |= _judged([off(answer, right)], bound) | {"dB": _decibels(answer, right)}
                yield row
            except Exception as error:  # one way that fails leaves the others
                yield {"pipeline": f"U-Net, {name}", "failed": f"{type(error).__name__}: {first_line(error)}"}


def fuse(module: torch.nn.Module) -> None:
    """Let each attention multiply by the weights of q, k and v at once, of k and v where it reads texts."""
    for part in module.modules():
        if type(part).__name__ == "Attention" and not hasattr(part, "to_k_ip"):
            names = ("to_q", "to_k", "to_v")
            layers = [getattr(part, name) for name in names]
            is_own = len({layer.in_features for layer in layers}) == 1 and not part.is_cross_attention
            joined = _Joined(layers if is_own else layers[1:])
            for number, name in enumerate(names if is_own else names[1:]):
                setattr(part, name, _PartOf(joined, number))


class _Joined:
    """Linears of one input as one product; what they answer is kept until the last was asked for."""

    def __init__(self, layers: list[Any]) -> None:
        self.count = len(layers)
        self.weight = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self._answers: tuple[Tensor, ...] = ()

    def answer(self, x: Tensor, number: int) -> Tensor:
        if number == 0:
            self._answers = functional.linear(x, self.weight, self.bias).chunk(self.count, -1)
        answer = self._answers[number]
        if number == self.count - 1:
            self._answers = ()
        return answer


class _PartOf(torch.nn.Module):
    def __init__(self, joined: _Joined, number: int) -> None:
        super().__init__()
        self._joined, self._number = joined, number

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) → (batch, n, out)."""
        return self._joined.answer(x, self._number)


def _decibels(answer: Tensor, right: Tensor) -> float:
    """Of the largest value, 99 at most."""
    error = (answer.double() - right.double()).square().mean().sqrt()
    return round(min(99.0, float(20 * torch.log10(right.double().abs().max() / error.clamp(min=1e-30)))), 1)


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
