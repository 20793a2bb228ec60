"""What adapters change in a layer whose weight stays in 8 or 4 bits: its codes are never made anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models.tensors import Patch
from ...models.tensors import Tensor as Stored

Product = Callable[[Tensor], Tensor]


class Adapted(nn.Module):
    """The patches of one layer. Thin matrices are multiplied beside the weight, or with one another into the
    buffer that the weight is unpacked into: whichever is less work for so many inputs. Other patches change
    the buffer.

    The tensors that they are made of are parameters, named 0, 1, 2 …
    """

    def __init__(self, patches: Sequence[Patch], shape: Sequence[int]) -> None:
        super().__init__()
        self.patches, self.shape, self.row = tuple(patches), tuple(shape), math.prod(shape[1:])
        self.stored: dict[str, Stored] = {
            str(number): tensor
            for number, tensor in enumerate(tensor for patch in patches for tensor in patch.tensors)
        }
        for name, tensor in self.stored.items():
            self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape, device="meta"), False))
        self.low_rank = all(patch.low_rank for patch in patches)
        self._merging: Callable[[Tensor, int], None] | None = None

    @property
    def kind(self) -> list[tuple[str, int, list[tuple[int, ...]]]]:
        """What it computes, whatever the values."""
        return [
            (type(patch).__name__, patch.flops, [tensor.shape for tensor in patch.tensors])
            for patch in self.patches
        ]

    @property
    def merging(self) -> bool:
        """Whether the weight is changed while it is dequantised now."""
        return self._merging is not None

    def beside(self, x: Tensor) -> bool:
        """Whether products beside the weight are less work: two for each input, where merging is one for each
        input channel, and other patches need the weight."""
        channels = x.shape[-1] if len(self.shape) == 2 else x.shape[1]
        return self.low_rank and x.numel() // channels * (self.shape[0] + self.row) < self.shape[0] * self.row

    def answer(
        self, x: Tensor, product: Product, thin: Callable[[Tensor, Tensor], Tensor], merges: bool
    ) -> Tensor:
        """What the layer answers. `product` is what it does without, by a dequantised weight if it `merges`,
        and `thin` what it does with another weight and no bias."""
        if self.low_rank:
            up, down = self._factors()
            if not merges or self.beside(x):
                return _add(product(x), thin(x, down), up)
            self._merging = lambda rows, start: self._merge_product(rows, start, up, down)
        else:
            self._merging = self._merge_patches()
        try:
            return product(x)
        finally:
            self._merging = None

    def merge(self, rows: Tensor, start: int) -> None:
        """Change the output channels from `start` on of the dequantised weight, of the layer's shape."""
        if self._merging:
            self._merging(rows, start)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(out, ranks) and (ranks, …), those of all patches side by side."""
        parts = self._parts()
        ups, downs = zip(*parts, strict=True)
        scaled = [up.flatten(1) * self._scale(number) for number, up in enumerate(ups)]
        return torch.cat(scaled, 1), torch.cat([down.view(-1, *self.shape[1:]) for down in downs])

    def _scale(self, number: int) -> float:
        patch: Any = self.patches[number]
        return patch.scale

    def _parts(self) -> list[tuple[Tensor, ...]]:
        parts = iter(self._parameters[name] for name in self.stored)
        return [tuple(next(parts) for _ in patch.tensors) for patch in self.patches]  # pyright: ignore[reportReturnType]

    def _merge_product(self, rows: Tensor, start: int, up: Tensor, down: Tensor) -> None:
        up = up[start : start + len(rows)]
        if rows.is_contiguous():
            rows.flatten(1).addmm_(up, down.flatten(1))
        else:  # channels last, as the buffer is on a CPU
            rows.permute(0, 2, 3, 1).flatten(1).addmm_(up, down.permute(0, 2, 3, 1).flatten(1))

    def _merge_patches(self) -> Callable[[Tensor, int], None]:
        parts = [
            patch.prepared(tuple(part.float() for part in own))
            for patch, own in zip(self.patches, self._parts(), strict=True)
        ]

        def merge(rows: Tensor, start: int) -> None:
            step = max(1, 2**18 // self.row)
            for first in range(0, len(rows), step):
                block = rows[first : first + step]
                changed = block.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
                for patch, own in zip(self.patches, parts, strict=True):
                    patch.apply(changed, start + first, own)
                block.copy_(changed)

        return merge


def _add(out: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """out + up · inner, in place."""
    if inner.ndim == 4:
        return out.add_(functional.conv2d(inner, up[..., None, None]))
    out.view(-1, len(up)).addmm_(inner.view(-1, up.shape[1]), up.T)
    return out
