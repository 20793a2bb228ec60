"""Which format each weight of a model takes, from its name and shape alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 4096  # values of a weight that is worth quantising

# Few weights that hurt most, as measured layer by layer on emoji (docs/decisions.md): where skip connections
# of other sizes of numbers are joined, into and out of each transformer, and the U-Net's ends. With them in
# groups of 64, int8 went from 48.1 to 54.2 dB and int4 from 34.0 to 35.2.
_DELICATE = ("conv_shortcut", "proj_in", "proj_out", "conv_in", "conv_out")


def recipe(precision: str, component: str, layer: str, shape: Sequence[int]) -> str | None:
    """The name in FORMATS for the weight of `layer` (dotted, without ".weight"), or None to leave it as it
    is.

    `precision` is int8 or int4; `component` a model's folder, or vae_decoder. A VAE is a twentieth of a model
    and its errors are in the picture as they are, so int4 leaves it int8.
    """
    if math.prod(shape) < LEAST or len(shape) not in (2, 4):
        return None
    if layer.rpartition(".")[2] in _DELICATE:
        return "int8-g64"
    if precision == "int8" or component.startswith("vae") or layer.endswith("_embedding"):
        return "int8"
    return "int4-g64"
