"""Z-Image: Qwen3 reads the text, and a transformer takes the noise out of a picture's patches of 2x2 latents
and the text, one row of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import TightfitError
from ..checks import MOST_LAYERS, Check, is_count, is_positive, is_truth, many, or_none, whole
from ..cures import of_mixed
from .family import Extent, Network, Role, Shape
from .flow import even, mu_of_tokens, shifted
from .parts import in_parts
from .qwen3 import AROUND, built, encoded_by, text_encoder
from .wide_vae import FLUX1_RGB, OfWideVae, wide_vae

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import Component, ModelSpec

_LAYERS = 36  # of Qwen3-4B, of which the last is not read
_READ = (_LAYERS - 1,)
_MOST_TOKENS = 512  # of a text
_MULTIPLE = 32  # of tokens, to which a text and a picture are each padded
_PATCH = 2
_SIDE = 128  # of the latents of pictures that it was trained on; no config says so

# ---------------------------------------------------------------------------------------- the text encoder


def _build_text_encoder(component: Component) -> Any:
    return built(component, _READ)


def _encode(module: Any, tokens: Any) -> tuple[Any, ...]:
    """States, and which of them are of words: the others pad."""
    (states,) = encoded_by(module, tokens, _READ)
    return states, (tokens >= 0).to(states.dtype)


_TEXT_ENCODER = text_encoder(_READ, _build_text_encoder, _encode, AROUND, length=_MULTIPLE, most=_MOST_TOKENS)

# -------------------------------------------------------------------------------------------- the denoiser

_COUNTS = "in_channels", "dim", "n_heads", "n_kv_heads", "cap_feat_dim"
_FIELDS: Mapping[str, Check] = {
    **dict.fromkeys(_COUNTS, is_count),
    **dict.fromkeys(("n_layers", "n_refiner_layers"), whole(1, MOST_LAYERS)),
    **dict.fromkeys(("norm_eps", "rope_theta", "t_scale"), is_positive),
    **dict.fromkeys(("all_patch_size", "all_f_patch_size", "axes_dims", "axes_lens"), many(is_count)),
    "qk_norm": is_truth,
    "siglip_feat_dim": or_none(is_count),
}
# What diffusers takes where a config leaves them out, but for the last.
_DEFAULTS = {
    "all_patch_size": (_PATCH,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1024, 512, 512),
    "sample_size": _SIDE,
}


def _layers(config: Mapping[str, Any]) -> dict[str, int]:
    return {name: config[name] for name in ("n_layers", "n_refiner_layers")}


def _inputs(spec: ModelSpec, extent: Extent) -> dict[str, Shape]:
    length = extent.chunks * spec.text_length
    return {
        "sample": (extent.batch, *spec.latent_shape(extent)),
        "timestep": (),
        "hidden": (extent.batch, length, spec.text_width),
        "known": (extent.batch, length),
    }


def _build_denoiser(component: Component) -> Any:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    module: Any = ZImageTransformer2DModel(**{name: component.config[name] for name in _FIELDS})
    for block in (*module.noise_refiner, *module.context_refiner, *module.layers):
        block.layer_id = 0  # which nothing reads: so they are alike, and followed once
        fed = block.feed_forward
        fed.forward = in_parts(fed.forward, 3 * fed.w1.out_features)  # w1, silu and w3 answer as much
    for name in ("x_pad_token", "cap_pad_token"):
        token = getattr(module, name)
        delattr(module, name)
        setattr(module, name, _padding(token))
    embedder = module.t_embedder
    # diffusers asks a weight for its dtype, which one that is quantised or streamed does not know.
    embedder.forward = lambda time, like: embedder.mlp(
        embedder.timestep_embedding(time, embedder.frequency_embedding_size).to(like.dtype)
    )
    return module


def _padding(token: Any) -> Any:
    """A layer that puts the learned token in the place of states that are of nothing."""
    import torch
    from torch import nn

    class Padding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = token

        def forward(self, states: Any, known: Any) -> Any:
            """(batch, tokens, width), (batch, tokens)."""
            return torch.where(known[..., None], states, self.weight.to(states.dtype))

    return Padding()


def _predict(module: Any, sample: Any, timestep: Any, hidden: Any, known: Any) -> tuple[Any, ...]:
    """Of latents (batch, channels, height, width), all rows with texts of one length. diffusers' transformer
    does the same of lists, whose texts have lengths of their own."""
    import torch
    from torch.nn.functional import pad

    batch, channels, height, width = sample.shape
    rows, columns, length = height // _PATCH, width // _PATCH, hidden.shape[1]
    count = rows * columns
    more = -count % _MULTIPLE
    time = module.t_embedder((1000 - timestep.expand(batch)) / 1000 * module.t_scale, sample)
    patches = sample.view(batch, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 3, 5, 1)
    of_picture = module.all_x_embedder[_KIND](pad(patches.reshape(batch, count, -1), (0, 0, 0, more)))
    is_picture = torch.arange(count + more, device=sample.device) < count
    of_picture = module.x_pad_token(of_picture, is_picture[None])
    picture_places, text_places = _places(module, rows, columns, more, length, sample.device)
    for block in module.noise_refiner:
        of_picture = block(of_picture, None, picture_places, time)
    of_text = module.cap_pad_token(module.cap_embedder(hidden), known > 0.5)
    for block in module.context_refiner:
        of_text = block(of_text, None, text_places)
    tokens, places = torch.cat([of_picture, of_text], 1), torch.cat([picture_places, text_places], 1)
    del of_picture, of_text
    for block in module.layers:
        tokens = block(tokens, None, places, time)
    predicted = module.all_final_layer[_KIND](tokens[:, :count], c=time)
    predicted = predicted.view(batch, rows, columns, _PATCH, _PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    return (-predicted.reshape(sample.shape),)


_KIND = f"{_PATCH}-1"  # of the layers at both ends: patches of 2x2, of one frame


def _places(module: Any, rows: int, columns: int, more: int, length: int, device: Any) -> tuple[Any, Any]:
    """What turns the heads of each token of a picture, and of a text, (1, tokens, half a head's width). A
    place has three axes: the text's from 1, and, after these, that of the picture; row and column. `more`
    tokens that pad a picture are at the origin."""
    import torch

    picture = torch.zeros(rows * columns + more, 3, dtype=torch.float64, device=device)
    picture[: rows * columns, 0] = length + 1
    down, across = (torch.arange(side, dtype=torch.float64, device=device) for side in (rows, columns))
    picture[: rows * columns, 1] = down.repeat_interleave(columns, output_size=rows * columns)
    picture[: rows * columns, 2] = across.repeat(rows)
    text = torch.zeros(length, 3, dtype=torch.float64, device=device)
    text[:, 0] = torch.arange(1, length + 1, dtype=torch.float64, device=device)

    def turned(places: Any) -> Any:
        angles = [
            places[:, axis, None]
            / module.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            for axis, dim in enumerate(module.axes_dims)
        ]
        whole = torch.cat(angles, 1).float()
        return torch.polar(torch.ones_like(whole), whole)[None]

    return turned(picture), turned(text)


_TRANSFORMER = Network(
    name="transformer",
    folder="transformer",
    role=Role.DENOISER,
    listed=r"diffusers ZImageTransformer2DModel",
    fields=_FIELDS,
    defaults=_DEFAULTS,
    layers=_layers,
    decided_by={
        r"layers\.": "n_layers",
        r"(noise|context)_refiner\.": "n_refiner_layers",
        r"siglip_": "siglip_feat_dim",
    },
    inputs=_inputs,
    build=_build_denoiser,
    call=_predict,
)

# ------------------------------------------------------------------------------------------------- the VAE

_DECODER, _ENCODER = wide_vae(scale=0.3611, shift=0.1159)

# ---------------------------------------------------------------------------------------------- the family


class ZImage(OfWideVae):
    name, title, reads = "z-image", "Z-Image", 2560
    networks = (_TEXT_ENCODER, _TRANSFORMER, _DECODER)
    on_demand = (_ENCODER,)
    tiny_decoder, latent_rgb = "taef1", FLUX1_RGB  # its VAE is Flux.1's
    takes = frozenset({"lora", "text_encoder", "unet", "vae"})

    def claims(self, source: Source) -> bool:
        return source.config(_TRANSFORMER).get("_class_name") == "ZImageTransformer2DModel"

    def check(self, spec: ModelSpec) -> None:
        config, folder = spec.denoiser.config, spec.folder
        super().check(spec)
        if config["siglip_feat_dim"] or ([*config["all_patch_size"]], [*config["all_f_patch_size"]]) != (
            [_PATCH],
            [1],
        ):
            raise TightfitError(f"{folder} is a Z-Image that reads pictures too: tightfit runs Z-Image-Turbo")
        if config["dim"] != config["n_heads"] * sum(config["axes_dims"]):
            raise TightfitError(
                f"{folder} has axes_dims of {sum(config['axes_dims'])}, which is not the width of a head: "
                "copy or download it again"
            )
        reads, layers = config["cap_feat_dim"], spec.text_encoders[0].config["num_hidden_layers"]
        wanted, there = (reads, config["in_channels"]), (spec.text_width, spec.latents.channels)
        if wanted != there or layers != _LAYERS:
            raise of_mixed(
                f"{folder} has texts {there[0]} wide of {layers} layers and latents of {there[1]} channels, "
                f"and a transformer for {wanted[0]} of {_LAYERS} and {wanted[1]}"
            )

    def default_guidance(self, spec: ModelSpec) -> float:
        return 5.0 if _is_base(spec) else 1.0

    def default_steps(self, spec: ModelSpec) -> int:
        return 50 if _is_base(spec) else 8

    def overflows_in_half(self, spec: ModelSpec) -> frozenset[Role]:
        """The transformer and the text encoder, which were trained in bf16."""
        return frozenset({Role.TEXT, Role.DENOISER})

    def levels(self, spec: ModelSpec, size: tuple[int, int], steps: int) -> np.ndarray:
        tokens = math.prod(side // spec.latents.multiple for side in size)
        return shifted(even(steps), spec.scheduler, mu_of_tokens(spec.scheduler, tokens))

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        ((hidden, known),) = encoded
        return {"hidden": hidden, "known": known}


def _is_base(spec: ModelSpec) -> bool:
    """Whether it is the model that Turbo was distilled from: nothing but the scheduler's shift says so, 6 in
    place of 3."""
    return spec.scheduler.get("shift") == 6.0
