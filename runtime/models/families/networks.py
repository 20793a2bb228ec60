"""The networks that the families of Stable Diffusion share: CLIP's text encoder, the U-Net, both halves of
the VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import (
    LEAST_TENSORS,
    MOST_ALL,
    MOST_LAYERS,
    MOST_LEVELS,
    MOST_WIDTH,
    Check,
    brief,
    check_fields,
    is_count,
    is_layers,
    is_number,
    is_positive,
    is_size,
    is_text,
    is_truth,
    largest,
    many,
    or_many,
    or_none,
    whole,
)
from ..cures import of_mixed
from .family import FEATURE, KEPT, RESIDUAL, SHALLOW, Extent, GraphNames, Network, Role, Shape, Tracing
from .image_prompt import SCALE, TOKENS, with_images
from .step_cache import kept_shape, predict

if TYPE_CHECKING:
    from ..spec import Component, ModelSpec

# What is read here, before the libraries that own the configs see it, and what it must be.
_TEXT_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
_TEXT = {
    **dict.fromkeys(_TEXT_COUNTS, is_count),
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "eos_token_id": whole(0, MOST_WIDTH),  # the token whose place the pooled text is read from
    **dict.fromkeys(("bos_token_id", "pad_token_id"), or_none(whole(-1, MOST_WIDTH))),
    "clip_skip": whole(2, MOST_LAYERS),  # ours, never a file's
    "hidden_act": is_text,
    "layer_norm_eps": is_positive,
}
_VAE = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), is_count),
    **dict.fromkeys(("down_block_types", "up_block_types"), many(is_text)),
    **dict.fromkeys(
        ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast"),
        or_none(is_truth),
    ),
    **dict.fromkeys(("latents_mean", "latents_std"), or_none(many(is_number, MOST_WIDTH))),
    "block_out_channels": many(is_count),
    "layers_per_block": is_layers,
    "norm_num_groups": is_count,
    "act_fn": is_text,
    "scaling_factor": is_positive,
    "shift_factor": or_none(is_number),
}
_UNET_COUNTS = (
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim",
    "time_embedding_dim", "encoder_hid_dim", "num_class_embeds", "addition_embed_type_num_heads",
    "norm_num_groups",
)  # fmt: skip
_UNET_TRUTHS = (
    "flip_sin_to_cos", "use_linear_projection", "upcast_attention", "dual_cross_attention",
    "center_input_sample", "resnet_skip_time_act", "class_embeddings_concat",
    "mid_block_only_cross_attention",
)  # fmt: skip
_UNET_TEXTS = (
    "mid_block_type", "act_fn", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act",
    "class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "resnet_time_scale_shift",
    "attention_type", "cross_attention_norm",
)  # fmt: skip
_nested_layers = or_many(or_many(is_layers))
_UNET = {
    **dict.fromkeys(("in_channels", "out_channels"), is_count),
    **dict.fromkeys(_UNET_COUNTS, or_none(is_count)),
    **dict.fromkeys(_UNET_TRUTHS, or_none(is_truth)),
    **dict.fromkeys(_UNET_TEXTS, or_none(is_text)),
    **dict.fromkeys(("down_block_types", "up_block_types"), many(is_text)),
    **dict.fromkeys(("attention_head_dim", "cross_attention_dim"), or_many(is_count)),
    **dict.fromkeys(("norm_eps", "mid_block_scale_factor"), is_positive),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), whole(1, 15)),
    "block_out_channels": many(is_count),
    "num_attention_heads": or_none(or_many(is_count)),
    "only_cross_attention": or_none(or_many(is_truth)),
    "sample_size": or_none(is_size),
    "layers_per_block": or_many(is_layers),
    "transformer_layers_per_block": _nested_layers,
    "reverse_transformer_layers_per_block": or_none(_nested_layers),
    "downsample_padding": whole(0, 1),
    "freq_shift": is_number,
    "dropout": is_number,
}
SCHEDULER_FIELDS: Mapping[str, Check] = {
    "num_train_timesteps": whole(1, MOST_LEVELS),
    "original_inference_steps": or_none(whole(1, MOST_LEVELS)),
    "steps_offset": whole(0, MOST_LEVELS),
    "prediction_type": lambda value: value in ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "trained_betas": or_none(many(is_number, MOST_LEVELS)),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), whole(1, 16)),
    **dict.fromkeys(("beta_start", "beta_end", "shift"), is_positive),
    "flow_shift": or_none(is_positive),
    **dict.fromkeys(("base_shift", "max_shift"), is_number),
}
# What the libraries take for fields that a config leaves out.
_UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
    "sample_size": None,
}
_VAE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "scaling_factor": 0.18215,
}
_TEXT_DEFAULTS = {
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_size": 512,
    "projection_dim": 512,
    "num_hidden_layers": 12,
}
# The field of the config that decides whether there is a tensor called so.
_UNET_DECIDED_BY = {
    r"mid_block\.attentions\.\d+\.transformer_blocks\.[1-9]": "transformer_layers_per_block",
    r"mid_block\.": "mid_block_type",
    r"(down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.[1-9]": "transformer_layers_per_block",
    r"(down|up)_blocks\.\d+\.(resnets|attentions)\.": "layers_per_block",
    r"(down|up)_blocks\.\d+\.(up|down)samplers\.": "block_out_channels",
    r"(down|up)_blocks\.": "block_out_channels",
    r"time_embedding\.cond_proj\.": "time_cond_proj_dim",
    r"conv_norm_out\.": "norm_num_groups",
    r"add_embedding\.": "addition_embed_type",
    r"class_embedding\.": "class_embed_type",
    r"encoder_hid_proj\.": "encoder_hid_dim_type",
}
_VAE_DECIDED_BY = {
    r"post_quant_conv\.": "use_post_quant_conv",
    r"decoder\.mid_block\.attentions\.": "mid_block_add_attention",
    r"decoder\.up_blocks\.\d+\.resnets\.": "layers_per_block",
    r"decoder\.": "block_out_channels",
}
_ENCODER_DECIDED_BY = {
    r"quant_conv\.": "use_quant_conv",
    r"encoder\.mid_block\.attentions\.": "mid_block_add_attention",
    r"encoder\.down_blocks\.\d+\.resnets\.": "layers_per_block",
    r"encoder\.": "block_out_channels",
}
_TEXT_DECIDED_BY = {r"(text_model\.)?encoder\.layers\.\d+\.": "num_hidden_layers"}


def check_config(component: Component) -> None:
    """Every field that decides what is built, before it is: a count of layers may not exceed the tensors that
    are there."""
    file, config, network = component.config_file, component.config, component.network
    check_fields(file, config, network.fields)
    tensors = sum(1 for tensor in component.tensors.values() if tensor.count)
    most_layers = min(tensors if component.tensors else MOST_ALL, MOST_ALL) // LEAST_TENSORS
    for field, count in network.layers(config).items():
        if count > most_layers:
            raise of_mixed(
                f"{file} has {field} {brief(config.get(field))}, more layers than {tensors} tensors can be of"
            )
    for field in ("latents_mean", "latents_std"):
        if (given := config.get(field)) and len(given) != config["latent_channels"]:
            raise TightfitError(
                f"{file} has {field} of {len(given)} channels, not of its latent_channels: "
                "copy or download it again"
            )


def _text_layers(config: Mapping[str, Any]) -> dict[str, int]:
    return {"num_hidden_layers": config["num_hidden_layers"]}


def _block_layers(config: Mapping[str, Any]) -> dict[str, int]:
    return {"layers_per_block": largest(config["layers_per_block"]) * len(config["block_out_channels"])}


def _unet_layers(config: Mapping[str, Any]) -> dict[str, int]:
    blocks = _block_layers(config)
    inner = largest(config["transformer_layers_per_block"])
    inner = max(inner, largest(config.get("reverse_transformer_layers_per_block") or 0))
    return blocks | {"transformer_layers_per_block": blocks["layers_per_block"] * inner}


# Of a transformer whose graph takes a picture's tokens, and the places of all, as Optimum's do of Flux.
PACKED = Tracing(
    sides={
        "sample": ("batch_size", "packed_height_width", ""),
        "hidden": ("batch_size", "", ""),
        "pooled": ("batch_size", ""),
        **dict.fromkeys(("timestep", "guidance"), ("batch_size",)),
        "img_ids": ("packed_height_width", ""),
        "txt_ids": ("", ""),
    },
    outputs=lambda _: ("out_hidden_states",),
    size={"batch_size": 2, "packed_height_width": 96},
    checked=({"batch_size": 1, "packed_height_width": 77},),
    exact=frozenset({"timestep", "guidance", "img_ids", "txt_ids"}),
)


def one_answer(name: str) -> Callable[[Sequence[str]], list[str]]:
    """Picks that answer of a graph's."""

    def answers(outputs: Sequence[str]) -> list[str]:
        if name not in outputs:
            raise ValueError(name)
        return [name]

    return answers


def _text_inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:  # noqa: ARG001  texts are encoded one by one
    return {"tokens": (1, spec.text_length)}


def unet_inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    """Shapes of latents, timestep and texts; of the guidance that distilled U-Nets are told; and of what
    networks of conditions add."""
    shapes: dict[str, Shape] = {
        "sample": (extent.batch, spec.unet["in_channels"], *spec.latent_shape(extent)[1:]),
        "timestep": (),
    }
    length = extent.chunks * spec.text_length + spec.unet.get(TOKENS, 0)
    shapes["hidden"] = (extent.batch, length, spec.text_width)
    if spec.guidance_width:
        shapes["time_condition"] = (1, spec.guidance_width)
    for component in spec.components.values():
        shapes |= component.network.adds(spec, extent)
    if extent.cache == SHALLOW:
        shapes[KEPT] = kept_shape(spec, extent.batch, *spec.latent_shape(extent)[1:])
    return shapes


def residuals(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    """Shapes of what is added to the U-Net's skip connections, and last to its middle; a shallow call reads
    the first alone."""
    _, height, width = spec.latent_shape(extent)
    every = residuals_of(spec.unet, {"batch_size": extent.batch, "height": height, "width": width})
    return {f"{RESIDUAL}0": every[f"{RESIDUAL}0"]} if extent.cache == SHALLOW else every


def residuals_of(config: Mapping[str, Any], size: Mapping[str, int]) -> dict[str, Shape]:
    """One for the input, and in each block one for each layer and for what makes the next one's sides half as
    long; `size` is that of the latents."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    batch, height, width = (size[side] for side in ("batch_size", "height", "width"))
    shapes: list[Shape] = [(batch, widths[0], height, width)]
    for block, channels in enumerate(widths):
        count = layers if isinstance(layers, int) else layers[block]
        shapes += [(batch, channels, height, width)] * count
        if block < len(widths) - 1:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((batch, channels, height, width))
    return {f"{RESIDUAL}{number}": shape for number, shape in enumerate([*shapes, shapes[-1]])}


def adding_residuals(network: Network, config: Mapping[str, Any]) -> Network:
    """The network as ONNX that adds residuals, by diffusers' names for them. Each is given in full, or is one
    zero."""
    *down, middle = residuals_of(config, _SIZE)
    names = {name: f"down_block_additional_residual_{number}" for number, name in enumerate(down)}
    names[middle] = "mid_block_additional_residual"
    graph, tracing = network.graph, network.tracing
    assert tracing
    before = tracing.following
    return replace(
        network,
        graph=replace(
            graph,
            needed=graph.needed | {*names.values()},
            names={**graph.names, **names},
            zeros=frozenset(names.values()),
        ),
        tracing=replace(
            tracing, following=lambda config, size: {**before(config, size), **residuals_of(config, size)}
        ),
    )


def _decoder_inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {"latents": (extent.batch, *spec.latent_shape(extent))}


def _encoder_inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    return {"pixels": (1, spec.vae["in_channels"], extent.height, extent.width)}


def _encode(module: Any, tokens: Any) -> tuple[Any, ...]:
    """The last layer, normalised."""
    return (module(tokens).last_hidden_state,)


def _every_state(module: Any, outputs: Sequence[str], tokens: Any) -> tuple[Any, ...]:
    """All that Optimum has a text encoder answer: two outputs by name, then the states around each layer."""
    import torch

    # The module's own positions are a buffer, and have no values where it was built on meta.
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    out = module(tokens, position_ids=positions, output_hidden_states=len(outputs) > 2)
    states = out.hidden_states or ()
    return (*(out[name] for name in outputs[: len(outputs) - len(states)]), *states)


def _predict(
    module: Any, sample: Any, timestep: Any, hidden: Any, time_condition: Any = None, **added: Any
) -> tuple[Any, ...]:
    *down, middle = [added.pop(name) for name in [*added] if name.startswith(RESIDUAL)] or [None]
    # Alike in all rows; diffusers leaves out one of another shape than the middle's.
    features = [added.pop(name) for name in [*added] if name.startswith(FEATURE)]
    features = [feature.expand(len(sample), -1, -1, -1) for feature in features]
    return module(
        sample,
        timestep,
        hidden,
        timestep_cond=time_condition,
        added_cond_kwargs=added or None,
        down_block_additional_residuals=down or None,
        mid_block_additional_residual=middle,
        down_intrablock_additional_residuals=features or None,
        return_dict=False,
    )[:1]


def _decode(module: Any, latents: Any) -> tuple[Any, ...]:
    return (module["decoder"](module["post_quant_conv"](latents)),)


def _moments(module: Any, pixels: Any) -> tuple[Any, ...]:
    """Mean and logarithm of the variance of the latents, side by side."""
    return (module["quant_conv"](module["encoder"](pixels)),)


_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id",
    "eos_token_id", "pad_token_id", "clip_skip",
)  # fmt: skip


def _text_class(component: Component) -> str:
    names = component.config.get("architectures") or ["CLIPTextModel"]
    return names[0] if isinstance(names, list) else names


def text_outputs(component: Component) -> tuple[str, ...]:
    """As Optimum has them, for either class."""
    if _text_class(component) == "CLIPTextModelWithProjection":
        return ("text_embeds", "last_hidden_state")
    return ("last_hidden_state", "pooler_output")


def _build_text_encoder(component: Component) -> Any:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    name = _text_class(component)
    if name not in kinds:
        raise TightfitError(f"{component.folder} holds a {name}: tightfit runs {' and '.join(kinds)}")
    # Of the others some are costly to read: for num_labels of 1e9 as many labels are made.
    return kinds[name](
        CLIPTextConfig(
            **{field: component.config[field] for field in _TEXT_FIELDS if field in component.config}
        )
    )


def _build_unet(component: Component) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if component.config.get("class_embed_type") is not None:
        raise TightfitError(
            f"{component.folder} wants class embeddings (unCLIP): tightfit runs text-to-image models"
        )
    config = dict(component.config)
    tokens, scale = config.pop(TOKENS, 0), config.pop(SCALE, 1.0)
    unet: Any = UNet2DConditionModel.from_config(config)
    return with_images(unet, tokens, scale) if tokens else unet


def _build_decoder(component: Component) -> Any:
    return _build_half(component, "decoder", "post_quant_conv")


def _build_encoder(component: Component) -> Any:
    return _build_half(component, "encoder", "quant_conv")


def _build_half(component: Component, half: str, convolution: str) -> Any:
    """Of the VAE, with the convolution beside it, which some VAEs have not."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import nn

    whole: Any = AutoencoderKL.from_config(dict(component.config))
    return nn.ModuleDict(
        {half: getattr(whole, half), convolution: getattr(whole, convolution) or nn.Identity()}
    )


_SIZE = {"batch_size": 2, "height": 16, "width": 24}
_OTHER_SIZE = {"batch_size": 1, "height": 32, "width": 16}
# diffusers' U-Net tells its upsamplers the size of the skip connection only where a side does not halve
# evenly, and doubles else. Traced with odd sides its graph always has the size, which is twice the side where
# that is even: the same values either way.
_ODD_SIZE = {"batch_size": 2, "height": 17, "width": 25}
_UNEVEN_SIZE = {"batch_size": 1, "height": 20, "width": 15}  # 20, 10, 5, 3 and 15, 8, 4, 2
_PIXELS, _OTHER_PIXELS = (
    {**size, "height": 8 * size["height"], "width": 8 * size["width"]} for size in (_SIZE, _OTHER_SIZE)
)
_IMAGE_SIDES = ("batch_size", "", "height", "width")


def _skip(component: Component, count: int) -> Component:
    from ..clip_skip import without_layers

    return without_layers(component, count - 1)


TEXT_TRACING = Tracing(
    sides={"tokens": ("batch_size", "sequence_length")},
    outputs=text_outputs,
    size={"batch_size": 2},
    checked=({"batch_size": 1},),
    tokens=frozenset({"tokens"}),
    call=_every_state,
)
TEXT_ENCODER = Network(
    name="text_encoder",
    folder="text_encoder",
    role=Role.TEXT,
    listed=r"transformers CLIPTextModel(WithProjection)?|diffusers OnnxRuntimeModel|optimum\S* ORT\w+",
    fields=_TEXT,
    defaults=_TEXT_DEFAULTS,
    layers=_text_layers,
    decided_by=_TEXT_DECIDED_BY,
    inputs=_text_inputs,
    build=_build_text_encoder,
    call=_encode,
    graph=GraphNames(
        needed=frozenset({"input_ids"}),
        answers=one_answer("last_hidden_state"),
        sides=(("input_ids", 2, 0, ""), ("last_hidden_state", 3, 2, "hidden_size")),
        names={"tokens": "input_ids"},
    ),
    tokenizer="tokenizer",
    vocabulary="token_embedding",
    tracing=TEXT_TRACING,
    skip=_skip,
    adapted_as=("text_encoders_clip_l_transformer_",),
)
UNET = Network(
    name="unet",
    folder="unet",
    role=Role.DENOISER,
    listed=r"diffusers (UNet2DConditionModel|OnnxRuntimeModel)|optimum\S* ORT\w+",
    fields=_UNET,
    defaults=_UNET_DEFAULTS,
    layers=_unet_layers,
    decided_by=_UNET_DECIDED_BY,
    inputs=unet_inputs,
    build=_build_unet,
    call=_predict,
    call_cached=partial(predict, _predict),
    graph=GraphNames(
        needed=frozenset({"sample", "timestep", "encoder_hidden_states"}),
        answers=one_answer("out_sample"),
        optional=frozenset({"timestep_cond", "text_embeds", "time_ids"}),
        sides=(("sample", 4, 1, "in_channels"), ("encoder_hidden_states", 3, 2, "cross_attention_dim")),
        names={"hidden": "encoder_hidden_states", "time_condition": "timestep_cond"},
    ),
    tracing=Tracing(
        sides={
            "sample": _IMAGE_SIDES,
            "timestep": (),
            "hidden": ("batch_size", "sequence_length", ""),
            **dict.fromkeys(("time_condition", "text_embeds", "time_ids"), ("batch_size", "")),
        },
        outputs=lambda _: ("out_sample",),
        size=_ODD_SIZE,
        checked=(_OTHER_SIZE, _UNEVEN_SIZE),
        counts=frozenset({"timestep", "time_ids"}),
    ),
)
DECODER = Network(
    name="vae_decoder",
    folder="vae",
    role=Role.DECODER,
    listed=r"diffusers (AutoencoderKL|OnnxRuntimeModel)|optimum\S* ORT\w+",
    fields=_VAE,
    defaults=_VAE_DEFAULTS,
    layers=_block_layers,
    decided_by=_VAE_DECIDED_BY,
    inputs=_decoder_inputs,
    build=_build_decoder,
    call=_decode,
    graph=GraphNames(
        needed=frozenset({"latent_sample"}),
        answers=one_answer("sample"),
        sides=(("latent_sample", 4, 1, "latent_channels"),),
        names={"latents": "latent_sample"},
    ),
    prefixes=("decoder.", "post_quant_conv."),
    in_strips=True,
    least_bits=8,  # it is a twentieth of a model, and its errors are in the picture as they are
    tracing=Tracing(
        sides={"latents": _IMAGE_SIDES},
        outputs=lambda _: ("sample",),
        size=_SIZE,
        checked=(_OTHER_SIZE,),
    ),
)
ENCODER = replace(
    DECODER,
    name="vae_encoder",
    graph_folder="vae_encoder",  # whatever it is called
    role=Role.ENCODER,
    decided_by=_ENCODER_DECIDED_BY,
    inputs=_encoder_inputs,
    build=_build_encoder,
    call=_moments,
    graph=GraphNames(
        needed=frozenset({"sample"}),
        answers=one_answer("latent_parameters"),
        sides=(("sample", 4, 1, "in_channels"),),
        names={"pixels": "sample"},
    ),
    prefixes=("encoder.", "quant_conv."),
    tracing=Tracing(
        sides={"pixels": _IMAGE_SIDES},
        outputs=lambda _: ("latent_parameters",),
        size=_PIXELS,
        checked=(_OTHER_PIXELS,),
    ),
)
REFERENCE_ENCODER = replace(ENCODER, name="reference_encoder")  # the same, at sizes of its own
