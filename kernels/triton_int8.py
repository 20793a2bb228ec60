"""kernels/int8.py on a GPU, in Triton, on tensor cores.

Needs compute capability 8.0; kernels do not compile for 7.5. Without triton, functions fail when they are
called (triton_weights.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8 import Pair, channels_last, empty_answer, scales, scales_and_zeros, sides, weight_sums
from .triton_weights import constexpr, jit, tl


def encode_triton(x: Tensor, scale: Tensor, zero: Tensor | None, block: int = 1024, **launch: int) -> Tensor:
    """The codes of `x`, contiguous or channels_last, without a copy of it in fp32. A program has `block`
    values."""
    codes, size = torch.empty_like(x, dtype=torch.int8), x[0].numel()
    if codes.stride() != x.stride():
        raise ValueError(
            f"strides {x.stride()} of shape {tuple(x.shape)} are neither contiguous nor channels_last"
        )
    _encode[len(x), -(-size // block)](codes, x, scale, zero, size, block, **launch)
    return codes


def linear_int8_triton(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tile: tuple[int, int, int] = (64, 64, 64),
    **launch: int,
) -> Tensor:
    """`linear_int8`, as a convolution of samples of one pixel. `tile` and `launch` are the convolution's."""
    rows = x.reshape(-1, x.shape[-1], 1, 1).contiguous()
    sides(rows, packed, scale)
    factor = scales(rows)
    codes = encode_triton(rows, factor, None)
    out = rows.new_empty(len(rows), len(packed), 1, 1)
    _launch(out, codes, packed, factor, None, scale, None, bias, ((1, 1), (1, 1), (0, 0)), tile, launch)
    return out.view(*x.shape[:-1], len(packed))


def conv2d_int8_triton(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    sums: Tensor | None = None,
    tile: tuple[int, int, int] = (128, 64, 64),
    **launch: int,
) -> Tensor:
    """`conv2d_int8` as one matrix product, which reads the inputs of each tap in place. The answer is
    channels_last if `x` is.

    `sums` is `weight_sums(packed)`, if it is known. `tile` is how many output pixels, output channels and
    input channels of a tap a program multiplies at a time, powers of 2 from 16, 16 and 32. `launch` is
    triton's num_warps and num_stages.
    """
    out = empty_answer(x, packed, scale, kernel_size, stride, padding)
    factor, zero = scales_and_zeros(x)
    codes = encode_triton(x if channels_last(x) else x.contiguous(), factor, zero).contiguous(
        memory_format=torch.channels_last
    )
    sums = weight_sums(packed) if sums is None else sums
    _launch(out, codes, packed, factor, zero, scale, sums, bias, (kernel_size, stride, padding), tile, launch)
    return out


def _launch(
    out, codes, packed, factor, zero, scale, sums, bias, how: tuple[Pair, Pair, Pair], tile, launch
) -> None:
    pixels, n = out.numel() // out.shape[1], out.shape[1]
    _convolve[-(-pixels // tile[0]), -(-n // tile[1])](
        *(
            out,
            codes,
            packed.contiguous(),
            factor,
            zero,
            scale.contiguous(),
            sums,
            bias,
            pixels,
            n,
            *codes.shape[1:],
        ),
        *(*out.shape[2:], out.stride(0), out.stride(1), out.stride(3), *how[0], *how[1], *how[2], *tile),
        **launch,
    )


@jit
def _encode(codes, x, scale, zero, size, block: constexpr):
    """A part of a row. Adding and subtracting 1.5 * 2**23 rounds halves to even, as torch does."""
    place = tl.program_id(1) * block + tl.arange(0, block)
    at = tl.program_id(0).to(tl.int64) * size + place
    values = tl.load(x + at, mask=place < size, other=0).to(tl.float32)
    values = tl.div_rn(values, tl.load(scale + tl.program_id(0)))
    values = (values + 12582912.0) - 12582912.0
    if zero is not None:
        values += tl.load(zero + tl.program_id(0)).to(tl.float32)
    values = tl.where(values > 127.0, 127.0, tl.where(values < -128.0, -128.0, values))
    tl.store(codes + at, values.to(tl.int8), mask=place < size)


@jit
def _convolve(
    out, x, weight, factor, zero, scale, sums, bias, m_count, n_count, channels, in_height, in_width, height,
    width, of_sample, of_channel, of_pixel, taps_y: constexpr, taps_x: constexpr, stride_y: constexpr,
    stride_x: constexpr, pad_y: constexpr, pad_x: constexpr, block_m: constexpr, block_n: constexpr,
    block_k: constexpr,
):  # fmt: skip
    """The product's rows are output pixels, its columns output channels. `of_…` are the strides of `out`."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    sample, pixel = m // (height * width), m % (height * width)
    top, left = pixel // width * stride_y - pad_y, pixel % width * stride_x - pad_x
    blocks = (channels + block_k - 1) // block_k
    total = tl.full((block_m, block_n), 0, tl.int32)
    nothing = sample if zero is None else tl.load(zero + sample, mask=m < m_count, other=0)
    for step in range(0, taps_y * taps_x * blocks):  # noqa: PIE808  triton's range
        tap, k = step // blocks, step % blocks * block_k + tl.arange(0, block_k)
        y, z = top + tap // taps_x, left + tap % taps_x
        inside = (m < m_count) & (y >= 0) & (y < in_height) & (z >= 0) & (z < in_width)
        at = ((sample.to(tl.int64) * in_height + y) * in_width + z) * channels
        inputs = tl.load(
            x + at[:, None] + k[None, :], mask=inside[:, None] & (k < channels)[None, :], other=0
        )
        if zero is not None:  # padding is the zero's code; beyond the channels weights are 0
            inputs = tl.where(inside[:, None], inputs, nothing[:, None].to(tl.int8))
        at = (n.to(tl.int64) * (taps_y * taps_x) + tap) * channels
        weights = tl.load(
            weight + at[:, None] + k[None, :], mask=(n < n_count)[:, None] & (k < channels)[None, :], other=0
        )
        total = tl.dot(inputs, tl.trans(weights), total, out_dtype=tl.int32)
    if zero is not None:
        total -= nothing[:, None] * tl.load(sums + n, mask=n < n_count, other=0)[None, :]
    answer = total.to(tl.float32) * tl.load(factor + sample, mask=m < m_count, other=0)[:, None]
    answer *= tl.load(scale + n, mask=n < n_count, other=0).to(tl.float32)[None, :]
    if bias is not None:
        answer += tl.load(bias + n, mask=n < n_count, other=0).to(tl.float32)[None, :]
    at = (sample.to(tl.int64) * of_sample + pixel * of_pixel)[:, None] + n[None, :] * of_channel
    tl.store(out + at, answer.to(out.dtype.element_ty), mask=(m < m_count)[:, None] & (n < n_count)[None, :])
