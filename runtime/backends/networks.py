"""The networks of a model as torch modules, and how each is called: diffusers' and transformers', with our attention and strips."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch

from ...kernels import attention, strips
from ...kernels.recipe import recipe
from ..errors import TightfitError, explained
from ..plan import DYNAMIC, QUANTISED, Placement
from ..spec import Component, ModelSpec
from . import quantised

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
            part.forward = _feed_forward(part, FEED_BYTES if device == "cpu" else GPU_FEED_BYTES)
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
        return _decode_in_strips if placement.tiling == "tiled" else _decode
    return _encode_sdxl if spec.family == "sdxl" else _encode


class Processor:
    """diffusers' attention block around one of our attentions; tensors and their order as in its AttnProcessor2_0."""

    def __init__(self, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.attend = attend

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None):  # noqa: ARG002
        """(batch, n, width), or (batch, width, h, w) in a VAE, attends to (batch, m, …) or to itself."""
        if attention_mask is not None or attn.spatial_norm is not None or attn.norm_cross or attn.norm_q or attn.norm_k:
            raise TightfitError("this model's attention has masks or norms that tightfit does not run: use a plain SD model")
        shape, x = hidden_states.shape, hidden_states
        if len(shape) == 4:
            x = x.view(shape[0], shape[1], shape[2] * shape[3]).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        text = x if encoder_hidden_states is None else encoder_hidden_states
        heads = (linear(each) for linear, each in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text)))
        q, k, v = (each.view(shape[0], -1, attn.heads, each.shape[-1] // attn.heads).transpose(1, 2) for each in heads)
        x = self.attend(q, k, v).transpose(1, 2).flatten(2)
        del q, k, v
        x = attn.to_out[1](attn.to_out[0](x))
        if len(shape) == 4:
            x = x.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


# Of a feed-forward layer's hidden values held at a time. A GPU waits for the host, which takes 40 us to start an operator: parts of
# 8 MiB made 3,848 operators of the 1,708 that SDXL's U-Net has whole, at 1024x1024; parts of 64 make 1,778.
FEED_BYTES = 2**23
GPU_FEED_BYTES = 2**26


def _feed_forward(part: Any, most_bytes: int) -> Callable[..., torch.Tensor]:
    """A transformer's feed-forward, for as many tokens at a time as keep its hidden values (eight times its width) few: at 512²
    they are 42 MB of SD 1.5's U-Net, and nothing else needs as much."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)
        rows = max(1, most_bytes // (8 * tokens.shape[1] * tokens.element_size()))
        if len(tokens) <= rows:
            return _through(part.net, hidden_states)
        out = torch.empty_like(tokens)
        for start in range(0, len(tokens), rows):
            out[start : start + rows] = _through(part.net, tokens[start : start + rows])
        return out.view(hidden_states.shape)

    return forward


def _through(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _encode(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SD 1.x and 2.x: the last layer, normalised."""
    return (module(tokens).last_hidden_state,)


def _encode_sdxl(module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SDXL: the layer before the last, without the final norm, and the projection where the model has one."""
    out = module(tokens, output_hidden_states=True)
    return (out.hidden_states[-2], out.text_embeds) if "text_embeds" in out else (out.hidden_states[-2],)


def _predict(module: Any, sample, timestep, hidden, time_condition=None, **added: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return module(sample, timestep, hidden, timestep_cond=time_condition, added_cond_kwargs=added or None, return_dict=False)[:1]


def _decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (module["decoder"](module["post_quant_conv"](latents)),)


def _decode_in_strips(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (decode_in_strips(module["decoder"], module["post_quant_conv"](latents)),)


def decode_in_strips(decoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """diffusers' `Decoder`: the middle block whole, for its attention sees all, and what is larger in strips."""
    source: strips.Rows = strips.Stored(decoder.mid_block(decoder.conv_in(latents)))
    for block in decoder.up_blocks:
        source = strips.Stored(_residuals(source, block.resnets))
        for upsampler in block.upsamplers or ():
            source = strips.Upsampled(source.x, upsampler.conv)
    return strips.convolved(source, decoder.conv_out, decoder.conv_norm_out)


def encode_in_strips(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """diffusers' `Encoder`, the same way."""
    x = strips.convolved(strips.Stored(pixels), encoder.conv_in)
    for block in encoder.down_blocks:
        x = _residuals(strips.Stored(x), block.resnets)
        for downsampler in block.downsamplers or ():
            x = strips.downsampled(x, downsampler.conv)
    return strips.convolved(strips.Stored(encoder.mid_block(x)), encoder.conv_out, encoder.conv_norm_out)


def _residuals(source: strips.Rows, resnets: Any) -> torch.Tensor:
    for resnet in resnets:
        convs = (resnet.conv1, resnet.conv2, *([] if resnet.conv_shortcut is None else [resnet.conv_shortcut]))
        source = strips.Stored(strips.residual(source, (resnet.norm1, resnet.norm2), convs))
    assert isinstance(source, strips.Stored)
    return source.x


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
