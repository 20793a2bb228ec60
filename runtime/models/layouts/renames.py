"""Names of CompVis's, Stability's, open_clip's, Z-Image's and llama.cpp's code, as diffusers and transformers
spell them.

Each function takes the tensors of one network by their original names, and answers them by the new ones.
Names that the network does not have are left out: averages, positions, what training left there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
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
_VAE_WHOLE: Words = (
    ("encoder.quant_conv.", "quant_conv."),  # as Black Forest Labs has it, and some tools keep it
    ("decoder.post_quant_conv.", "post_quant_conv."),
    *((name, name) for name in ("quant_conv.", "post_quant_conv.", "bn.running_")),
)
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
# Z-Image's own layers where diffusers has others; what else it has begins so.
_Z_IMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_Z_IMAGE_ATTENTION = {
    "qkv": ("to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
    "q_norm": ("norm_q",),
    "k_norm": ("norm_k",),
}
_Z_IMAGE_LAYER = re.compile(r"(.+\.attention)\.(\w+)")
_Z_IMAGE_PADS = "x_pad_token", "cap_pad_token"
_Z_IMAGE_REST = (
    "layers.", "noise_refiner.", "context_refiner.", "t_embedder.", "cap_embedder.", "all_", "siglip_",
)  # fmt: skip
_LLAMA_CPP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LLAMA_CPP_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_CPP_T5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_LLAMA_CPP_T5_LAYER = {
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}
_LLAMA_CPP_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)")
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
        name: _without_pixel(tensor) if ".attentions." in name else tensor for name, tensor in renamed.items()
    }


def _without_pixel(tensor: Tensor) -> Tensor:
    """A linear layer's, which was a convolution of one pixel."""
    if math.prod(tensor.shape[2:]) != 1:
        raise _damaged(tensor, "a convolution of one pixel")
    return replace(tensor, shape=tensor.shape[:2])


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


def z_image(tensors: Tensors) -> dict[str, Tensor]:
    """A transformer's of Z-Image, by the names of its own code or diffusers'. stable-diffusion.cpp writes the
    tokens that pad without their side of 1."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if name in _Z_IMAGE_PADS:
            renamed[name] = replace(tensor, shape=(1, *tensor.shape)) if len(tensor.shape) == 1 else tensor
        elif leaf not in ("weight", "bias"):
            continue
        elif places := _of_z_image(layer):
            parts = split(tensor, len(places)) if places[1:] else (tensor,)
            renamed |= {f"{place}.{leaf}": part for place, part in zip(places, parts, strict=True)}
        elif name.startswith(_Z_IMAGE_REST):
            renamed[name] = tensor
    return renamed


def z_image_layers(paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The layers of a transformer of Z-Image by the names of its own code; empty for other networks."""
    known = {*paths}
    attentions = {found[1] for path in paths if (found := _Z_IMAGE_LAYER.match(path))}
    names = (f"{attention}.{layer}" for attention in attentions for layer in _Z_IMAGE_ATTENTION)
    return {name: places for name in (*_Z_IMAGE, *names) if known.issuperset(places := _of_z_image(name))}


def _of_z_image(layer: str) -> tuple[str, ...]:
    if layer in _Z_IMAGE:
        return (_Z_IMAGE[layer],)
    if not (found := _Z_IMAGE_LAYER.fullmatch(layer)):
        return ()
    return tuple(f"{found[1]}.{place}" for place in _Z_IMAGE_ATTENTION.get(found[2], ()))


def llama_cpp(tensors: Tensors) -> dict[str, Tensor]:
    """A language model's."""

    def renamed(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        if found := _LLAMA_CPP_BLOCK.fullmatch(layer):
            place = _LLAMA_CPP_LAYER.get(found[2])
            return f"model.layers.{int(found[1])}.{place}.{leaf}" if place else ""
        return f"model.{_LLAMA_CPP[layer]}.{leaf}" if layer in _LLAMA_CPP else ""

    return _renamed(tensors, renamed)


def llama_cpp_t5(tensors: Tensors) -> dict[str, Tensor]:
    """Of T5's encoder."""

    def renamed(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        if found := _LLAMA_CPP_BLOCK.fullmatch(layer.removeprefix("enc.")):
            place = _LLAMA_CPP_T5_LAYER.get(found[2])
            return f"encoder.block.{int(found[1])}.layer.{place}.{leaf}" if place else ""
        return f"{_LLAMA_CPP_T5[layer]}.{leaf}" if layer in _LLAMA_CPP_T5 else ""

    return _renamed(tensors, renamed)


def thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor's rows in three equal parts."""
    return split(tensor, 3)


def split(tensor: Tensor, shares: int | Sequence[int]) -> tuple[Tensor, ...]:
    """The tensor's rows in so many equal parts, or in parts of these shares."""
    shares = (1,) * shares if isinstance(shares, int) else shares
    count, whole = tensor.shape[0] if tensor.shape else 0, sum(shares)
    if not tensor.shape or count % whole:
        raise _damaged(tensor, f"{len(shares)} in one")
    starts = (sum(shares[:number]) for number in range(len(shares)))
    each = count // whole
    return tuple(
        rows(tensor, each * start, each * share) for share, start in zip(shares, starts, strict=True)
    )


def rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """So many of the tensor's rows, from `first` on. Raises TightfitError if these are no whole blocks."""
    encoding, row = tensor.encoding, math.prod(tensor.shape[1:])
    try:
        if encoding and count * row % encoding.values and count < tensor.shape[0]:
            raise ValueError
        encoding = encoding and encoding.begun(first * row)
    except ValueError:
        raise _damaged(tensor, f"several, of which one has {count} rows") from None
    size, offset = (tensor.stored_bytes * some // max(1, tensor.shape[0]) for some in (count, first))
    shape = count, *tensor.shape[1:]
    return replace(tensor, shape=shape, offset=tensor.offset + offset, stored_bytes=size, encoding=encoding)


def turned(tensor: Tensor) -> Tensor:
    """The tensor with its second half of rows first."""
    half = split(tensor, 2)[1]
    return replace(tensor, turned_bytes=half.stored_bytes, encoding=half.encoding)


def _damaged(tensor: Tensor, meant: str) -> TightfitError:
    return TightfitError(
        f"{tensor.file} has a tensor of shape {list(tensor.shape)} in place of {meant}: "
        "copy or download it again"
    )


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
    if whole := _begun(name, _VAE_WHOLE):
        return whole
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
