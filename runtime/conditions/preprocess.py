"""Pictures to follow, made from others: edges and the like, for which no network is needed. Each function
takes and answers (height, width, 3) uint8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_SIGMA = 1.0  # of the blur before edges are looked for, in pixels
_LOW, _HIGH = 100.0, 200.0  # |dx| + |dy| of Sobel's filters: of an edge that goes on, and of one that begins
_TILE = 8  # a tile's detail is taken out by making it so many times smaller
_LUMINANCE = 0.299, 0.587, 0.114  # ITU-R BT.601


def canny(pixels: np.ndarray) -> np.ndarray:
    """White edges of one pixel (Canny 1986): where the blurred picture's gradient is largest across, and
    larger than _HIGH, or than _LOW beside an edge."""
    import numpy as np

    dx, dy = _gradients(_blurred(_grey(pixels)))
    strength = np.abs(dx) + np.abs(dy)
    thin = strength * _is_largest_across(strength, dx, dy)
    return _in_three(255 * _going_on(thin > _HIGH, thin > _LOW))


def soft(pixels: np.ndarray) -> np.ndarray:
    """White edges as strong as the gradient: that of a step from black to white is 255."""
    import numpy as np

    return _in_three(np.hypot(*_gradients(_grey(pixels))) / 4)


def invert(pixels: np.ndarray) -> np.ndarray:
    return 255 - pixels


def tile(pixels: np.ndarray) -> np.ndarray:
    """Without details."""
    import numpy as np
    from PIL import Image

    height, width, _ = pixels.shape
    small = Image.fromarray(pixels).resize(
        (max(1, width // _TILE), max(1, height // _TILE)), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def luminance(pixels: np.ndarray) -> np.ndarray:
    return _in_three(_grey(pixels))


PREPROCESSORS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda pixels: pixels,
    "canny": canny,
    "soft": soft,
    "invert": invert,
    "tile": tile,
    "luminance": luminance,
}


def _grey(pixels: np.ndarray) -> np.ndarray:
    import numpy as np

    return pixels.astype(np.float32) @ np.array(_LUMINANCE, np.float32)


def _in_three(grey: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _blurred(grey: np.ndarray) -> np.ndarray:
    import numpy as np

    places = np.arange(-3, 4)
    kernel = np.exp(-(places**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    return _filtered(_filtered(grey, kernel, 0), kernel, 1)


def _filtered(grey: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """Along one axis, whose ends go on as they are."""
    import numpy as np

    reach, length = len(kernel) // 2, grey.shape[axis]
    sides = [(0, 0), (0, 0)]
    sides[axis] = reach, reach
    wide = np.pad(grey, sides, mode="edge")
    parts = (wide.take(range(place, place + length), axis) for place in range(len(kernel)))
    return sum(share * part for share, part in zip(kernel, parts, strict=True))  # pyright: ignore[reportReturnType]


def _gradients(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's, to the right and downwards."""
    import numpy as np

    smooth, differ = np.array([1, 2, 1], np.float32), np.array([-1, 0, 1], np.float32)
    return _filtered(_filtered(grey, smooth, 0), differ, 1), _filtered(_filtered(grey, smooth, 1), differ, 0)


def _is_largest_across(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether neither neighbour across the edge is stronger, of four directions the nearest; of two that are
    as strong the second counts."""
    import numpy as np

    height, width = strength.shape
    wide = np.pad(strength, 1)
    direction = (np.arctan2(dy, dx) / (np.pi / 4)).round().astype(int) % 4
    largest = np.zeros(strength.shape, bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        before, after = (wide[1 + sign * down :, 1 + sign * right :][:height, :width] for sign in (-1, 1))
        largest |= (direction == number) & (strength >= before) & (strength > after)
    return largest


def _going_on(begun: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """What is weak, and joined to what has begun by neighbours that are: the new ones' neighbours in each
    round."""
    import numpy as np

    wide, edges = np.pad(weak, 1), np.zeros(np.add(weak.shape, 2), bool)
    edges[1:-1, 1:-1] = begun
    row = weak.shape[1] + 2
    beside = np.array([-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1])
    flat, open_ends = edges.ravel(), np.flatnonzero(edges)
    while len(open_ends):
        near = np.unique(open_ends[:, None] + beside)
        open_ends = near[wide.ravel()[near] & ~flat[near]]
        flat[open_ends] = True
    return edges[1:-1, 1:-1]
