"""The format of each weight of a model, chosen by its name and shape."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LEAST = 4096  # values of the smallest weight that is quantised

# The few weights that hurt most, measured layer by layer on emoji (docs/decisions.md): where skip connections
# with values of another magnitude join, at both ends of each transformer, and at both ends of the U-Net. With
# these in groups of 64, int8 went from 48.1 to 54.2 dB and int4 from 34.0 to 35.2.
_DELICATE = ("conv_shortcut", "proj_in", "proj_out", "conv_in", "conv_out", "x_embedder", "context_embedder")
# What a transformer scales and shifts all tokens by: an error there is in each of them. And tables of tokens.
_WIDE = re.compile(
    r"modulation|norm\w*\.linear$|final_layer|_embed(d)?er|time_guidance_embed|pos_embed"
    r"|embed_tokens$|_embedding$|^shared$"
)
# Of a transformer, whose proj_out is a feed-forward layer's second: a seventh of Flux.1.
_BLOCK = "single_transformer_blocks."
_PLAIN = "patch_embedding"  # of CLIP's image encoder: transformers asks its weight for a dtype


def recipe(
    precision: str, layer: str, shape: Sequence[int], least_bits: int = 4, stored: str = ""
) -> str | None:
    """The name in FORMATS for the weight of `layer` (dotted, without ".weight"), or None for one that is not
    worth it.

    `precision` is int8 or int4. `least_bits` is 8 for a network that stays int8 in an int4 model. `stored` is
    the format in which a file has the weight's codes; they are kept unless they are wider than what would be
    made of them.
    """
    made = _made(precision, layer, shape, least_bits)
    return stored if stored and made and bits_of(stored) <= bits_of(made) else made


def bits_of(form: str) -> int:
    """Of a code in the format of this name."""
    return 8 if form.startswith("int8") else 4


def _made(precision: str, layer: str, shape: Sequence[int], least_bits: int) -> str | None:
    name = layer.rpartition(".")[2]
    if math.prod(shape) < LEAST or len(shape) not in (2, 4) or name == _PLAIN:
        return None
    if name in _DELICATE and not layer.startswith(_BLOCK):
        return "int8-g64"
    if precision == "int8" or least_bits > 4 or _WIDE.search(layer):
        return "int8"
    return "int4-g64"
