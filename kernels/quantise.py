"""Quantise weights to 8 and 4 bits, into the parts that formats.py describes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import Format, nearest, pack
from .gptq import codes_by, factored

BLOCK = 2**18  # weights quantised at a time, so that temporary values stay in the cache
_SHRINK, _FITS = 0.95, 3  # nearly the best of the searches that were tried, and fast (docs/decisions.md)
_LEAST = 6e-8  # the smallest scale that fp16 has


def quantise(weight: Tensor, form: Format, moment: Tensor | None = None) -> dict[str, Tensor]:
    """The stored parts of `weight` (any floating dtype), computed a block of output channels at a time.

    Each group's scale and zero are fitted to its own weights. With `moment`, the mean of x xᵀ over the
    layer's inputs (in, in), codes are chosen so that errors cancel in its answers (kernels/gptq.py). Raises
    ValueError for values that are not finite.
    """
    if 0 in weight.shape:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has nothing to quantise")
    parts = {
        name: torch.empty(sides, dtype=dtype) for name, (dtype, sides) in form.parts(weight.shape).items()
    }
    step, factor = (BLOCK, None) if moment is None else (16 * BLOCK, factored(moment))
    step = max(1, step // math.prod(weight.shape[1:]))
    for start in range(0, len(weight), step):
        rows = form.rows(weight[start : start + step].float())
        if not all(extreme.isfinite() for extreme in rows.aminmax()):  # `isfinite` of all took two fifths
            raise ValueError("the weight has values that are not finite")
        scale, zero = fit(rows, form)
        codes = (
            encode(rows, form, scale, zero) if factor is None else codes_by(factor, rows, form, scale, zero)
        )
        block = {"packed": codes.flatten(1), "scale": scale.flatten(1)}
        block |= {"zero": (zero * 16).flatten(1), "least": zero.flatten(1)}
        block["packed"] = pack(block["packed"]) if form.bits == 4 else block["packed"]
        for name, part in parts.items():
            part[start : start + step] = block[name]
        del rows, codes, block  # before the next ones are made
    return parts


def fit(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """scale and zero (out, taps, groups of a tap) for `rows` in fp32, rounded as they will be stored. Only
    int4 has a zero other than 0; int4-min has its least value there.

    int4's are fitted by least squares to the codes that they give, several times, like HQQ's (Badri and
    Shaji, 2023) but without its norm.
    """
    scales, zeros = [], []
    for channels, _, size in form.spans(rows.shape[-1]):
        x = rows[..., channels].unflatten(-1, (-1, size))
        low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
        zero = torch.zeros_like(low)
        if form.kind == "int4":
            scale, zero = _fitted(x, low, high)
        elif form.kind == "int4-min":
            scale, zero = (high - low) / 15, low.half().float()
        else:
            scale = torch.maximum(high, -low) / (127 if form.kind == "int8" else 1)
        scales.append(_no_less(scale if form.wide else scale.half().float())[..., 0])
        zeros.append(zero[..., 0])
    return torch.cat(scales, -1), torch.cat(zeros, -1)


def _fitted(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """int4's scale and zero. Where all values have one sign the fit's zero may not be storable; the plain
    range is taken there."""
    plain = _no_less((high - low) / 15)
    scale, zero = plain * _SHRINK, -low / plain
    for _ in range(_FITS):
        codes = (x / scale).add_(zero).round_().clamp_(0, 15)
        middle, mean = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        codes -= middle
        scale = _no_less(
            (codes * x).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_min_(1e-6)
        )
        zero = middle - mean / scale
    storable = (zero >= 0) & (zero * 16 <= 255)
    scale, zero = torch.where(storable, scale, plain), torch.where(storable, zero, -low / plain)
    return scale, (zero * 16).round_().clamp_(0, 255) / 16


def _no_less(scale: Tensor) -> Tensor:
    return scale.clamp_min(_LEAST)  # of a group of zeros


def encode(rows: Tensor, form: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes of `rows` (out, taps, channels), as floats."""
    codes = torch.empty_like(rows)
    for channels, groups, size in form.spans(rows.shape[-1]):
        x = rows[..., channels].unflatten(-1, (-1, size))
        codes[..., channels] = nearest(x, form, scale[..., groups, None], zero[..., groups, None]).flatten(-2)
    return codes
