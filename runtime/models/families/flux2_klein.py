"""Flux.2 klein: Qwen3 reads the text, a transformer of joint and of single blocks takes the noise out of
latents in patches of 2x2, which the VAE normalises by its own statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import (
    MOST_LAYERS,
    Check,
    is_count,
    is_positive,
    is_truth,
    many,
    or_none,
    whole,
)
from ..cures import of_mixed
from .family import REFERENCE, Extent, Family, GraphNames, Latents, Network, Role, Shape
from .flow import even, shifted
from .networks import DECODER, ENCODER, PACKED, one_answer
from .parts import in_parts, is_traced, parts
from .qwen3 import WITHOUT_THINKING, as_graph, built, encoded_by, text_encoder

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

_READ = 9, 18, 27  # of Qwen3-4B's 36 layers
_TEXT_TOKENS = 512  # each text is padded to, or cut
_SIDE = 64  # of the latents of pictures that it was trained on; no config says so

# ---------------------------------------------------------------------------------------- the text encoder


def _build_text_encoder(component: Component) -> Any:
    return built(component, _READ)


def _encode(module: Any, tokens: Any) -> tuple[Any, ...]:
    return encoded_by(module, tokens, _READ)


_TEXT_ENCODER = text_encoder(
    _READ, _build_text_encoder, _encode, WITHOUT_THINKING, length=_TEXT_TOKENS, most=_TEXT_TOKENS
)
_TEXT_ENCODER = replace(_TEXT_ENCODER, **as_graph(_READ))

# -------------------------------------------------------------------------------------------- the denoiser

_COUNTS = (
    "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "timestep_guidance_channels", "rope_theta",
)  # fmt: skip
_FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_COUNTS, is_count),
    "out_channels": or_none(is_count),
    **dict.fromkeys(("num_layers", "num_single_layers"), whole(1, MOST_LAYERS)),
    **dict.fromkeys(("mlp_ratio", "eps"), is_positive),
    "axes_dims_rope": many(is_count),
    "guidance_embeds": is_truth,
}
# What diffusers takes where a config leaves them out, but for the last.
_DEFAULTS = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
    "sample_size": _SIDE,
}


def _layers(config: Mapping[str, Any]) -> dict[str, int]:
    return {name: config[name] for name in ("num_layers", "num_single_layers")}


def _inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {
        "sample": (extent.batch, *spec.latent_shape(extent)),
        "timestep": (),
        "hidden": (extent.batch, spec.text_length, spec.text_width),
        **{
            f"{REFERENCE}{number}": (1, *spec.latent_shape(extent._replace(height=height, width=width)))
            for number, (height, width) in enumerate(extent.references)
        },
    }


def _build_denoiser(component: Component) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    module: Any = Flux2Transformer2DModel(**{name: component.config[name] for name in _FIELDS})
    for block in module.transformer_blocks:
        for part in (block.ff, block.ff_context):
            part.forward = in_parts(part.forward, part.linear_in.out_features)
    for block in module.single_transformer_blocks:
        block.attn.set_processor(_InParts())
    return module


class _InParts:
    """The attention of a single block, whose one linear makes heads and a feed-forward layer's hidden values,
    for some tokens at a time."""

    _attention_backend = None  # as diffusers' own processors call it

    def __call__(
        self, attn: Any, hidden_states: Any, attention_mask: Any = None, image_rotary_emb: Any = None
    ) -> Any:
        """(batch, tokens, width). There is no mask."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb
        from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor

        if is_traced():
            plain = Flux2ParallelSelfAttnProcessor()
            return plain(attn, hidden_states, attention_mask, image_rotary_emb)
        batch, length, _ = hidden_states.shape
        heads, width = attn.heads, attn.inner_dim
        qkv = hidden_states.new_empty(batch, length, 3, heads, attn.head_dim)
        joined = hidden_states.new_empty(batch, length, width + attn.mlp_hidden_dim)
        for some in parts(hidden_states, 3 * width + attn.mlp_mult_factor * attn.mlp_hidden_dim):
            made = attn.to_qkv_mlp_proj(hidden_states[:, some])
            q, k, v = made[..., : 3 * width].unflatten(-1, (3, heads, -1)).unbind(2)
            places = tuple(values[some] for values in image_rotary_emb)
            qkv[:, some, 0] = apply_rotary_emb(attn.norm_q(q), places, sequence_dim=1)
            qkv[:, some, 1] = apply_rotary_emb(attn.norm_k(k), places, sequence_dim=1)
            qkv[:, some, 2] = v
            joined[:, some, width:] = attn.mlp_act_fn(made[..., 3 * width :])
            del made, q, k, v
        answer = dispatch_attention_fn(*qkv.unbind(2), backend=self._attention_backend)
        joined[..., :width] = answer.flatten(2)
        del qkv, answer
        return attn.to_out(joined)


_BETWEEN = 10  # places of the first axis, from one picture to the next


def _predict(module: Any, sample: Any, timestep: Any, hidden: Any, **references: Any) -> tuple[Any, ...]:
    """Of latents (batch, channels, height, width), beside those of references (1, channels, any, any)."""
    import torch

    batch, count, length = len(sample), sample[0, 0].numel(), hidden.shape[1]
    pictures = [sample, *(references[f"{REFERENCE}{number}"] for number in range(len(references)))]
    tokens = [picture.flatten(2).transpose(1, 2).expand(batch, -1, -1) for picture in pictures]
    places = [_places(picture, _BETWEEN * number) for number, picture in enumerate(pictures)]
    text = torch.zeros(length, 4, device=sample.device)
    text[:, 3] = torch.arange(length, device=sample.device)
    (predicted,) = module(
        torch.cat(tokens, 1) if references else tokens[0],
        encoder_hidden_states=hidden,
        timestep=timestep.expand(batch) / 1000,
        img_ids=torch.cat(places) if references else places[0],
        txt_ids=text,
        return_dict=False,
    )
    return (predicted[:, :count].transpose(1, 2).reshape(sample.shape),)


def _places(picture: Any, number: int) -> Any:
    """(tokens, 4) of a picture's latents. A place has four axes: the picture's number, row, column, and a
    text's place."""
    import torch

    height, width = picture.shape[2:]
    places = torch.zeros(height * width, 4, device=picture.device)
    places[:, 0] = number
    places[:, 1] = torch.arange(height, device=picture.device).repeat_interleave(
        width, output_size=height * width
    )
    places[:, 2] = torch.arange(width, device=picture.device).repeat(height)
    return places


def _predict_tokens(
    module: Any,
    outputs: Sequence[str],  # noqa: ARG001
    sample: Any,
    timestep: Any,
    hidden: Any,
    img_ids: Any,
    txt_ids: Any,
) -> tuple[Any, ...]:
    """As a graph is called: of all pictures' tokens, with the places of all tokens. Times count up to 1."""
    return module(
        sample,
        encoder_hidden_states=hidden,
        timestep=timestep,
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )


def _taken(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A session's arrays, as a graph takes them."""
    import numpy as np

    references = [array for name, array in arrays.items() if name.startswith(REFERENCE)]
    pictures, batch, length = (
        [arrays["sample"], *references],
        len(arrays["sample"]),
        arrays["hidden"].shape[1],
    )
    tokens, every = [], []
    for number, picture in enumerate(pictures):
        _, channels, height, width = picture.shape
        rows = np.reshape(picture, (-1, channels, height * width)).transpose(0, 2, 1)
        tokens.append(np.broadcast_to(rows, (batch, height * width, channels)))
        places = np.zeros((height, width, 4), np.float32)
        places[..., 0], places[..., 1], places[..., 2] = (
            _BETWEEN * number,
            np.arange(height)[:, None],
            np.arange(width),
        )
        every.append(places.reshape(-1, 4))
    text = np.zeros((length, 4), np.float32)
    text[:, 3] = np.arange(length)
    return {
        "sample": np.concatenate(tokens, 1),
        "timestep": np.broadcast_to(arrays["timestep"] / np.float32(1000), batch),
        "hidden": arrays["hidden"],
        "img_ids": np.concatenate(every),
        "txt_ids": text,
    }


def _given(answer: Any, arrays: Mapping[str, Any]) -> Any:
    """Latents of the picture's tokens among those that a graph answers."""
    *_, height, width = shape = arrays["sample"].shape
    return answer[:, : height * width].transpose(0, 2, 1).reshape(shape)


_NAMES = {"sample": "hidden_states", "hidden": "encoder_hidden_states"}
_TRANSFORMER = Network(
    name="transformer",
    folder="transformer",
    role=Role.DENOISER,
    listed=r"diffusers Flux2Transformer2DModel|optimum\S* ORT\w+",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    layers=_layers,
    decided_by={r"transformer_blocks\.": "num_layers", r"single_transformer_blocks\.": "num_single_layers"},
    inputs=_inputs,
    build=_build_denoiser,
    call=_predict,
    graph=GraphNames(
        needed=frozenset({*_NAMES.values(), "timestep", "img_ids", "txt_ids"}),
        answers=one_answer("out_hidden_states"),
        sides=(
            ("hidden_states", 3, 2, "in_channels"),
            ("encoder_hidden_states", 3, 2, "joint_attention_dim"),
        ),
        names=_NAMES,
        takes=_taken,
        gives=_given,
    ),
    tracing=replace(PACKED, call=_predict_tokens),
)

# ------------------------------------------------------------------------------------------------- the VAE

_MEAN, _VARIANCE = "running_mean", "running_var"
_OF_VAE = {
    "fields": {
        **DECODER.fields,
        "decoder_block_out_channels": or_none(many(is_count)),
        "batch_norm_eps": is_positive,
        "patch_size": lambda value: many(is_count, 2)(value) and len(value) == 2 and value[0] == value[1],
    },
    "defaults": {
        **{name: value for name, value in DECODER.defaults.items() if name != "scaling_factor"},
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 32,
        "batch_norm_eps": 1e-4,
        "patch_size": (2, 2),
    },
    "listed": r"diffusers AutoencoderKLFlux2|optimum\S* ORT\w+",
}


def _half(component: Component, half: str, convolution: str) -> Any:
    """Of the VAE, with the convolution beside it, and the statistics by which latents are normalised."""
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from torch import nn

    whole: Any = AutoencoderKLFlux2.from_config(dict(component.config))
    statistics = {name: nn.Parameter(getattr(whole.bn, name), False) for name in (_MEAN, _VARIANCE)}
    parts = {half: getattr(whole, half), convolution: getattr(whole, convolution) or nn.Identity()}
    return nn.ModuleDict({**parts, "bn": nn.ParameterDict(statistics)})


def _build_decoder(component: Component) -> Any:
    module = _half(component, "decoder", "post_quant_conv")
    normal = _normal(module["bn"], component)

    def unpacked(_: Any, given: tuple[Any, ...]) -> Any:
        (latents,), (mean, deviation) = given, normal()
        return unpack(latents * deviation + mean, component.config["patch_size"])

    module["post_quant_conv"].register_forward_pre_hook(unpacked)
    return module


def _build_encoder(component: Component) -> Any:
    """It answers latents: the distribution's mean, as diffusers takes that."""
    module = _half(component, "encoder", "quant_conv")
    normal = _normal(module["bn"], component)

    def packed(_: Any, __: Any, moments: Any) -> Any:
        mean, deviation = normal()
        return (pack(moments.chunk(2, dim=1)[0], component.config["patch_size"]) - mean) / deviation

    module["quant_conv"].register_forward_hook(packed)
    return module


def _normal(statistics: Any, component: Component) -> Callable[[], tuple[Any, Any]]:
    """Mean and deviation of each channel, once they are loaded."""

    def loaded() -> tuple[Any, Any]:
        deviation = (statistics[_VARIANCE] + component.config["batch_norm_eps"]).sqrt()
        return statistics[_MEAN][:, None, None], deviation[:, None, None]

    return loaded


def pack(latents: Any, patch: Sequence[int]) -> Any:
    """(batch, channels, height, width) → (batch, channels of a patch, patches down, patches across)."""
    (tall, wide), (batch, channels, height, width) = patch, latents.shape
    parts = latents.reshape(batch, channels, height // tall, tall, width // wide, wide)
    parts = parts.permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(batch, channels * tall * wide, height // tall, width // wide)


def unpack(latents: Any, patch: Sequence[int]) -> Any:
    """The reverse."""
    (tall, wide), (batch, channels, height, width) = patch, latents.shape
    parts = latents.reshape(batch, channels // (tall * wide), tall, wide, height, width)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * tall, width * wide)


_DECODER = replace(
    DECODER,
    **_OF_VAE,
    build=_build_decoder,
    prefixes=("decoder.", "post_quant_conv.", "bn."),
    graph=replace(DECODER.graph, sides=()),  # of patches, which are wider than its config says of latents
)
_ENCODER = replace(ENCODER, **_OF_VAE, build=_build_encoder, prefixes=("encoder.", "quant_conv.", "bn."))

# ---------------------------------------------------------------------------------------------- the family


# Red, green and blue of the VAE's channels that colour a picture most, and a constant, as
# stable-diffusion.cpp has them in latent-preview.h (MIT), where stduhpf fitted them. Of the other 23 no
# number is above 0.02.
_CHANNELS, _PATCH = 32, 4
_COLOURS = {
    1: (-0.001, -0.016, 0.021), 2: (-0.006, 0.002, 0.037), 3: (0.039, 0.074, 0.12),
    6: (-0.033, 0.051, -0.028), 8: (-0.113, -0.084, -0.023), 11: (0.033, 0, -0.061),
    15: (-0.028, 0.028, 0.018), 19: (0.053, -0.02, 0.009), 29: (-0.035, -0.009, 0.013),
}  # fmt: skip
_CONSTANT = -0.029, -0.098, -0.108


def _colour(which: int) -> tuple[float, ...]:
    """The mean over a patch of red, green or blue."""
    shares = [
        _COLOURS[channel][which] / _PATCH if channel in _COLOURS else 0.0 for channel in range(_CHANNELS)
    ]
    return (*(share for share in shares for _ in range(_PATCH)), _CONSTANT[which])


class Flux2Klein(Family):
    name, title, reads = "flux2-klein", "Flux.2 klein", 7680
    networks = (_TEXT_ENCODER, _TRANSFORMER, _DECODER)
    on_demand = (_ENCODER,)
    first_step_is_known = True
    needs_range = True
    takes = frozenset({"lora", "text_encoder", "unet", "vae"})
    reference_pixels = 1024**2  # diffusers'
    latent_rgb = tuple(map(_colour, range(3)))

    def claims(self, source: Source) -> bool:
        return source.config(_TRANSFORMER).get("_class_name") == "Flux2Transformer2DModel"

    def check(self, spec: ModelSpec) -> None:
        config, folder = spec.denoiser.config, spec.folder
        if config["guidance_embeds"] or config["patch_size"] != 1:
            raise TightfitError(f"{folder} is a Flux.2 that is not klein: tightfit runs klein")
        if (vae := spec.vae.get("_class_name")) != "AutoencoderKLFlux2":
            raise TightfitError(
                f"{folder} has a {vae}, not klein's AutoencoderKLFlux2: copy or download it again"
            )
        reads, channels = config["joint_attention_dim"], spec.latents.channels
        if (reads, config["in_channels"]) != (spec.text_width, channels) or config["out_channels"] not in (
            None,
            channels,
        ):
            raise of_mixed(
                f"{folder} has texts {spec.text_width} wide and latents of {channels} channels, "
                f"and a transformer for {reads} and {config['in_channels']}"
            )

    def default_guidance(self, spec: ModelSpec) -> float:
        return 1.0 if self.is_distilled(spec) else 4.0

    def default_steps(self, spec: ModelSpec) -> int:
        return 4 if self.is_distilled(spec) else 50

    def is_distilled(self, spec: ModelSpec) -> bool:
        return bool(spec.settings.get("is_distilled"))

    def overflows_in_half(self, spec: ModelSpec) -> frozenset[Role]:
        """The text encoder, as language models do that were trained in bf16. Of the transformer diffusers
        clips the states in fp16."""
        return frozenset({Role.TEXT})

    def latents(self, spec: ModelSpec) -> Latents:
        of_vae, (tall, wide) = super().latents(spec), spec.vae["patch_size"]
        pixels = of_vae.pixels * tall
        return Latents(of_vae.channels * tall * wide, pixels, pixels)

    def levels(self, spec: ModelSpec, size: tuple[int, int], steps: int) -> np.ndarray:
        tokens = math.prod(side // spec.downsampling for side in size)
        return shifted(even(steps), spec.scheduler, _mu(tokens, steps))

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        ((hidden,),) = encoded
        return {"hidden": hidden}


# How far levels are shifted, by the picture's tokens: lines for 10 and for 200 steps, from diffusers'
# Flux2KleinPipeline. Above 4300 tokens the second is for all.
_TEN, _TWO_HUNDRED, _MOST_TOKENS = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


def _mu(tokens: int, steps: int) -> float:
    few, many_steps = (slope * tokens + start for slope, start in (_TEN, _TWO_HUNDRED))
    if tokens > _MOST_TOKENS:
        return many_steps
    slope = (many_steps - few) / 190
    return slope * steps + many_steps - 200 * slope
