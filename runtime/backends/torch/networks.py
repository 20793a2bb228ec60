"""The networks of a model as torch modules, and how each is called: diffusers' and transformers', with our attention and strips."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch

from ....kernels import attention
from ....kernels.recipe import recipe
from ...errors import TightfitError, explained
from ...models.spec import Component, ModelSpec
from ...placement import DYNAMIC, QUANTISED, Placement
from . import quantised
from .patches import FEED_BYTES, GPU_FEED_BYTES, Processor, feed_forward
from .vae import decode_strips, decode_whole

Forward = Callable[..., tuple[torch.Tensor, ...]]


def build(component: Component, placement: Placement, device: str) -> torch.nn.Module:
    """The component's module on the meta device, shapes and no memory, as the placement has it computed on `device`."""
    make = {"unet": _unet, "vae_decoder": _decoder}.get(component.name, _text_encoder)
    config = component.folder / "config.json"
    with explained(f"{config} describes no model that can be built", "copy or download it again"), torch.device("meta"):
        module = make(component).eval().requires_grad_(False)
    formats, used_often = _formats(component, module, placement.precision), component.name == "vae_decoder"  # by its strips
    quantised.quantise_layers(module, formats, device, whole=used_often, dynamic=placement.precision == DYNAMIC)
    processor = Processor(attention.VARIANTS[placement.attention])
    for part in module.modules():
        if type(part).__name__ == "FeedForward":
            part.forward = feed_forward(part, FEED_BYTES if device == "cpu" else GPU_FEED_BYTES)
        if hasattr(part, "set_processor"):
            part.set_processor(processor)  # pyright: ignore[reportCallIssue]
    return module


def _formats(component: Component, module: torch.nn.Module, precision: str) -> dict[str, str]:
    """The format of each layer that is quantised, by its path: as stored in the files, or as it will be while it is loaded."""
    paths: dict[str, Any] = {path: part for path, part in module.named_modules() if type(part) in quantised.KINDS}
    if component.formats is not None:
        renamed = (current_name(path, paths) for path in component.formats)
        return dict(zip(renamed, component.formats.values(), strict=True))
    if precision not in QUANTISED:
        return {}
    kind = "int8" if precision == DYNAMIC else precision
    chosen = {path: recipe(kind, component.name, path, layer.weight.shape) for path, layer in paths.items()}
    return {path: name for path, name in chosen.items() if name}


def current_name(stored: str, expected: Container[str]) -> str:
    """A tensor's or a layer's name as today's libraries spell it: text models lost a prefix, VAE attention got new words."""
    for old, new in ((".query", ".to_q"), (".key", ".to_k"), (".value", ".to_v"), (".proj_attn", ".to_out.0")):
        if ".attentions." in stored and f"{old}." in f"{stored}.":
            stored = f"{stored}.".replace(f"{old}.", f"{new}.")[:-1]
    if stored not in expected:
        for other in (stored.removeprefix("text_model."), f"text_model.{stored}"):
            if other in expected:
                return other
    return stored


def forward(spec: ModelSpec, component: Component, placement: Placement) -> Forward:
    """How to call the component's module with the tensors that `Session` names."""
    if component.name == "unet":
        return _predict
    if component.name == "vae_decoder":
        return decode_strips if placement.tiling == "tiled" else decode_whole
    return _encode_sdxl if spec.family == "sdxl" else _encode


def _encode(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SD 1.x and 2.x: the last layer, normalised."""
    return (module(tokens).last_hidden_state,)


def _encode_sdxl(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SDXL: the layer before the last, without the final norm, and the projection where the model has one."""
    out = module(tokens, output_hidden_states=True)
    return (out.hidden_states[-2], out.text_embeds) if "text_embeds" in out else (out.hidden_states[-2],)


def _predict(module: Any, sample, timestep, hidden, time_condition=None, **added: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return module(sample, timestep, hidden, timestep_cond=time_condition, added_cond_kwargs=added or None, return_dict=False)[:1]


_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def _text_encoder(component: Component) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    names = component.config.get("architectures") or ["CLIPTextModel"]
    name = names[0] if isinstance(names, list) else names
    if name not in kinds:
        raise TightfitError(f"{component.folder} holds a {name}: tightfit runs {' and '.join(kinds)}")
    # Of the others some are costly to read: for num_labels of 1e9 as many labels are made.
    return kinds[name](CLIPTextConfig(**{field: component.config[field] for field in _TEXT_FIELDS if field in component.config}))


def _unet(component: Component) -> torch.nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if component.config.get("class_embed_type") is not None:
        raise TightfitError(f"{component.folder} wants class embeddings (unCLIP): tightfit runs text-to-image models")
    unet: Any = UNet2DConditionModel.from_config(dict(component.config))
    return unet


def _decoder(component: Component) -> torch.nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    whole: Any = AutoencoderKL.from_config(dict(component.config))
    return torch.nn.ModuleDict({"decoder": whole.decoder, "post_quant_conv": whole.post_quant_conv or torch.nn.Identity()})
