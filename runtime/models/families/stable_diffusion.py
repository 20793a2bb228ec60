"""SD 1.x and SD 2.x: one text encoder, a U-Net that reads its last layer, a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import TightfitError
from ..cures import of_mixed
from .family import Family
from .networks import DECODER, ENCODER, TEXT_ENCODER, UNET

if TYPE_CHECKING:
    import numpy as np

    from ...request import Job
    from ..layouts import Source
    from ..spec import ModelSpec


@dataclass(frozen=True)
class StableDiffusion(Family):
    """`linear_projection` tells SD 2.x from SD 1.x: its transformers project by linears, not by 1x1
    convolutions."""

    name: str
    linear_projection: bool
    title: str
    reads: int
    networks = (TEXT_ENCODER, UNET, DECODER)
    on_demand = (ENCODER,)
    tiny_decoder = r"taesd(?!xl|\d)"
    # Of latents' channels, and a constant: red, green and blue in -1..1. As stable-diffusion.cpp has them in
    # latent-preview.h (MIT), where stduhpf fitted them.
    latent_rgb = (
        (0.337, 0.166, -0.268, -0.178, -0.017),
        (0.216, 0.387, 0.237, -0.201, -0.056),
        (0.257, 0.047, 0.224, -0.679, -0.106),
    )
    # Sabour et al. 2024, "Align Your Steps", for SD 1.5.
    align_your_steps = 14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029

    def claims(self, source: Source) -> bool:
        return bool(source.config(UNET).get("use_linear_projection")) == self.linear_projection

    def check(self, spec: ModelSpec) -> None:
        check_parts(spec)
        if (embedding := spec.unet.get("addition_embed_type")) is not None:
            raise unknown_conditioning(spec, embedding)

    def default_guidance(self, spec: ModelSpec) -> float:
        return 8.5 if spec.consistent else 7.5

    def default_steps(self, spec: ModelSpec) -> int:
        return default_steps(spec)

    def is_distilled(self, spec: ModelSpec) -> bool:
        return bool(spec.guidance_width)

    def corrects_configs(self, spec: ModelSpec) -> bool:
        return not spec.latent_consistency

    def latent_affine(self, spec: ModelSpec) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        channels = spec.decoder.setting("latent_channels")
        return (1.0,) * channels, spec.decoder.setting("scaling_factor"), (0.0,) * channels

    def condition(self, job: Job, encoded: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        (hidden, *_), *_ = encoded
        return {"hidden": hidden} | guidance_input(job)


def default_steps(spec: ModelSpec) -> int:
    """As in diffusers' pipeline for latent consistency models."""
    return 4 if spec.consistent else 20


def guidance_input(job: Job) -> dict[str, np.ndarray]:
    """What guidance-distilled U-Nets (LCM) take in place of a second call."""
    width = job.spec.guidance_width
    return {"time_condition": guidance_embedding(job.guidance_scale, width)} if width else {}


def guidance_embedding(scale: float, width: int) -> np.ndarray:
    """(1, width): the sinusoids by which guidance-distilled U-Nets read w = scale - 1 (arXiv 2310.04378,
    appendix)."""
    import numpy as np

    half = width // 2
    frequencies = np.exp(np.arange(half) * -(np.log(10000.0) / (half - 1)))
    angles = (scale - 1) * 1000.0 * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2))[None].astype(np.float32)


def check_parts(spec: ModelSpec) -> None:
    """Raise TightfitError for a U-Net and a VAE of other classes, or that are not of one model, or do more
    than text to image."""
    unet, vae, folder = spec.unet, spec.vae, spec.folder
    if unet.get("_class_name") != "UNet2DConditionModel" or vae.get("_class_name") != "AutoencoderKL":
        raise TightfitError(
            f"{folder} holds a {spec.pipeline} "
            f"made of {unet.get('_class_name')} and {vae.get('_class_name')}: "
            "tightfit runs SD 1.x, SD 2.x and SDXL (UNet2DConditionModel, AutoencoderKL)"
        )
    latent = vae["latent_channels"]
    if unet["in_channels"] not in (latent, 2 * latent, 2 * latent + 1):  # plain, editing, inpainting
        raise TightfitError(
            f"{folder} expects {unet['in_channels']} input channels, not the VAE's {latent}: "
            "it is an unknown kind of model; use its text-to-image counterpart"
        )
    if vae.get("out_channels", 3) != 3 or unet.get("out_channels", 4) != vae["latent_channels"]:
        raise TightfitError(
            f"{folder} paints more than red, green and blue, or predicts more than noise: use a plain model"
        )
    reads = spec.denoiser.setting("cross_attention_dim")
    other = next(
        (width for width in ([reads] if isinstance(reads, int) else reads) if width != spec.text_width), None
    )
    if other is not None and not unet.get("encoder_hid_dim"):
        raise of_mixed(
            f"{folder} has texts {spec.text_width} wide from its text encoders, {other} wide in its U-Net"
        )


def unknown_conditioning(spec: ModelSpec, embedding: object) -> TightfitError:
    return TightfitError(
        f"{spec.folder} is a {spec.pipeline} with conditioning '{embedding}': "
        "tightfit runs SD 1.x, SD 2.x and SDXL base"
    )
