"""Linears and convolutions in integers. The weights are stored in 8 bits; inputs are quantised to 8 bits in
each call.

    value  = (code - zero) * scale             codes -128..127; a scale for each row of a linear's input,
                                               whose zero is 0, or a scale and a zero for each sample of a
                                               convolution's: SiLU's answers are lopsided
    answer = sum of (code - zero) * code of the weight * scale of the row or sample
             * scale of the output channel + bias

The sums are exact: an int32 holds those of MOST products. Weights are in the format int8 of
kernels/formats.py: `packed` int8 (out, taps x in) and `scale` fp16 (out, 1). A row or sample with a value
that is not finite gives an answer that is not finite. The plain versions run on any device. Those of oneDNN,
which is part of torch, need weights packed beforehand, and an x86 CPU with VNNI: without it their sums
saturate. Triton's are in triton_int8.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .formats import from_rows

Pair = tuple[int, int]
MOST = (2**31 - 1) // (255 * 127)
_LEAST = 1e-30  # the smallest scale, so that the codes of a row of zeros are zeros
AT_ONCE = 2**18  # values quantised at a time on a CPU, few enough to stay in its caches


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, …) → int8 codes -127..127, in memory as `x` is, and fp32 scales (rows, 1, …). ValueError for an
    `x` without values."""
    scale = scales(x)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def quantise_samples(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, …) → int8 codes, in memory as `x` is, fp32 scales and int32 zeros (batch, 1, …). ValueError as
    above."""
    scale, zero = scales_and_zeros(x)
    return (x / scale).round_().add_(zero).clamp_(-128, 127).to(torch.int8), scale, zero


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(…, in) → (…, out), in the dtype of `x`. The plain version: fp64 holds every sum exactly.

    Raises ValueError for shapes that do not fit, or are empty.
    """
    rows = x.reshape(-1, x.shape[-1])
    sides(rows[..., None, None], packed, scale)
    codes, factor = quantise_rows(rows)
    sums = functional.linear(codes.double(), packed.double())
    out = sums.float() * factor * scale.float().view(-1)
    return _biased(out, bias).to(x.dtype).view(*x.shape[:-1], len(packed))


def conv2d_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> Tensor:
    """(batch, in, h, w) → (batch, out, h', w'), in the dtype of `x`. The plain version: fp64 holds every sum
    exactly.

    Raises ValueError for shapes that are empty or do not fit, such as those of grouped convolutions.
    """
    sides(x, packed, scale, kernel_size, stride, padding)
    codes, factor, zero = quantise_samples(x)
    weight = from_rows(packed, (len(packed), x.shape[1], *kernel_size))
    sums = functional.conv2d(codes.double() - zero, weight.double(), None, stride, padding)
    out = sums.float() * factor * scale.float().view(-1, 1, 1)
    return _biased(out, None if bias is None else bias[:, None, None]).to(x.dtype)


def weight_sums(packed: Tensor) -> Tensor:
    """int32 (out): the sum of each output channel's codes. A zero other than 0 adds itself times this sum to
    every answer."""
    return packed.sum(1, dtype=torch.int32)


def pack_linear(packed: Tensor) -> Tensor:
    """Stored codes as oneDNN wants them, opaque, for `linear_int8_onednn`."""
    return torch.ops.onednn.qlinear_prepack(packed, None)


def linear_int8_onednn(x: Tensor, ready: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_int8` of packed weights. A token's scale is rounded to the dtype of `x`, as it multiplies the
    answer once that is in it, so that in 16 bits a code may be off by one.
    """
    rows = x.reshape(-1, x.shape[-1])
    codes, factor = torch.empty(rows.shape, dtype=torch.uint8), rows.new_empty(len(rows), 1)
    least = max(_LEAST, torch.finfo(x.dtype).tiny)
    for part in _pieces(len(rows), rows.shape[1]):
        # The largest and the smallest: the infinity norm takes four times as long as both. fp32 in between,
        # as torch makes integers of halves one by one.
        low, high = rows[part].amin(1, keepdim=True), rows[part].amax(1, keepdim=True)
        torch.maximum(high, low.neg_(), out=factor[part]).div_(127).clamp_min_(least)
        values = rows[part].to(torch.float32, copy=True).div_(factor[part])
        codes[part] = values.round_().clamp_(-127, 127).add_(128)
        del values
    many, zeros = scale.float().view(-1), torch.zeros(len(scale), dtype=torch.int64)
    rest = 1.0, 0, _made(x), "none", [], ""
    out = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, ready, many, zeros, None, *rest).to(x.dtype)
    out = out.mul_(factor) if bias is None else torch.addcmul(bias, out, factor, out=out)
    return out.view(*x.shape[:-1], -1)


def pack_conv2d(packed: Tensor, in_channels: int, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Stored codes as oneDNN wants them, opaque, for `conv2d_int8_onednn`."""
    # Any zero other than 0. oneDNN keeps the weights' sums beside them only for such a zero, and would pack
    # again in each call.
    weight = from_rows(packed, (len(packed), in_channels, *kernel_size))
    ones, zero = torch.ones(len(packed)), 128
    return torch.ops.onednn.qconv_prepack(
        weight, ones, 1.0, zero, list(stride), list(padding), [1, 1], 1, None
    )


def conv2d_int8_onednn(
    x: Tensor,
    ready: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> Tensor:
    """`conv2d_int8` of packed weights, sample by sample. `x` is channels_last, and so is the answer.

    For kernels and strides that are square. With AMX oneDNN 3.12 answers wrongly for some others, and for a
    stride over 1 whose answer is one pixel wide (patches.never_narrow).
    """
    many, zeros = scale.float().view(-1), torch.zeros(len(scale), dtype=torch.int64)
    rest = list(stride), list(padding), [1, 1], 1, 1.0, 0, _made(x), "none", [], ""
    bias, answers = None if bias is None else bias.float(), None
    for i, sample in enumerate(x.permute(0, 2, 3, 1).flatten(1, 2)):
        factor, zero = (number.item() for number in scales_and_zeros(sample[None]))
        codes = torch.empty(sample.shape, dtype=torch.uint8)
        for part in _pieces(*sample.shape):
            values = sample[part].to(torch.float32, copy=True).div_(factor)
            codes[part] = values.round_().add_(zero + 128).clamp_(0, 255)
            del values
        codes = codes.view(1, *x.shape[2:], -1).permute(0, 3, 1, 2)
        one = torch.ops.onednn.qconv2d_pointwise(
            codes, factor, zero + 128, ready, many, zeros, bias, *rest
        ).to(x.dtype)
        if len(x) == 1:
            return one
        if answers is None:
            answers = torch.empty((len(x), *one.shape[1:]), dtype=x.dtype, memory_format=torch.channels_last)
        answers[i] = one[0]
        del one, codes
    assert answers is not None
    return answers


def _made(x: Tensor) -> torch.dtype:
    """The dtype that oneDNN converts its sums to. To fp16 it would do so in a slow loop."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _pieces(rows: int, row: int) -> Iterator[slice]:
    step = max(1, AT_ONCE // row)
    return (slice(start, start + step) for start in range(0, rows, step))


def scales(x: Tensor) -> Tensor:
    """fp32 (rows, 1, …)."""
    _nothing(x)
    most = torch.linalg.vector_norm(x, torch.inf, tuple(range(1, x.ndim)), keepdim=True, dtype=torch.float32)
    return most.clamp_min_(_LEAST).div_(127)


def scales_and_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 and int32, (batch, 1, …): the smallest value becomes -128, the largest 127, and 0 has a code."""
    _nothing(x)
    dims = tuple(range(1, x.ndim))
    if len(x) == 1:  # a third of the time that two passes take
        ends = (end.view([1] * x.ndim) for end in x.aminmax())
    else:
        ends = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    low, high = (end.float() for end in ends)
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    scale = (high - low).clamp_min_(_LEAST).div_(255)
    return scale, (-low / scale).nan_to_num_(0, 0, 0).round_().sub_(128).to(torch.int32)


def _nothing(x: Tensor) -> None:
    if not x.numel():
        raise ValueError(f"an input of shape {tuple(x.shape)} has nothing to quantise")


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out.add_(bias.float())


def empty_answer(
    x: Tensor, packed: Tensor, scale: Tensor, kernel_size: Pair, stride: Pair, padding: Pair
) -> Tensor:
    """An uninitialised answer of a convolution of `x`, channels_last if `x` is. Raises ValueError for shapes
    that do not fit."""
    shape = (len(x), len(packed), *sides(x, packed, scale, kernel_size, stride, padding))
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def channels_last(x: Tensor) -> bool:
    """Whether `x` is channels_last only. An image of one channel is contiguous too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def sides(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    kernel_size: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> Pair:
    """Height and width of the answer. Raises ValueError for shapes that do not fit."""
    row = x.shape[1] * kernel_size[0] * kernel_size[1]
    if packed.shape[1] != row or scale.shape != (len(packed), 1):
        raise ValueError(
            f"{x.shape[1]} channels and {kernel_size} taps need rows of {row} with one scale, "
            f"not {tuple(packed.shape)} and {tuple(scale.shape)}; grouped convolutions are not supported"
        )
    if row > MOST:
        raise ValueError(f"sums of {row} products do not fit into 32 bits, which hold {MOST}")
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in (0, 1))
    if 0 in x.shape or height < 1 or width < 1:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} has no answer with {kernel_size} taps and padding {padding}"
        )
    return height, width
