"""What the model is, read from its configs and the headers of its safetensors files: never a weight, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from . import cures
from .errors import TightfitError
from .files import PICKLES, Tensor, all_tensors, check_classes, read_header, read_json, readable, sha256
from .onnx_file import Graph, read_graph

MANIFEST_VERSION = 1  # of tightfit.json


@dataclass(frozen=True)
class Component:
    """One network of the model: the folder it lives in, its config and its tensors by their names in the safetensors files, none
    if it is there as ONNX alone; `graph` is that, and `unreadable` says why there is none though there is a file.

    `formats` says in which of kernels/formats.py's each quantised layer is stored; None in a model that is not quantised.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    formats: Mapping[str, str] | None = None
    graph: Graph | None = None
    unreadable: str = ""

    @property
    def stored_bytes(self) -> int:
        """Of its weights in the safetensors files."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @property
    def engines(self) -> tuple[str, ...]:
        """The backends that can read it."""
        return (*(["torch"] if self.tensors else []), *(["onnx"] if self.graph else []))

    def setting(self, field: str) -> Any:
        """A field of the config, or what the libraries take where it is missing."""
        return self.config.get(field)


@dataclass(frozen=True)
class ModelSpec:
    """A Stable Diffusion model in a diffusers folder. `family` is sd1, sd2 or sdxl; `scheduler` is its scheduler config, and
    `pipeline` the class that its model_index.json names.

    `components` are text_encoder, text_encoder_2 (sdxl), unet and vae_decoder, in the order a picture needs them.
    `defaults` are what the folder's tightfit.json, if it has one, says of requests that leave something open, `precision`
    (int8 or int4) what it says the weights are stored in, and `source` of which model it was exported.
    """

    name: str
    folder: Path
    family: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    force_zeros: bool
    defaults: Mapping[str, Any]
    precision: str | None = None
    source: str | None = None
    pipeline: str = "StableDiffusionPipeline"

    @property
    def unet(self) -> Mapping[str, Any]:
        return self.components["unet"].config

    @property
    def vae(self) -> Mapping[str, Any]:
        return self.components["vae_decoder"].config

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures the model was trained on. Raises TightfitError if its config says none."""
        size = self.unet["sample_size"]
        if size is None:
            raise TightfitError(
                f"{self.components['unet'].folder / 'config.json'} has no sample_size: say --width and --height, or add it"
            )
        if self.corrected and isinstance(size, int) and _before_0_9(self.unet.get("_diffusers_version")):
            size = max(size, 64)  # as StableDiffusionPipeline corrects the configs of 2022
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.downsampling, width * self.downsampling

    @property
    def some_size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture to try the networks with: the native size, if the config says one."""
        side = 64 * self.downsampling
        return (side, side) if self.unet["sample_size"] is None else self.native_size

    @property
    def corrected(self) -> bool:
        """Whether diffusers' pipeline corrects older configs as it loads them: StableDiffusionPipeline does, those of SDXL and
        LCM take them as they are."""
        return self.family != "sdxl" and not self.latent_consistency

    @property
    def latent_consistency(self) -> bool:
        """Whether its pipeline is that of latent consistency models: diffusers', its image to image kin's, or Optimum's."""
        return "LatentConsistencyModel" in self.pipeline

    @property
    def _consistent(self) -> bool:
        return self.latent_consistency or bool(self.guidance_width)

    @property
    def default_guidance(self) -> float:
        """What the model's own manifest says, else diffusers' defaults: 7.5, 5.0 for SDXL, 8.5 for latent consistency models."""
        return self.defaults.get("guidance_scale", 8.5 if self._consistent else 5.0 if self.family == "sdxl" else 7.5)

    @property
    def default_steps(self) -> int:
        """20, and 4 for latent consistency models, as in diffusers' pipeline for them."""
        return 4 if self._consistent else 20

    @property
    def latent_affine(self) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """What the VAE wants of the U-Net's latents, by channel: latents * first / second + third.

        First and third are ones and zeros unless the VAE has latents_std and latents_mean, which diffusers reads in SDXL alone.
        """
        vae = self.components["vae_decoder"]
        mean, deviation = (vae.setting(field) for field in ("latents_mean", "latents_std"))
        if self.family != "sdxl" or mean is None or deviation is None:
            channels = vae.setting("latent_channels")
            deviation, mean = (1.0,) * channels, (0.0,) * channels
        return tuple(deviation), vae.setting("scaling_factor"), tuple(mean)

    @property
    def guidance_width(self) -> int | None:
        """Channels of the guidance embedding that distilled U-Nets (LCM) take in place of classifier-free guidance."""
        return self.unet.get("time_cond_proj_dim")

    def inputs(self, component: Component, batch: int, height: int, width: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a session is called with, by their names there, for a picture of `height` x `width` pixels."""
        latents = (batch, self.vae["latent_channels"], height // self.downsampling, width // self.downsampling)
        length = min(encoder.setting("max_position_embeddings") for encoder in self.text_encoders)
        if component.name == "vae_decoder":
            return {"latents": (1, *latents[1:])}
        if component.name != "unet":
            return {"tokens": (1, length)}
        shapes = {"sample": latents, "timestep": (), "hidden": (batch, length, _text_width(self.components))}
        if self.guidance_width:
            shapes["time_condition"] = (1, self.guidance_width)
        if self.family == "sdxl":
            pooled = self.components["text_encoder_2"].setting("projection_dim")
            shapes |= {"text_embeds": (batch, pooled), "time_ids": (batch, 6)}
        return shapes

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        return tuple(c for name, c in self.components.items() if name.startswith("text_encoder"))


def read_model(folder: Path, name: str | None = None) -> ModelSpec:
    """Read the diffusers folder `folder`. Raises TightfitError for whatever is missing, broken or not supported."""
    with readable(folder):
        return _read_model(folder, name)


def _read_model(folder: Path, name: str | None) -> ModelSpec:
    index = read_json(file := _index_file(folder))
    check_classes(file, index)
    pipeline = index.get("_class_name", "unknown")
    listed = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if needed not in listed:
            raise TightfitError(f"{folder} is a {pipeline} without a {needed}: tightfit runs SD 1.x, SD 2.x and SDXL base models")
    manifest = _manifest(folder)
    components = {}
    for part in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
        if part != "text_encoder_2" or part in listed:
            components[part] = _component(part, folder, manifest, index[part.removesuffix("_decoder")])
    for component in components.values():
        _check_config(component)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    _check_fields(folder / "scheduler" / "scheduler_config.json", scheduler, _SCHEDULER)
    return ModelSpec(
        name=name or str(folder.absolute()),
        folder=folder,
        family=_family(folder, pipeline, components),
        components=components,
        scheduler=scheduler,
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in listed)),
        defaults=manifest.get("defaults", {}),
        precision=manifest.get("precision") if components["unet"].formats is not None else None,
        source=manifest.get("source"),
        pipeline=str(pipeline),
    )


def _manifest(folder: Path) -> Mapping[str, Any]:
    """The folder's tightfit.json, if there is one, as `tightfit export` writes it: defaults, precision, components."""
    file = folder / "tightfit.json"
    data = read_json(file) if file.exists() else {}
    version = data.get("version", MANIFEST_VERSION)
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise TightfitError(f"{file} was written by a newer tightfit: update this one, or export the model again")
    if not _understood(data):
        raise TightfitError(f"{file} cannot be understood: delete it if the model is not quantised, or export the model again")
    return data


def _understood(manifest: Mapping[str, Any]) -> bool:
    defaults, components = manifest.get("defaults", {}), manifest.get("components", {})
    if not isinstance(defaults, dict) or not isinstance(defaults.get("guidance_scale", 1.0), int | float):
        return False
    if manifest.get("precision") not in (None, "fp32", "fp16", "int8", "int4") or not isinstance(components, dict):
        return False
    parts = [
        each.get(part, {}) if isinstance(each, dict) else None for each in components.values() for part in ("formats", "sha256")
    ]
    told = [manifest.get("source"), *(name for each in parts if isinstance(each, dict) for name in each.values())]
    return all(isinstance(each, dict) for each in parts) and all(isinstance(name, str | None) for name in told)


MOST_LEVELS = 100_000  # of a scheduler's noise; SD has 1000
_MOST_WIDTH = 2**20
# Of what is counted before anything is built: more than any model of these families has, by far.
_MOST_LAYERS, _MOST_BLOCKS, _MOST_ALL = 512, 16, 4096
_LEAST_TENSORS = 6  # of a layer: a residual block without a shortcut has 8, a text encoder's layer 16
Check = Callable[[Any], bool]


def _whole(least: int, most: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 <= value <= 1e9  # neither NaN nor infinite


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100


def _many(check: Check, most: int = _MOST_BLOCKS) -> Check:
    return lambda value: isinstance(value, list | tuple) and 0 < len(value) <= most and all(map(check, value))


def _or_many(check: Check) -> Check:
    return lambda value: check(value) or _many(check)(value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_count, _layers = _whole(1, _MOST_WIDTH), _whole(0, _MOST_LAYERS)
_size = lambda value: _count(value) or (_many(_count, 2)(value) and len(value) == 2)  # noqa: E731
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
    **dict.fromkeys(_TEXT_COUNTS, _count),
    "num_hidden_layers": _whole(1, _MOST_LAYERS),
    "eos_token_id": _whole(0, _MOST_WIDTH),  # the token whose place the pooled text is read from
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _or_none(_whole(-1, _MOST_WIDTH))),
    "hidden_act": _text,
    "layer_norm_eps": _positive,
}
_VAE = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), _count),
    **dict.fromkeys(("down_block_types", "up_block_types"), _many(_text)),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast"), _or_none(_truth)),
    **dict.fromkeys(("latents_mean", "latents_std"), _or_none(_many(_number, _MOST_WIDTH))),
    "block_out_channels": _many(_count),
    "layers_per_block": _layers,
    "norm_num_groups": _count,
    "act_fn": _text,
    "scaling_factor": _positive,
    "shift_factor": _or_none(_number),
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
_nested_layers = _or_many(_or_many(_layers))
_UNET = {
    **dict.fromkeys(("in_channels", "out_channels"), _count),
    **dict.fromkeys(_UNET_COUNTS, _or_none(_count)),
    **dict.fromkeys(_UNET_TRUTHS, _or_none(_truth)),
    **dict.fromkeys(_UNET_TEXTS, _or_none(_text)),
    **dict.fromkeys(("down_block_types", "up_block_types"), _many(_text)),
    **dict.fromkeys(("attention_head_dim", "cross_attention_dim"), _or_many(_count)),
    **dict.fromkeys(("norm_eps", "mid_block_scale_factor"), _positive),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), _whole(1, 15)),
    "block_out_channels": _many(_count),
    "num_attention_heads": _or_none(_or_many(_count)),
    "only_cross_attention": _or_none(_or_many(_truth)),
    "sample_size": _or_none(_size),
    "layers_per_block": _or_many(_layers),
    "transformer_layers_per_block": _nested_layers,
    "reverse_transformer_layers_per_block": _or_none(_nested_layers),
    "downsample_padding": _whole(0, 1),
    "freq_shift": _number,
    "dropout": _number,
}
_FIELDS: dict[str, Mapping[str, Check]] = {"unet": _UNET, "vae_decoder": _VAE, "text_encoder": _TEXT}
_SCHEDULER: Mapping[str, Check] = {
    "num_train_timesteps": _whole(1, MOST_LEVELS),
    "original_inference_steps": _or_none(_whole(1, MOST_LEVELS)),
    "steps_offset": _whole(0, MOST_LEVELS),
    "prediction_type": lambda value: value in ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "trained_betas": _or_none(_many(_number, MOST_LEVELS)),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), _whole(1, 16)),
    **dict.fromkeys(("beta_start", "beta_end"), _positive),
}
# What the libraries take for fields that a config leaves out.
_DEFAULTS: dict[str, Mapping[str, Any]] = {
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


def _check_fields(file: Path, config: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for field, fits in checks.items():
        if field in config and not fits(config[field]):
            raise TightfitError(f"{file} has {field} {_brief(config[field])}, which cannot be: copy or download it again")


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "of more digits than can be shown"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_config(component: Component) -> None:
    """Every field that decides what is built, before it is: a count of layers may not exceed the tensors that are there."""
    file, kind = component.folder / "config.json", component.name.removesuffix("_2")
    _check_fields(file, component.config, _FIELDS[kind])
    tensors = sum(1 for tensor in component.tensors.values() if tensor.count)
    there = min(tensors if component.tensors else _MOST_ALL, _MOST_ALL) // _LEAST_TENSORS
    if kind == "text_encoder":
        counted = {"num_hidden_layers": component.setting("num_hidden_layers")}
    else:
        blocks = len(component.setting("block_out_channels"))
        deep = {"layers_per_block": _most(component.setting("layers_per_block")) * blocks}
        if kind == "unet":
            inner = _most(component.setting("transformer_layers_per_block"))
            inner = max(inner, _most(component.config.get("reverse_transformer_layers_per_block") or 0))
            deep["transformer_layers_per_block"] = deep["layers_per_block"] * inner
        counted = deep
    for field, count in counted.items():
        if count > there:
            raise TightfitError(
                f"{file} has {field} {_brief(component.setting(field))}, more layers than {tensors} tensors can be of: "
                "files of different models were mixed; copy or download it again"
            )
    for field in ("latents_mean", "latents_std"):
        if kind == "vae_decoder" and (given := component.setting(field)) and len(given) != component.setting("latent_channels"):
            raise TightfitError(
                f"{file} has {field} of {len(given)} channels, not of its latent_channels: copy or download it again"
            )


def _most(value: Any) -> int:
    """The largest number of a count that may be given for each block, and each layer of it."""
    return max(map(_most, value)) if isinstance(value, list | tuple) else value


def _before_0_9(version: Any) -> bool:
    parts = re.match(r"v?(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return bool(parts) and (int(parts[1]), int(parts[2] or 0)) < (0, 9)


def _text_width(components: Mapping[str, Component]) -> int:
    """Of the texts that the U-Net reads: all text encoders' side by side."""
    return sum(c.setting("hidden_size") for name, c in components.items() if name.startswith("text_encoder"))


def _family(folder: Path, pipeline: str, components: Mapping[str, Component]) -> str:
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
    widths, reads = _text_width(components), components["unet"].setting("cross_attention_dim")
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


def _index_file(folder: Path) -> Path:
    if folder.suffix in {pattern[1:] for pattern in PICKLES} and folder.is_file():
        raise TightfitError(f"{folder} is not opened: {cures.of_pickle(folder)}")
    if folder.is_file():
        raise TightfitError(_single_file(folder))
    if not folder.is_dir():
        raise TightfitError(
            f"{folder} does not exist{near(folder)}: a model is 'emoji', a diffusers folder or a hub id such as owner/name"
        )
    index = folder / "model_index.json"
    try:
        found = index.exists()
    except PermissionError:
        raise TightfitError(f"{folder} may not be entered: allow it, or copy the model to a folder of yours") from None
    if not found:
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            pickle = min(path for pattern in PICKLES for path in folder.glob(pattern))
            raise TightfitError(f"{folder} holds a pickle and no diffusers model: {cures.of_pickle(pickle)}")
        if single := sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf")):
            raise TightfitError(f"{folder} has no model_index.json: {_single_file(single[0])}")
        raise TightfitError(f"{folder} has no model_index.json: it is not a diffusers folder (name the folder that has one)")
    return index


def _single_file(file: Path) -> str:
    """Why a file is no model here, and how it becomes one."""
    if file.suffix.lower() == ".gguf":
        return f"{file} is not opened, as {cures.GGUF}"
    if file.suffix.lower() != ".safetensors":
        return f"{file} is no model: a model is 'emoji', a diffusers folder or a hub id such as owner/name"
    tensors = frozenset(read_header(file))
    if cures.is_adapter(tensors):
        return f"{file} is a LoRA, an addition to a model, which is not read in this version: name the model itself"
    return f"{file} is a single file; a model is a diffusers folder or a hub id: {cures.of_file(file, tensors)}"


def near(folder: Path) -> str:
    """' (did you mean emoji?)', if a name beside it, or a built-in one, is like that of `folder`."""
    beside: list[str] = []
    with suppress(OSError):
        beside = [path.name for path in islice(folder.parent.iterdir(), 1000) if path.is_dir()]
    close = get_close_matches(folder.name, ["emoji", *beside], 1)
    return f" (did you mean {close[0] if close[0] == 'emoji' else folder.parent / close[0]}?)" if close else ""


def _component(name: str, model: Path, manifest: Mapping[str, Any], listed: Sequence[Any]) -> Component:
    """What is there of it: tensors as diffusers keeps them, a graph as Optimum does, or both. `listed` is what model_index.json
    says of it, a library and a class."""
    folder, file = model / name.removesuffix("_decoder"), model / name / "model.onnx"
    torch = any(folder.glob("*.safetensors"))
    if file.exists() and not torch:
        beside = next((f for f in (folder, model / name) if (f / "config.json").exists()), model / name)
        config = _config(name, beside / "config.json", listed)
        _check_unmixed(file, manifest)
        return Component(name, model / name, config, {}, None, _graph(name, config, file))
    if not any(path for pattern in ("*.safetensors", *PICKLES) for path in folder.glob(pattern)) and any(model.glob("*/*.onnx")):
        others = (each.name for each in file.parent.glob("*.onnx") if each.name != file.name)
        renamed = next((f"rename {each}, which is there, or " for each in others), "")
        raise TightfitError(f"{file if file.parent.is_dir() else file.parent} is missing: {renamed}copy or export the model again")
    prefixes = ("decoder.", "post_quant_conv.") if name == "vae_decoder" else ("",)
    config = _config(name, folder / "config.json", listed)
    tensors = {key: tensor for key, tensor in all_tensors(folder).items() if key.startswith(prefixes)}
    if not tensors:
        raise TightfitError(f"the weight files in {folder} hold nothing of a {name}: copy or download them again")
    formats = manifest.get("components", {}).get(folder.name, {}).get("formats", {})
    of_these = {layer: form for layer, form in formats.items() if layer.startswith(prefixes)}
    stored = manifest.get("precision") in ("int8", "int4")
    graph, unreadable = None, ""
    try:
        graph = _graph(name, config, file) if file.exists() else None
    except TightfitError as error:  # torch can do without
        unreadable = str(error)
    return Component(name, folder, config, tensors, of_these if stored else None, graph, unreadable)


def _config(name: str, file: Path, listed: Sequence[Any]) -> dict[str, Any]:
    """A network's config with what the libraries take for what it leaves out. The class of a text encoder is, as in diffusers,
    the one that model_index.json names, unless its own config says that it is of another kind."""
    config = {**_DEFAULTS[name.removesuffix("_2")], **read_json(file)}
    if name.startswith("text_encoder"):
        _check_fields(file, config, {"architectures": lambda named: named in (None, []) or _or_many(_text)(named)})
        classes = (*(config.get("architectures") or ()), listed[-1])
        if all(str(each).startswith("CLIPTextModel") for each in classes):
            config["architectures"] = [listed[-1]]
    return config


def _check_unmixed(file: Path, manifest: Mapping[str, Any]) -> None:
    """A graph of another export would read its weights from wrong places in the file beside it. The weights are not read here."""
    told = manifest.get("components", {}).get(file.parent.name, {}).get("sha256", {}).get(file.name)
    if told and sha256(file) != told:
        raise TightfitError(
            f"{file} is not the one that was exported into this folder: copy or export the model again "
            "(or delete its tightfit.json, if you changed the graph yourself)"
        )


# What each network's graph is given, and may be given beside that.
_INPUTS = {
    "unet": ({"sample", "timestep", "encoder_hidden_states"}, {"timestep_cond", "text_embeds", "time_ids"}),
    "vae_decoder": ({"latent_sample"}, set()),
    "text_encoder": ({"input_ids"}, set()),
}
# Values of each network's graph: how many sides they have, and which of these a field of its config tells.
_SIDES = {
    "unet": (("sample", 4, 1, "in_channels"), ("encoder_hidden_states", 3, 2, "cross_attention_dim")),
    "vae_decoder": (("latent_sample", 4, 1, "latent_channels"),),
    "text_encoder": (("input_ids", 2, 0, ""), ("last_hidden_state", 3, 2, "hidden_size")),
}


def _graph(name: str, config: Mapping[str, Any], file: Path) -> Graph:
    """The graph in `file`, whose inputs are those of the network `name`, and as wide as its config says."""
    graph = read_graph(file)
    needed, allowed = _INPUTS[name.removesuffix("_2")]
    if not needed <= graph.inputs.keys() <= needed | allowed:
        raise TightfitError(
            f"{file} has the inputs {', '.join(sorted(graph.inputs))}, a {name} has {', '.join(sorted(needed))}: "
            "files of different models were mixed, or one was renamed; copy or export the model again"
        )
    for value, rank, which, field in _SIDES[name.removesuffix("_2")]:
        sides, wanted = (graph.inputs | graph.outputs).get(value, (0, ()))[1], config.get(field)
        if sides and len(sides) != rank:
            raise TightfitError(f"{graph.file} has {value} of {len(sides)} sides, not {rank}: copy or export the model again")
        if sides and isinstance(sides[which], int) and isinstance(wanted, int) and sides[which] != wanted:
            raise TightfitError(
                f"{graph.file} has {value} of {list(sides)}, its config says {field} {wanted}: "
                "files of different models were mixed; copy or export the model again"
            )
    return graph
