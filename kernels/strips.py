"""The convolutions, norms and residual blocks of a VAE in strips of rows: the same numbers in less memory.

A strip's convolution reads one more row above and below. Group norms use the statistics of the whole image,
so there are no seams to blend. (Overlapping tiles, each with its own statistics, gave 20 to 37 dB;
docs/decisions.md.) Two maps of a block are held whole: the one in its middle and the one at its end. An
upsampled map is recomputed for each strip. Maps are (batch, channels, h, w), of any floating dtype, on any
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIPS = 8
_MIN_ROWS = 8


class Rows(Protocol):
    """A map that can be read by rows."""

    shape: tuple[int, int, int, int]

    def rows(self, start: int, end: int) -> Tensor: ...


class Stored:
    """A map in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape = x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3])

    def rows(self, start: int, end: int) -> Tensor:
        return self.x[:, :, start:end]


class Upsampled:
    """`conv` (3x3, padding 1) over a map of twice the rows and columns, each value repeated. Rows are
    computed when they are read."""

    def __init__(self, x: Tensor, conv: nn.Conv2d) -> None:
        self.x, self.conv = x, conv
        self.shape = (x.shape[0], conv.out_channels, x.shape[2] * 2, x.shape[3] * 2)

    def rows(self, start: int, end: int) -> Tensor:
        above, below = max(start - 1, 0), min(end + 1, self.shape[2])
        first = above // 2
        large = functional.interpolate(self.x[:, :, first : -(-below // 2)], scale_factor=2.0, mode="nearest")
        large = large[:, :, above - 2 * first : below - 2 * first]
        return _convolve(large, self.conv, _weight(self.conv), above - start + 1, end + 1 - below)


def convolved(source: Rows, conv: nn.Conv2d, norm: nn.GroupNorm | None = None) -> Tensor:
    """`conv` (kernel 1 or 3, stride 1) of the source, or of silu(norm(source)), as a whole map."""
    out = None
    for start, end, strip in _strips(source, conv, norm):
        if out is None:
            out = strip.new_empty((*source.shape[:1], conv.out_channels, *source.shape[2:]))
        out[:, :, start:end] = strip
        del strip
    assert out is not None
    return out


def residual(source: Rows, norms: tuple[nn.GroupNorm, nn.GroupNorm], convs: tuple[nn.Conv2d, ...]) -> Tensor:
    """conv₂(silu(norm₂(conv₁(silu(norm₁(x)))))) + x. A third convolution, if there is one, is applied to the
    added x.

    Without one the answer overwrites a stored source.
    """
    hidden = Stored(convolved(source, convs[0], norms[0]))
    out = convolved(source, convs[2]) if len(convs) == 3 else _whole(source)
    for start, end, strip in _strips(hidden, convs[1], norms[1]):
        out[:, :, start:end] += strip
        del strip
    return out


def downsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (3x3, stride 2) with a row of zeros below and a column to the right, as Stable Diffusion's
    encoder pads."""
    height = (x.shape[2] - 2) // 2 + 1
    out = x.new_empty((x.shape[0], conv.out_channels, height, (x.shape[3] - 2) // 2 + 1))
    for start, end in _ranges(height):
        part = x[:, :, 2 * start : 2 * end + 1]
        padded = functional.pad(part, (0, 1, 0, 2 * end + 1 - 2 * start - part.shape[2]))
        out[:, :, start:end] = functional.conv2d(padded, _weight(conv), conv.bias, stride=2)
        del part, padded
    return out


def statistics(source: Rows, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of each group of channels, each (batch, groups, 1) in fp32, accumulated over
    strips."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for start, end in _ranges(source.shape[2]):
        strip = source.rows(start, end).reshape(source.shape[0], groups, -1).float()
        variance, local = torch.var_mean(strip, -1, correction=0, keepdim=True)
        more = strip.shape[-1]
        del strip
        if not count:
            count, mean, square = more, local, variance * more
            continue
        apart = local - mean  # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979
        mean = mean + apart * (more / (count + more))
        square = square + variance * more + apart.square() * (count * more / (count + more))
        count += more
    return square / count, mean


def _strips(source: Rows, conv: nn.Conv2d, norm: nn.GroupNorm | None) -> Iterator[tuple[int, int, Tensor]]:
    prepare = _normalised(norm, *statistics(source, norm.num_groups)) if norm else _as_is
    height, halo, weight = source.shape[2], conv.kernel_size[0] // 2, _weight(conv)
    for start, end in _ranges(height):
        above, below = max(start - halo, 0), min(end + halo, height)
        part = prepare(source.rows(above, below))
        if not isinstance(source, Stored):
            weight = _weight(conv)  # reading the source overwrote it with the source's weight
        part = _convolve(part, conv, weight, above - start + halo, end + halo - below)
        yield start, end, part
        del part


def _weight(conv: nn.Conv2d) -> Tensor:
    """The weight. A quantised layer (one with `dense`) dequantises it into a buffer shared with others."""
    dense = getattr(conv, "dense", None)
    return dense() if dense else conv.weight


def _convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, above: int, below: int) -> Tensor:
    """`conv` with `above` and `below` rows of zeros at the edges of the image, and its own padding left and
    right."""
    if above or below:
        x = functional.pad(x, (0, 0, above, below))
    return functional.conv2d(x, weight, conv.bias, padding=(0, conv.kernel_size[1] // 2))


def _normalised(norm: nn.GroupNorm, variance: Tensor, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)) of a strip with the statistics of the whole image, as one factor and one shift per
    channel."""
    channels = (variance.shape[0], norm.num_channels, 1, 1)
    spread = norm.num_channels // norm.num_groups
    factor = (variance + norm.eps).rsqrt().repeat_interleave(spread, 1).reshape(
        channels
    ) * norm.weight.float()[:, None, None]
    shift = norm.bias.float()[:, None, None] - mean.repeat_interleave(spread, 1).reshape(channels) * factor
    return lambda strip: functional.silu(
        torch.addcmul(shift, strip.float(), factor).to(strip.dtype), inplace=True
    )


def _whole(source: Rows) -> Tensor:
    if isinstance(source, Stored):
        return source.x
    out = None
    for start, end in _ranges(source.shape[2]):
        strip = source.rows(start, end)
        out = strip.new_empty(source.shape) if out is None else out
        out[:, :, start:end] = strip
        del strip
    assert out is not None
    return out


def _as_is(strip: Tensor) -> Tensor:
    return strip


def _ranges(height: int) -> Iterator[tuple[int, int]]:
    rows = max(_MIN_ROWS, -(-height // STRIPS))
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
