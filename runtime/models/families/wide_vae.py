"""Families whose VAE has 16 channels, with a scale and a shift for all of them: SD 3's and Flux.1's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import TightfitError
from .family import Family, Latents, Network
from .networks import DECODER, ENCODER

if TYPE_CHECKING:
    from ..spec import ModelSpec

_VAE = "AutoencoderKL"
# Red, green and blue of the 16 channels and a constant. As Stability's sd3.5 has them in sd3_impls.py (MIT).
SD3_RGB = (
    (
        -0.065, 0.003, 0.185, 0.094, 0.09, -0.002, 0.086, -0.054, -0.006,
        -0.041, 0.111, -0.025, 0.082, -0.012, -0.075, -0.142, 0
    ),
    (
        0.018, 0.031, 0.076, 0.036, 0.051, 0.12, 0.012, 0.066, 0.012,
        0.028, 0.117, 0.068, 0.085, -0.005, -0.063, -0.146, 0
    ),
    (
        0.105, 0.065, 0.036, 0.089, -0.036, 0.028, 0.028, 0.105, 0.07,
        -0.004, 0.122, -0.048, 0.121, -0.087, -0.046, -0.126, 0
    ),
)  # fmt: skip
# As stable-diffusion.cpp has them in latent-preview.h (MIT), where stduhpf fitted them.
FLUX1_RGB = (
    (
        -0.041, 0.028, 0.066, -0.013, 0.079, -0.016, 0.034, -0.024, -0.04,
        0.113, -0.023, 0.083, 0.076, -0.144, -0.026, -0.112, 0.025
    ),
    (
        0.02, 0.027, -0.068, -0.015, 0.059, -0.004, 0.139, -0.064, -0.017,
        0.089, 0.094, 0.048, 0.074, 0.018, -0.082, -0.056, -0.007
    ),
    (
        0.097, 0.13, -0.015, 0.081, -0.025, 0.005, 0.069, -0.03, 0.127,
        -0.042, 0.026, 0.007, 0.082, -0.136, -0.04, -0.032, -0.008
    ),
)  # fmt: skip


def wide_vae(scale: float, shift: float) -> tuple[Network, Network]:
    """The decoder and the encoder. Latents are (encoded - shift) * scale."""
    config = {
        **DECODER.defaults,
        "latent_channels": 16,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "scaling_factor": scale,
        "shift_factor": shift,
    }
    return replace(DECODER, defaults=config), replace(ENCODER, defaults=config)


class OfWideVae(Family):
    """A transformer that was trained in bf16 by flow matching, on patches of such a VAE's latents."""

    first_step_is_known = True
    needs_range = True

    def check(self, spec: ModelSpec) -> None:
        if (vae := spec.vae.get("_class_name", _VAE)) != _VAE:
            raise TightfitError(
                f"{spec.folder} has a {vae}, not {self.title}'s {_VAE}: copy or download it again"
            )

    def patch(self, spec: ModelSpec) -> int:
        """A side of a token, in latents."""
        return 2

    def latents(self, spec: ModelSpec) -> Latents:
        channels, pixels, _ = super().latents(spec)
        return Latents(channels, pixels, self.patch(spec) * pixels)

    def latent_affine(self, spec: ModelSpec) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        channels, vae = spec.latents.channels, spec.vae
        return (1.0,) * channels, vae["scaling_factor"], (vae.get("shift_factor") or 0.0,) * channels
