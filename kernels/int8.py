"""Linears and convolutions in whole numbers: inputs are quantised to 8 bits as they come, as the weights already are.

    value  = code * scale                      codes -127..127; a scale for each row of a linear's input, or sample of a batch
    answer = sum of code * code * scale of the row or sample * scale of the output channel + bias

The sums are exact: an int32 holds those of MOST products. Weights are stored as kernels/formats.py says, in its format int8:
`packed` int8 (out, taps x in) and `scale` fp16 (out, 1). A row or sample with a value that is not finite has an answer that is not.
The plain versions work on any device. Those of Triton have tensor cores multiply: they compile for compute capability 8.0 and
later, not for 7.5, and without triton fail when they are called (kernels/triton_weights.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .formats import from_rows
from .triton_weights import constexpr, jit, tl

Pair = tuple[int, int]
MOST = (2**31 - 1) // 127**2
_LEAST = 1e-30  # a row's largest value counts for no less, so that the codes of zeros are zeros


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, …) → int8 codes, in memory as `x` is, and fp32 scales (rows, 1, …). Raises ValueError for an `x` without values."""
    scale = _scales(x)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def quantise_rows_triton(x: Tensor, block: int = 1024, **launch: int) -> tuple[Tensor, Tensor]:
    """The same of an `x` that is contiguous or channels_last, without a copy of it in fp32. `block` values to a program."""
    scale, codes, size = _scales(x), torch.empty_like(x, dtype=torch.int8), x[0].numel()
    if codes.stride() != x.stride():
        raise ValueError(f"strides {x.stride()} of shape {tuple(x.shape)} are neither contiguous nor channels_last")
    _encode[len(x), -(-size // block)](codes, x, scale, size, block, **launch)
    return codes, scale


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(…, in) → (…, out), in the dtype of `x`: the plain version. Raises ValueError for shapes that do not fit, or are empty."""
    rows = x.reshape(-1, x.shape[-1])
    _sides(rows[..., None, None], packed, scale)
    codes, factor = quantise_rows(rows)
    (m, k), n = codes.shape, len(packed)
    # Of what shapes torch takes on GPUs; on a CPU it takes all, and answers some wrongly, as those of k = 1 (torch 2.13).
    if m > 16 and k % 8 == 0 and n % 8 == 0:
        sums = torch._int_mm(codes, packed.T)
    else:
        sums = functional.linear(codes.double(), packed.double())
    out = sums.float() * factor * scale.float().view(-1)
    return _biased(out, bias).to(x.dtype).view(*x.shape[:-1], n)


def linear_int8_triton(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, tile: tuple[int, int, int] = (64, 64, 64), **launch: int
) -> Tensor:
    """The same, as a convolution of samples of one pixel each, whose `tile` and `launch` these are."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    return conv2d_int8_triton(rows, packed, scale, bias, (1, 1), (1, 1), (0, 0), tile, **launch).view(*x.shape[:-1], len(packed))


def conv2d_int8(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel_size: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0)
) -> Tensor:
    """(batch, in, h, w) → (batch, out, h', w'), in the dtype of `x`: the plain version, whose fp64 holds every sum.

    Raises ValueError for shapes that are empty or do not fit, as those of grouped convolutions, which there are none of.
    """
    _sides(x, packed, scale, kernel_size, stride, padding)
    codes, factor = quantise_rows(x)
    weight = from_rows(packed, (len(packed), x.shape[1], *kernel_size))
    sums = functional.conv2d(codes.double(), weight.double(), None, stride, padding)
    out = sums.float() * factor * scale.float().view(-1, 1, 1)
    return _biased(out, None if bias is None else bias[:, None, None]).to(x.dtype)


def conv2d_int8_triton(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    tile: tuple[int, int, int] = (128, 64, 64),
    **launch: int,
) -> Tensor:
    """The same, with an answer that is channels_last if `x` is: one product, which finds each tap's inputs where they are.

    `tile` is how many output pixels, output channels and input channels of a tap a program multiplies at a time, powers of 2 from
    16, 16 and 32; `launch` is triton's num_warps and num_stages.
    """
    (batch, channels, *sides), n = x.shape, len(packed)
    height, width = _sides(x, packed, scale, kernel_size, stride, padding)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    codes, factor = quantise_rows_triton(x if last else x.contiguous())
    codes = codes.contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((batch, n, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    pixels = batch * height * width
    _convolve[-(-pixels // tile[0]), -(-n // tile[1])](
        *(out, codes, packed.contiguous(), factor, scale.contiguous(), bias, pixels, n, channels, *sides, height, width),
        *(out.stride(0), out.stride(1), out.stride(3), *kernel_size, *stride, *padding, *tile),
        **launch,
    )
    return out


@jit
def _encode(codes, x, scale, size, block: constexpr):
    """One part of one row. Adding and taking away 1.5 * 2**23 rounds as torch does, halves to even."""
    place = tl.program_id(1) * block + tl.arange(0, block)
    at = tl.program_id(0).to(tl.int64) * size + place
    values = tl.load(x + at, mask=place < size, other=0).to(tl.float32)
    values = tl.div_rn(values, tl.load(scale + tl.program_id(0)))
    tl.store(codes + at, ((values + 12582912.0) - 12582912.0).to(tl.int8), mask=place < size)


@jit
def _convolve(
    out, x, weight, factor, scale, bias, m_count, n_count, channels, in_height, in_width, height, width,
    of_sample, of_channel, of_pixel, taps_y: constexpr, taps_x: constexpr, stride_y: constexpr, stride_x: constexpr,
    pad_y: constexpr, pad_x: constexpr, block_m: constexpr, block_n: constexpr, block_k: constexpr,
):  # fmt: skip
    """Rows of the product are output pixels, columns output channels; `of_…` are the strides of `out`."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    sample, pixel = m // (height * width), m % (height * width)
    top, left = pixel // width * stride_y - pad_y, pixel % width * stride_x - pad_x
    blocks = (channels + block_k - 1) // block_k
    total = tl.full((block_m, block_n), 0, tl.int32)
    for step in range(0, taps_y * taps_x * blocks):  # noqa: PIE808  triton's range
        tap, k = step // blocks, step % blocks * block_k + tl.arange(0, block_k)
        y, z = top + tap // taps_x, left + tap % taps_x
        inside = (m < m_count) & (y >= 0) & (y < in_height) & (z >= 0) & (z < in_width)
        at = ((sample.to(tl.int64) * in_height + y) * in_width + z) * channels
        inputs = tl.load(x + at[:, None] + k[None, :], mask=inside[:, None] & (k < channels)[None, :], other=0)
        at = (n.to(tl.int64) * (taps_y * taps_x) + tap) * channels
        weights = tl.load(weight + at[:, None] + k[None, :], mask=(n < n_count)[:, None] & (k < channels)[None, :], other=0)
        total = tl.dot(inputs, tl.trans(weights), total, out_dtype=tl.int32)
    answer = total.to(tl.float32) * tl.load(factor + sample, mask=m < m_count, other=0)[:, None]
    answer *= tl.load(scale + n, mask=n < n_count, other=0).to(tl.float32)[None, :]
    if bias is not None:
        answer += tl.load(bias + n, mask=n < n_count, other=0).to(tl.float32)[None, :]
    at = (sample.to(tl.int64) * of_sample + pixel * of_pixel)[:, None] + n[None, :] * of_channel
    tl.store(out + at, answer.to(out.dtype.element_ty), mask=(m < m_count)[:, None] & (n < n_count)[None, :])


def _scales(x: Tensor) -> Tensor:
    if not x.numel():
        raise ValueError(f"an input of shape {tuple(x.shape)} has nothing to quantise")
    most = torch.linalg.vector_norm(x, torch.inf, tuple(range(1, x.ndim)), keepdim=True, dtype=torch.float32)
    return most.clamp_min_(_LEAST).div_(127)


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out.add_(bias.float())


def _sides(
    x: Tensor, packed: Tensor, scale: Tensor, kernel_size: Pair = (1, 1), stride: Pair = (1, 1), padding: Pair = (0, 0)
) -> Pair:
    """Height and width of the answer, of shapes that fit."""
    row = x.shape[1] * kernel_size[0] * kernel_size[1]
    if packed.shape[1] != row or scale.shape != (len(packed), 1):
        raise ValueError(
            f"{x.shape[1]} channels and {kernel_size} taps need rows of {row} with one scale, not {tuple(packed.shape)} and "
            f"{tuple(scale.shape)}; grouped convolutions are not supported"
        )
    if row > MOST:
        raise ValueError(f"sums of {row} products do not fit into 32 bits, which hold {MOST}")
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in (0, 1))
    if 0 in x.shape or height < 1 or width < 1:
        raise ValueError(f"an input of shape {tuple(x.shape)} has no answer with {kernel_size} taps and padding {padding}")
    return height, width
