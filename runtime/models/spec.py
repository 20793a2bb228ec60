"""What the model is, read from its configs and the headers of its safetensors files: never a weight, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from .graph import Graph
from .tensors import Tensor


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
        shapes = {"sample": latents, "timestep": (), "hidden": (batch, length, text_width(self.components))}
        if self.guidance_width:
            shapes["time_condition"] = (1, self.guidance_width)
        if self.family == "sdxl":
            pooled = self.components["text_encoder_2"].setting("projection_dim")
            shapes |= {"text_embeds": (batch, pooled), "time_ids": (batch, 6)}
        return shapes

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        return tuple(c for name, c in self.components.items() if name.startswith("text_encoder"))


def _before_0_9(version: Any) -> bool:
    parts = re.match(r"v?(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return bool(parts) and (int(parts[1]), int(parts[2] or 0)) < (0, 9)


def text_width(components: Mapping[str, Component]) -> int:
    """Of the texts that the U-Net reads: all text encoders' side by side."""
    return sum(c.setting("hidden_size") for name, c in components.items() if name.startswith("text_encoder"))
