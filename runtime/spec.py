"""What the model is, read from its configs and the headers of its safetensors files: never a weight, never a pickle."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import TightfitError

PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
CONVERT = (
    "a pickle can run any code when it is opened, so tightfit never does; convert it once, in a place you trust: "
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_single_file('model.ckpt').save_pretrained('folder')\""
)
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers too


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: its dtype in that format's spelling, its shape, and its bytes' place there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    stored_bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Component:
    """One network of the model: the folder it lives in, its config and its tensors by their names in the files."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors.values())

    def weight_bytes(self, precision: str) -> int:
        """Bytes of all weights when held in `precision`."""
        return self.parameters * PRECISION_BYTES[precision]


@dataclass(frozen=True)
class ModelSpec:
    """A Stable Diffusion model in a diffusers folder. `family` is sd1, sd2 or sdxl; `scheduler` is its scheduler config.

    `components` are text_encoder, text_encoder_2 (sdxl), unet and vae_decoder, in the order a picture needs them.
    `defaults` are what the folder's tightfit.json, if it has one, says of requests that leave something open.
    """

    name: str
    folder: Path
    family: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    force_zeros: bool
    defaults: Mapping[str, Any]

    @property
    def unet(self) -> Mapping[str, Any]:
        return self.components["unet"].config

    @property
    def vae(self) -> Mapping[str, Any]:
        return self.components["vae_decoder"].config

    @cached_property
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
        return self.vae.get("scaling_factor", _DEFAULTS["scaling_factor"])

    @property
    def guidance_width(self) -> int | None:
        """Channels of the guidance embedding that distilled U-Nets (LCM) take in place of classifier-free guidance."""
        return self.unet.get("time_cond_proj_dim")

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        return tuple(c for name, c in self.components.items() if name.startswith("text_encoder"))


def read_model(folder: Path, name: str | None = None) -> ModelSpec:
    """Read the diffusers folder `folder`. Raises TightfitError for whatever is missing, broken or not supported."""
    index = _json(_index_file(folder))
    pipeline = index.get("_class_name", "unknown")
    listed = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if needed not in listed:
            raise TightfitError(f"{folder} is a {pipeline} without a {needed}: tightfit runs SD 1.x, SD 2.x and SDXL base models")
    unet = _component("unet", folder / "unet")
    vae = _component("vae_decoder", folder / "vae", ("decoder.", "post_quant_conv."))
    components = {"text_encoder": _component("text_encoder", folder / "text_encoder")}
    if "text_encoder_2" in listed:
        components["text_encoder_2"] = _component("text_encoder_2", folder / "text_encoder_2")
    components |= {"unet": unet, "vae_decoder": vae}
    for component in components.values():
        _check_config(component)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    if str(scheduler.get("_class_name")).startswith(("EDM", "FlowMatch")):
        raise TightfitError(
            f"{folder} was trained for {scheduler['_class_name']}, whose noise is not that of SD: it cannot run here"
        )
    manifest = folder / "tightfit.json"
    defaults = _json(manifest).get("defaults", {}) if manifest.exists() else {}
    if not isinstance(defaults, dict) or not isinstance(defaults.get("guidance_scale", 1.0), int | float):
        raise TightfitError(f"{manifest} has defaults that cannot be understood: delete it, or export the model again")
    return ModelSpec(
        name=name or str(folder.absolute()),
        folder=folder,
        family=_family(folder, pipeline, components),
        components=components,
        scheduler=scheduler,
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in listed)),
        defaults=defaults,
    )


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
    "text_encoder": {"max_position_embeddings": _count},
}
_DEFAULTS = {"scaling_factor": 0.18215, "max_position_embeddings": 77}  # the libraries' own


def _check_config(component: Component) -> None:
    for field, fits in _FIELDS[component.name.removesuffix("_2")].items():
        value = component.config.get(field, _DEFAULTS.get(field))
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
    if not index.exists():
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise TightfitError(f"{folder} holds a pickle and no diffusers model: {CONVERT}")
        raise TightfitError(f"{folder} has no model_index.json: it is not a diffusers folder (name the folder that has one)")
    return index


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TightfitError(f"{path} is missing: copy or download the model again") from None
    except OSError as error:
        raise TightfitError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TightfitError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise TightfitError(f"{path} is not a JSON object: copy or download it again")
    return value


def _component(name: str, folder: Path, prefixes: tuple[str, ...] = ("",)) -> Component:
    config = _json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= {key: tensor for key, tensor in read_header(file).items() if key.startswith(prefixes)}
    if not tensors:
        raise TightfitError(f"the weight files in {folder} hold nothing of a {name}: copy or download them again")
    return Component(name, folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: the plain file or shards, else the fp16 variant."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                places = _json(index).get("weight_map")
                names = set(map(str, places.values())) if isinstance(places, dict) else set()
                if not names or any(Path(shard).name != shard for shard in names):
                    raise TightfitError(f"{index} does not list plain file names: copy or download it again")
                return [folder / shard for shard in sorted(names)]
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return [single]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise TightfitError(f"{folder} has its weights only as {pickles[0]}: {CONVERT}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise TightfitError(
        f"{folder} has no diffusion_pytorch_model.safetensors or model.safetensors (there: {found}): "
        "rename it back, or copy or download the model again"
    )


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file promises, checked against its length. Format: the safetensors README."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _HEADER_LIMIT):
                raise TightfitError(f"{file} is not a whole safetensors file ({size} bytes): copy or download it again")
            header = json.loads(stream.read(length))
        tensors = {name: _tensor(entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        promised = max((tensor.offset + tensor.stored_bytes for tensor in tensors.values()), default=8 + length)
    except OSError as error:
        raise TightfitError(f"{file} cannot be read: {error.strerror}; copy or download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TightfitError(f"{file} has a broken safetensors header: copy or download it again") from None
    if promised != size:
        raise TightfitError(f"{file} is truncated or overwritten: it has {size} bytes of {promised}; copy or download it again")
    return tensors


def _tensor(entry: Mapping[str, Any], file: Path, data: int) -> Tensor:
    """One entry of a header whose tensors' bytes begin at `data`; ValueError if its numbers contradict each other."""
    begin, end = entry["data_offsets"]
    tensor = Tensor(entry["dtype"], tuple(entry["shape"]), file, data + begin, end - begin)
    if begin < 0 or any(side < 0 for side in tensor.shape):
        raise ValueError("a negative size")
    if tensor.dtype in STORED_BYTES and tensor.count * STORED_BYTES[tensor.dtype] != tensor.stored_bytes:
        raise ValueError("a tensor of another size than its shape")
    return tensor
