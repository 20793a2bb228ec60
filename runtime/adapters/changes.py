"""What each form of adapter does to a weight. Parts are torch's tensors; no library is imported here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.layouts.renames import rows as some_rows
from ..models.layouts.renames import turned
from ..models.tensors import Patch, Tensor

_EPSILON = 2**-23  # beside a norm, as LyCORIS has it
Parts = tuple[Any, ...]


@dataclass(frozen=True)
class Change(Patch):
    """A patch made of the tensors of one layer in an adapter's file, acting `scale` times as strongly.

    sides: output channels, and values of each, of the weights that it is for. Making one raises ValueError
    for tensors that do not go together.
    """

    tensors: tuple[Tensor, ...]
    scale: float
    sides: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", self._sides())

    def _sides(self) -> tuple[int, int]:
        raise NotImplementedError

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of that shape."""
        return len(shape) > 1 and self.sides == (shape[0], math.prod(shape[1:]))

    def part(self, first: int, rows: int) -> Change:
        """What it does to so many rows from `first` on, or to all from the middle on, after the last of which
        row 0 is next. ValueError where it has no parts."""
        return Part(self.tensors, self.scale, self, first, rows)


@dataclass(frozen=True)
class Part(Change):
    """What another change does to some rows."""

    of: Change
    first: int
    rows: int

    def _sides(self) -> tuple[int, int]:
        rows, row = self.of.sides
        if self.of.whole or not rows:
            raise ValueError("a change of no parts")
        return self.rows, row

    @property
    def flops(self) -> int:
        return self.of.flops

    def prepared(self, parts: Parts) -> Parts:
        return self.of.prepared(parts)

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        start = (start + self.first) % self.of.sides[0]
        before_end = self.of.sides[0] - start
        self.of.apply(rows[:before_end], start, parts)
        if len(rows) > before_end:
            self.of.apply(rows[before_end:], 0, parts)


class LowRank(Change):
    """LoRA and LoCon: up @ down, or up @ middle @ down of a convolution in three."""

    @property
    def low_rank(self) -> bool:
        return len(self.tensors) == 2

    def part(self, first: int, rows: int) -> Change:
        up, *others = self.tensors
        cut = turned(up) if rows == up.shape[0] else some_rows(up, first, rows)
        return LowRank((cut, *others), self.scale)

    def _sides(self) -> tuple[int, int]:
        up, down, *middle = self.tensors
        return _product(up, down, *middle)

    @property
    def flops(self) -> int:
        return 2 * self.tensors[0].shape[1]

    def prepared(self, parts: Parts) -> Parts:
        up, down, *middle = parts
        return up.flatten(1), _inner(down, *middle)

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        up, down = parts
        rows.flatten(1).addmm_(up[start : start + len(rows)], down, alpha=self.scale)


class Hadamard(Change):
    """LoHa: two low-rank matrices multiplied value by value (Hyeon-Woo et al., "FedPara", arXiv 2108.06098).

    The tensors are a and b of the first and of the second, then the middles of both or of none.
    """

    def _sides(self) -> tuple[int, int]:
        a1, b1, a2, b2, *middles = self.tensors
        if len(middles) == 1:
            raise ValueError("one middle of two")
        if middles:
            first, second = (
                _product(*pair) for pair in ((_turned(a1), b1, middles[0]), (_turned(a2), b2, middles[1]))
            )
        else:
            first, second = _product(a1, b1), _product(a2, b2)
        if first != second:
            raise ValueError("two matrices of different shapes")
        return first

    @property
    def flops(self) -> int:
        return 4 * self.tensors[1].shape[0] + 3

    def prepared(self, parts: Parts) -> Parts:
        a1, b1, a2, b2, *middles = parts
        if middles:
            return a1.T, _inner(b1, middles[0]), a2.T, _inner(b2, middles[1])
        return a1.flatten(1), b1.flatten(1), a2.flatten(1), b2.flatten(1)

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        a1, b1, a2, b2 = parts
        half = -(-len(rows) // 2)  # both products of a half take what one of all does
        for part in rows.flatten(1).split(half):
            end = start + len(part)
            product = a1[start:end] @ b1
            product *= a2[start:end] @ b2
            part.add_(product, alpha=self.scale)
            start = end


@dataclass(frozen=True)
class Kronecker(Change):
    """LoKr: the Kronecker product of two matrices, each whole or a product (Yeh et al., LyCORIS, arXiv
    2309.14859).

    The tensors are the first's, `first` of them, then the second's: whole, a and b, or a, b and a middle.
    """

    first: int = 1

    def _sides(self) -> tuple[int, int]:
        one, two = self._halves(self.tensors)
        (m1, n1), (m2, n2) = (_product(*half) if len(half) < 3 else _tucker(*half) for half in (one, two))
        return m1 * m2, n1 * n2

    def _halves(self, parts: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return parts[: self.first], parts[self.first :]

    def prepared(self, parts: Parts) -> Parts:
        def whole(a: Any, b: Any = None, middle: Any = None) -> Any:
            if b is None:
                return a.flatten(1)
            return (a.flatten(1) if middle is None else a.T) @ (
                b.flatten(1) if middle is None else _inner(b, middle)
            )

        one, two = self._halves(parts)
        return whole(*one), whole(*two)

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        one, two = parts
        count, end = len(two), start + len(rows)
        flat = rows.flatten(1)
        for row in range(start // count, -(-end // count)):  # of the first matrix
            low, high = max(start, row * count), min(end, (row + 1) * count)
            part = flat[low - start : high - start].view(high - low, len(one[row]), -1)
            second = two[low - row * count : high - row * count, None, :]
            part.addcmul_(second, one[row][None, :, None], value=self.scale)


@dataclass(frozen=True)
class Scaled(Change):
    """IA3: each output channel, or each input channel, by a factor of its own (Liu et al., arXiv
    2205.05638)."""

    on_input: bool = False

    def _sides(self) -> tuple[int, int]:
        count = self.tensors[0].count
        return (0, count) if self.on_input else (count, 0)

    def fits(self, shape: Sequence[int]) -> bool:
        return [self.tensors[0].count] == [*shape[int(self.on_input) :][:1]]

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        factor = 1 + self.scale * parts[0].flatten()
        shape = [1] * rows.ndim
        shape[1 if self.on_input else 0] = -1
        rows.mul_((factor if self.on_input else factor[start : start + len(rows)]).view(shape))


class Added(Change):
    """A difference as it is: of a whole weight, a bias, or a norm."""

    def _sides(self) -> tuple[int, int]:
        (difference,) = self.tensors
        rows = difference.shape[0] if difference.shape else 1
        return rows, difference.count // max(1, rows)

    def fits(self, shape: Sequence[int]) -> bool:
        return self.sides == (shape[0], math.prod(shape[1:]))

    def prepared(self, parts: Parts) -> Parts:
        return (parts[0].reshape(self.sides),)

    @property
    def flops(self) -> int:
        return 1

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        rows.add_(parts[0][start : start + len(rows)].view(rows.shape), alpha=self.scale)


@dataclass(frozen=True)
class Decomposed(Change):
    """DoRA: the weight with another change, its rows or columns scaled to lengths of their own (Liu et al.,
    arXiv 2402.09353). `scale` goes from the weight alone to all of this.

    The tensors are those of `inner`, the lengths, and for columns the weight itself, whose lengths need all
    of it.
    """

    inner: Change | None = None
    by_rows: bool = True

    @property
    def whole(self) -> bool:
        return not self.by_rows

    @property
    def _change(self) -> Any:
        assert self.inner
        return self.inner

    def _sides(self) -> tuple[int, int]:
        return self._change.sides

    @property
    def flops(self) -> int:
        blend = 0 if self.scale == 1 else 3
        return blend + self._change.flops + (6 if self.by_rows else self._change.flops + 10)

    def prepared(self, parts: Parts) -> Parts:
        count = len(self._change.tensors)
        inner, lengths = self._change.prepared(parts[:count]), parts[count].flatten()
        if self.by_rows:
            return lengths, *inner
        base = parts[count + 1]
        squares, start = lengths.new_zeros(base.shape[1]), 0
        for rows in base.split(max(1, 2**18 * len(base) // base.numel())):
            changed = rows.clone()
            self._change.apply(changed, start, inner)
            squares += changed.square_().flatten(2).sum((0, 2)) if base.ndim > 2 else changed.square_().sum(0)
            start += len(rows)
        return lengths / (squares.sqrt_() + _EPSILON), *inner

    def apply(self, rows: Any, start: int, parts: Parts) -> None:
        lengths, *inner = parts
        before = None if self.scale == 1 else rows.clone()
        self._change.apply(rows, start, tuple(inner))
        if self.by_rows:
            factor = lengths[start : start + len(rows)] / (rows.flatten(1).norm(dim=1) + _EPSILON)
            rows.mul_(factor.view(-1, *[1] * (rows.ndim - 1)))
        else:
            rows.mul_(lengths.view(1, -1, *[1] * (rows.ndim - 2)))
        if before is not None:
            rows.sub_(before).mul_(self.scale).add_(before)


def _inner(down: Any, middle: Any = None) -> Any:
    """(rank, in · taps) of `down` (rank, in, …), or of `middle` (other rank, rank, …) after it."""
    if middle is None:
        return down.flatten(1)
    return (middle.flatten(2).transpose(1, 2) @ down.flatten(1)).transpose(1, 2).flatten(1)


def _product(a: Tensor, b: Tensor | None = None, middle: Tensor | None = None) -> tuple[int, int]:
    """Sides of a @ b, or of a @ middle @ b, or of `a` alone."""
    if len(a.shape) < 2 or not a.count or (b is not None and (len(b.shape) < 2 or not b.count)):
        raise ValueError("a matrix without sides")
    if b is None:
        return a.shape[0], a.count // a.shape[0]
    rank, taps = b.shape[0], 1
    if middle is not None:
        if len(middle.shape) < 3 or middle.shape[1] != rank:
            raise ValueError("a middle of another rank")
        rank, taps = middle.shape[0], math.prod(middle.shape[2:])
    if a.count != a.shape[0] * rank:
        raise ValueError("matrices of different ranks")
    return a.shape[0], b.count // b.shape[0] * taps


def _turned(tensor: Tensor) -> Tensor:
    """Its header, transposed."""
    if len(tensor.shape) != 2:
        raise ValueError("a factor of a convolution in three that is no matrix")
    return Tensor(tensor.dtype, tensor.shape[::-1], tensor.file, tensor.offset, tensor.stored_bytes)


def _tucker(a: Tensor, b: Tensor, middle: Tensor) -> tuple[int, int]:
    return _product(_turned(a), b, middle)
