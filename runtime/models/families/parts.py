"""Layers that answer some tokens at a time, where their answers are several times as wide as a token. Those
that are traced answer all at once, as a graph has no loop over as many tokens as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# Bytes that such a layer answers at a time. At 1024x1024 a single block's of Flux.2 klein answers 243 MiB in
# 16 bits: a call took 588 MiB beside the weights, and takes 384. Each part dequantises a quantised weight.
AT_ONCE = 2**26


def is_traced() -> bool:
    """Whether torch's exporter follows the call. Then nothing is written into an array that is there: in a
    graph that is a copy of it."""
    import torch

    return torch.compiler.is_exporting()


def parts(tokens: Any, width: int) -> Iterator[slice]:
    """Some tokens (batch, tokens, …) at a time, by how many values are made of each."""
    batch, length, _ = tokens.shape
    step = max(1, AT_ONCE // (batch * width * tokens.element_size()))
    return (slice(start, start + step) for start in range(0, length, step))


def in_parts(forward: Callable[[Any], Any], width: int) -> Callable[[Any], Any]:
    """A feed-forward layer, whose hidden values are so wide, for some tokens at a time."""

    def some_at_a_time(tokens: Any) -> Any:
        if is_traced():
            return forward(tokens)
        out = tokens.new_empty(tokens.shape)
        for some in parts(tokens, width):
            out[:, some] = forward(tokens[:, some])
        return out

    return some_at_a_time
