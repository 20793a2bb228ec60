"""Families whose VAE has 16 channels, with a scale and a shift for all of them: SD 3's and Flux.1's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import TightfitError
from .family import NO_GRAPH, Family, Latents, Network
from .networks import DECODER, ENCODER

if TYPE_CHECKING:
    from ..spec import ModelSpec

_VAE = "AutoencoderKL"
# Red, green and blue of the 16 channels and a constant, as ComfyUI's latent formats have them.
SD3_RGB = (
    (
        -0.092, 0.031, 0.199, 0.086, 0.059, -0.001, 0.098, -0.004, -0.019,
        -0.049, 0.092, -0.028, 0.033, -0.007, -0.06, -0.145, 0.239
    ),
    (
        -0.018, 0.063, 0.093, 0.034, 0.027, 0.11, 0.031, 0.104, 0.002,
        0.013, 0.099, 0.052, 0.046, -0.003, -0.046, -0.146, 0.213
    ),
    (
        0.075, 0.095, 0.046, 0.09, -0.05, 0.031, 0.043, 0.136, 0.067,
        -0.027, 0.095, -0.054, 0.089, -0.081, -0.029, -0.119, 0.193
    ),
)  # fmt: skip
FLUX1_RGB = (
    (
        -0.035, 0.003, 0.028, -0.017, 0.086, 0, 0.041, -0.024, -0.025,
        0.101, -0.051, 0.043, 0.082, -0.126, -0.028, -0.126, -0.033
    ),
    (
        0.024, 0.021, -0.067, 0.016, 0.072, 0.038, 0.086, -0.018, 0.025,
        0.075, 0.02, -0.001, 0.076, -0.052, -0.088, -0.098, -0.072
    ),
    (
        0.068, 0.069, -0.043, 0.062, 0.033, 0.011, 0.091, -0.026, 0.118,
        -0.042, 0.001, -0.004, 0.075, -0.11, -0.05, -0.078, -0.085
    ),
)  # fmt: skip


def wide_vae(scale: float, shift: float) -> tuple[Network, Network]:
    """The decoder and the encoder; no ONNX graph. Latents are (encoded - shift) * scale."""
    config = {
        **DECODER.defaults,
        "latent_channels": 16,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "scaling_factor": scale,
        "shift_factor": shift,
    }
    changed = {"defaults": config, "graph": NO_GRAPH, "tracing": None}
    return replace(DECODER, **changed), replace(ENCODER, **changed)


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
