"""Names of CompVis's, Stability's and open_clip's code, as diffusers and transformers spell them.

Each function takes the tensors of one network by their original names, and answers them by the new ones.
Names that the network does not have are left out: averages, positions, what training left there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from ...errors import TightfitError
from ..tensors import Tensor

Tensors = Mapping[str, Tensor]
Words = tuple[tuple[str, str], ...]  # beginnings of names, and what stands there instead

_UNET_ENDS: Words = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("time_embed.cond_proj.", "time_embedding.cond_proj."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
)
_UNET_RESNET: Words = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)
_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d)\.(.+)")
_DOWNSAMPLER = re.compile(r"input_blocks\.(\d{1,4})\.0\.op\.weight")
_HINT = re.compile(r"input_hint_block\.(\d{1,4})\.(.+)")
_ADDED = re.compile(r"zero_convs\.(\d{1,4})\.0\.(.+)")
_BODY = re.compile(r"body\.(\d{1,4})\.(.+)")
_VAE_ENDS: Words = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.", "mid_block.attentions.0."),
    ("norm_out.", "conv_norm_out."),
    ("conv_in.", "conv_in."),
    ("conv_out.", "conv_out."),
)
_VAE_ATTENTION: Words = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)
_VAE_BLOCK = re.compile(r"(down|up)\.(\d{1,4})\.(?:block\.(\d{1,4})|(?:down|up)sample)\.(.+)")
_RESAMPLER_LAYER = re.compile(r"layers\.(\d{1,4})\.(.+)")
_RESAMPLER: Words = (
    ("0.norm1.", "ln0."),
    ("0.norm2.", "ln1."),
    ("0.to_q.", "attn.to_q."),
    ("0.to_out.", "attn.to_out.0."),
    ("1.0.", "ff.0."),
    ("1.1.", "ff.1.net.0.proj."),
    ("1.3.", "ff.1.net.2."),
)
_OPEN_CLIP: Words = (
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
_OPEN_CLIP_LAYER: Words = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
_JOINED = "attn.in_proj_"  # weight or bias of queries, keys and values, one below the other


def unet(tensors: Tensors) -> dict[str, Tensor]:
    """A U-Net's, whose blocks are counted through from the first to the last there."""
    samplers = (int(found[1]) for name in tensors if (found := _DOWNSAMPLER.fullmatch(name)))
    layers = min(samplers, default=1 + max(map(_input_block, tensors), default=0))
    return _renamed(tensors, lambda name: _of_unet(name, layers))


def control(tensors: Tensors) -> dict[str, Tensor]:
    """A ControlNet's: half a U-Net's, what reads the picture, and what each of its layers adds."""
    hints = [int(found[1]) for name in tensors if (found := _HINT.match(name))]

    def renamed(name: str) -> str:
        if found := _HINT.match(name):  # layers and their activations are counted
            place = "conv_in" if found[1] == "0" else f"blocks.{int(found[1]) // 2 - 1}"
            place = "conv_out" if int(found[1]) == max(hints) else place
            return f"controlnet_cond_embedding.{place}.{found[2]}"
        if found := _ADDED.match(name):
            return f"controlnet_down_blocks.{int(found[1])}.{found[2]}"
        return _begun(name, (("middle_block_out.0.", "controlnet_mid_block."),))

    return unet(tensors) | _renamed(tensors, renamed)


def t2i_adapter(tensors: Tensors) -> dict[str, Tensor]:
    """A T2I-Adapter's, whose residual blocks are counted through; each of diffusers' blocks has two."""

    def renamed(name: str) -> str:
        if not (found := _BODY.fullmatch(name)):
            return f"adapter.{name}"
        block, layer = divmod(int(found[1]), 2)
        inner = found[2] if found[2].startswith("in_conv.") else f"resnets.{layer}.{found[2]}"
        return f"adapter.body.{block}.{inner}"

    return _renamed(tensors, renamed)


def vae(tensors: Tensors) -> dict[str, Tensor]:
    """A VAE's, whose decoder counts its blocks from the picture to the latents."""
    blocks = (_VAE_BLOCK.match(name.removeprefix("decoder.")) for name in tensors)
    last = max((int(found[2]) for found in blocks if found and found[1] == "up"), default=0)
    renamed = _renamed(tensors, lambda name: _of_vae(name, last))
    return {
        # attention was a convolution of one pixel
        name: _part(tensor, tensor.shape[:2]) if ".attentions." in name else tensor
        for name, tensor in renamed.items()
    }


def open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """A text encoder's. Queries, keys and values are rows of one tensor, so other offsets of its file."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _RESBLOCK.fullmatch(name)
        if layer and layer[2].startswith(_JOINED):
            own = f"text_model.encoder.layers.{int(layer[1])}.self_attn"
            leaf = layer[2].removeprefix(_JOINED)
            parts = zip("qkv", thirds(tensor), strict=True)
            renamed |= {f"{own}.{part}_proj.{leaf}": rows for part, rows in parts}
        elif layer and (new := _begun(layer[2], _OPEN_CLIP_LAYER)):
            renamed[f"text_model.encoder.layers.{int(layer[1])}.{new}"] = tensor
        elif not layer and (new := _begun(name, _OPEN_CLIP)):
            renamed[new] = transposed(tensor) if name == "text_projection" else tensor
    return renamed


def clip(tensors: Tensors) -> dict[str, Tensor]:
    """A text encoder's that has transformers' names, of a version that had a prefix before them or none.

    stable-diffusion.cpp renames open_clip's so, but leaves queries, keys and values in one tensor, and the
    projection transposed.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        layer, joined, leaf = new.rpartition(".self_attn.in_proj.")
        if joined:
            parts = zip("qkv", thirds(tensor), strict=True)
            renamed |= {f"{layer}.self_attn.{part}_proj.{leaf}": rows for part, rows in parts}
        elif new == "text_model.text_projection":
            renamed["text_projection.weight"] = transposed(tensor)
        else:
            renamed[new] = tensor
    return renamed


def resampler(tensors: Tensors) -> dict[str, Tensor]:
    """Of IP-Adapter "plus"."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _RESAMPLER_LAYER.fullmatch(name)
        begin = f"layers.{layer[1]}." if layer else ""
        if layer and layer[2] == "0.to_kv.weight":
            parts = zip("kv", split(tensor, 2), strict=True)
            renamed |= {f"{begin}attn.to_{part}.weight": rows for part, rows in parts}
        else:
            new = _begun(layer[2], _RESAMPLER) if layer else name
            renamed[begin + (new or name)] = tensor
    return renamed


def thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor's rows in three equal parts."""
    return split(tensor, 3)


def split(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """The tensor's rows in so many equal parts."""
    rows = tensor.shape[0] // count if tensor.shape else 0
    return tuple(_part(tensor, (rows, *tensor.shape[1:]), number, count) for number in range(count))


def _part(tensor: Tensor, shape: tuple[int, ...], number: int = 0, parts: int = 1) -> Tensor:
    """One of so many equal parts of a tensor's bytes, of that shape. Raises TightfitError if these have
    another size, or are no whole blocks."""
    values = tensor.encoding.values if tensor.encoding else 1
    if parts * math.prod(shape) != tensor.count or (parts > 1 and math.prod(shape) % values):
        raise TightfitError(
            f"{tensor.file} has a tensor of shape {list(tensor.shape)} in place of {parts} of shape "
            f"{list(shape)}: copy or download it again"
        )
    size = tensor.stored_bytes // parts
    return replace(tensor, shape=shape, offset=tensor.offset + number * size, stored_bytes=size)


def transposed(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=tensor.shape[::-1], transposed=not tensor.transposed)


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {new: tensor for name, tensor in tensors.items() if (new := rename(name))}


def _begun(name: str, words: Words) -> str:
    """`name` with another beginning, or none if it has none of these."""
    return next((new + name.removeprefix(old) for old, new in words if name.startswith(old)), "")


def _input_block(name: str) -> int:
    found = _UNET_BLOCK.fullmatch(name)
    return int(found[2]) if found and found[1] == "input" else 0


def _of_unet(name: str, layers: int) -> str:
    """`layers` input blocks, a downsampler's included, are one block of diffusers'."""
    if new := _begun(name, _UNET_ENDS):
        where, resnet, leaf = new.rpartition(".resnets.")
        return _resnet(f"{where}.resnets.{leaf[0]}", leaf[2:]) if resnet else new
    found = _UNET_BLOCK.fullmatch(name)
    if not found:
        return ""
    side, number, part, leaf = found[1], int(found[2]), found[3], found[4]
    block, layer = divmod(number - (side == "input"), layers)
    where = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if leaf.startswith("op."):
        return f"{where}.downsamplers.0.conv.{leaf.removeprefix('op.')}"
    if leaf.startswith("conv."):
        return f"{where}.upsamplers.0.{leaf}"
    return _resnet(f"{where}.resnets.{layer}", leaf) if part == "0" else f"{where}.attentions.{layer}.{leaf}"


def _resnet(where: str, leaf: str) -> str:
    new = _begun(leaf, _UNET_RESNET)
    return new and f"{where}.{new}"


def _of_vae(name: str, last: int) -> str:
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return name
    if half not in ("encoder", "decoder"):
        return ""
    if found := _VAE_BLOCK.fullmatch(rest):
        way, leaf = found[1], found[4].replace("nin_shortcut.", "conv_shortcut.")
        block = int(found[2]) if way == "down" else last - int(found[2])
        part = f"resnets.{int(found[3])}" if found[3] else f"{way}samplers.0"
        return f"{half}.{way}_blocks.{block}.{part}.{leaf}"
    new = _begun(rest, _VAE_ENDS)
    head, _, leaf = new.partition(".attentions.0.")
    return f"{half}.{head}.attentions.0.{_begun(leaf, _VAE_ATTENTION)}" if leaf else new and f"{half}.{new}"
