"""Transformers that take noise out as they are published: how the tensors of each are called, and what of its
model no shape tells. A new one is one line in PUBLISHED."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..tensors import Tensor
from . import renames
from .scales import scaled
from .single_file import Config, Shapes, Tensors
from .text_encoders import CLIP_G, CLIP_L, QWEN3, T5, TextEncoder
from .transformer_names import FLUX1, KLEIN, SD3

_BEFORE = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
_BASE = r"(?:^|[\W_])base(?:[\W_]|$)"
_PATCH = 4  # latents that are one of the transformer's
_HEAD_WIDTH = 64  # of SD 3, where no norm of a head's values says it


@dataclass(frozen=True)
class Published:
    """A transformer and its model.

    denoiser, pipeline: diffusers' classes. names: by tensors that no other has all of, how its names become
    diffusers'. shapes: what those say of its config. encoders: the text encoders, by the folder that each
    would have. widths: of what each answers, in that order. optional: those without which the model is
    another that is run too. beside: what the VAE's config has. vae: how its file is called. scheduler: by the
    config, and whether the model was distilled, as settings. base: what is in the names of files with a model
    that was not, which no tensor says; None where there is one model, or tensors do.
    """

    denoiser: str
    pipeline: str
    names: Mapping[tuple[str, ...], Callable[[Tensors], dict[str, Tensor]]]
    shapes: Callable[[Tensors], Config]
    encoders: Mapping[str, TextEncoder]
    widths: Callable[[Mapping[str, Any]], tuple[int, ...]]
    beside: Callable[[Config], Config]
    vae: str
    scheduler: Callable[[Mapping[str, Any], bool], Mapping[str, Any]]
    optional: frozenset[str] = frozenset()
    base: re.Pattern[str] | None = None
    settings: Callable[[bool], Mapping[str, Any]] = lambda _: {}

    def config(self, tensors: Tensors) -> Config:
        return {"_class_name": self.denoiser, **self.shapes(tensors)}

    def is_distilled(self, file_stem: str) -> bool:
        return not (self.base and self.base.search(file_stem))


def transformer(tensors: Tensors) -> dict[str, Tensor]:
    """One that is published alone, by diffusers' names; empty for a file of another network."""
    return next((named for _, named in told(tensors)), {})


def told(tensors: Tensors) -> Iterator[tuple[Published, dict[str, Tensor]]]:
    """Which one it is, and its tensors; nothing for a file of another network."""
    for start in _BEFORE:
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        for kind in PUBLISHED:
            for marks, renamed in kind.names.items():
                if own.keys() >= {*marks}:
                    yield kind, renamed(scaled(own))


def published_of(denoiser: Mapping[str, Any]) -> Published | None:
    """The one of whose class a denoiser's config is; None for others."""
    return next((one for one in PUBLISHED if one.denoiser == denoiser.get("_class_name")), None)


# ------------------------------------------------------------------------------------------ their configs


def _of_flux2(tensors: Tensors) -> Config:
    shapes = Shapes(tensors)
    width = shapes.side("x_embedder.weight")
    head = shapes.side("single_transformer_blocks.0.attn.norm_q.weight")
    return {
        "patch_size": 1,
        "in_channels": shapes.side("x_embedder.weight", 1),
        "out_channels": shapes.side("proj_out.weight"),
        "num_layers": shapes.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": shapes.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // max(1, head),
        "joint_attention_dim": shapes.side("context_embedder.weight", 1),
        "timestep_guidance_channels": shapes.side("time_guidance_embed.timestep_embedder.linear_1.weight", 1),
        "mlp_ratio": shapes.side("transformer_blocks.0.ff.linear_out.weight", 1) / max(1, width),
        "axes_dims_rope": [max(1, head // 4)] * 4,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _of_z_image(tensors: Tensors) -> Config:
    shapes, attention = Shapes(tensors), "layers.0.attention"
    width, head = shapes.side("cap_embedder.1.weight"), shapes.side(f"{attention}.norm_q.weight")
    reads_pictures = any(name.startswith("siglip_") for name in tensors)
    return {
        "in_channels": shapes.side("all_x_embedder.2-1.weight", 1) // _PATCH,
        "dim": width,
        "n_layers": shapes.count(r"layers\.(\d+)\."),
        "n_refiner_layers": shapes.count(r"noise_refiner\.(\d+)\."),
        "n_heads": width // max(1, head),
        "n_kv_heads": shapes.side(f"{attention}.to_k.weight") // max(1, head),
        "cap_feat_dim": shapes.side("cap_embedder.1.weight", 1),
        "axes_dims": [max(1, head // 4), *[max(1, 3 * head // 8)] * 2],
        "siglip_feat_dim": shapes.side("siglip_embedder.1.weight", 1) if reads_pictures else None,
    }


def _of_flux1(tensors: Tensors) -> Config:
    shapes = Shapes(tensors)
    width, head = shapes.side("x_embedder.weight"), shapes.side("transformer_blocks.0.attn.norm_q.weight")
    return {
        "patch_size": 1,
        "in_channels": shapes.side("x_embedder.weight", 1),
        "out_channels": shapes.side("proj_out.weight"),
        "num_layers": shapes.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": shapes.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // max(1, head),
        "joint_attention_dim": shapes.side("context_embedder.weight", 1),
        "pooled_projection_dim": shapes.side("time_text_embed.text_embedder.linear_1.weight", 1),
        "axes_dims_rope": [max(1, head // 8), *[max(1, 7 * head // 16)] * 2],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _of_sd3(tensors: Tensors) -> Config:
    shapes, first, norm = Shapes(tensors), "pos_embed.proj.weight", "transformer_blocks.0.attn.norm_q.weight"
    width, patch = shapes.side(first), shapes.side(first, 2)
    head = shapes.side(norm) if norm in tensors else _HEAD_WIDTH
    places = math.isqrt(shapes.side("pos_embed.pos_embed", 1))
    second = (re.match(r"transformer_blocks\.(\d{1,4})\.attn2\.", name) for name in tensors)
    return {
        "sample_size": min(128, places * patch),
        "patch_size": patch,
        "in_channels": shapes.side(first, 1),
        "out_channels": shapes.side("proj_out.weight") // max(1, patch**2),
        "num_layers": shapes.count(r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // max(1, head),
        "joint_attention_dim": shapes.side("context_embedder.weight", 1),
        "caption_projection_dim": shapes.side("context_embedder.weight"),
        "pooled_projection_dim": shapes.side("time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": places,
        "dual_attention_layers": sorted({int(found[1]) for found in second if found}),
        "qk_norm": "rms_norm" if norm in tensors else None,
    }


def _sd3(tensors: Tensors) -> dict[str, Tensor]:
    """The table of places is no layer. Some GGUF files have it without its side of 1."""
    named = SD3.renamed(tensors)
    if table := tensors.get("pos_embed"):
        shape = (1, *table.shape) if len(table.shape) == 2 else table.shape
        named["pos_embed.pos_embed"] = replace(table, shape=shape)
    return named


# ------------------------------------------------------------------------------------------------ all of them

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_BY_SIZE = {
    **_FLOW,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
_KLEIN = Published(
    denoiser="Flux2Transformer2DModel",
    pipeline="Flux2KleinPipeline",
    names={
        ("single_stream_modulation.lin.weight",): KLEIN.renamed,
        ("single_stream_modulation.linear.weight",): dict,
    },
    shapes=_of_flux2,
    encoders={"text_encoder": QWEN3},
    widths=lambda config: (config["joint_attention_dim"] // 3,),  # states after three layers, side by side
    beside=lambda config: {
        "_class_name": "AutoencoderKLFlux2",
        "latent_channels": config["in_channels"] // _PATCH,
    },
    vae="flux2-vae.safetensors",
    scheduler=lambda _, __: _BY_SIZE,
    base=re.compile(_BASE, re.IGNORECASE),
    settings=lambda is_distilled: {"is_distilled": is_distilled},
)
_Z_IMAGE = Published(
    denoiser="ZImageTransformer2DModel",
    pipeline="ZImagePipeline",
    names={("layers.0.adaLN_modulation.0.weight",): renames.z_image},
    shapes=_of_z_image,
    encoders={"text_encoder": QWEN3},
    widths=lambda config: (config["cap_feat_dim"],),
    beside=lambda config: {"_class_name": "AutoencoderKL", "latent_channels": config["in_channels"]},
    vae="ae.safetensors",
    scheduler=lambda _, is_distilled: {
        **_FLOW,
        "shift": 3.0 if is_distilled else 6.0,
        "use_dynamic_shifting": False,
    },
    base=re.compile(rf"{_BASE}|^(?!.*turbo).*z[-_ ]?image", re.IGNORECASE),
)
_FLUX1 = Published(
    denoiser="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    # Chroma has no such modulation, HunyuanVideo another name for it, and no linear layer for texts; others
    # read no pooled text, and a ControlNet makes no prediction.
    names={
        ("single_blocks.0.modulation.lin.weight",): FLUX1.renamed,
        (
            "single_transformer_blocks.0.norm.linear.weight",
            "context_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "proj_out.weight",
        ): dict,
    },
    shapes=_of_flux1,
    encoders={"text_encoder": CLIP_L, "text_encoder_2": T5},
    widths=lambda config: (config["pooled_projection_dim"], config["joint_attention_dim"]),
    beside=lambda config: {
        "_class_name": "AutoencoderKL",
        "latent_channels": config["in_channels"] // _PATCH,
    },
    vae="ae.safetensors",
    scheduler=lambda config, _: (
        _BY_SIZE
        if config["guidance_embeds"]  # dev
        else {**_BY_SIZE, "shift": 1.0, "use_dynamic_shifting": False}
    ),
)
_SD3 = Published(
    denoiser="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    names={
        ("joint_blocks.0.x_block.attn.qkv.weight",): _sd3,
        ("pos_embed.pos_embed", "transformer_blocks.0.attn.add_q_proj.weight", "proj_out.weight"): dict,
    },
    shapes=_of_sd3,
    encoders={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    # Pooled texts are 768 and 1280 wide, side by side.
    widths=lambda config: (
        3 * config["pooled_projection_dim"] // 8,
        5 * config["pooled_projection_dim"] // 8,
        config["joint_attention_dim"],
    ),
    optional=frozenset({"text_encoder_3"}),
    beside=lambda config: {"_class_name": "AutoencoderKL", "latent_channels": config["in_channels"]},
    vae="sd3_vae.safetensors",
    scheduler=lambda _, __: {**_FLOW, "shift": 3.0, "use_dynamic_shifting": False},
)
PUBLISHED = _KLEIN, _Z_IMAGE, _FLUX1, _SD3
