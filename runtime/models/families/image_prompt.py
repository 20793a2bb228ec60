"""What lets a denoiser read pictures beside texts, as IP-Adapter has it (Ye et al. 2023, arXiv 2308.06721):
an encoder, whose tokens come after the text's, and attention of its own to these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checks import MOST_LAYERS, is_count, is_positive, is_text, whole
from .family import Extent, GraphNames, Network, Role, Shape

if TYPE_CHECKING:
    from ..spec import Component, ModelSpec

TOKENS, SCALE = "image_tokens", "image_scale"
"""Fields of a denoiser's config, which no file has: how many tokens a picture is, and how much they count."""
ATTENTION = ".attn2"  # which reads texts
_HEAD = 64  # channels of each head of the resampler
_VISION = {
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "projection_dim", "num_attention_heads", "image_size",
            "patch_size", TOKENS, "reads", "texts", "heads",
        ),
        is_count,
    ),
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "resampled": whole(0, MOST_LAYERS),
    "hidden_act": is_text,
    "layer_norm_eps": is_positive,
}  # fmt: skip
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # transformers'


def with_images(denoiser: Any, tokens: int, scale: float) -> Any:
    """The denoiser whose attention to texts has keys and values for the tokens of pictures, too."""
    from torch import nn

    for path, part in denoiser.named_modules():
        if path.endswith(ATTENTION):
            part.to_k_ip, part.to_v_ip = (
                nn.Linear(layer.in_features, layer.out_features, bias=False)
                for layer in (part.to_k, part.to_v)
            )
            part.images = tokens, scale
    return denoiser


def _build(component: Component) -> Any:
    from diffusers.models.embeddings import IPAdapterPlusImageProjection
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = component.config
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**{name: config[name] for name in _DEFAULTS}))
    if not config["resampled"]:
        linear = nn.Linear(config["reads"], config[TOKENS] * config["texts"])
        projection: Any = nn.ModuleDict({"proj": linear, "norm": nn.LayerNorm(config["texts"])})
    else:
        projection = IPAdapterPlusImageProjection(
            embed_dims=config["hidden_size"],
            output_dims=config["texts"],
            hidden_dims=config["reads"],
            depth=config["resampled"],
            dim_head=_HEAD,
            heads=config["heads"],
            num_queries=config[TOKENS],
        )
    return nn.ModuleDict({"encoder": encoder, "projection": projection})


def _tokens(module: Any, pixels: Any) -> tuple[Any, ...]:
    """Tokens of no picture, and of this one."""
    import torch

    encoder, projection = module["encoder"], module["projection"]
    if hasattr(projection, "latents"):
        both = torch.cat([torch.zeros_like(pixels), pixels])
        return (projection(encoder(both, output_hidden_states=True).hidden_states[-2]),)
    seen = encoder(pixels).image_embeds
    made = projection["proj"](torch.cat([torch.zeros_like(seen), seen]))
    return (projection["norm"](made.unflatten(1, (-1, *projection["norm"].normalized_shape))),)


def _inputs(spec: ModelSpec, extent: Extent) -> Mapping[str, Shape]:  # noqa: ARG001  of one size
    side = spec.components[IMAGE_ENCODER.name].config["image_size"]
    return {"pixels": (1, 3, side, side)}


def _no_graph(outputs: Sequence[str]) -> list[str]:
    raise ValueError(f"anything but {', '.join(outputs)}")


IMAGE_ENCODER = Network(
    name="image_encoder",
    folder="image_encoder",
    role=Role.ENCODER,
    listed=r"transformers CLIPVisionModelWithProjection",
    fields=_VISION,
    defaults=_DEFAULTS,
    layers=lambda config: {
        "num_hidden_layers": config["num_hidden_layers"],
        "resampled": config["resampled"],
    },
    decided_by={},
    inputs=_inputs,
    build=_build,
    call=_tokens,
    graph=GraphNames(needed=frozenset(), answers=_no_graph),
    least_bits=8,
)
