"""Networks that enlarge pictures, for inference alone: RRDBNet (Wang et al., "ESRGAN", 2018; "Real-ESRGAN",
2021) and SRVGGNetCompact, Real-ESRGAN's small one; whole, or in strips of rows, which gives the same numbers.

A strip goes through all layers. Each convolution keeps the last two rows that it was given, for the next
strip. So nothing is computed twice, and there are no seams. Tiles that overlap by 10 pixels, as is usual,
differ by up to 20 of 255 from the whole picture (docs/decisions.md).

Pictures are (1, channels, h, w) in 0..1. Layers are called as in published files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIPS = 8
_MIN_ROWS, _MOST_ROWS = (
    32,
    128,
)  # of a strip; what is kept of RRDBNet's 345 convolutions is as much as 250 rows
_TAIL_STRIPS = 16  # of a strip: at four times its size a map of RRDBNet takes as much as 16 of its trunk
_SHARE = 0.2  # of what a block answers, that is added to what it was given
_SLOPE = 0.2  # of leaky ReLUs


class Convolution(nn.Conv2d):
    """3x3, with channels last. Of 64 channels at 128x128 in fp32 on a CPU oneDNN takes 20 % less time so, and
    two thirds of the memory: it has nothing to put in another order but the weight."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return self.convolve(input, (1, 1))

    def convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        return functional.conv2d(x, weight, self.bias, padding=padding)


class DenseBlock(nn.Module):
    """Five convolutions, each of which is given what all before it were given and answered."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for number in range(4):
            self.add_module(f"conv{number + 1}", Convolution(features + number * growth, growth))
        self.conv5 = Convolution(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for number in range(1, 5):
            answer = self.get_submodule(f"conv{number}")(torch.cat(parts, 1))
            parts.append(functional.leaky_relu_(answer, _SLOPE))
            del answer
        together = torch.cat(parts, 1)
        parts.clear()
        return self.conv5(together).mul_(_SHARE).add_(x)


class ResidualBlock(nn.Module):
    """Three dense blocks."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))).mul_(_SHARE).add_(x)


class RRDBNet(nn.Module):
    """A trunk of `blocks`, then so many `doublings` of the size. A square of `unshuffle` by `unshuffle`
    pixels is one of the trunk's, so sides are multiples of that."""

    def __init__(
        self, channels: int, features: int, growth: int, blocks: int, doublings: int, unshuffle: int
    ):
        super().__init__()
        self.factor, self.unshuffle = 2**doublings, unshuffle
        self.conv_first = Convolution(channels * unshuffle**2, features)
        self.body = nn.Sequential(*(ResidualBlock(features, growth) for _ in range(blocks)))
        self.conv_body = Convolution(features, features)
        self.ups = [f"conv_up{number + 1}" for number in range(doublings)]
        for name in self.ups:
            self.add_module(name, Convolution(features, features))
        self.conv_hr = Convolution(features, features)
        self.conv_last = Convolution(features, channels)

    def forward(self, pixels: Tensor) -> Iterator[Tensor]:
        """Strips of the larger picture, from above."""
        first = self.conv_first(functional.pixel_unshuffle(pixels, self.unshuffle))
        features = self.conv_body(self.body(first)).add_(first)
        del first
        tail = _Tail(self)
        for strip, last in pieces(features, -(-features.shape[2] // _TAIL_STRIPS)):
            yield tail(strip, last)

    def strips(self, strips: Iterator[tuple[Tensor, bool]]) -> Iterator[Tensor]:
        """The same of a picture that comes in strips, each with whether it is the last."""
        begin, end, tail, waiting = _Rows(self.conv_first), _Rows(self.conv_body), _Tail(self), _Waiting()
        blocks = [_Block(block) for block in self.body if isinstance(block, ResidualBlock)]
        for strip, last in strips:
            x, _ = begin(functional.pixel_unshuffle(strip, self.unshuffle), last)
            rows = strip.shape[2] // self.unshuffle
            waiting.put(x)
            for block in blocks:
                x = block(x, _MOST_ROWS, last)
            x, _ = end(x, last)
            x = x.add_(waiting.take(x.shape[2]))
            for piece, is_last in pieces(x, -(-rows // _TAIL_STRIPS)):
                yield tail(piece, last and is_last)


class SRVGGNetCompact(nn.Module):
    """Convolutions in a row, whose answer is added to the picture with each pixel repeated."""

    unshuffle = 1

    def __init__(self, channels: int, features: int, convolutions: int, scale: int) -> None:
        super().__init__()
        self.factor = scale
        layers: list[Any] = [Convolution(channels, features), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [Convolution(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, Convolution(features, channels * scale**2))

    def forward(self, pixels: Tensor) -> Iterator[Tensor]:
        yield self._added(self.body(pixels), pixels)

    def strips(self, strips: Iterator[tuple[Tensor, bool]]) -> Iterator[Tensor]:
        layers = [_Rows(layer) if isinstance(layer, Convolution) else layer for layer in self.body]
        waiting = _Waiting()
        for x, last in strips:
            waiting.put(x)
            for layer in layers:
                x = layer(x, last)[0] if isinstance(layer, _Rows) else layer(x)
            yield self._added(x, waiting.take(x.shape[2]))

    def _added(self, x: Tensor, pixels: Tensor) -> Tensor:
        large = functional.pixel_shuffle(x, self.factor)
        if not pixels.shape[2]:
            return large
        return large.add_(functional.interpolate(pixels, scale_factor=float(self.factor), mode="nearest"))


def pieces(x: Tensor, rows: int) -> Iterator[tuple[Tensor, bool]]:
    """Strips of a map, of so many rows each, and whether each is the last."""
    count = max(1, x.shape[2])
    for start in range(0, count, rows):
        yield x[:, :, start : start + rows], start + rows >= count


def enlarge(network: RRDBNet | SRVGGNetCompact, picture: Tensor, tiled: bool) -> Tensor:
    """A picture in bytes, `factor / unshuffle` times as large, in bytes. Raises FloatingPointError where the
    network answers what is no finite number."""
    unit = network.unshuffle
    height, width = (side * network.factor // unit for side in picture.shape[2:])
    out, row = torch.empty((*picture.shape[:2], height, width), dtype=torch.uint8, device=picture.device), 0
    picture = _drawn_out(picture, unit)
    tall = picture.shape[2]
    rows = min(max(_MIN_ROWS, -(-tall // (STRIPS * unit)) * unit), _MOST_ROWS) if tiled else tall
    dtype = next(network.parameters()).dtype
    read = ((strip.to(dtype).div_(255), last) for strip, last in pieces(picture, rows))
    finite = torch.ones((), dtype=torch.bool, device=picture.device)
    for strip in network.strips(read) if tiled else network(next(read)[0]):
        some = strip[:, :, : height - row, :width]
        finite &= _finite(some)
        some.clamp_(0, 1).mul_(255).round_()
        out[:, :, row : row + some.shape[2]] = some
        row += some.shape[2]
        del strip, some
    if not (finite.is_meta or finite):
        raise FloatingPointError(f"it overflowed in {dtype}")
    return out


def _finite(strip: Tensor) -> Tensor:
    """Whether all of it is finite, told by its extremes, which take no memory."""
    extremes = [extreme(strip, (0, 1, 2, 3)) for extreme in (torch.amin, torch.amax)] if strip.numel() else []
    return torch.stack([*extremes, strip.new_zeros(())]).isfinite().all()


def _drawn_out(picture: Tensor, unit: int) -> Tensor:
    """With sides that are multiples of `unit`, the last rows and columns mirrored."""
    for side in (2, 3):
        length = picture.shape[side]
        if more := -length % unit:
            mirrored = torch.tensor(
                [max(length - 2 - step, 0) for step in range(more)], device=picture.device
            )
            picture = torch.cat([picture, picture.index_select(side, mirrored)], side)
    return picture


class _Rows:
    """A convolution of a map that comes in strips. It answers all rows that it can, and these rows of what it
    was given."""

    def __init__(self, convolution: Convolution) -> None:
        self._convolution = convolution
        self._kept: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        beyond = x.new_zeros((x.shape[0], 1, x.shape[3], x.shape[1])).permute(0, 3, 1, 2)
        before = beyond if self._kept is None else self._kept
        x = torch.cat([before, x, *([beyond] if last else [])], 2)
        del before
        self._kept = None if last else x[:, :, -2:].clone()
        if x.shape[2] < 3:
            return x.new_empty((x.shape[0], self._convolution.out_channels, 0, x.shape[3])), x[:, :, :0]
        return self._convolution.convolve(x, (0, 1)), x[:, :, 1:-1]


class _Waiting:
    """Rows that are given now, and taken later."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def put(self, x: Tensor) -> None:
        self._rows.append(x)

    def take(self, count: int) -> Tensor:
        rows, self._rows = torch.cat(self._rows, 2), []
        if count < rows.shape[2]:
            self._rows.append(rows[:, :, count:].clone())
        return rows[:, :, :count]


class _Block:
    """A residual block whose map comes in strips."""

    def __init__(self, block: ResidualBlock) -> None:
        self._dense: Sequence[_Dense] = [_Dense(dense) for dense in (block.rdb1, block.rdb2, block.rdb3)]
        self._waiting = _Waiting()

    def __call__(self, x: Tensor, rows: int, last: bool) -> Tensor:
        """Answers in pieces of so many rows: of the last strip each block has 15 more to answer than the one
        before."""
        if not x.shape[2] and not last:
            return x
        return torch.cat([self._answer(piece, last and end) for piece, end in pieces(x, rows)], 2)

    def _answer(self, x: Tensor, last: bool) -> Tensor:
        self._waiting.put(x)
        for dense in self._dense:
            x = dense(x, last)
        return x.mul_(_SHARE).add_(self._waiting.take(x.shape[2]))


class _Dense:
    """A dense block whose map comes in strips."""

    def __init__(self, dense: DenseBlock) -> None:
        self._convolutions = [_Rows(part) for part in dense.children() if isinstance(part, Convolution)]

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        features = x.shape[1]
        *some, final = self._convolutions
        for convolution in some:
            answer, given = convolution(x, last)
            x = torch.cat([given, functional.leaky_relu_(answer, _SLOPE)], 1)
            del answer, given
        answer, given = final(x, last)
        return answer.mul_(_SHARE).add_(given[:, :features])


class _Tail:
    """What of RRDBNet makes the larger picture, of features that come in strips."""

    def __init__(self, network: RRDBNet) -> None:
        self._ups = [
            _Rows(up) for up in map(network.get_submodule, network.ups) if isinstance(up, Convolution)
        ]
        self._last = [_Rows(network.conv_hr), _Rows(network.conv_last)]

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        for doubled in self._ups:
            if x.shape[2]:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            else:
                x = x.new_empty((*x.shape[:3], 2 * x.shape[3]))
            x, _ = doubled(x, last)
            x = functional.leaky_relu_(x, _SLOPE)
        hidden, final = self._last
        x, _ = hidden(x, last)
        x, _ = final(functional.leaky_relu_(x, _SLOPE), last)
        return x
