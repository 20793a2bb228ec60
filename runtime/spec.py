"""What the model is, read from its configs and the headers of its safetensors files: never a weight, never a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TightfitError
from .files import CONVERT, PICKLES, Tensor, read_header, read_json, weight_files
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
        return self.config.get(field, _DEFAULTS.get(field))


@dataclass(frozen=True)
class ModelSpec:
    """A Stable Diffusion model in a diffusers folder. `family` is sd1, sd2 or sdxl; `scheduler` is its scheduler config.

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
        """Height and width in pixels of the pictures the model was trained on."""
        size = self.unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.downsampling, width * self.downsampling

    @property
    def default_guidance(self) -> float:
        """What the model's own manifest says, else diffusers' defaults: 7.5, and 5.0 for SDXL."""
        return self.defaults.get("guidance_scale", 5.0 if self.family == "sdxl" else 7.5)

    @property
    def latent_scale(self) -> float:
        """By which latents are larger in the U-Net than in the VAE."""
        return self.components["vae_decoder"].setting("scaling_factor")

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
        shapes = {"sample": latents, "timestep": (), "hidden": (batch, length, component.setting("cross_attention_dim"))}
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
    index = read_json(_index_file(folder))
    pipeline = index.get("_class_name", "unknown")
    listed = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if needed not in listed:
            raise TightfitError(f"{folder} is a {pipeline} without a {needed}: tightfit runs SD 1.x, SD 2.x and SDXL base models")
    manifest = _manifest(folder)
    components = {}
    for part in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
        if part != "text_encoder_2" or part in listed:
            components[part] = _component(part, folder, manifest)
    for component in components.values():
        _check_config(component)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if str(scheduler.get("_class_name")).startswith(("EDM", "FlowMatch")):
        raise TightfitError(
            f"{folder} was trained for {scheduler['_class_name']}, whose noise is not that of SD: it cannot run here"
        )
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


def _counts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(v, int) and v > 0 for v in value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _side(value: Any) -> bool:
    return _count(value) or (_counts(value) and len(value) == 2)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


# What is read here, before the libraries that own the configs see them, and what it must be; the rest is theirs to check.
_FIELDS = {
    "unet": {"in_channels": _count, "block_out_channels": _counts, "sample_size": _side},
    "vae_decoder": {"latent_channels": _count, "block_out_channels": _counts, "scaling_factor": _number},
    "text_encoder": {"max_position_embeddings": _count, "hidden_size": _count},
}
_DEFAULTS = {
    "scaling_factor": 0.18215,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_size": 512,
    "cross_attention_dim": 1280,
}  # the libraries' own


def _check_config(component: Component) -> None:
    for field, fits in _FIELDS[component.name.removesuffix("_2")].items():
        value = component.setting(field)
        if not fits(value):
            raise TightfitError(
                f"{component.folder / 'config.json'} has {field} {value!r}, which cannot be: copy or download it again"
            )


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
    widths = sum(c.setting("hidden_size") for name, c in components.items() if name.startswith("text_encoder"))
    reads = components["unet"].setting("cross_attention_dim")
    if isinstance(reads, int) and reads != widths and not unet.get("encoder_hid_dim"):
        raise TightfitError(
            f"{folder} has texts {widths} wide from its text encoders, {reads} wide in its U-Net: "
            "files of different models were mixed; copy or download it again"
        )
    embedding = unet.get("addition_embed_type")
    if embedding == "text_time" and "text_encoder_2" in components:
        return "sdxl"
    if embedding is not None or "text_encoder_2" in components:
        raise TightfitError(f"{folder} is a {pipeline} with conditioning '{embedding}': tightfit runs SD 1.x, SD 2.x and SDXL base")
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _index_file(folder: Path) -> Path:
    if folder.suffix in {pattern[1:] for pattern in PICKLES}:
        raise TightfitError(f"{folder} is not opened: {CONVERT}")
    if folder.is_file():
        how = "convert it once with diffusers' from_single_file(...).save_pretrained('folder')"
        raise TightfitError(f"{folder} is a single file; a model is a diffusers folder or a hub id: {how}")
    if not folder.is_dir():
        raise TightfitError(f"{folder} does not exist: a model is 'emoji', a diffusers folder or a hub id such as owner/name")
    index = folder / "model_index.json"
    try:
        found = index.exists()
    except PermissionError:
        raise TightfitError(f"{folder} may not be entered: allow it, or copy the model to a folder of yours") from None
    if not found:
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise TightfitError(f"{folder} holds a pickle and no diffusers model: {CONVERT}")
        raise TightfitError(f"{folder} has no model_index.json: it is not a diffusers folder (name the folder that has one)")
    return index


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """What the safetensors files of one component's folder hold, by name."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def _component(name: str, model: Path, manifest: Mapping[str, Any]) -> Component:
    """What is there of it: tensors as diffusers keeps them, a graph as Optimum does, or both."""
    folder, file = model / name.removesuffix("_decoder"), model / name / "model.onnx"
    torch = any(folder.glob("*.safetensors"))
    if file.exists() and not torch:
        config = read_json(next((f for f in (folder, model / name) if (f / "config.json").exists()), model / name) / "config.json")
        _check_unmixed(file, manifest)
        return Component(name, model / name, config, {}, None, _graph(name, config, file))
    if not any(path for pattern in ("*.safetensors", *PICKLES) for path in folder.glob(pattern)) and any(model.glob("*/*.onnx")):
        others = (each.name for each in file.parent.glob("*.onnx") if each.name != file.name)
        renamed = next((f"rename {each}, which is there, or " for each in others), "")
        raise TightfitError(f"{file if file.parent.is_dir() else file.parent} is missing: {renamed}copy or export the model again")
    prefixes = ("decoder.", "post_quant_conv.") if name == "vae_decoder" else ("",)
    config = read_json(folder / "config.json")
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


def _check_unmixed(file: Path, manifest: Mapping[str, Any]) -> None:
    """A graph of another export would read its weights from wrong places in the file beside it. The weights are not read here."""
    told = manifest.get("components", {}).get(file.parent.name, {}).get("sha256", {}).get(file.name)
    if told and hashlib.sha256(file.read_bytes()).hexdigest() != told:
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
