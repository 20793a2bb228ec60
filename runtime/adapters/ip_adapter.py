"""IP-Adapter: pictures that the denoiser reads beside texts. Its file has keys and values for the denoiser's
attention, and what makes tokens of an image encoder's answer; that encoder lies in a folder beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import TightfitError, explained
from ..files import read_json, shortened
from ..models.families.image_prompt import IMAGE_ENCODER, SCALE, TOKENS
from ..models.families.networks import check_config
from ..models.layouts import renames
from ..models.layouts.bitsandbytes import tensors_of
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from .header import Stamp, contents, exists, located, stamp

IN_FOLDERS = ("ip_adapter.safetensors",)
_PLAIN_TOKENS = 4
_HEAD = 64
_READS = re.compile(r"(.+\.attn2)\.to_k\.(?:weight|packed)")
_ORDER = "down_blocks", "up_blocks", "mid_block"  # in which files number the layers
_WEIGHT = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)
_MOST = 10.0
_COMFYS, _MOST_FILES = "clip_vision", 100  # ComfyUI's folder of image encoders, each in one file
_CLASS = "vision_model.embeddings.class_embedding"
# By width. Those that OpenAI published (ViT-B, ViT-L) have another activation than OpenCLIP's ViT-H and bigG.
_HEADS, _OPENAIS = {768: 12}, (768, 1024)
_Stored = tuple[Path, Mapping[str, Any], Mapping[str, Tensor]]
"""Where an image encoder is, its config, its tensors."""


@dataclass(frozen=True)
class IPAdapter:
    """The adapter in a file, plain or "plus". scale: how much pictures count beside texts, which have 1."""

    option: ClassVar = "ip_adapter"

    file: Path
    written: Stamp
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.file}:{self.scale!r}"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model that reads pictures, with what encodes them. Raises TightfitError for another family's,
        and for a second."""
        own = spec.denoiser
        if TOKENS in own.config:
            raise TightfitError(f"{self.file} is a second IP-Adapter: give one")
        if not own.tensors:
            raise TightfitError(
                f"{own.folder} is there as ONNX alone, which takes no IP-Adapter: "
                "use the model it was made from"
            )
        stored, _ = contents(self.file, self.written)
        with explained(f"{self.file} is no IP-Adapter that can be read", "copy or download it again"):
            encoder, attention = self._encoder(spec, stored), self._attention(spec, stored)
        settings = {TOKENS: encoder.config[TOKENS], SCALE: self.scale}
        tensors = {**own.tensors, **attention}
        denoiser = replace(own, config={**own.config, **settings}, tensors=tensors, graph=None)
        return replace(spec, components={**spec.components, own.name: denoiser}).with_components((encoder,))

    def _attention(self, spec: ModelSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys and values by the denoiser's names. Files number its attention layers, those of texts odd."""
        paths = sorted(
            (match[1] for name in spec.denoiser.tensors if (match := _READS.fullmatch(name))), key=_place
        )
        made = {
            f"{path}.{part}.weight": stored.get(f"ip_adapter.{2 * number + 1}.{part}.weight")
            for number, path in enumerate(paths)
            for part in ("to_k_ip", "to_v_ip")
        }
        width, reads = stored["ip_adapter.1.to_k_ip.weight"].shape[-1], spec.text_width
        count = sum(name.startswith("ip_adapter.") for name in stored)
        if width != reads or count != len(made) or None in made.values():
            raise TightfitError(
                f"{self.file} has {count} tensors for texts {width} wide, and {spec.name} takes {len(made)}, "
                f"{reads} wide: take an IP-Adapter of the same family"
            )
        return {name: tensor for name, tensor in made.items() if tensor}

    def _encoder(self, spec: ModelSpec, stored: Mapping[str, Tensor]) -> Component:
        """The image encoder, with what makes tokens of its answer."""
        inside = {
            name.removeprefix("image_proj."): tensor
            for name, tensor in stored.items()
            if name.startswith("image_proj.")
        }
        if "latents" in inside:
            projection, settings = renames.resampler(inside), _resampler(inside)
            field, wanted = "hidden_size", inside["proj_in.weight"].shape[-1]
        elif {"proj.weight", "norm.weight"} <= inside.keys():
            projection, field, wanted = inside, "projection_dim", inside["proj.weight"].shape[-1]
            settings = {TOKENS: _PLAIN_TOKENS, "reads": wanted, "resampled": 0}
        else:
            raise TightfitError(
                f"{self.file} is an IP-Adapter of faces, or of another kind: take a plain or plus one"
            )
        folder, config, stored = self._encoder_there(spec, field, wanted)
        config = {**IMAGE_ENCODER.defaults, **config, **settings, "texts": spec.text_width}
        tensors = {f"encoder.{name}": tensor for name, tensor in stored.items()}
        tensors |= {f"projection.{name}": tensor for name, tensor in projection.items()}
        component = Component(IMAGE_ENCODER, folder, config, tensors)
        check_config(component)
        return component

    def _encoder_there(self, spec: ModelSpec, field: str, wanted: int) -> _Stored:
        """The first image encoder beside it that this was made for."""
        above = self.file.parent
        for folder in (above, above.parent / "models", spec.folder):
            path = folder / IMAGE_ENCODER.folder
            if (path / "config.json").exists():
                config = read_json(path / "config.json")
                if config.get(field, IMAGE_ENCODER.defaults[field]) == wanted:
                    return path, config, tensors_of(path)
        for file in sorted((above.parent / _COMFYS).glob("*.safetensors"))[:_MOST_FILES]:
            stored, _ = contents(file, stamp(file))
            if _CLASS in stored and (config := _config(stored))[field] == wanted:
                return file, config, stored
        raise TightfitError(
            f"{self.file} needs an image encoder with {field} {wanted}, which is not beside it: put that "
            f"(config.json and model.safetensors) into {above / IMAGE_ENCODER.folder}"
        )


def _config(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of an image encoder in one file, by the shapes of its tensors."""
    (width,), patches = stored[_CLASS].shape, stored["vision_model.embeddings.patch_embedding.weight"].shape
    positions = stored["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    layers = {name.split(".")[3] for name in stored if name.startswith("vision_model.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": stored["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": stored["visual_projection.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": _HEADS.get(width, 16),
        "image_size": math.isqrt(positions) * patches[-1],
        "patch_size": patches[-1],
        "hidden_act": "quick_gelu" if width in _OPENAIS else "gelu",
    }


def _resampler(inside: Mapping[str, Tensor]) -> dict[str, int]:
    queries, layers = (
        inside["latents"].shape[1],
        {name.split(".")[1] for name in inside if name.startswith("layers.")},
    )
    heads = inside["layers.0.0.to_q.weight"].shape[0] // _HEAD
    return {TOKENS: queries, "reads": inside["latents"].shape[2], "resampled": len(layers), "heads": heads}


def _place(path: str) -> tuple[int, ...]:
    """Of a layer, by the order of its block, then by its numbers."""
    block, *numbers = path.split(".")
    return (_ORDER.index(block), *(int(number) for number in numbers if number.isdigit()))


def written(text: str) -> IPAdapter:
    """The adapter that FILE[:scale] says."""
    path, scale = text, "1"
    if not exists(path) and (match := _WEIGHT.fullmatch(path)):
        path, scale = match.groups()
    try:
        number = float(scale)
    except ValueError:
        number = float("nan")
    if not -_MOST <= number <= _MOST:
        raise TightfitError(
            f"{shortened(scale)} in {shortened(text)} is no number to {_MOST:g}: say FILE:0.6"
        )
    file = located(path, IN_FOLDERS)
    stored, _ = contents(file, stamp(file))
    if "ip_adapter.1.to_k_ip.weight" not in stored:
        raise TightfitError(f"{file} is no IP-Adapter (it holds {shortened(next(iter(stored), 'nothing'))})")
    return IPAdapter(file, stamp(file), number)
