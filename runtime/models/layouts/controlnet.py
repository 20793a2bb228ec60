"""ControlNets and T2I-Adapters in files: a diffusers folder, or one file by the names of the original code or
of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import read_json
from ..families import known_by
from ..families.family import Extent, Network
from ..families.networks import adding_residuals, check_config, residuals, residuals_of
from ..families.t2i_adapter import PLAIN, XL
from ..manifest import read_manifest
from ..spec import Component, ModelSpec
from ..tensors import Tensor
from . import foreign, renames
from .bitsandbytes import tensors_of
from .library import Kind
from .optimum import GRAPH, check_unmixed, read_network
from .scales import scaled
from .single_file import READS, control_config

_CLASS, _FOLDER = "ControlNetModel", "controlnet"
_SOME = {"batch_size": 1, "height": 8, "width": 8}
_INSIDE = ("control_model.", "controlnet.")  # how names begin in a file of several networks
_ORIGINAL = "input_hint_block."
# What else controls a picture, by the beginnings of names.
_OTHERS = (
    (r"(?:task_embedding|control_type_proj|control_add_embedding|spatial_ch_projs|transformer_layes)\b",
     "a union of ControlNets (ControlNet++)"),
    (r"lllite_", "a ControlNet-LLLite"),
    (r"(?:lora_controlnet$|.*\.(?:up|down)$)", "a Control-LoRA"),
    (r"(?:controlnet_x_embedder|controlnet_single_blocks|(?:double|single)_blocks|img_in)\b",
     "a ControlNet of Flux"),
    (r"(?:pos_embed_input|transformer_blocks\.\d+\.norm1_context)\b", "a ControlNet of SD 3"),
)  # fmt: skip
_CLASSES = {
    "ControlNetUnionModel": _OTHERS[0][1],
    "FluxControlNetModel": "a ControlNet of Flux",
    "SD3ControlNetModel": "a ControlNet of SD 3",
}
_RUN = "tightfit runs ControlNets and T2I-Adapters of SD 1.x, SD 2.x and SDXL"
_ADAPTER, _ADAPTERS_CLASS = "adapter.", "T2IAdapter"
_BODY = re.compile(r"(?:adapter\.)?body\.\d+\.")
# Of what reads the picture: channels of blocks of pixels, as in_channels and a side in pixels.
_UNSHUFFLED = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}


def of_folder(path: Path, networks: tuple[Network, Network], spec: ModelSpec) -> Component:
    """The ControlNet or the T2I-Adapter in a diffusers folder, checked: of the first or the second network.
    Raises TightfitError for what is neither, or for another model."""
    config = read_json(path / "config.json")
    named = str(config.get("_class_name"))[:40]
    network = networks[named == _ADAPTERS_CLASS]
    if named == _ADAPTERS_CLASS:
        whole = {**network.defaults, **config}
        return _checked_adapter(Component(network, path, whole, tensors_of(path)), spec)
    if named != _CLASS:
        raise TightfitError(f"{path} holds {_CLASSES.get(named, f'a {named}')}: {_RUN}")
    whole, manifest = {**network.defaults, **config}, read_manifest(path.parent)
    if (path / GRAPH).is_file() and not any(path.glob("*.safetensors")):
        return _as_onnx(Component(network, path, whole, {}), manifest, spec)
    formats = manifest.get("components", {}).get(path.name, {}).get("formats")  # exported in 8 or 4 bits
    return _checked(Component(network, path, whole, tensors_of(path), formats), spec)


def _as_onnx(component: Component, manifest: Mapping[str, Any], spec: ModelSpec) -> Component:
    """The ControlNet with its graph, whose answers are what the model's U-Net takes."""
    check_config(component)
    config, file = component.config, component.folder / GRAPH
    _check_family(component, config.get("cross_attention_dim"), spec)
    _check_answers(component, [shape[1] for shape in residuals_of(config, _SOME).values()], spec)
    check_unmixed(file, manifest)
    network = adding_residuals(component.network, config)
    return replace(component, network=network, graph=read_network(network, config, file))


def of_file(
    path: Path, stored: Mapping[str, Tensor], networks: tuple[Network, Network], spec: ModelSpec
) -> Component:
    """The one whose tensors these are, checked. Raises TightfitError as `of_folder` does."""
    network, adapter = networks
    if any(map(_BODY.match, stored)) and foreign.kind_of(stored) is not Kind.UPSCALER:
        return _adapter(path, stored, adapter, spec)
    begin = next((start for start in _INSIDE if any(name.startswith(start) for name in stored)), "")
    own = {name.removeprefix(begin): t for name, t in stored.items() if name.startswith(begin)}
    other = _other(own)
    if any(name.startswith(_ORIGINAL) for name in own):
        tensors = renames.control(scaled(own))
    elif any(name.startswith("controlnet_cond_embedding.") for name in own) and not other:
        tensors = scaled(own)
    elif not other and (known := foreign.what(stored)):
        raise TightfitError(f"{path} is {known[0]}, no ControlNet: {known[1]}")
    else:
        raise TightfitError(f"{path} is {other or 'no ControlNet'}: {_RUN}")
    config = {**network.defaults, **control_config(tensors, spec.unet)}
    return _checked(Component(network, path, config, tensors), spec)


def _adapter(path: Path, stored: Mapping[str, Tensor], network: Network, spec: ModelSpec) -> Component:
    diffusers = any(name.startswith(_ADAPTER) for name in stored)
    tensors = scaled(stored) if diffusers else renames.t2i_adapter(scaled(stored))
    begin = tensors.get(f"{_ADAPTER}conv_in.weight")
    channels, factor = _UNSHUFFLED.get(begin.shape[1] if begin and len(begin.shape) == 4 else 0, (0, 0))
    last = f"{_ADAPTER}body.{{}}.resnets.1.block2.bias"
    widths = [tensors[name].count for block in range(8) if (name := last.format(block)) in tensors]
    if not channels or not widths:
        raise TightfitError(f"{path} is a T2I-Adapter of another kind (light, or fused): {_RUN}")
    config = {
        **network.defaults,
        "in_channels": channels,
        "channels": widths,
        "downscale_factor": factor,
        "adapter_type": XL if factor == 16 else PLAIN,
    }
    return _checked_adapter(Component(network, path, config, tensors), spec)


def _checked_adapter(component: Component, spec: ModelSpec) -> Component:
    """Raise TightfitError unless its answers are what the model's blocks take."""
    check_config(component)
    widths, config = [*spec.unet["block_out_channels"]], component.config
    is_xl = config["adapter_type"] == XL
    if [*config["channels"]] != (widths + widths[-1:] if is_xl else widths):
        kind = "SDXL" if is_xl else "SD 1.x or 2.x"
        raise TightfitError(
            f"{component.folder} is a T2I-Adapter of {kind}, blocks of {list(config['channels'])} channels, "
            f"and {spec.name} has {widths}: take one of the same family"
        )
    return component


def _other(names: Iterable[str]) -> str:
    """What a file is that controls pictures otherwise."""
    names = [*names]
    return next((what for pattern, what in _OTHERS if any(re.match(pattern, name) for name in names)), "")


def _checked(component: Component, spec: ModelSpec) -> Component:
    """Raise TightfitError unless its answers are what the model's U-Net takes."""
    tensors = component.tensors
    _check_family(component, _text_width(tensors), spec)
    count = len(residuals(spec, Extent(1, 64, 64)))
    places = (*(f"controlnet_down_blocks.{n}" for n in range(count - 1)), "controlnet_mid_block")
    _check_answers(component, [t.count if (t := tensors.get(f"{at}.bias")) else 0 for at in places], spec)
    check_config(component)
    return component


def _check_family(component: Component, width: Any, spec: ModelSpec) -> None:
    """Raise TightfitError unless texts so wide, and latents, are those of the model."""
    path, ours = component.folder, spec.text_width
    if width and width != ours:
        kind, other = (known_by(side) or f"texts {side} wide" for side in (width, ours))
        raise TightfitError(
            f"{path} is a ControlNet of {kind}, and {spec.name} is of {other}: take one of the same family"
        )
    reads, latent = component.config["in_channels"], spec.vae["latent_channels"]
    if reads != latent:
        raise TightfitError(
            f"{path} is a ControlNet of latents of {reads} channels, and those of {spec.name} have {latent}: "
            "take one of the same family"
        )


def _check_answers(component: Component, channels: list[int], spec: ModelSpec) -> None:
    """Raise TightfitError unless answers of so many channels are what the model's U-Net takes."""
    if channels != [shape[1] for shape in residuals(spec, Extent(1, 64, 64)).values()]:
        raise TightfitError(
            f"{component.folder} is a ControlNet of another U-Net than that of {spec.name}: "
            "take one of the same family"
        )


def _text_width(tensors: Mapping[str, Any]) -> int:
    reading = (tensor.shape for name, tensor in tensors.items() if name.endswith(READS))
    return next((shape[1] for shape in reading if len(shape) > 1), 0)


def built_in(spec: ModelSpec) -> Path | None:
    """The ControlNet that a model's folder has, as diffusers' pipelines of ControlNets do."""
    folder = spec.folder / _FOLDER
    return folder if (folder / "config.json").is_file() else None
