"""Codes whose errors cancel: the channels that are not rounded yet make up for the error of each one.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", arXiv 2210.17323, algorithm 1. All taps of a convolution see the same inputs, except
at the edge of the image. So each tap counts as a row, and all share one moment (in, in). The whole
(taps x in)² moment takes 81 times the memory, and gained 0.3 dB on emoji.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Format, nearest, value

_DAMPING = 0.01  # of the mean diagonal, as in the paper
_BLOCK = 128  # channels whose errors are passed on together


def factored(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped moment (in, in): row i says how the
    channels after i make up for its error."""
    damped = moment.float().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def codes_by(factor: Tensor, rows: Tensor, form: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of `rows` (out, taps, channels) as floats, for given scale and zero. `factor` is that of the
    inputs' moment."""
    channels = len(factor)
    left = rows.reshape(-1, channels).clone()  # all taps of a row that is one group have the same scale
    codes = torch.empty_like(left)
    scales, zeros = (_by_channel(part, form, channels, len(left)) for part in (scale, zero))
    for start in range(0, channels, _BLOCK):
        end = min(start + _BLOCK, channels)
        block, errors = left[:, start:end], torch.empty(len(left), end - start)
        for i in range(end - start):
            at = slice(start + i, start + i + 1)
            codes[:, at] = nearest(block[:, i : i + 1], form, scales[:, at], zeros[:, at])
            wrong = block[:, i : i + 1] - value(codes[:, at], form, scales[:, at], zeros[:, at])
            errors[:, i : i + 1] = wrong / factor[start + i, start + i]
            block[:, i:] -= errors[:, i : i + 1] * factor[start + i, start + i : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes.view(rows.shape)


def _by_channel(part: Tensor, form: Format, channels: int, rows: int) -> Tensor:
    """(out, taps, groups of a tap) → (rows, channels), where a row is a tap of an output channel."""
    if not form.group:
        return part.reshape(-1, 1).repeat_interleave(rows // part.numel(), 0).expand(-1, channels)
    return part.flatten(0, 1).repeat_interleave(form.group, 1)[:, :channels]
