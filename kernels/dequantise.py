"""From stored parts into a buffer that is there already: what a layer does each time before it multiplies."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, bitwise_and, bitwise_right_shift, tensor

from .formats import NF4, Format


def dequantise(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor,
    form: Format,
    taps: int,
    taps_last: bool = False,
) -> None:
    """Fill `out` (out, row), contiguous, of any floating dtype, with the weight that the parts mean (kernels/formats.py).

    Rows are (tap, in-channel), or (in-channel, tap) if `taps_last`. `codes` is uint8, with as many values as `packed`, and is
    written over; 8 bits need none. One Triton kernel where that runs, else a handful of torch's operators.
    """
    if out.is_cuda and triton_runs(out.device):
        from .triton_weights import dequantise_triton

        dequantise_triton(out, packed, scale, zero, form, taps, out.shape[1] // taps, taps_last)
        return
    if form.bits == 8:
        out.copy_(packed)
    else:
        half = packed.shape[1]
        codes = codes[: packed.numel()].view(packed.shape)
        _spread(out[:, :half], bitwise_and(packed, 15, out=codes), form)
        bitwise_right_shift(packed, 4, out=codes)
        _spread(out[:, half:], codes[:, : out.shape[1] - half], form)
    rows = out.view(len(out), taps if form.group else 1, -1)
    scale = scale.to(out.dtype).view(*rows.shape[:2], -1)
    if form.kind == "int4":
        assert zero is not None
        zero = zero.to(out.dtype).view(scale.shape) / 16
    for channels, groups, size in form.spans(rows.shape[-1]):
        part = rows[..., channels].unflatten(-1, (-1, size))
        if form.kind == "int4":
            assert zero is not None
            part.sub_(zero[..., groups, None])
        part.mul_(scale[..., groups, None])
    if taps_last and taps > 1:  # few at a time, so that it takes hardly any memory
        for part in out.split(max(1, 2**18 // out.shape[1])):
            part.copy_(part.view(len(part), taps, -1).transpose(1, 2).flatten(1))


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton does on a GPU: its compiler takes NVIDIA's GPUs from Volta on, and AMD's.

    Imported here, as on a CPU it is memory for nothing.
    """
    from .triton_weights import triton

    return triton is not None and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0))


def _spread(out: Tensor, codes: Tensor, form: Format) -> None:
    out.copy_(tensor(NF4, dtype=out.dtype, device=out.device)[codes.int()] if form.kind == "nf4" else codes)
