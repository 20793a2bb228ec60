"""Text encoders alone in files, or in a checkpoint as ComfyUI saves it: whether a file has one of a kind, and
its config, are told from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..spec import Component
from ..tensors import Tensor
from ..vocabulary import END
from . import pieces, renames
from .scales import scaled
from .single_file import Config, Shapes, Tensors, clip_config

_QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"
_DISTANCES = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_CLIP_HAS = r"text_model\.(?:embeddings|encoder|final_layer_norm)\."
_OWN_NAME = "tokenizer"


@dataclass(frozen=True)
class TextEncoder:
    """A kind of text encoder.

    title: as people call it. file: how its file is called. called: what ComfyUI calls it in a checkpoint, as
    a regular expression. named: its tensors by transformers' names, none of another network's. shapes: what
    these say of its config, and known, what they do not. widths: the fields that say how wide its texts are.
    pad: the token that fills up its texts, of CLIP's own vocabulary. tokenizers: without that, how folders of
    its tokenizer are called beside its file; all but the first also up to three folders above. tokenizer_of:
    whose that is. in_pieces: whether its pieces do, in such a folder, or beside or inside its file.
    """

    title: str
    file: str
    called: str
    named: Callable[[Tensors], dict[str, Tensor]]
    shapes: Callable[[Tensors], Config]
    known: Mapping[str, Any]
    widths: tuple[str, ...] = ("hidden_size",)
    pad: str | None = None
    tokenizers: tuple[str, ...] = (_OWN_NAME,)
    tokenizer_of: str = ""
    in_pieces: bool = False

    def read(self, tensors: Tensors) -> tuple[Config, dict[str, Tensor]]:
        """Its config and its tensors, both empty for a file without one. Raises TightfitError for one of
        which something is missing."""
        inside = re.compile(rf"text_encoders\.{self.called}\.transformer\.")
        own = {name[found.end() :]: t for name, t in tensors.items() if (found := inside.match(name))}
        named = self.named(own or tensors)
        return ({**self.known, **self.shapes(named)}, named) if named else ({}, {})

    def wide(self, width: int) -> Config:
        """What is known of one that is so wide."""
        return {**self.known, **dict.fromkeys(self.widths, width)}

    def tokenizer(self, encoder: Path, *others: Path) -> tuple[Path, str]:
        """The folder of its tokenizer: called as its file, or as such folders are, beside that or one of the
        others, or beside its own folder in a model's; and what to do where there is none."""
        beside = [file.parent / name for file in (encoder, *others) for name in self.tokenizers]
        above = [folder / name for folder in encoder.absolute().parents[:4] for name in self.tokenizers[1:]]
        own = re.fullmatch(r"text_encoder(_\d)?", encoder.parent.name)
        in_model = [encoder.parent.with_name(f"{_OWN_NAME}{own[1] or ''}")] if own else []
        places = [encoder.with_suffix(""), *beside, *above, *in_model]
        for place in places:
            if (place / "tokenizer.json").is_file() or (
                (place / "vocab.json").is_file() and (place / "merges.txt").is_file()
            ):
                return place, ""
        if self.in_pieces and (of := next(filter(pieces.place, (*places, encoder.parent, encoder)), None)):
            return of, ""
        return places[0], (
            f"{encoder} has no tokenizer beside it: put tokenizer.json of its model, "
            f"such as {self.tokenizer_of}, into the folder {places[0]}"
        )

    def with_tokenizer(self, component: Component, *others: Path) -> Component:
        """One that was read from a file, beside others, with what reads its texts."""
        if self.pad:
            return replace(component, pad=self.pad)
        return replace(component, tokenizer=self.tokenizer(component.folder, *others)[0])


def _qwen3(tensors: Tensors) -> dict[str, Tensor]:
    named = renames.llama_cpp(tensors) if "token_embd.weight" in tensors else scaled(tensors)
    return named if _QUERY_NORM in named else {}


def _of_qwen3(tensors: Tensors) -> Config:
    shapes, layer = Shapes(tensors), "model.layers.0"
    vocabulary, width = (shapes.side("model.embed_tokens.weight", side) for side in (0, 1))
    head = shapes.side(_QUERY_NORM)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes.side(f"{layer}.mlp.gate_proj.weight"),
        "num_hidden_layers": shapes.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": shapes.side(f"{layer}.self_attn.q_proj.weight") // max(1, head),
        "num_key_value_heads": shapes.side(f"{layer}.self_attn.k_proj.weight") // max(1, head),
        "head_dim": head,
    }


def _clip(tensors: Tensors, projected: bool) -> dict[str, Tensor]:
    """SD 3's and Flux.1's own code projects no text of CLIP-L, whatever its file has. What has no projection
    is no CLIP-G."""
    if "transformer.resblocks.0.ln_1.weight" in tensors:
        named = renames.open_clip(scaled(tensors))
    elif "text_model.embeddings.token_embedding.weight" in tensors:
        named = renames.clip(scaled(tensors))
    else:
        return {}
    if projected and "text_projection.weight" not in named:
        return {}
    used = re.compile(_CLIP_HAS + (r"|text_projection\." if projected else ""))
    return {n: t for n, t in named.items() if used.match(n) and not n.endswith(".position_ids")}


def _t5(tensors: Tensors) -> dict[str, Tensor]:
    """T5's encoder. Wan's umT5 is as wide, and has a table of distances in each block."""
    named = renames.llama_cpp_t5(tensors) if "enc.output_norm.weight" in tensors else scaled(tensors)
    return named if _DISTANCES.format(0) in named and _DISTANCES.format(1) not in named else {}


def _of_t5(tensors: Tensors) -> Config:
    shapes, layer = Shapes(tensors), "encoder.block.0.layer"
    heads = shapes.side(_DISTANCES.format(0), 1)
    return {
        "vocab_size": shapes.side("shared.weight"),
        "d_model": shapes.side("shared.weight", 1),
        "d_kv": shapes.side(f"{layer}.0.SelfAttention.q.weight") // max(1, heads),
        "d_ff": shapes.side(f"{layer}.1.DenseReluDense.wi_0.weight"),
        "num_layers": shapes.count(r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
    }


QWEN3 = TextEncoder(
    title="Qwen3",
    file="qwen_3_4b.safetensors",
    called=r"qwen\w+",
    named=_qwen3,
    shapes=_of_qwen3,
    known={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tokenizer_class": "Qwen2Tokenizer",
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    tokenizer_of="Qwen/Qwen3-4B",
)
CLIP_L = TextEncoder(
    title="CLIP-L",
    file="clip_l.safetensors",
    called="clip_l",
    named=lambda tensors: _clip(tensors, projected=False),
    shapes=lambda tensors: clip_config(tensors, projected=False),
    known={"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu"},
    widths=("hidden_size", "projection_dim"),
    pad=END,
)
CLIP_G = TextEncoder(
    title="CLIP-G",
    file="clip_g.safetensors",
    called="clip_g",
    named=lambda tensors: _clip(tensors, projected=True),
    shapes=lambda tensors: clip_config(tensors, projected=True),
    known={"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"},
    widths=("hidden_size", "projection_dim"),
    pad="!",
)
T5 = TextEncoder(
    title="T5",
    file="t5xxl_fp16.safetensors",
    called="t5xxl",
    named=_t5,
    shapes=_of_t5,
    known={"architectures": ["T5EncoderModel"], "model_type": "t5", "tokenizer_class": "T5Tokenizer"},
    widths=("d_model",),
    # The second is where ComfyUI has it, beside its folder of models. A "tokenizer" there is Qwen3's.
    tokenizers=("t5_tokenizer", "comfy/text_encoders/t5_tokenizer"),
    tokenizer_of="the folder tokenizer_2 of black-forest-labs/FLUX.1-schnell",
    in_pieces=True,
)
