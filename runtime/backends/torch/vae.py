"""The VAE in strips of rows."""

from __future__ import annotations

from typing import Any

import torch

from ....kernels import strips


def encode_strips(module: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (module["quant_conv"](encode_in_strips(module["encoder"], pixels)),)


def decode_strips(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (decode_in_strips(module["decoder"], module["post_quant_conv"](latents)),)


def decode_in_strips(decoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """diffusers' `Decoder`. The middle block runs whole, because its attention sees every pixel; the larger
    blocks run in strips."""
    source: strips.Rows = strips.Stored(decoder.mid_block(decoder.conv_in(latents)))
    for block in decoder.up_blocks:
        source = strips.Stored(_residuals(source, block.resnets))
        for upsampler in block.upsamplers or ():
            source = strips.Upsampled(source.x, upsampler.conv)
    return strips.convolved(source, decoder.conv_out, decoder.conv_norm_out)


def encode_in_strips(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """diffusers' `Encoder`, the same way."""
    x = strips.convolved(strips.Stored(pixels), encoder.conv_in)
    for block in encoder.down_blocks:
        x = _residuals(strips.Stored(x), block.resnets)
        for downsampler in block.downsamplers or ():
            x = strips.downsampled(x, downsampler.conv)
    return strips.convolved(strips.Stored(encoder.mid_block(x)), encoder.conv_out, encoder.conv_norm_out)


def _residuals(source: strips.Rows, resnets: Any) -> torch.Tensor:
    for resnet in resnets:
        convs = (
            resnet.conv1,
            resnet.conv2,
            *([] if resnet.conv_shortcut is None else [resnet.conv_shortcut]),
        )
        source = strips.Stored(strips.residual(source, (resnet.norm1, resnet.norm2), convs))
    assert isinstance(source, strips.Stored)
    return source.x
