"""SD 1.x, SD 2.x and SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from ..spec import Component, text_width

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
    "hidden_act": is_text,
    "layer_norm_eps": is_positive,
}
_VAE = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), is_count),
    **dict.fromkeys(("down_block_types", "up_block_types"), many(is_text)),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast"), or_none(is_truth)),
    **dict.fromkeys(("latents_mean", "latents_std"), or_none(many(is_number, MOST_WIDTH))),
    "block_out_channels": many(is_count),
    "layers_per_block": is_layers,
    "norm_num_groups": is_count,
    "act_fn": is_text,
    "scaling_factor": is_positive,
    "shift_factor": or_none(is_number),
}
_UNET_COUNTS = (
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim", "time_embedding_dim",
    "encoder_hid_dim", "num_class_embeds", "addition_embed_type_num_heads", "norm_num_groups",
)  # fmt: skip
_UNET_TRUTHS = (
    "flip_sin_to_cos", "use_linear_projection", "upcast_attention", "dual_cross_attention", "center_input_sample",
    "resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention",
)  # fmt: skip
_UNET_TEXTS = (
    "mid_block_type", "act_fn", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "class_embed_type",
    "addition_embed_type", "encoder_hid_dim_type", "resnet_time_scale_shift", "attention_type", "cross_attention_norm",
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
_FIELDS: dict[str, Mapping[str, Check]] = {"unet": _UNET, "vae_decoder": _VAE, "text_encoder": _TEXT}
SCHEDULER_FIELDS: Mapping[str, Check] = {
    "num_train_timesteps": whole(1, MOST_LEVELS),
    "original_inference_steps": or_none(whole(1, MOST_LEVELS)),
    "steps_offset": whole(0, MOST_LEVELS),
    "prediction_type": lambda value: value in ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "trained_betas": or_none(many(is_number, MOST_LEVELS)),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), whole(1, 16)),
    **dict.fromkeys(("beta_start", "beta_end"), is_positive),
}
# What the libraries take for fields that a config leaves out.
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 1280,
        "sample_size": None,
    },
    "vae_decoder": {
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_size": 512,
        "projection_dim": 512,
        "num_hidden_layers": 12,
    },
}


def check_config(component: Component) -> None:
    """Every field that decides what is built, before it is: a count of layers may not exceed the tensors that are there."""
    file, kind = component.folder / "config.json", component.name.removesuffix("_2")
    check_fields(file, component.config, _FIELDS[kind])
    tensors = sum(1 for tensor in component.tensors.values() if tensor.count)
    there = min(tensors if component.tensors else MOST_ALL, MOST_ALL) // LEAST_TENSORS
    if kind == "text_encoder":
        counted = {"num_hidden_layers": component.setting("num_hidden_layers")}
    else:
        blocks = len(component.setting("block_out_channels"))
        deep = {"layers_per_block": largest(component.setting("layers_per_block")) * blocks}
        if kind == "unet":
            inner = largest(component.setting("transformer_layers_per_block"))
            inner = max(inner, largest(component.config.get("reverse_transformer_layers_per_block") or 0))
            deep["transformer_layers_per_block"] = deep["layers_per_block"] * inner
        counted = deep
    for field, count in counted.items():
        if count > there:
            raise TightfitError(
                f"{file} has {field} {brief(component.setting(field))}, more layers than {tensors} tensors can be of: "
                "files of different models were mixed; copy or download it again"
            )
    for field in ("latents_mean", "latents_std"):
        if kind == "vae_decoder" and (given := component.setting(field)) and len(given) != component.setting("latent_channels"):
            raise TightfitError(
                f"{file} has {field} of {len(given)} channels, not of its latent_channels: copy or download it again"
            )


def family_of(folder: Path, pipeline: str, components: Mapping[str, Component]) -> str:
    unet, vae = components["unet"].config, components["vae_decoder"].config
    if unet.get("_class_name") != "UNet2DConditionModel" or vae.get("_class_name") != "AutoencoderKL":
        raise TightfitError(
            f"{folder} holds a {pipeline} made of {unet.get('_class_name')} and {vae.get('_class_name')}: "
            "tightfit runs SD 1.x, SD 2.x and SDXL (UNet2DConditionModel, AutoencoderKL)"
        )
    if unet["in_channels"] != vae["latent_channels"]:
        raise TightfitError(
            f"{folder} expects {unet['in_channels']} input channels, not the VAE's {vae['latent_channels']}: "
            "it is an inpainting or editing model; use its text-to-image counterpart"
        )
    if vae.get("out_channels", 3) != 3 or unet.get("out_channels", 4) != vae["latent_channels"]:
        raise TightfitError(f"{folder} paints more than red, green and blue, or predicts more than noise: use a plain model")
    widths, reads = text_width(components), components["unet"].setting("cross_attention_dim")
    other = next((width for width in ([reads] if isinstance(reads, int) else reads) if width != widths), None)
    if other is not None and not unet.get("encoder_hid_dim"):
        raise TightfitError(
            f"{folder} has texts {widths} wide from its text encoders, {other} wide in its U-Net: "
            "files of different models were mixed; copy or download it again"
        )
    embedding = unet.get("addition_embed_type")
    if embedding == "text_time" and "text_encoder_2" in components:
        return "sdxl"
    if embedding is not None or "text_encoder_2" in components:
        raise TightfitError(f"{folder} is a {pipeline} with conditioning '{embedding}': tightfit runs SD 1.x, SD 2.x and SDXL base")
    return "sd2" if unet.get("use_linear_projection") else "sd1"
