"""Scratch that torch's CPU kernels allocate beside their output and free before they return.

Each formula was found with torch's profiler, which sees every allocation (torch 2.13, oneDNN, AVX-512, two
threads). `tests/runtime/backends/torch/test_meter.py` holds them against it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ....kernels import onednn
from ....kernels.attention import sdpa_cpu_bytes
from ....kernels.dequantise import look_up_rows
from ....kernels.int8 import AT_ONCE
from .quantised import CONV2D_INT8, LINEAR_INT8, LINEAR_NF4, dequantised_bytes, scales_bytes

SDPA = torch.ops.aten.scaled_dot_product_attention.default
CONVOLUTION = torch.ops.aten.conv2d.default
GROUP_NORM = torch.ops.aten.group_norm.default


def own_bytes(func: Any, args: Any, out: Any) -> int:
    """Scratch bytes of the operator `func` on a CPU, for the shapes of `args` and `out`, which may be on
    meta."""
    formula = _FORMULAS.get(func)
    return formula(args, out) if formula else 0


def _attention(args: Any, _: Any) -> int:
    (batch, heads, n, d), m = args[0].shape, args[1].shape[2]
    return sdpa_cpu_bytes(batch * heads, n, m, d, args[0].dtype, torch.get_num_threads())


def _convolution(args: Any, out: torch.Tensor) -> int:
    """oneDNN's copies of input, weight and output with channels in blocks. Those of input and weight are
    freed before the output is copied back. A 1x1 convolution in half precision also keeps fp32 sums, one set
    per thread."""
    x, weight = args[:2]
    # torch's own kernel by im2col (use_mkldnn).
    if x.dtype == torch.float32 and x.shape[0] == 1 and x.numel() <= 20480:
        return 0 if weight.shape[2] == 1 else 4 * weight[0].numel() * out.shape[2] * out.shape[3]
    # Then torch makes the input channels-last too, and oneDNN copies only the weight.
    if channels_last(weight) or (channels_last(x) and weight.shape[2:] == (1, 1)):
        copied = 0 if x.is_contiguous(memory_format=torch.channels_last) else x.nbytes
        return copied + _up(weight.shape[0], 16) * weight[0].numel() * weight.element_size()
    size, block = x.element_size(), _block()
    answer = out.numel() // out.shape[1] * _up(out.shape[1], block) * size
    weights = weight[0, 0].numel() * _up(weight.shape[0], block) * _up(weight.shape[1], block) * size
    picture = x.numel() // x.shape[1] * _up(x.shape[1], block if x.shape[1] >= block else 1) * size
    sums = 4 * torch.get_num_threads() * out.numel() if size == 2 and weight.shape[2] == 1 else 0
    return max(picture + weights + answer + sums - out.nbytes, answer)


def _convolution_packed(args: Any, _: Any) -> int:
    """A copy of the input with channels last."""
    x = args[0]
    return 0 if x.is_contiguous(memory_format=torch.channels_last) else x.nbytes


def channels_last(x: torch.Tensor) -> bool:
    """Whether torch would compute a convolution of `x` with channels last: of its strides, channels' reach
    the least, then those of columns, of rows, and of pictures. torch's own function imports sympy.

    Where sides are 1, strides may say either; a single value a picture is not with channels last.
    """
    if x.ndim != 4 or 0 in x.shape or not x.stride(1):
        return False
    reach = 0
    for place in (1, 3, 2):
        if x.stride(place) < reach:
            return False
        reach = x.stride(place) * x.shape[place]
    return x.stride(0) >= reach != x.stride(1)


def _upsampling(args: Any, out: torch.Tensor) -> int:
    """Channels-last copies of input and output, where the output is small."""
    return args[0].nbytes + out.nbytes if max(out.shape[2:]) <= 64 else 0


def _dequantising(args: Any, _: Any) -> int:
    """Scales and what moves the groups; before them places in NF4's table."""
    out, _, scale, zero, _, kind = args[:6]
    places = 4 * look_up_rows(out.shape) * out.shape[1] if kind == "nf4" else 0
    return max(places, scales_bytes(out, scale, zero, kind))


def _linear_int8(args: Any, out: torch.Tensor) -> int:
    """The codes and tokens' scales; beside them what makes the codes of some tokens, before there is an
    answer, or the scales of channels."""
    x, channels = args[0], out.shape[-1]
    codes = x.numel() + x.numel() // x.shape[-1] * x.element_size()
    making = 4 * min(x.numel(), max(1, AT_ONCE // x.shape[-1]) * x.shape[-1])
    return codes + max(12 * channels, making - out.nbytes)


def _convolution_int8(args: Any, out: torch.Tensor) -> int:
    """One sample's codes; beside them the buffers that make the codes, or the sample's output before it is
    copied to the others."""
    x = args[0]
    codes = x[0].numel()
    piece = min(codes, max(1, AT_ONCE // x.shape[1]) * x.shape[1])
    making = 4 * piece
    if len(x) == 1:
        return codes + max(0, making - out.nbytes)
    return codes + max(making, out[0].nbytes)


_FORMULAS: dict[Any, Callable[[Any, Any], int]] = {
    SDPA: _attention,
    CONVOLUTION: _convolution,
    onednn.CONVOLUTION: _convolution_packed,
    torch.ops.aten.upsample_nearest2d.vec: _upsampling,
    torch.ops.tightfit.dequantise.default: _dequantising,
    LINEAR_INT8: _linear_int8,
    CONV2D_INT8: _convolution_int8,
    LINEAR_NF4: dequantised_bytes,
}


@functools.cache
def _block() -> int:
    """Channels in one of oneDNN's blocks: as many floats as a vector register holds."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
