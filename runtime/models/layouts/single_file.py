"""A checkpoint in one safetensors file, as CompVis's and Stability's code writes it: SD 1.x, SD 2.x, SDXL.

The family is told from names and shapes, and its config is made of them. What no shape tells, such as the
number of heads, is the family's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import TightfitError
from ...files import read_bytes
from ..families.family import Network
from ..spec import ZEROED, Component
from ..tensors import Tensor
from . import foreign, renames
from .safetensors import read_file
from .scales import scaled

Tensors = Mapping[str, Tensor]
Config = dict[str, Any]

# Where a network's tensors are, by the beginning of their names, and how these are renamed. The first that
# has any is taken.
_PLACES: Mapping[str, tuple[tuple[str, Callable[[Tensors], dict[str, Tensor]]], ...]] = {
    "unet": (("model.diffusion_model.", renames.unet),),
    "vae": (("first_stage_model.", renames.vae), ("vae.", renames.vae)),
    "text_encoder": (
        ("cond_stage_model.transformer.", renames.clip),
        ("cond_stage_model.model.", renames.open_clip),
        ("conditioner.embedders.0.transformer.", renames.clip),
        ("text_encoders.clip_l.transformer.", renames.clip),
        ("text_encoder.", renames.clip),
    ),
    "text_encoder_2": (
        ("conditioner.embedders.1.model.", renames.open_clip),
        ("conditioner.embedders.0.model.", renames.open_clip),  # of the refiner, which has no other
        ("conditioner.embedders.1.transformer.", renames.clip),
        ("cond_stage_model.1.transformer.", renames.clip),  # stable-diffusion.cpp's, as it renames
        ("text_encoders.clip_g.transformer.", renames.clip),
        ("text_encoder_2.", renames.clip),
    ),
}
_BEFORE_UNET = ("model.diffusion_model.", "diffusion_model.", "unet.")
_ORIGINAL_UNET = re.compile(r"(?:in|out)put_blocks\.")
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_EPSILON, _V = "epsilon", "v_prediction"
READS = ".attn2.to_k.weight"  # how names end of weights whose rows are as wide as texts
_HEAD_WIDTH = 64  # of all transformers but those of SD 1.x's U-Net
_NAMES = {
    "unet": "U-Net",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}


@dataclass(frozen=True)
class Original:
    """What the files of one family have in common and do not say, as in the configs that are published.

    texts: of each text encoder its activation and the token that fills up its texts. heads: of the U-Net in
    all blocks; by its width without. sides: of latents, by what is predicted. layers: at most so many of a
    text encoder are used. sizes: how many numbers about the picture the U-Net reads, if it reads any.
    """

    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: Mapping[str, tuple[str, str]]
    scheduler: Mapping[str, Any]
    sides: Mapping[str, int]
    prediction: str = _EPSILON
    heads: int | None = None
    layers: int | None = None
    sizes: int = 6


_SD2_TEXTS = 1024  # their width; SD 1.x's have 768
_END = "<|endoftext|>"
_SD1 = Original(
    "StableDiffusionPipeline",
    {"use_linear_projection": False},
    {"scaling_factor": 0.18215},
    {"text_encoder": ("quick_gelu", _END)},
    _SCHEDULE
    | {
        "_class_name": "PNDMScheduler",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "clip_sample": False,
    },
    {_EPSILON: 64, _V: 64},
    heads=8,
)
_SD2 = Original(
    "StableDiffusionPipeline",
    {"use_linear_projection": True, "upcast_attention": True},
    {"scaling_factor": 0.18215},
    {"text_encoder": ("gelu", "!")},
    _SCHEDULE | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False},
    {_EPSILON: 64, _V: 96},
    prediction=_V,
    layers=23,  # the 24th was trained for another use
)
_SDXL = Original(
    "StableDiffusionXLPipeline",
    {"use_linear_projection": True, "addition_embed_type": "text_time"},
    {"scaling_factor": 0.13025, "force_upcast": True},
    {"text_encoder": ("quick_gelu", _END), "text_encoder_2": ("gelu", "!")},
    _SCHEDULE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    {_EPSILON: 128, _V: 128},
)


_REFINER = replace(
    _SDXL, pipeline="StableDiffusionXLImg2ImgPipeline", texts={"text_encoder_2": ("gelu", "!")}, sizes=5
)


class SingleFileLayout:
    def claims(self, path: Path) -> bool:
        return path.suffix.lower() == ".safetensors" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        tensors, metadata = read_file(path)
        foreign.check(path, tensors)
        return checkpoint(path, tensors, metadata)


def checkpoint(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Checkpoint:
    """The model whose tensors these are, by the names of the original code."""
    found = {name: _network(tensors, name) for name in _PLACES}
    original = _original(path, found)
    return Checkpoint(path, original, found, _trained(path, original, tensors, metadata))


def _network(tensors: Tensors, name: str) -> dict[str, Tensor]:
    for start, rename in _PLACES[name]:
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        if own:
            return rename(scaled(own))
    return {}


def denoiser(tensors: Tensors) -> dict[str, Tensor]:
    """The U-Net of a file that may have nothing else, under diffusers' names."""
    started = next((start for start in _BEFORE_UNET if any(name.startswith(start) for name in tensors)), "")
    own = {key.removeprefix(started): tensor for key, tensor in tensors.items() if key.startswith(started)}
    return renames.unet(scaled(own)) if any(map(_ORIGINAL_UNET.match, own)) else scaled(own)


def _original(path: Path, found: Mapping[str, Tensors]) -> Original:
    """The family, by its text encoders, its transformers' projections and the texts' width, as
    stable-diffusion.cpp made convolutions of all projections. Raises TightfitError for a file that lacks a
    network."""
    unet = found["unet"].items()
    linear = any(key.endswith(".proj_in.weight") and len(tensor.shape) == 2 for key, tensor in unet)
    wide = any(
        key.endswith(".attn2.to_k.weight") and tensor.shape[1:] == (_SD2_TEXTS,) for key, tensor in unet
    )
    original = _family(found, linear or wide)
    if not any(found.values()):
        raise TightfitError(f"{path} is a single file of no model that tightfit knows: name another")
    if lacking := [_NAMES[name] for name in ("unet", *original.texts) if not found[name]]:
        whole = "take a checkpoint that has all networks inside, or the model's diffusers folder"
        raise TightfitError(
            f"{path} is a single file without a {' or a '.join(lacking)}: "
            f"{f'{foreign.UNET}, or {whole}' if found['unet'] else whole}"
        )
    return original  # a VAE can be given beside it


def _family(found: Mapping[str, Tensors], linear: bool) -> Original:
    if not found["text_encoder_2"]:
        return _SD2 if linear else _SD1
    reads = next((t.shape for name, t in found["unet"].items() if name.endswith(".attn2.to_k.weight")), ())
    width = next(
        (
            t.shape[1:]
            for name, t in found["text_encoder_2"].items()
            if name.endswith("token_embedding.weight")
        ),
        (),
    )
    return _REFINER if not found["text_encoder"] and reads[1:] == width else _SDXL


# ------------------------------------------------------------------------------------ what it was trained for


@dataclass(frozen=True)
class Trained:
    """What the denoiser predicts, whether the last noise level has no signal, and by which words of the file
    that is known."""

    prediction: str
    zero_snr: bool
    told_by: str


def _trained(path: Path, original: Original, tensors: Tensors, metadata: Mapping[str, str]) -> Trained:
    told_by, prediction = _prediction(path, tensors, metadata) or ("", original.prediction)
    return Trained(prediction, "ztsnr" in tensors, told_by)


def _prediction(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """What a file says that its denoiser predicts, after the words that it says it by."""
    known = (
        ("its key v_pred", _V if "v_pred" in tensors else None),
        ("its metadata", _of_metadata(metadata)),
        (f"{path.with_suffix('.yaml').name} beside it", _of_yaml(path.with_suffix(".yaml"))),
    )
    return next(((by, kind) for by, kind in known if kind), None)


def told(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of the scheduler that its denoiser was trained for."""
    prediction = _prediction(path, tensors, metadata)
    return {
        **({"prediction_type": prediction[1]} if prediction else {}),
        **({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {}),
    }


def _of_metadata(metadata: Mapping[str, str]) -> str | None:
    """By Stability's ModelSpec."""
    told = metadata.get("modelspec.prediction_type", "").lower()
    if told in ("v", "v_prediction", "v-prediction", "epsilon"):
        return _EPSILON if told == "epsilon" else _V
    architecture = metadata.get("modelspec.architecture", "").lower()
    return {"stable-diffusion-v2-512": _EPSILON, "stable-diffusion-v2-768-v": _V}.get(architecture)


_YAML_BYTES = 2**16  # Stability's have 3 kB
# Each begins with a line, and goes on in it: \s would take the lines that follow, too.
_PARAMETERIZATION = re.compile(
    r"""^[ \t]*parameterization[ \t]*:[ \t]*["']?(v|eps)["']?[ \t]*\r?(#.*)?$""", re.M
)
_SCALING = re.compile(r"^[ \t]*target[ \t]*:[ \t]*[\w.]+\.(V|Eps)Scaling[ \t]*\r?$", re.M)


def _of_yaml(file: Path) -> str | None:
    """By the config that the original code was trained with: one line of it, so it is not parsed."""
    if not file.is_file():
        return None
    text = read_bytes(file, _YAML_BYTES).decode("utf-8", "replace")
    found = _PARAMETERIZATION.search(text) or _SCALING.search(text)
    return found and (_V if found[1].lower() == "v" else _EPSILON)


# --------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Checkpoint:
    """A Source: see layouts/__init__.py. `networks` are its tensors by folder, under diffusers' names."""

    folder: Path
    original: Original
    networks: Mapping[str, Tensors]
    trained: Trained

    manifest = MappingProxyType({})

    @property
    def pipeline(self) -> str:
        return self.original.pipeline

    @property
    def sides(self) -> Mapping[str, int]:
        return self.original.sides

    @property
    def settings(self) -> Mapping[str, Any]:
        return {ZEROED: len(self.original.texts) > 1}

    @property
    def listed(self) -> Mapping[str, Any]:
        return {name: tensors for name, tensors in self.networks.items() if tensors}

    @property
    def notes(self) -> tuple[str, ...]:
        told, original = self.trained, self.original
        usual = (told.prediction, told.zero_snr) == (_EPSILON, False)
        if usual and original.prediction == _EPSILON:
            return ()
        by = f"as {told.told_by} says"
        if not told.told_by:
            other = _EPSILON if told.prediction == _V else "v"
            by = f"which is taken as the file does not say: --prediction {other} says otherwise"
        snr = ", without signal at the last noise level (zero terminal SNR)" if told.zero_snr else ""
        return (f"{self.folder.name} predicts {told.prediction}, {by}{snr}",)

    @cached_property
    def _configs(self) -> Mapping[str, Config]:
        made = {name: _text(self.networks[name], name, self.original) for name in self.original.texts}
        pooled = [config["projection_dim"] for config in made.values()][-1]
        side = self.original.sides[self.trained.prediction]
        unet = _unet(self.networks["unet"], self.original, pooled) | {"sample_size": side}
        vae = vae_config(self.networks["vae"]) if self.networks["vae"] else _USUAL_VAE
        return {**made, "unet": unet, "vae": {**vae, **self.original.vae}}

    def config(self, network: Network) -> Mapping[str, Any]:
        return self._configs.get(network.folder, {})

    def component(self, network: Network) -> Component:
        config = {**network.defaults, **self._configs[network.folder]}
        tensors = {k: t for k, t in self.whole(network).items() if k.startswith(network.prefixes)}
        _, pad = self.original.texts.get(network.folder, ("", None))
        return Component(network, self.folder / network.folder, config, tensors, pad=pad)

    def whole(self, network: Network) -> Mapping[str, Tensor]:
        tensors, config = self.networks[network.folder], self._configs[network.folder]
        if network.folder not in self.original.texts:
            return tensors
        return {key: tensor for key, tensor in tensors.items() if _is_read(key, config)}

    def scheduler(self) -> Mapping[str, Any]:
        distilled = "time_cond_proj_dim" in self._configs["unet"]  # a latent consistency model
        return {
            **({"_class_name": "LCMScheduler"} if distilled else self.original.scheduler),
            "prediction_type": self.trained.prediction,
            **({"rescale_betas_zero_snr": True} if self.trained.zero_snr else {}),
        }


# --------------------------------------------------------------------------------------- configs from shapes


class Shapes:
    """Sides of a network's tensors. A name that is missing, or of fewer sides, is said."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def side(self, name: str, which: int = 0) -> int:
        try:
            return self.tensors[name].shape[which]
        except (KeyError, IndexError):
            file = next(iter(self.tensors.values())).file
            raise TightfitError(
                f"{file} has no {name} of {which + 1} sides or more, so it is no whole checkpoint: "
                "copy or download it again"
            ) from None

    def count(self, pattern: str) -> int:
        """How many there are of what is numbered in names that begin so."""
        numbers = {found[1] for name in self.tensors if (found := re.match(pattern, name))}
        return len(numbers)


def _text(tensors: Tensors, name: str, original: Original) -> Config:
    projected = name != "text_encoder"
    config = clip_config(tensors, projected)
    layers = config["num_hidden_layers"]
    return config | {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "num_hidden_layers": min(layers, original.layers or layers),
        "hidden_act": original.texts[name][0],
    }


def clip_config(tensors: Tensors, projected: bool) -> Config:
    """What the shapes of a text encoder of CLIP say of it."""
    shapes = Shapes(tensors)
    tokens = "text_model.embeddings.token_embedding.weight"
    width = shapes.side(tokens, 1)
    return {
        "hidden_size": width,
        "intermediate_size": shapes.side("text_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": shapes.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": shapes.side("text_model.embeddings.position_embedding.weight"),
        "vocab_size": shapes.side(tokens),
        "projection_dim": shapes.side("text_projection.weight") if projected else width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def _is_read(name: str, config: Config) -> bool:
    """Whether a text encoder of this config has the tensor: a checkpoint may have more layers, positions, and
    a projection that is not used."""
    if name.startswith("text_projection."):
        return "CLIPTextModelWithProjection" in config["architectures"]
    layer = re.match(r"text_model\.encoder\.layers\.(\d{1,4})\.", name)
    return not name.endswith(".position_ids") and (not layer or int(layer[1]) < config["num_hidden_layers"])


def _unet(tensors: Tensors, original: Original, pooled: int) -> Config:
    shapes, half = Shapes(tensors), _down_half(tensors)
    kinds, widths = half["down_block_types"], half["block_out_channels"]
    reads = next((name for name in tensors if name.endswith(READS)), f"an {READS[1:]}")
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        **half,
        "out_channels": shapes.side("conv_out.weight"),
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "cross_attention_dim": shapes.side(reads, 1),
        "attention_head_dim": original.heads or [max(1, width // _HEAD_WIDTH) for width in widths],
        **original.unet,
    }
    if "addition_embed_type" in config:
        added = shapes.side("add_embedding.linear_1.weight", 1)
        config |= {
            "projection_class_embeddings_input_dim": added,
            "addition_time_embed_dim": (added - pooled) // original.sizes,
        }
    if "time_embedding.cond_proj.weight" in tensors:
        config["time_cond_proj_dim"] = shapes.side("time_embedding.cond_proj.weight", 1)
    return config


def _down_half(tensors: Tensors) -> Config:
    """What a U-Net and its ControlNets have in common: all until the sides grow again."""
    shapes = Shapes(tensors)
    blocks = range(shapes.count(r"down_blocks\.(\d+)\.resnets\.") or 1)  # without any, the first is missed
    widths = [shapes.side(f"down_blocks.{block}.resnets.0.conv1.weight") for block in blocks]
    inner = [
        shapes.count(rf"down_blocks\.{block}\.attentions\.0\.transformer_blocks\.(\d+)\.") for block in blocks
    ]
    middle = shapes.count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    return {
        "in_channels": shapes.side("conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": shapes.count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if count else "DownBlock2D" for count in inner],
        # that of the last block is also the middle one's
        "transformer_layers_per_block": [count or 1 for count in inner[:-1]] + [inner[-1] or middle or 1],
    }


# What a ControlNet has as its U-Net has it, and no shape tells.
_AS_UNET = (
    "cross_attention_dim", "flip_sin_to_cos", "freq_shift", "only_cross_attention", "downsample_padding",
    "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "attention_head_dim",
    "num_attention_heads", "use_linear_projection", "upcast_attention", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
)  # fmt: skip


def control_config(tensors: Tensors, unet: Mapping[str, Any]) -> Config:
    """What the shapes of a ControlNet's tensors, under diffusers' names, say of it, and the config of the
    U-Net that it is for."""
    shapes, hint = Shapes(tensors), "controlnet_cond_embedding"
    wider = range(1, shapes.count(rf"{hint}\.blocks\.(\d+)\."), 2)
    names = [f"{hint}.conv_in.weight", *(f"{hint}.blocks.{block}.weight" for block in wider)]
    middle = any(name.startswith("mid_block.attentions.") for name in tensors)
    return {
        "_class_name": "ControlNetModel",
        **{name: unet[name] for name in _AS_UNET if name in unet},
        **_down_half(tensors),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "conditioning_channels": shapes.side(names[0], 1),
        "conditioning_embedding_out_channels": [shapes.side(name) for name in names],
    }


# Of all published ones: what is taken until a VAE is named for a file without.
_USUAL_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
}


def vae_config(tensors: Tensors) -> Config:
    """What the shapes of a VAE's tensors, under diffusers' names, say of it."""
    shapes = Shapes(tensors)
    blocks = range(shapes.count(r"decoder\.up_blocks\.(\d+)\.resnets\.") or 1)
    widths = [shapes.side(f"decoder.up_blocks.{block}.resnets.0.conv1.weight") for block in reversed(blocks)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": shapes.side("decoder.conv_out.weight"),
        "latent_channels": shapes.side("decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": shapes.count(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": 32,
    }
