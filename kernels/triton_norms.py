"""kernels/norms.py on a GPU, in Triton: group norm and SiLU in one kernel. Without triton its function fails
when it is called (triton_weights.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import Norm
from .triton_weights import constexpr, jit, tl


def group_norm_silu_triton(x: Tensor, norm: Norm, block: int = 1024, **launch: int) -> Tensor:
    """silu(group_norm(x)), in the dtype and layout of `x` (batch, channels, h, w): fp32, fp16 or bf16,
    contiguous or channels_last. Statistics and values are fp32 and rounded once.

    A program does one group of one sample, `block` values at a time, a power of 2; `launch` is triton's
    num_warps and num_stages. It needs no memory but the answer's. Raises ValueError for other layouts, and
    for weights that do not fit.
    """
    groups, weight, bias, eps = norm
    samples, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
    if any(part.shape != (channels,) or not part.is_contiguous() for part in (weight, bias)):
        raise ValueError(f"weight and bias have one value for each of {channels} channels, in a row")
    last = not x.is_contiguous()
    if last and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"strides {x.stride()} of shape {tuple(x.shape)} are neither contiguous nor channels_last"
        )
    out = torch.empty_like(x)
    _normalise[groups, samples](
        out, x, weight, bias, pixels, eps, channels // groups, groups, last, block, **launch
    )
    return out


@jit
def _added(a, b):
    return a + b


@jit
def _normalise(
    out, x, weight, bias, pixels, eps, width: constexpr, groups: constexpr, last: constexpr,
    block: constexpr,
):  # fmt: skip
    """`width` is the channels of a group. Sums are of what differs from the group's first value, so that a
    large mean takes no digits from the variance."""
    group, place = tl.program_id(0), tl.arange(0, block)
    begin = tl.program_id(1).to(tl.int64) * pixels * (width * groups)
    begin += group * width if last else group.to(tl.int64) * width * pixels
    first, count = tl.load(x + begin).to(tl.float32), pixels * width
    sums, squares = tl.full((block,), 0, tl.float32), tl.full((block,), 0, tl.float32)
    for start in range(0, count, block):
        e = start + place
        at = (e // width).to(tl.int64) * (width * groups) + e % width if last else e
        value = tl.load(x + begin + at, mask=e < count, other=0).to(tl.float32)
        value = tl.where(e < count, value - first, 0.0)
        sums += value
        squares += value * value
    mean = tl.reduce(sums, 0, _added) / count
    variance = tl.reduce(squares, 0, _added) / count - mean * mean
    factor = 1.0 / tl.sqrt(tl.where(variance > 0.0, variance, 0.0) + eps)
    for start in range(0, count, block):
        e = start + place
        at = (e // width).to(tl.int64) * (width * groups) + e % width if last else e
        channel = group * width + (e % width if last else e // pixels)
        value = tl.load(x + begin + at, mask=e < count, other=0).to(tl.float32)
        value = (value - first - mean) * factor
        value *= tl.load(weight + channel, mask=e < count, other=0).to(tl.float32)
        value += tl.load(bias + channel, mask=e < count, other=0).to(tl.float32)
        value = value / (1.0 + tl.exp(-value))
        tl.store(out + begin + at, value.to(out.dtype.element_ty), mask=e < count)
