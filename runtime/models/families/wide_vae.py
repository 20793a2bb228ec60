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
