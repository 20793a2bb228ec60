"""Stored weights (kernels/formats.py) on a GPU: one Triton kernel dequantises a weight, or dequantises and
multiplies.

Without triton this module can be imported and `triton` is None; its functions fail when they are called.
Kernels use nothing of triton's standard library, so that they can be interpreted on a CPU however triton was
imported. For triton 3.4 and later.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .formats import NF4, Format

_WHOLE = 2**30  # channels of a group that is a whole row


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = _optional("triton"), _optional("triton.language")
if TYPE_CHECKING:
    constexpr = Any  # marks a parameter: triton compiles the kernel for each of its values
else:
    constexpr = getattr(tl, "constexpr", Any)


def jit(function: Any) -> Any:
    """`triton.jit`; without triton the function itself."""
    return triton.jit(function) if triton else function


def dequantise_triton(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    form: Format,
    taps: int,
    in_channels: int,
    nchw: bool = False,
    block: tuple[int, int] = (4, 256),
    **launch: int,
) -> None:
    """Fill `out` with the dequantised weight: in our order (out, taps, in), or with `nchw` in torch's (out,
    in, taps).

    `out` is contiguous, of any floating dtype and any shape with as many values. Values are computed in fp32
    and rounded once. `block` is how many rows and columns one program writes, powers of 2. `launch` is
    triton's num_warps and num_stages. Raises ValueError for parts or an `out` that do not fit this weight.
    """
    _check(packed, scale, zero, form, (len(packed), in_channels, taps))
    rows, row = len(packed), taps * in_channels
    if out.numel() != rows * row or not out.is_contiguous():
        raise ValueError(
            f"{rows} x {row} weights do not go into strides {out.stride()} of shape {tuple(out.shape)}"
        )
    grid = (-(-rows // block[0]), -(-row // block[1]))
    _dense[grid](
        *(
            out,
            packed,
            scale,
            zero,
            _table(form, out.device),
            rows,
            row,
            in_channels,
            packed.shape[1],
            scale.shape[1],
        ),
        *(-(-in_channels // form.group) if form.group else 0, form.kind, form.group or _WHOLE),
        *(taps, nchw or taps == 1, *block),
        **launch,
    )


def linear_triton(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    form: Format,
    tile: tuple[int, int, int] | None = None,
    **launch: int,
) -> Tensor:
    """(…, in) → (…, out), in the dtype of `x`: fp32, fp16 or bf16. For few rows of `x`: all weights are
    dequantised for every 64 of them.

    Weights are rounded to that dtype, and products are summed in fp32. `tile` is how many rows of `x`,
    output channels and columns of `packed` one program takes at a time, powers of 2 from 16; `launch` is
    triton's num_warps and num_stages. Raises ValueError for parts that do not fit `x`.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    _check(packed, scale, zero, form, (len(packed), x.shape[-1]))
    (m, row), (n, width) = rows.shape, packed.shape
    out = x.new_empty(*x.shape[:-1], n)
    group = form.group or _WHOLE
    tile = tile or (
        max(16, min(64, 1 << (m - 1).bit_length())),
        32,
        64 if width % 64 == 0 and group % 64 == 0 else 32,
    )
    # Each output channel then has one scale in what a program multiplies at a time.
    aligned = group % tile[2] == 0 and (form.bits == 8 or not form.group or width % tile[2] == 0)
    _multiply[-(-n // tile[1]), -(-m // tile[0])](
        *(out, rows, packed, scale, zero, _table(form, x.device), bias, m, n, row, width, scale.shape[1]),
        *(form.kind, group, aligned, *tile),
        **launch,
    )
    return out


@jit
def _codes(read, high):
    """The 4-bit codes in bytes: of the second half of a row where `high`, otherwise of the first."""
    read = read.to(tl.int32)
    return tl.where(high, read >> 4, read & 15)


@jit
def _value(codes, scale, zero, table, at, inside, kind: constexpr):
    """The values of codes, in fp32. `at` is where the scales and zeros of their groups are."""
    value = tl.load(table + codes) if kind == "nf4" else codes.to(tl.float32)
    if kind == "int4":
        value -= tl.load(zero + at, mask=inside, other=0).to(tl.float32) * 0.0625
    value *= tl.load(scale + at, mask=inside, other=0).to(tl.float32)
    if kind == "int4-min":
        value += tl.load(zero + at, mask=inside, other=0).to(tl.float32)
    return value


@jit
def _dense(
    out, packed, scale, zero, table, rows, row, channels, width, groups, groups_of_tap,
    kind: constexpr, group: constexpr, taps: constexpr, nchw: constexpr, block_rows: constexpr,
    block_columns: constexpr,
):  # fmt: skip
    """In the order of writing. Where it changes the order, the reads are scattered: they are fewer bytes and
    cached."""
    o = tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    place = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[None, :]
    inside = (o < rows) & (place < row)
    o = o.to(tl.int64)
    tap, channel = (place % taps, place // taps) if nchw else (place // channels, place % channels)
    k = tap * channels + channel
    if kind == "int8":
        codes = tl.load(packed + o * width + k, mask=inside, other=0)
    else:
        high = k >= width
        codes = _codes(tl.load(packed + o * width + tl.where(high, k - width, k), mask=inside, other=0), high)
    at = o * groups + tap * groups_of_tap + channel // group
    value = _value(codes, scale, zero, table, at, inside, kind)
    tl.store(out + o * row + place, value.to(out.dtype.element_ty), mask=inside)


@jit
def _multiply(
    out, x, packed, scale, zero, table, bias, m_count, n_count, row, width, groups,
    kind: constexpr, group: constexpr, aligned: constexpr, block_m: constexpr, block_n: constexpr,
    block_k: constexpr,
):  # fmt: skip
    m = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    channel = n[:, None]
    total = tl.full((block_m, block_n), 0, tl.float32)
    for start in range(0, width, block_k):
        column = start + tl.arange(0, block_k)[None, :]
        read = tl.load(
            packed + channel * width + column, mask=(channel < n_count) & (column < width), other=0
        )
        for half in tl.static_range(1 if kind == "int8" else 2):
            k = column + half * width
            inputs = tl.load(x + m * row + k, mask=(m < m_count) & (column < width) & (k < row), other=0)
            codes = read if kind == "int8" else _codes(read, half == 1)
            at = channel * groups + (start + half * width if aligned else k) // group
            inside = channel < n_count if aligned else (channel < n_count) & (k < row)
            weight = _value(codes, scale, zero, table, at, inside, kind).to(inputs.dtype)
            # By default a product in fp32 would keep 10 bits.
            total = tl.dot(inputs, tl.trans(weight), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, mask=n < n_count, other=0).to(tl.float32)[None, :]
    tl.store(
        out + m * n_count + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(m < m_count) & (n < n_count)[None, :],
    )


@functools.cache
def _made(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


def _table(form: Format, device: torch.device) -> Tensor | None:
    return _made(device) if form.kind == "nf4" else None


def _check(packed: Tensor, scale: Tensor, zero: Tensor | None, form: Format, shape: tuple[int, ...]) -> None:
    """Raise ValueError for parts of another shape, as kernels check no bounds but those they are given."""
    parts = {"packed": packed, "scale": scale, form.offset: zero}
    for name, (dtype, sides) in form.parts(shape).items():
        part = parts[name]
        if part is None or part.dtype != dtype or part.shape != sides or not part.is_contiguous():
            given = (
                "none" if part is None else f"{part.dtype} {tuple(part.shape)} with strides {part.stride()}"
            )
            raise ValueError(
                f"{name} of a {form.kind} weight {shape} is {dtype} {sides}, contiguous; this is {given}"
            )
