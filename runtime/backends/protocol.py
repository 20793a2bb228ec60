"""What every engine offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from ..costs.footprint import Footprint
from ..machine.hardware import Hardware
from ..models.spec import Component, ModelSpec
from ..placement import Placement

if TYPE_CHECKING:
    import numpy as np


class Session(Protocol):
    """A loaded component: called with float32 or int64 numpy arrays by name, answers with float32 numpy
    arrays.

    text_encoder: tokens (batch, length) → hidden (batch, length, width), and pooled (batch, width) if it
    projects. unet: sample (batch, channels, h, w), timestep (), hidden, and for some models time_condition,
    text_embeds, time_ids → (batch, channels, h, w). vae_decoder: latents (batch, channels, h, w) → (batch, 3,
    H, W) in -1..1.
    """

    notices: tuple[str, ...]
    """What a user should know of how it was loaded."""

    def __call__(self, **arrays: np.ndarray) -> tuple[np.ndarray, ...]: ...

    def close(self) -> None:
        """Free the weights. A closed session is not called again."""
        ...


class Meter(Protocol):
    """Measures the bytes that a backend's device holds, and keeps them under a limit."""

    def limit(self, count: int | None) -> None:
        """From now on raise OutOfMemoryError rather than hold more than `count` bytes."""
        ...

    def reset(self) -> None: ...

    def bytes(self) -> int:
        """The most held at once since `reset`."""
        ...

    def held(self) -> int:
        """Bytes that what is loaded holds now."""
        ...


class Backend(Protocol):
    """One engine on one device."""

    @property
    def meter(self) -> Meter: ...

    def load(self, component: Component, placement: Placement) -> Session:
        """Raises OutOfMemoryError if there is no room for it, and leaves nothing behind then."""
        ...

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Let go of what is kept of the host's memory between requests for components placed otherwise than
        these, by name. No session of theirs is called again."""
        ...

    def trim(self, peak_bytes: int) -> Iterable[str]:
        """Give back what makes it hold more than `peak_bytes`, the most that the next plan takes, if anything
        does. The names of the components whose sessions were closed for that; they are loaded anew."""
        ...


class Engine(Protocol):
    """What an engine knows of a machine that need not be here."""

    @staticmethod
    def refuses(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        size: tuple[int, int, int],
    ) -> str | None:
        """Why it cannot run a component so on that hardware for that size, or None if it can."""
        ...

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """Raise TightfitError for a component that it cannot run on any machine."""
        ...

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        size: tuple[int, int, int],
    ) -> Footprint:
        """What a component takes when called for `size`: a batch, and the picture's height and width in
        pixels."""
        ...
