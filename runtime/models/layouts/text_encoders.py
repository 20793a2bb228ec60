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
from . import renames
from .scales import scaled
from .single_file import Config, Shapes, Tensors

_QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"
_OWN_NAME = "tokenizer"


@dataclass(frozen=True)
class TextEncoder:
    """A kind of text encoder.

    title: as people call it. file: how its file is called. called: what ComfyUI calls it in a checkpoint, as
    a regular expression. named: its tensors by transformers' names, none of another network's. shapes: what
    these say of its config, and known, what they do not. widths: the fields that say how wide its texts are.
    pad: the token that fills up its texts, of CLIP's own vocabulary. tokenizers: without that, how folders of
    its tokenizer are called beside its file, or any number of folders above. tokenizer_of: whose that is.
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
        others; and what to do where there is none."""
        beside = [file.parent / name for file in (encoder, *others) for name in self.tokenizers]
        above = [folder / name for folder in encoder.absolute().parents[:4] for name in self.tokenizers[1:]]
        places = [encoder.with_suffix(""), *beside, *above]
        for place in places:
            if (place / "tokenizer.json").is_file() or (
                (place / "vocab.json").is_file() and (place / "merges.txt").is_file()
            ):
                return place, ""
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
