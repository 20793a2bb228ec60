"""Another VAE in place of the model's own: of a diffusers folder or a single file, whole or tiny (TAESD)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..errors import TightfitError
from ..files import read_json
from ..models.families.family import Network
from ..models.families.networks import DECODER, check_config
from ..models.families.tiny import TINY_DECODER
from ..models.layouts import renames
from ..models.layouts.bitsandbytes import tensors_of
from ..models.layouts.single_file import vae_config
from ..models.layouts.split_file import vae
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from .header import Stamp, contents, exists, path_of, stamp

_MOST_FILES = 100  # of a folder, whose sizes and times are looked at
_INSIDE = "first_stage_model."  # as names of a VAE begin in a checkpoint, and in files that were cut from one
_TINY, _WHOLE = "AutoencoderTiny", "AutoencoderKL"
# taesd_decoder.safetensors of its authors numbers its layers, a clamp without weights the first of them.
_NUMBERED = re.compile(r"(\d{1,4})\.(.+)")


Stored = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""A config, and tensors by diffusers' names."""


@dataclass(frozen=True)
class Vae:
    """The VAE at `path`: a folder with a config.json, or a safetensors file."""

    option: ClassVar = "vae"

    path: Path
    stamps: tuple[Stamp, ...] = ()
    """Sizes and times of its files when it was named; if they are written again it is another VAE."""

    def __post_init__(self) -> None:
        inside = self.path / DECODER.folder  # of a whole model
        if not (self.path / "config.json").exists() and (inside / "config.json").exists():
            object.__setattr__(self, "path", inside)
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        object.__setattr__(self, "stamps", tuple(stamp(file) for file in files[:_MOST_FILES]))

    @property
    def name(self) -> str:
        return str(self.path)

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with its decoder. Raises TightfitError for one of other latents, or that is no VAE."""
        if spec.decoder.network is TINY_DECODER:
            raise TightfitError(f"{self.path} is a second VAE beside {spec.decoder.folder}: give one")
        config, stored = self._folder(spec) if self.path.is_dir() else self._file(spec)
        tiny = config.get("_class_name") == _TINY
        if tiny:  # as diffusers has it, whatever the file says
            config = {**TINY_DECODER.defaults, **config}
            config["block_out_channels"] = config["decoder_block_out_channels"]
        if tiny and spec.latents.channels != spec.vae["latent_channels"]:
            raise TightfitError(
                f"{self.path} is a tiny decoder, and {spec.name} takes a whole VAE: leave it out"
            )
        decoder = self._component(config, stored, TINY_DECODER if tiny else spec.decoder.network)
        latents, ours = decoder.setting("latent_channels"), spec.decoder.setting("latent_channels")
        factor = 2 ** (len(decoder.setting("block_out_channels")) - 1)
        own_factor = 2 ** (len(spec.vae["block_out_channels"]) - 1)
        wanted_factor = own_factor if spec.decoder.engines else factor  # a file without a VAE has none
        if (latents, factor, decoder.setting("out_channels")) != (ours, wanted_factor, 3):
            raise TightfitError(
                f"{self.path} decodes {latents} channels to {factor} times their size, "
                f"{spec.name} has {ours}, {own_factor} times: take a VAE of the same family"
            )
        notes = spec.notes
        if decoder.network is TINY_DECODER:
            notes += (f"{self.path.name} decodes approximately: dB count from its own picture in fp32",)
        components = {**spec.components, decoder.name: decoder}
        spare = spec.spare if tiny else partial(self._component, config, stored)
        return replace(spec, components=components, notes=notes, spare=spare)

    def _folder(self, spec: ModelSpec) -> Stored:
        config = read_json(self.path / "config.json")
        named, whole = config.get("_class_name"), spec.vae.get("_class_name", _WHOLE)
        if named not in (_TINY, whole):
            raise TightfitError(f"{self.path} holds a {str(named)[:40]}: a VAE is an {whole} or {_TINY}")
        return config, tensors_of(self.path)

    def _file(self, spec: ModelSpec) -> Stored:
        stored, _ = contents(self.path, stamp(self.path))
        if all(_NUMBERED.fullmatch(name) for name in stored):
            stored = _renamed(stored)
        if any(name.startswith("decoder.layers.") for name in stored):
            return {"_class_name": _TINY, **_latents(stored.get("decoder.layers.0.weight"))}, stored
        config, whole = vae(stored)
        if config:
            return config | {"norm_num_groups": spec.vae.get("norm_num_groups", 32)}, whole
        whole = {name.removeprefix(_INSIDE): tensor for name, tensor in stored.items()}
        if any(name.startswith("decoder.mid.") for name in whole):
            whole = renames.vae(whole)
        shapes = {} if spec.decoder.engines else vae_config(whole)
        return {**spec.decoder.config, **shapes, **_latents(whole.get("decoder.conv_in.weight"))}, whole

    def _component(
        self, config: Mapping[str, Any], stored: Mapping[str, Tensor], network: Network
    ) -> Component:
        """One half of it, checked."""
        tensors = {name: tensor for name, tensor in stored.items() if name.startswith(network.prefixes)}
        if not tensors:
            raise TightfitError(f"{self.path} holds nothing of a VAE's {network.role.value}: name a VAE")
        component = Component(network, self.path, {**network.defaults, **config}, tensors)
        check_config(component)
        return component


def _latents(first: Tensor | None) -> dict[str, int]:
    """What a decoder's first convolution says of the latents."""
    return {"latent_channels": first.shape[1]} if first and len(first.shape) > 1 else {}


def _renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of TAESD's decoder as diffusers' are."""
    parts = {name: _NUMBERED.fullmatch(name) for name in stored}
    return {
        f"decoder.layers.{int(part[1]) - 1}.{part[2]}": stored[name] for name, part in parts.items() if part
    }


def written(text: str) -> Vae:
    """The VAE in a folder or a file."""
    path = path_of(text)
    if not exists(path):
        raise TightfitError(f"{path} does not exist: a VAE is a diffusers folder or a safetensors file")
    return Vae(path)
