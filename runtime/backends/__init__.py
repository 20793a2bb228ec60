"""What every engine offers, and which engines there are. Each module beside this one is the only importer of its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..errors import TightfitError
from ..plan import Placement
from ..spec import Component, ModelSpec

if TYPE_CHECKING:
    import numpy as np


class Session(Protocol):
    """A loaded component: called with float32 or int64 numpy arrays by name, answers with float32 numpy arrays.

    text_encoder: tokens (batch, length) → hidden (batch, length, width), and pooled (batch, width) if it projects.
    unet: sample (batch, channels, h, w), timestep (), hidden, and for some models time_condition, text_embeds,
    time_ids → (batch, channels, h, w). vae_decoder: latents (batch, channels, h, w) → (batch, 3, H, W) in -1..1.
    """

    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]: ...

    def close(self) -> None:
        """Free the weights. A closed session is not called again."""
        ...


class Peak(Protocol):
    """Measures the most bytes held since `reset`."""

    def reset(self) -> None: ...

    def bytes(self) -> int: ...


class Backend(Protocol):
    """One engine on one device."""

    def check(self, component: Component) -> None:
        """Raise TightfitError if the component's config and tensors do not fit together; no weight is read."""
        ...

    def load(self, spec: ModelSpec, component: Component, placement: Placement) -> Session: ...

    def peak(self) -> Peak: ...


def backend(name: str, device: str) -> Backend:
    """The engine called `name`, imported now. Raises TightfitError for an unknown one."""
    if name == "torch":
        from .torch import TorchBackend

        return TorchBackend(device)
    raise TightfitError(f"unknown backend '{name}': this version has torch")
