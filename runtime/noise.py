"""Where a picture's noise comes from: torch's generator of the CPU, or CUDA's, computed here; and what A1111
makes of it: a second seed, another size's noise, a seed of the steps' own.

CUDA's normal numbers are cuRAND's: Philox4x32-10 (Salmon et al. 2011), then Box and Muller's. torch gives
each number of an array a thread of its own, where the card runs as many at once: 16,384 for 512x512, 65,536
for 1024x1024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Draw = Callable[[Sequence[int]], "np.ndarray"]
CPU, GPU, NV = SOURCES = ("cpu", "gpu", "nv")  # gpu: a card of NVIDIA; nv: that, computed by A1111
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_NO_ARC = 1e-6  # its sine
_ALIKE = 0.9995  # cosine above which two noises are mixed in a line


def philox(counters: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Random words (4, n) of counters (4, n), all of 32 bits."""
    import numpy as np

    a, b, c, d = (row.astype(np.uint64) for row in counters)
    (first, second), low = key, np.uint64(2**32 - 1)
    for _ in range(rounds):
        left, right = a * np.uint64(_MULTIPLIERS[0]), c * np.uint64(_MULTIPLIERS[1])
        a, b = (right >> np.uint64(32)) ^ b ^ np.uint64(first), right & low
        c, d = (left >> np.uint64(32)) ^ d ^ np.uint64(second), left & low
        first, second = (first + _WEYL[0]) % 2**32, (second + _WEYL[1]) % 2**32
    return np.stack([a, b, c, d]).astype(np.uint32)


class Torch:
    """torch's own, on the CPU. `token` is what torch.randn is given, to draw by it while `drawing`."""

    def __init__(self, seed: int) -> None:
        import torch

        self.token = torch.Generator("cpu").manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        import torch

        return torch.randn(tuple(shape), generator=self.token).numpy()

    def drawing(self) -> AbstractContextManager[Any]:
        return nullcontext()


class Philox:
    """What torch.randn draws on a card."""

    def __init__(self, seed: int) -> None:
        import torch

        self._key = seed % 2**32, (seed >> 32) % 2**32
        self._drawn = 0
        self.token = torch.Generator("cpu")  # stands for this one

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        import numpy as np

        count = math.prod(shape)
        counters = np.zeros((4, count), np.uint32)
        counters[0], counters[2] = self._drawn, np.arange(count)
        self._drawn += 1
        # In fp64; a card's fp32 and its fast sine are off by some 1e-7.
        lengths, turns, *_ = (philox(counters, self._key) + 0.5) / 2**32
        numbers = np.sqrt(-2 * np.log(lengths)) * np.sin(2 * np.pi * turns)
        return numbers.astype(np.float32).reshape(tuple(shape))

    def drawing(self) -> AbstractContextManager[Any]:
        """A generator that is not ours is one by seed, of torchsde's Brownian tree: the first of that seed's
        numbers, as A1111 has it."""
        import torch
        from torch.overrides import TorchFunctionMode

        philox = self

        class Randn(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                kwargs = kwargs or {}
                generator = kwargs.get("generator")
                if func is not torch.randn or generator is None:
                    return func(*args, **kwargs)
                source = philox if generator is philox.token else Philox(generator.initial_seed())
                (shape,) = args
                return torch.from_numpy(source.normal(shape)).to(kwargs.get("dtype"))

        return Randn()


@dataclass(frozen=True)
class Noise:
    """What a picture's latents begin as, and what is drawn in its steps.

    shape: of the latents. subseed: of a second noise, which has the share `strength`. resize: (height, width)
    of latents whose noise is put in the middle, or cut. ensd: added to the seed for what is drawn in steps.
    """

    shape: tuple[int, ...]
    seed: int
    source: str = CPU
    subseed: int = 0
    strength: float = 0.0
    resize: tuple[int, int] | None = None
    ensd: int = 0

    def generator(self, seed: int) -> Torch | Philox:
        return Torch(seed) if self.source == CPU else Philox(seed)

    def first(self, before: Callable[[Draw], object] = lambda _: None) -> tuple[np.ndarray, Torch | Philox]:
        """The noise to begin with, and the generator of what is drawn in steps. `before` may draw first."""
        own = self.generator(self.seed)
        before(own.normal)
        shape = (*self.shape[:2], *(self.resize or self.shape[2:]))
        is_resized = shape != self.shape
        noise = (self.generator(self.seed) if is_resized else own).normal(shape)
        if self.strength:
            noise = _between(noise, self.generator(self.subseed).normal(shape), self.strength)
        if is_resized:
            noise = _centred(noise, own.normal(self.shape))
        return noise, self.generator(self.seed + self.ensd) if self.ensd else own


def _between(noise: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """On the arc from one noise to another. A1111 turns columns of a picture, not the whole."""
    import numpy as np

    lengths = [np.linalg.norm(array, axis=2, keepdims=True) for array in (noise, other)]
    cosine = (noise / lengths[0] * (other / lengths[1])).sum(2, keepdims=True)
    if cosine.mean() > _ALIKE:
        return noise * np.float32(share) + other * np.float32(1 - share)
    angle = np.arccos(np.clip(cosine, -1, 1))
    parts = np.sin((1 - share) * angle) * noise + np.sin(share * angle) * other
    whole, line = np.sin(angle), (1 - share) * noise + share * other  # where there is no arc, or any
    return np.where(whole > _NO_ARC, parts / np.maximum(whole, _NO_ARC), line).astype(np.float32)


def _centred(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """`inner` in the middle of `outer`; what is larger is cut on both sides."""
    spans = [_span(a, b) for a, b in zip(inner.shape[2:], outer.shape[2:], strict=True)]
    (rows, from_rows), (columns, from_columns) = spans
    outer = outer.copy()
    outer[:, :, rows, columns] = inner[:, :, from_rows, from_columns]
    return outer


def _span(inner: int, outer: int) -> tuple[slice, slice]:
    """The places of one side: where they go, and which go there. Odd rests as A1111 rounds them, down."""
    before = (outer - inner) // 2
    count = inner if before >= 0 else inner + 2 * before
    return slice(max(before, 0), max(before, 0) + count), slice(max(-before, 0), max(-before, 0) + count)
