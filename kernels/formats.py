"""Weights in 8 and 4 bits: how they are stored, and the plain dequantisation that every faster version must
equal. quantise.py makes them.

A weight is (out, in), or (out, in, height, width) in a convolution, which has `height x width` taps. It is
stored in rows, one for each output channel: tap by tap, and within a tap input channel by input channel. A
group is `group` neighbouring input channels of one tap; the last group of a tap may be smaller. With group 0
it is the whole row. Others' files have rows that are `flat`: of a convolution they go through its taps input
channel by input channel, as torch's weight does, and groups follow one another, whatever tap they are of. A
group has one scale:

    int8       value = code * scale                 codes -127..127
    int4       value = (code - zero / 16) * scale   codes 0..15, zero 0..255: sixteenths are exact in bf16,
                                                    where 16 bits are not
    int4-min   value = code * scale + least         codes 0..15
    nf4        value = NF4[code] * scale            codes 0..15; Dettmers et al., "QLoRA", arXiv 2305.14314

`packed` holds int8 codes as they are (out, row), 4-bit ones two in a byte (out, ⌈row / 2⌉): the first half of
the row in the low four bits, the second in the high ones, so that unpacking writes two contiguous runs.
`scale` is fp16 (out, groups of a row), or fp32 in a format that says so; `zero` is uint8 of that shape, and
`least` fp16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The 16 values of NF4, as listed in appendix E of the paper.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One way to store a weight. `kind` is int8, int4, int4-min or nf4. `group` input channels share a scale;
    with 0 a whole row does. `flat` rows have torch's order. `wide`: scales are fp32."""

    kind: str
    group: int
    flat: bool = False
    wide: bool = False

    @property
    def bits(self) -> int:
        return 8 if self.kind == "int8" else 4

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """dtype and shape of each stored part of a weight of `shape`."""
        out, row, groups = shape[0], math.prod(shape[1:]), self.groups(shape)
        parts: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
            "packed": (torch.int8, (out, row)) if self.bits == 8 else (torch.uint8, (out, -(-row // 2))),
            "scale": (torch.float32 if self.wide else torch.float16, (out, groups)),
        }
        if self.offset:
            parts[self.offset] = (torch.uint8 if self.kind == "int4" else torch.float16, (out, groups))
        return parts

    @property
    def offset(self) -> str:
        """The part that moves a group's values up or down, "" for none."""
        return {"int4": "zero", "int4-min": "least"}.get(self.kind, "")

    def groups(self, shape: Sequence[int]) -> int:
        """Groups of one row."""
        taps = self.taps(shape)
        return taps * -(-math.prod(shape[1:]) // taps // self.group) if self.group else 1

    def taps(self, shape: Sequence[int]) -> int:
        """Parts of a row in which groups begin anew."""
        return 1 if self.flat else math.prod(shape[2:])

    def spans(self, channels: int) -> Iterator[tuple[slice, slice, int]]:
        """Runs of equal groups in the last axis of `rows`: their channels, their groups, and the size of a
        group."""
        group = min(self.group or channels, channels)
        whole = channels // group * group
        yield slice(0, whole), slice(0, channels // group), group
        if whole < channels:
            yield slice(whole, channels), slice(channels // group, channels // group + 1), channels - whole

    def rows(self, weight: Tensor) -> Tensor:
        """(out, in) or (out, in, h, w) → (out, taps, in), or (out, 1, taps x in) where a row is one group."""
        if self.flat or weight.ndim == 2:
            return weight.flatten(1)[:, None]
        rows = weight.permute(0, 2, 3, 1).flatten(1, 2)
        return rows if self.group else rows.flatten(1)[:, None]

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a stored weight of `shape`."""
        return sum(dtype.itemsize * math.prod(sides) for dtype, sides in self.parts(shape).values())


FORMATS: Mapping[str, Format] = {
    "int8": Format("int8", 0),
    "int8-g64": Format("int8", 64),
    "int4-g64": Format("int4", 64),
    "int4-g32": Format("int4", 32),
    "nf4-g64": Format("nf4", 64),
    "int8-b32": Format("int8", 32, flat=True),
    "int4-b32": Format("int4", 32, flat=True),
    "int4-min-b32": Format("int4-min", 32, flat=True),
    "nf4-b64": Format("nf4", 64, flat=True, wide=True),
    "int8-wide": Format("int8", 0, wide=True),
}


def pack(codes: Tensor) -> Tensor:
    """(out, row) of 0..15 → (out, ⌈row / 2⌉) uint8."""
    codes = codes.to(torch.uint8)
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed


def unpack(packed: Tensor, row: int) -> Tensor:
    """(out, ⌈row / 2⌉) uint8 → (out, row) of 0..15."""
    return torch.cat([packed & 15, packed[:, : row // 2] >> 4], 1)


def from_rows(rows: Tensor, shape: Sequence[int], flat: bool = False) -> Tensor:
    """(out, row) → a view of `shape`, laid out in memory as channels_last unless it is `flat`."""
    if flat or len(shape) == 2:
        return rows.view(*shape)
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def nearest(x: Tensor, form: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """The code of each value, as floats; `scale` and `zero` broadcast."""
    if form.kind == "int8":
        return (x / scale).round_().clamp_(-127, 127)
    if form.kind == "int4":
        return (x / scale).add_(zero).round_().clamp_(0, 15)
    if form.kind == "int4-min":
        return ((x - zero) / scale).round_().clamp_(0, 15)
    table = torch.tensor(NF4)
    return torch.bucketize((x / scale).contiguous(), (table[1:] + table[:-1]) / 2).to(x.dtype)


def value(codes: Tensor, form: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """The values of codes. All arguments are floats and broadcast; `zero` is `least` where there is that."""
    if form.kind == "int4-min":
        return codes * scale + zero
    return (torch.tensor(NF4)[codes.long()] if form.kind == "nf4" else codes - zero) * scale


def dequantise(parts: Mapping[str, Tensor], form: Format, shape: Sequence[int]) -> Tensor:
    """The stored parts as a weight of `shape`, in fp32: the plain reference."""
    row, taps = math.prod(shape[1:]), form.taps(shape)
    codes = unpack(parts["packed"], row) if form.bits == 4 else parts["packed"]
    rows = codes.float().view(shape[0], taps if form.group else 1, -1)
    scale = parts["scale"].float().view(*rows.shape[:2], -1)
    zero = parts[form.offset].float().view(scale.shape) if form.offset else torch.zeros_like(scale)
    zero = zero / 16 if form.kind == "int4" else zero
    for channels, groups, size in form.spans(rows.shape[-1]):
        part = rows[..., channels].unflatten(-1, (-1, size))
        part.copy_(value(part, form, scale[..., groups, None], zero[..., groups, None]))
    return from_rows(rows.flatten(1), shape, form.flat)
