"""Noise levels of models that were trained by flow matching."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def even(steps: int) -> np.ndarray:
    """`steps` levels from 1, all noise, down to 1 / steps, in fp32."""
    import numpy as np

    return np.linspace(1.0, 1 / steps, steps).astype(np.float32)


def shifted(levels: np.ndarray, scheduler: Mapping[str, Any], mu: float) -> np.ndarray:
    """Levels as a scheduler's config has them shifted: by `mu`, which is of the picture, or all alike."""
    if not scheduler.get("use_dynamic_shifting"):
        shift = scheduler.get("shift", 1.0)
        return shift * levels / (1 + (shift - 1) * levels)
    factor = mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
    return factor / (factor + (1 / levels - 1))


def mu_of_tokens(scheduler: Mapping[str, Any], tokens: int) -> float:
    """How far levels are shifted, by the picture's tokens, where the scheduler says that it is by these: on a
    line through two pictures."""
    few, many_tokens = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return least + (most - least) * (tokens - few) / (many_tokens - few)
