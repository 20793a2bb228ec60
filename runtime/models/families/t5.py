"""T5's encoder, which reads texts for several families: what it answers for each token is read, pads
included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import MOST_LAYERS, MOST_WIDTH, Check, is_count, is_positive, or_none, whole
from .family import GraphNames, Network, Reading, Role, Tracing
from .networks import one_answer

if TYPE_CHECKING:
    from ..spec import Component

_COUNTS = "vocab_size", "d_model", "d_kv", "d_ff", "num_heads"
# How far tokens are from one another is told in 32 steps, up to 128: every T5's. Others may divide by zero.
_DISTANCES = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_COUNTS, is_count),
    **{name: whole(count, count) for name, count in _DISTANCES.items()},
    "num_layers": whole(1, MOST_LAYERS),
    "layer_norm_epsilon": is_positive,
    "feed_forward_proj": lambda value: value == "gated-gelu",
    **dict.fromkeys(("eos_token_id", "pad_token_id"), or_none(whole(0, MOST_WIDTH))),
}
# Those of T5 1.1 XXL.
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    **_DISTANCES,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
_BUILT = (*_COUNTS, *_DISTANCES, "num_layers", "layer_norm_epsilon", "feed_forward_proj")
_USED = "shared.", "encoder.block.", "encoder.final_layer_norm."
# In fp16 what feed-forward layers answer overflows. transformers keeps their last weight in fp32, 1.9 GiB
# more of XXL; here its inputs are scaled by a power of two, and its answers back. That rounds only what is
# below 2**-8, to multiples of 2**-18.
_SCALE = 2.0**-6


def text_encoder(place: str, length: int) -> Network:
    """T5 in the folder `text_encoder` with `place` behind that, for texts of `length` tokens, padded."""
    return Network(
        name=f"text_encoder{place}",
        folder=f"text_encoder{place}",
        role=Role.TEXT,
        listed=r"transformers T5EncoderModel|optimum\S* ORT\w+",
        fields=FIELDS,
        defaults=DEFAULTS,
        layers=lambda config: {"num_layers": config["num_layers"]},
        decided_by={
            r"encoder\.block\.\d+\.": "num_layers",
            r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi\.": "feed_forward_proj",
        },
        inputs=lambda _spec, _extent: {"tokens": (1, length)},  # texts are encoded one by one
        build=_build,
        call=_encode,
        graph=GraphNames(
            needed=frozenset({"input_ids"}),
            answers=one_answer("last_hidden_state"),
            sides=(("input_ids", 2, 0, ""), ("last_hidden_state", 3, 2, "d_model")),
            names={"tokens": "input_ids"},
            takes=_taken,
        ),
        tracing=Tracing(
            sides={"tokens": ("batch_size", "")},
            outputs=lambda _: ("last_hidden_state",),
            size={"batch_size": 2},
            checked=({"batch_size": 1},),
            tokens=frozenset({"tokens"}),
        ),
        uses=lambda name: name.startswith(_USED),
        tokenizer=f"tokenizer{place}",
        reading=Reading(
            around=("", ""),
            length=length,
            most=length,
            open_tokenizer=_open_tokenizer,
            listed=r"transformers T5Tokenizer(Fast)?",
            width=lambda config: config["d_model"],
            closed=True,
            in_pieces=True,
        ),
        vocabulary="shared",
        adapted_as=("te3_", "text_encoders_t5xxl_transformer_"),  # kohya's, whichever it is, and ComfyUI's
    )


def _open_tokenizer(folder: Path, **arguments: Any) -> Any:
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    return T5TokenizerFast.from_pretrained(folder, **arguments)


def _build(component: Component) -> Any:
    from torch import nn
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    config = {field: component.config[field] for field in _BUILT}
    model: Any = T5EncoderModel(T5Config(**config))
    blocks, norm = model.encoder.block, model.encoder.final_layer_norm
    model.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})
    for block in blocks:
        attention, feed = block.layer
        attention.SelfAttention.layer_idx = 0  # of a cache, which there is not: so blocks are alike
        attention.SelfAttention.forward = _attention(attention.SelfAttention)
        feed.DenseReluDense.forward = _feed_forward(feed.DenseReluDense)

    def read(tokens: Any) -> Any:
        import torch

        states, bias = model.shared(torch.where(tokens >= 0, tokens, ~tokens)), None
        for block in blocks:
            states, bias, *_ = block(states, position_bias=bias)
        return norm(states)

    model.forward = read
    return model


def _attention(own: Any) -> Callable[..., Any]:
    """Of all tokens to all others. The first block makes what is added to scores, by how far tokens are from
    one another, for all blocks."""

    def forward(states: Any, position_bias: Any = None, **_: Any) -> tuple[Any, Any, None]:
        from torch.nn.functional import scaled_dot_product_attention

        length = states.shape[1]
        if position_bias is None:
            position_bias = own.compute_bias(length, length, device=states.device).contiguous()
        q, k, v = (
            linear(states).unflatten(-1, (own.n_heads, -1)).transpose(1, 2)
            for linear in (own.q, own.k, own.v)
        )
        answer = scaled_dot_product_attention(q, k, v, attn_mask=position_bias, scale=1.0)
        return own.o(answer.transpose(1, 2).flatten(2)), position_bias, None

    return forward


def _feed_forward(own: Any) -> Callable[[Any], Any]:
    """transformers' own asks a weight for its dtype, which one that is quantised or streamed does not know.
    In fp16 its answer is in fp32, and so are all states after it."""

    def forward(states: Any) -> Any:
        import torch

        hidden = own.act(own.wi_0(states)) * own.wi_1(states)
        if hidden.dtype is torch.float16:
            return own.wo(hidden * _SCALE).float() / _SCALE
        return own.wo(hidden)

    return forward


def _taken(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens without the mark of those that pad, which a graph would count from the table's end."""
    import numpy as np

    tokens = arrays["tokens"]
    return {"tokens": np.where(tokens >= 0, tokens, -1 - tokens)}


def _encode(module: Any, tokens: Any) -> tuple[Any, ...]:
    """States (1, length, width). A token that pads is ~id."""
    return (module(tokens),)
