"""Names that transformers' layers have in their authors' own code, beside diffusers'."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..tensors import Tensor
from .renames import Tensors, split, turned

_BLOCK = re.compile(r"(\w+_blocks)\.(\d{1,4})\.(.+)")
_LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}


class Place(NamedTuple):
    """Diffusers' layers for one of another code, which has the rows of all of them in this order. turned: its
    second half of rows is their first."""

    paths: tuple[str, ...]
    turned: bool = False


Layers = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class OwnNames:
    """One transformer's names.

    told_by: a layer by diffusers' name that no other transformer has. ends: of layers outside of blocks.
    blocks: by what stands before a block's number, that word in diffusers, and the block's layers. turned:
    those whose halves of rows lie the other way round. turned_in_last: those that do so in the last block
    alone. shares: of diffusers' layers that have so many times as many rows of a joined one as its others.
    """

    told_by: str
    ends: Mapping[str, str]
    blocks: Mapping[str, tuple[str, Layers]]
    turned: frozenset[str] = frozenset()
    turned_in_last: frozenset[str] = frozenset()
    shares: Mapping[str, int] = field(default_factory=dict)

    def layers(self, paths: Collection[str]) -> dict[str, Place]:
        """Where the layers are that the code has, of a transformer with these layers by diffusers' names;
        empty for another's."""
        known, last = {*paths}, _last(paths)
        if self.told_by not in known:
            return {}
        places = {name: self._place(name, last) for name in (*self.ends, *self._in_blocks(last))}
        return {name: place for name, place in places.items() if place and known.issuperset(place.paths)}

    def renamed(self, tensors: Tensors) -> dict[str, Tensor]:
        """By diffusers' names. Tensors of no layer are left out."""
        renamed: dict[str, Tensor] = {}
        last = _last(tensors)
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            place = self._place(layer, last) if leaf in _LEAVES else None
            if place is None:
                continue
            shares = [self.shares.get(path.rpartition(".")[2], 1) for path in place.paths]
            parts = split(turned(tensor) if place.turned else tensor, shares)
            renamed |= {
                f"{path}.{_LEAVES[leaf]}": part for path, part in zip(place.paths, parts, strict=True)
            }
        return renamed

    def _in_blocks(self, last: int) -> Iterator[str]:
        for kind, (_, layers) in self.blocks.items():
            yield from (f"{kind}.{number}.{layer}" for number in range(last + 1) for layer in layers)

    def _place(self, layer: str, last: int) -> Place | None:
        if layer in self.ends:
            return Place((self.ends[layer],), layer in self.turned)
        found = _BLOCK.fullmatch(layer)
        blocks, layers = self.blocks.get(found[1], ("", {})) if found else ("", {})
        if not found or found[3] not in layers:
            return None
        number, name = int(found[2]), found[3]
        paths = tuple(f"{blocks}.{number}.{path}" for path in layers[name])
        return Place(paths, number == last and name in self.turned_in_last)


def _last(names: Collection[str]) -> int:
    """The number of the last block of the kind that has most."""
    return max((int(found[2]) for name in names if (found := _BLOCK.match(name))), default=0)


_ENDS_OF_FLUX = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_LAST_OF_FLUX = "final_layer.adaLN_modulation.1"
_JOINT_OF_FLUX: Layers = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_SINGLE_OF_FLUX: Layers = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}

KLEIN = OwnNames(
    told_by="double_stream_modulation_img.linear",
    ends={
        **_ENDS_OF_FLUX,
        _LAST_OF_FLUX: "norm_out.linear",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    blocks={
        "double_blocks": (
            "transformer_blocks",
            {
                **_JOINT_OF_FLUX,
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {**_SINGLE_OF_FLUX, "linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    turned=frozenset({_LAST_OF_FLUX}),
)
"""Black Forest Labs' of Flux.2."""

FLUX1 = OwnNames(
    told_by="single_transformer_blocks.0.proj_mlp",
    ends={
        **_ENDS_OF_FLUX,
        _LAST_OF_FLUX: "norm_out.linear",
        **{
            f"{theirs}_in.{end}_layer": f"time_text_embed.{embedder}_embedder.linear_{number}"
            for theirs, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for number, end in ((1, "in"), (2, "out"))
        },
    },
    blocks={
        "double_blocks": (
            "transformer_blocks",
            {
                **_JOINT_OF_FLUX,
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {
                **_SINGLE_OF_FLUX,
                "modulation.lin": ("norm.linear",),
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
            },
        ),
    },
    turned=frozenset({_LAST_OF_FLUX}),
    shares={"proj_mlp": 4},
)
"""Black Forest Labs' of Flux.1."""

SD3 = OwnNames(
    told_by="pos_embed.proj",
    ends={
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        _LAST_OF_FLUX: "norm_out.linear",
        **{
            f"{theirs}_embedder.mlp.{2 * number - 2}": f"time_text_embed.{embedder}_embedder.linear_{number}"
            for theirs, embedder in (("t", "timestep"), ("y", "text"))
            for number in (1, 2)
        },
    },
    blocks={
        "joint_blocks": (
            "transformer_blocks",
            {
                **{
                    f"x_block.{attn}.{theirs}": paths
                    for attn in ("attn", "attn2")
                    for theirs, paths in (
                        ("qkv", (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v")),
                        ("proj", (f"{attn}.to_out.0",)),
                        ("ln_q", (f"{attn}.norm_q",)),
                        ("ln_k", (f"{attn}.norm_k",)),
                    )
                },
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            },
        )
    },
    turned=frozenset({_LAST_OF_FLUX}),
    turned_in_last=frozenset({"context_block.adaLN_modulation.1"}),
)
"""Stability's of SD 3 and 3.5; the table of places is no layer."""

XLABS = OwnNames(
    told_by=FLUX1.told_by,
    ends={},
    blocks={
        "double_blocks": (
            "transformer_blocks",
            {
                "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "proj_lora1": ("attn.to_out.0",),
                "proj_lora2": ("attn.to_add_out",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("proj_out",)},
        ),
    },
)
"""XLabs' of what a LoRA of Flux.1 changes."""
OWN_NAMES = KLEIN, FLUX1, SD3, XLABS
