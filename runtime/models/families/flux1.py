"""Flux.1, dev and schnell: T5 reads the text, CLIP-L sums it up, and a transformer of joint and of single
blocks takes the noise out of a picture's patches of 2x2 latents beside the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import MOST_LAYERS, Check, is_count, is_truth, many, or_none, whole
from ..cures import of_mixed
from .family import Extent, GraphNames, Network, Role, Shape
from .flow import even, mu_of_tokens, shifted
from .networks import PACKED, TEXT_ENCODER, one_answer
from .parts import in_parts, is_traced, parts
from .t5 import text_encoder
from .wide_vae import FLUX1_RGB, OfWideVae, wide_vae

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

_PATCH = 2
_SIDE = 128  # of the latents of pictures that it was trained on; no config says so

# --------------------------------------------------------------------------------------- the text encoders


def _sum_up(module: Any, tokens: Any) -> tuple[Any, ...]:
    """States, which nothing reads, and the pooled text."""
    out = module(tokens)
    return out.last_hidden_state, out.pooler_output


def _skip(component: Component, _count: int) -> Component:
    raise TightfitError(
        f"{component.folder} is read for its pooled text, of its last layer: leave out clip skip"
    )


def _answers(outputs: Sequence[str]) -> list[str]:
    if missing := [name for name in _SUMMED_UP if name not in outputs]:
        raise ValueError(missing[0])
    return [*_SUMMED_UP]


_SUMMED_UP = "last_hidden_state", "pooler_output"
_CLIP = replace(TEXT_ENCODER, call=_sum_up, graph=replace(TEXT_ENCODER.graph, answers=_answers), skip=_skip)

# -------------------------------------------------------------------------------------------- the denoiser

_COUNTS = (
    "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "pooled_projection_dim",
)  # fmt: skip
_FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_COUNTS, is_count),
    "out_channels": or_none(is_count),
    **dict.fromkeys(("num_layers", "num_single_layers"), whole(1, MOST_LAYERS)),
    "axes_dims_rope": many(is_count),
    "guidance_embeds": is_truth,
}
# What diffusers takes where a config leaves them out, but for the last.
_DEFAULTS = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": False,
    "sample_size": _SIDE,
}
_PLACES = 3  # axes of a token's place: one that all share, row and column


def _inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    config, t5 = spec.denoiser.config, spec.text_encoders[-1]
    guidance: dict[str, Shape] = {"guidance": (extent.batch,)} if config["guidance_embeds"] else {}
    return {
        "sample": (extent.batch, *spec.latent_shape(extent)),
        "timestep": (),
        "hidden": (extent.batch, spec.length_of(t5), spec.text_width),
        "pooled": (extent.batch, config["pooled_projection_dim"]),
        **guidance,
    }


def _build_denoiser(component: Component) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    module: Any = FluxTransformer2DModel(**{name: component.config[name] for name in _FIELDS})
    for block in module.transformer_blocks:
        block.attn.set_processor(_Attention())
        for fed in (block.ff, block.ff_context):
            fed.forward = in_parts(fed.forward, 2 * fed.net[0].proj.out_features)  # before and after gelu
    for block in module.single_transformer_blocks:
        block.attn.set_processor(_Attention())
        block.forward = _single(block)
    return module


class _Attention:
    """Of a row of tokens to all of it, or of a picture's and a text's to all of both."""

    _attention_backend = None  # as diffusers' own processors call it

    def __call__(self, attn: Any, states: Any, text: Any, _mask: Any, places: Sequence[Any]) -> Any:
        """(batch, tokens, width) of each, text first among `places`. There is no mask."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        if is_traced():
            plain: Any = FluxAttnProcessor()
            return plain(attn, states, text, image_rotary_emb=places)
        length = 0 if text is None else text.shape[1]
        qkv = states.new_empty(len(states), length + states.shape[1], 3, attn.heads, attn.head_dim)
        own = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        _fill(qkv[:, length:], states, own, [one[length:] for one in places])
        if text is not None:
            added = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)
            _fill(qkv[:, :length], text, (*added, (attn.add_v_proj, None)), [one[:length] for one in places])
        answer = dispatch_attention_fn(*qkv.unbind(2), backend=self._attention_backend).flatten(2)
        del qkv
        if text is None:
            return answer
        return attn.to_out[0](answer[:, length:]), attn.to_add_out(answer[:, :length])


def _single(block: Any) -> Callable[..., Any]:
    """The forward of a single block, of text and picture in one row of tokens, whose attention and
    feed-forward layer one linear adds up, for some tokens at a time."""

    def forward(states: Any, time: Any, places: Sequence[Any]) -> Any:
        import torch

        normed, gate = block.norm(states, emb=time)
        answer = block.attn(normed, image_rotary_emb=places)

        def added_up(answer: Any, normed: Any) -> Any:
            return block.proj_out(torch.cat([answer, block.act_mlp(block.proj_mlp(normed))], 2))

        if is_traced():
            out = added_up(answer, normed)
        else:
            out = torch.empty_like(states)
            for some in parts(states, states.shape[-1] + 3 * block.mlp_hidden_dim):
                out[:, some] = added_up(answer[:, some], normed[:, some])
        out = states + gate[:, None] * out
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out

    return forward


def _fill(qkv: Any, states: Any, layers: Sequence[tuple[Any, Any]], places: Sequence[Any]) -> None:
    """Queries, keys and values, each by its linear. The first two are normalised, and turned by their places:
    in fp32, which takes the bytes of ten in 16 bits, so some tokens at a time."""
    from diffusers.models.embeddings import apply_rotary_emb

    for number, (linear, norm) in enumerate(layers):
        for some in parts(states, 10 * states.shape[-1]):
            made = linear(states[:, some]).unflatten(-1, qkv.shape[-2:])
            if norm is not None:
                made = apply_rotary_emb(norm(made), tuple(one[some] for one in places), sequence_dim=1)
            qkv[:, some, number] = made


def _predict(
    module: Any, sample: Any, timestep: Any, hidden: Any, pooled: Any, guidance: Any = None
) -> tuple[Any, ...]:
    """Of latents (batch, channels, height, width), as diffusers' transformer does of their patches."""
    batch, channels, height, width = sample.shape
    rows, columns, length = height // _PATCH, width // _PATCH, hidden.shape[1]
    patches = sample.view(batch, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, rows * columns, -1)
    told = (timestep.expand(batch), *([] if guidance is None else [guidance.float() * 1000]))
    time = module.time_text_embed(*told, pooled)
    places = _places(module, rows, columns, length, sample.device)
    predicted = _through(module, module.x_embedder(patches), module.context_embedder(hidden), time, places)
    predicted = predicted.view(batch, rows, columns, channels, _PATCH, _PATCH).permute(0, 3, 1, 4, 2, 5)
    return (predicted.reshape(sample.shape),)


def _through(module: Any, picture: Any, text: Any, time: Any, places: Any) -> Any:
    """What is predicted of a picture's tokens, (batch, tokens, width)."""
    import torch

    length = text.shape[1]
    for block in module.transformer_blocks:
        text, picture = block(picture, text, time, places)
    tokens = torch.cat([text, picture], 1)
    del text, picture
    for block in module.single_transformer_blocks:
        tokens = block(tokens, time, places)
    return module.proj_out(module.norm_out(tokens[:, length:], time))


def _predict_tokens(
    module: Any,
    outputs: Sequence[str],  # noqa: ARG001
    sample: Any,
    timestep: Any,
    hidden: Any,
    pooled: Any,
    **given: Any,
) -> tuple[Any, ...]:
    """As a graph is called: of a picture's patches, with the places of all tokens. Times count up to 1."""
    import torch

    told = timestep, *([given["guidance"]] if "guidance" in given else [])
    time = module.time_text_embed(*(1000 * number for number in told), pooled)
    places = module.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    return (_through(module, module.x_embedder(sample), module.context_embedder(hidden), time, places),)


def _taken(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A session's arrays, as a graph takes them."""
    import numpy as np

    sample = arrays["sample"]
    batch, channels, height, width = sample.shape
    rows, columns = height // _PATCH, width // _PATCH
    patches = np.reshape(sample, (batch, channels, rows, _PATCH, columns, _PATCH)).transpose(0, 2, 4, 1, 3, 5)
    places = np.zeros((rows, columns, _PLACES), np.float32)
    places[..., 1], places[..., 2] = np.arange(rows)[:, None], np.arange(columns)
    return {
        **arrays,
        "sample": patches.reshape(batch, rows * columns, -1),
        "timestep": np.broadcast_to(arrays["timestep"] / np.float32(1000), batch),
        "img_ids": places.reshape(-1, _PLACES),
        "txt_ids": np.zeros((arrays["hidden"].shape[1], _PLACES), np.float32),
    }


def _given(answer: Any, arrays: Mapping[str, Any]) -> Any:
    """Latents of the tokens that a graph answers."""
    batch, channels, height, width = shape = arrays["sample"].shape
    tokens = answer.reshape(batch, height // _PATCH, width // _PATCH, channels, _PATCH, _PATCH)
    return tokens.transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def _places(module: Any, rows: int, columns: int, length: int, device: Any) -> Any:
    """What turns the heads of each token, of which all of a text are at the origin."""
    import torch

    ids = torch.zeros(length + rows * columns, _PLACES, device=device)
    down, across = (torch.arange(side, device=device) for side in (rows, columns))
    ids[length:, 1] = down.repeat_interleave(columns, output_size=rows * columns)
    ids[length:, 2] = across.repeat(rows)
    return module.pos_embed(ids)


_NAMES = {"sample": "hidden_states", "hidden": "encoder_hidden_states", "pooled": "pooled_projections"}
_TRANSFORMER = Network(
    name="transformer",
    folder="transformer",
    role=Role.DENOISER,
    listed=r"diffusers FluxTransformer2DModel|optimum\S* ORT\w+",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    layers=lambda config: {name: config[name] for name in ("num_layers", "num_single_layers")},
    decided_by={
        r"transformer_blocks\.": "num_layers",
        r"single_transformer_blocks\.": "num_single_layers",
        r"time_text_embed\.guidance_embedder\.": "guidance_embeds",
    },
    inputs=_inputs,
    build=_build_denoiser,
    call=_predict,
    graph=GraphNames(
        needed=frozenset({*_NAMES.values(), "timestep", "img_ids", "txt_ids"}),
        answers=one_answer("out_hidden_states"),
        optional=frozenset({"guidance"}),
        sides=(
            ("hidden_states", 3, 2, "in_channels"),
            ("encoder_hidden_states", 3, 2, "joint_attention_dim"),
            ("pooled_projections", 2, 1, "pooled_projection_dim"),
        ),
        names=_NAMES,
        takes=_taken,
        gives=_given,
    ),
    tracing=replace(PACKED, call=_predict_tokens),
)

# ------------------------------------------------------------------------------------------------- the VAE

_DECODER, _ENCODER = wide_vae(scale=0.3611, shift=0.1159)

# ---------------------------------------------------------------------------------------------- the family


class Flux1(OfWideVae):
    """dev, which was distilled for its guidance, and is told how much."""

    name, title, reads = "flux1-dev", "Flux.1", 4096
    networks = (_CLIP, text_encoder("_2", 512), _TRANSFORMER, _DECODER)
    on_demand = (_ENCODER,)
    takes = frozenset({"lora", "text_encoder", "unet", "vae"})
    tiny_decoder, latent_rgb = "taef1", FLUX1_RGB

    def claims(self, source: Source) -> bool:
        return source.config(_TRANSFORMER).get("_class_name") == "FluxTransformer2DModel"

    def check(self, spec: ModelSpec) -> None:
        config, folder = spec.denoiser.config, spec.folder
        super().check(spec)
        channels, answers = _PATCH**2 * spec.latents.channels, config["out_channels"] or config["in_channels"]
        if config["in_channels"] > answers:
            raise TightfitError(
                f"{folder} is a Flux.1 that reads pictures too: tightfit runs dev and schnell"
            )
        axes = config["axes_dims_rope"]
        if len(axes) != _PLACES or sum(axes) != config["attention_head_dim"] or any(n % 2 for n in axes):
            raise TightfitError(
                f"{folder} has axes_dims_rope of {sum(axes)}, which is not the width of a head: "
                "copy or download it again"
            )
        clip, t5 = spec.text_encoders
        there = t5.config["d_model"], clip.config["hidden_size"], channels, channels
        wanted = (
            config["joint_attention_dim"],
            config["pooled_projection_dim"],
            config["in_channels"],
            answers,
        )
        if config["patch_size"] != 1 or there != wanted:
            raise of_mixed(
                f"{folder} has texts {there[0]} wide, pooled {there[1]}, and patches of {channels} values, "
                f"and a transformer for {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )
        if "CLIPTextModel" not in clip.config.get("architectures", ["CLIPTextModel"]):
            raise TightfitError(
                f"{clip.folder} has a projection, which Flux.1's has not: copy or download the model again"
            )

    def text_width(self, spec: ModelSpec) -> int:
        """T5's; of CLIP the denoiser reads the pooled text alone."""
        return spec.denoiser.config["joint_attention_dim"]

    def default_guidance(self, spec: ModelSpec) -> float:
        return 3.5

    def default_steps(self, spec: ModelSpec) -> int:
        return 28

    def is_distilled(self, spec: ModelSpec) -> bool:
        return True

    def is_told_guidance(self, spec: ModelSpec) -> bool:
        return True

    def levels(self, spec: ModelSpec, size: tuple[int, int], steps: int) -> np.ndarray:
        tokens = math.prod(side // spec.latents.multiple for side in size)
        return shifted(even(steps), spec.scheduler, mu_of_tokens(spec.scheduler, tokens))

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        import numpy as np

        (_, pooled), (hidden,) = encoded
        guidance = np.full(len(hidden), job.guidance_scale, np.float32)
        return {"hidden": hidden, "pooled": pooled} | (
            {"guidance": guidance} if self.is_told_guidance(job.spec) else {}
        )


class Flux1Schnell(Flux1):
    """schnell, which was distilled for few steps too, with shorter texts."""

    name = "flux1-schnell"
    networks = (_CLIP, text_encoder("_2", 256), _TRANSFORMER, _DECODER)

    def claims(self, source: Source) -> bool:
        return super().claims(source) and not source.config(_TRANSFORMER).get("guidance_embeds")

    def default_guidance(self, spec: ModelSpec) -> float:
        return 1.0

    def default_steps(self, spec: ModelSpec) -> int:
        return 4

    def is_told_guidance(self, spec: ModelSpec) -> bool:
        return False
