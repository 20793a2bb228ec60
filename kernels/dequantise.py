"""Dequantise stored parts into a given buffer, as a layer does each time before it multiplies."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, addcmul, bitwise_and, bitwise_right_shift, tensor

from .formats import NF4, Format

_LOOKED_UP = 2**17  # values at a time: their places, int32, stay in the cache


def dequantise(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor | None,
    form: Format,
    taps: int,
    taps_last: bool = False,
) -> None:
    """Fill `out` (out, row), contiguous, of any floating dtype, with the dequantised weight
    (kernels/formats.py).

    `zero` is the part that moves a group, if there is one (`Format.offset`). Rows are (tap, in-channel), or
    (in-channel, tap) if `taps_last`. `codes` is scratch for 4 bits: uint8,
    with as many values as `packed`. With None it is allocated in each call. One Triton kernel where Triton
    runs, otherwise a few of torch's operators.
    """
    if out.is_cuda and triton_runs(out.device):
        from .triton_weights import dequantise_triton

        dequantise_triton(out, packed, scale, zero, form, taps, out.shape[1] // taps, taps_last)
    else:
        dequantise_torch(out, packed, scale, zero, codes, form, taps, taps_last)


def dequantise_torch(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor | None,
    form: Format,
    taps: int,
    taps_last: bool = False,
) -> None:
    """`dequantise` in torch's operators, on any device."""
    reordered, groups_of = taps_last and taps > 1, taps if form.group else 1
    half, row = packed.shape[1], out.shape[1]
    # A view, so that each value is written to its final place. Reordering `out` afterwards took 116 of 127
    # launches, for a convolution of 1280 from 1280 channels in int4.
    rows = out.view(len(out), -1, taps).transpose(1, 2) if reordered else out.view(len(out), groups_of, -1)
    if form.bits == 8:
        target = rows if reordered else out
        target.copy_(packed.view(target.shape))
    elif form.kind == "nf4" and out.is_cpu and not reordered and row % 2 == 0:
        _look_up(out, packed)
    else:
        codes = torch.empty_like(packed) if codes is None else codes[: packed.numel()].view(packed.shape)
        bitwise_and(packed, 15, out=codes)
        for start, end in ((0, half), (half, row)):
            if start:
                bitwise_right_shift(packed, 4, out=codes)
            for part, at in (
                _rectangles(rows, start, end) if reordered else [(out[:, start:end], slice(end - start))]
            ):
                _spread(part, codes[:, at].view(part.shape), form)
    scale = scale.to(out.dtype).view(len(out), groups_of, -1)
    if zero is not None:
        zero = zero.to(out.dtype).view(scale.shape)
        zero = zero / 16 if form.kind == "int4" else zero
    for channels, groups, size in form.spans(rows.shape[-1]):
        part = rows[..., channels].unflatten(-1, (-1, size))
        if form.kind == "int4":
            assert zero is not None
            part.sub_(zero[..., groups, None])
        if form.kind == "int4-min":
            assert zero is not None  # at once: sums of products that are rounded lose 4 bits of bf16's 8
            addcmul(zero[..., groups, None], part, scale[..., groups, None], out=part)
        else:
            part.mul_(scale[..., groups, None])


def _look_up(out: Tensor, packed: Tensor) -> None:
    """Fill `out` with NF4's values, some rows at a time: a fifth of the time that indexing takes on a CPU."""
    table, step = tensor(NF4, dtype=out.dtype), look_up_rows(out.shape)
    codes = torch.empty(step, 2, packed.shape[1], dtype=torch.int32)
    for rows, read in zip(out.split(step), packed.split(step), strict=True):
        at = codes[: len(rows)]
        bitwise_and(read, 15, out=at[:, 0])
        bitwise_right_shift(read, 4, out=at[:, 1])
        torch.index_select(table, 0, at.view(-1), out=rows.view(-1))


def look_up_rows(shape: Sequence[int]) -> int:
    """Rows of a weight of 4-bit codes that a CPU looks up in a table at a time."""
    return min(shape[0], max(1, _LOOKED_UP // shape[1]))


def _rectangles(rows: Tensor, start: int, end: int) -> Iterator[tuple[Tensor, slice]]:
    """Values `start` to `end` of each row of (out, taps, in-channels), as at most three views. With each its
    place among these values."""
    channels, at = rows.shape[2], start
    while at < end:
        tap, channel = divmod(at, channels)
        whole = 1 if channel else max(1, (end - at) // channels)  # taps
        stop = min(end, (tap + whole) * channels)
        yield (
            rows[:, tap : tap + whole, channel : min(channels, channel + stop - at)],
            slice(at - start, stop - start),
        )
        at = stop


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton runs on a GPU, tried once."""
    return triton_problem(device) is None


def triton_problem(device: torch.device) -> str | None:
    """Why Triton does not run on a GPU, in one line; None if it does.

    It needs a C compiler and Python's headers when a kernel is first launched, and supports AMD's GPUs and
    NVIDIA's from Volta on. So a small weight is dequantised, once per device, and compared with torch's
    answer. Raises torch.OutOfMemoryError if there is no memory to try.
    """
    return _problem(
        device if device.index is not None else torch.device(device.type, torch.cuda.current_device())
    )


@functools.cache
def _problem(device: torch.device) -> str | None:
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (7, 0):
        return "it knows no GPU of compute capability {}.{}".format(*capability)
    try:
        return None if _trial(device) else "what it makes of a weight is wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a linker's, the driver's, triton's own
        line = next(iter(str(error).strip().splitlines()), "")
        why = textwrap.shorten(f"{type(error).__name__}: {line}", 160, placeholder=" …")
        return f"{why}; install triton, a C compiler and Python's headers"


def _trial(device: torch.device) -> bool:
    """Whether Triton dequantises a weight of 16 channels from 48 and 3 x 3 taps as torch does."""
    from .triton_weights import dequantise_triton, triton  # on a CPU it would be memory for nothing

    if triton is None:
        raise ModuleNotFoundError("triton is not installed")
    form, draw = Format("int4", 32), torch.Generator().manual_seed(0)
    parts = form.parts((16, 48, 3, 3))
    packed, zero = (
        torch.randint(256, parts[name][1], dtype=torch.uint8, generator=draw) for name in ("packed", "zero")
    )
    scale = torch.rand(parts["scale"][1], generator=draw).half()
    made, right = (torch.zeros(16, 48 * 9, device=device) for _ in range(2))
    packed, scale, zero = (part.to(device) for part in (packed, scale, zero))
    dequantise_triton(made, packed, scale, zero, form, 9, 48, True)
    dequantise_torch(right, packed, scale, zero, None, form, 9, True)
    return torch.allclose(made, right, rtol=1e-4, atol=1e-5)


def _spread(out: Tensor, codes: Tensor, form: Format) -> None:
    out.copy_(tensor(NF4, dtype=out.dtype, device=out.device)[codes.int()] if form.kind == "nf4" else codes)
