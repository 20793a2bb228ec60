"""Qwen3 as a text encoder: a language model, of which some layers' states are read and no word is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import MOST_LAYERS, MOST_WIDTH, Check, is_count, is_positive, is_text, is_truth, or_none, whole
from .family import Extent, GraphNames, Network, Reading, Role, Shape, Tracing
from .networks import one_answer

if TYPE_CHECKING:
    from ..spec import Component, ModelSpec

_BUILT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "attention_bias",
)  # fmt: skip
FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_BUILT[:6], is_count),
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "max_position_embeddings": is_count,
    "hidden_act": is_text,
    "rms_norm_eps": is_positive,
    "attention_bias": is_truth,
    "use_sliding_window": lambda value: value in (None, False),
    "rope_theta": or_none(is_positive),
    "rope_scaling": lambda value: value is None or _is_plain_rope(value),
    "rope_parameters": lambda value: value is None or _is_plain_rope(value),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), or_none(whole(-1, MOST_WIDTH))),
}
# Those of Qwen3-4B.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 40960,
}
_THETA = 1_000_000.0
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
AROUND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's chat template puts around a message. Templates of models are programs, and none is run."""
WITHOUT_THINKING = AROUND[0], f"{AROUND[1]}<think>\n\n</think>\n\n"
"""The same for one that is answered without thinking."""


def _is_plain_rope(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    kinds = value.get("rope_type", "default"), value.get("type", "default")
    return kinds == ("default", "default") and is_positive(value.get("rope_theta", _THETA))


def text_encoder(
    read: Sequence[int], build: Any, call: Any, around: tuple[str, str], length: int, most: int
) -> Network:
    """A text encoder that answers the states after the layers `read`, counted from 1, side by side, for texts
    of `most` tokens, padded to a multiple of `length`. `build` and `call` are the functions below, of these
    layers."""
    last = max(read)

    def uses(name: str) -> bool:
        layer = _LAYER.match(name)
        return int(layer[1]) < last if layer else name.startswith("model.embed_tokens.")

    return Network(
        name="text_encoder",
        folder="text_encoder",
        role=Role.TEXT,
        listed=r"transformers Qwen3ForCausalLM|optimum\S* ORT\w+",
        fields=FIELDS,
        defaults=DEFAULTS,
        layers=lambda config: {"num_hidden_layers": config["num_hidden_layers"]},
        decided_by={_LAYER.pattern: "num_hidden_layers"},
        inputs=_inputs,
        build=build,
        call=call,
        uses=uses,
        tokenizer="tokenizer",
        reading=Reading(
            around=around,
            length=length,
            most=most,
            open_tokenizer=_open_tokenizer,
            listed=r"transformers Qwen2Tokenizer(Fast)?",
            width=lambda config: len(read) * config["hidden_size"],
        ),
        vocabulary="embed_tokens",
        skip=_skip,
    )


def _inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {"tokens": (1, extent.chunks * spec.text_length)}  # texts are encoded one by one


def _skip(component: Component, count: int) -> Component:  # noqa: ARG001
    raise TightfitError("clip skip is of CLIP, and this model reads texts by Qwen3: leave out --clip-skip")


def _open_tokenizer(folder: Path, **arguments: Any) -> Any:
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder, **arguments)


def built(component: Component, read: Sequence[int]) -> Any:
    """As far as the last of the layers that are read. Positions are computed in `encoded_by`, as a buffer
    that is made on meta has no values."""
    from torch import nn
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    config = component.config
    if config["num_hidden_layers"] < max(read):
        raise TightfitError(
            f"{component.folder} has {config['num_hidden_layers']} layers, and {max(read)} are read: "
            "copy or download the model again"
        )
    known = {field: config[field] for field in _BUILT}
    model: Any = Qwen3Model(Qwen3Config(num_hidden_layers=max(read), **known))
    model.norm, model.rotary_emb = nn.Identity(), nn.Identity()
    for layer in model.layers:
        layer.self_attn.layer_idx = 0  # of a cache, which there is not: so they are alike, and followed once
    module: Any = nn.ModuleDict({"model": model})
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    module.theta = float(rope.get("rope_theta") or config.get("rope_theta") or _THETA)
    return module


def encoded_by(module: Any, tokens: Any, read: Sequence[int]) -> tuple[Any, ...]:
    """(1, length, width). Each token sees itself and those before it that do not pad, and one that pads is
    read all the same."""
    import torch

    known = tokens >= 0
    return _states(module, torch.where(known, tokens, ~tokens), known, read)


def as_graph(read: Sequence[int]) -> dict[str, Any]:
    """What makes a text encoder one that is exported to ONNX: transformers' names for its inputs."""

    def call(module: Any, outputs: Sequence[str], tokens: Any, attention_mask: Any) -> tuple[Any, ...]:  # noqa: ARG001
        return _states(module, tokens, attention_mask > 0, read)

    graph = GraphNames(
        needed=frozenset({"input_ids", "attention_mask"}),
        answers=one_answer("last_hidden_state"),
        sides=(("input_ids", 2, 0, ""), ("attention_mask", 2, 0, "")),
        names={"tokens": "input_ids"},
        takes=_taken,
    )
    tracing = Tracing(
        sides=dict.fromkeys(("tokens", "attention_mask"), ("batch_size", "")),
        outputs=lambda _: ("last_hidden_state",),
        size={"batch_size": 2},
        checked=({"batch_size": 1},),
        tokens=frozenset({"tokens", "attention_mask"}),
        call=call,
    )
    return {"graph": graph, "tracing": tracing}


def _taken(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, and which of them do not pad."""
    import numpy as np

    tokens = arrays["tokens"]
    known = tokens >= 0
    return {"tokens": np.where(known, tokens, -1 - tokens), "attention_mask": known.astype(np.int64)}


def _states(module: Any, tokens: Any, known: Any, read: Sequence[int]) -> tuple[Any, ...]:
    import torch

    model, length = module["model"], tokens.shape[1]
    states = model.embed_tokens(tokens)
    sees = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril() & known[:, None, None]
    mask = torch.zeros(sees.shape, dtype=states.dtype, device=tokens.device)
    mask.masked_fill_(~sees, torch.finfo(states.dtype).min)
    positions = _rotary(module.theta, model.config.head_dim, length, states)
    found = []
    for number, layer in enumerate(model.layers, 1):
        states = layer(states, attention_mask=mask, position_embeddings=positions)
        if number in read:
            found.append(states)
    return (torch.cat(found, -1),)


def _rotary(theta: float, width: int, length: int, like: Any) -> tuple[Any, Any]:
    """Cosines and sines of each position, (1, length, width)."""
    import torch

    halves = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
    places = torch.arange(length, dtype=torch.float32, device=like.device)
    angles = torch.outer(places, 1.0 / theta**halves).repeat(1, 2)[None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
