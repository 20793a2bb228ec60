"""The tiny autoencoder (TAESD): a decoder of plain convolutions that stands in for a VAE's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checks import is_count, is_layers, is_number, is_positive, is_text, is_truth, many, whole
from .family import Role
from .networks import DECODER

if TYPE_CHECKING:
    from ..spec import Component

_FIELDS = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "latent_magnitude"), is_count),
    "upsampling_scaling_factor": whole(2, 2),
    **dict.fromkeys(
        ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"), many(is_count)
    ),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), many(is_layers)),
    **dict.fromkeys(("act_fn", "upsample_fn"), is_text),
    **dict.fromkeys(("latent_shift", "shift_factor"), is_number),
    "scaling_factor": is_positive,
    "force_upcast": is_truth,
}
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def _layers(config: Mapping[str, Any]) -> dict[str, int]:
    return {"num_decoder_blocks": sum(config["num_decoder_blocks"])}


def _build(component: Component) -> Any:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from torch import nn

    taken = {name: value for name, value in component.config.items() if name != "block_out_channels"}
    whole: Any = AutoencoderTiny.from_config(taken)  # which makes that itself, and warns of it
    return nn.ModuleDict({"decoder": whole.decoder})


def _decode(module: Any, latents: Any) -> tuple[Any, ...]:
    return (module["decoder"](latents),)


TINY_DECODER = replace(
    DECODER,
    listed=r"diffusers AutoencoderTiny",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    layers=_layers,
    decided_by={},
    build=_build,
    call=_decode,
    prefixes=("decoder.",),
    in_strips=False,
    tracing=None,
)
PREVIEW_DECODER = replace(TINY_DECODER, name="preview_decoder", role=Role.PREVIEW)
