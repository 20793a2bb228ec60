"""What every engine offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..costs.footprint import Footprint
from ..machine.hardware import Hardware
from ..models.families.family import Extent
from ..models.graph import Graph
from ..models.spec import Component, ModelSpec
from ..placement import Placement

if TYPE_CHECKING:
    import numpy as np


class Session(Protocol):
    """A loaded component. It takes float32 or int64 numpy arrays by name and returns float32 numpy arrays.
    One of Role.CONTROL returns what stays on its device, for a session there to take; numpy reads it, too, in
    whatever precision.

    text_encoder: tokens (batch, length) → hidden (batch, length, width), and pooled (batch, width) if it
    projects. unet: sample (batch, channels, h, w), timestep (), hidden, and for some models time_condition,
    text_embeds, time_ids → (batch, channels, h, w). vae_decoder: latents (batch, channels, h, w) → (batch, 3,
    H, W) in -1..1, and so preview_decoder. upscaler: raw (1, 3, h, w) → (1, 3, H, W), both uint8. controlnet:
    what the unet takes, picture (1, 3, H, W) in 0..1, scales (batch, answers), and residual_0 … if it is not
    the first → what is added to the unet's skip connections and middle.

    A denoiser that caches steps is called with `caching` besides (torch alone): a full call answers a second
    array, which stays on its device, and a shallow one is handed that as `kept`. Beside that a controlnet,
    called so, answers residual_0 alone.

    One that can leave layers out is called `without` their numbers (torch alone).
    """

    notices: tuple[str, ...]
    """What the user should know about how it was loaded."""

    def __call__(self, **arrays: Any) -> tuple[np.ndarray, ...]: ...

    def close(self) -> None:
        """Free the weights. A closed session is not called again."""
        ...


class Meter(Protocol):
    """Measures the bytes held on a backend's device and keeps them under a limit."""

    def limit(self, count: int | None) -> None:
        """From now on, raise OutOfMemoryError instead of holding more than `count` bytes."""
        ...

    def reset(self) -> None: ...

    def bytes(self) -> int:
        """Peak bytes held since `reset`."""
        ...

    def held(self) -> int:
        """Bytes held now by what is loaded."""
        ...


class Backend(Protocol):
    """One engine on one device."""

    @property
    def meter(self) -> Meter: ...

    def load(self, component: Component, placement: Placement) -> Session:
        """Raises OutOfMemoryError if there is no room, and then leaves nothing behind."""
        ...

    def adapt(self, session: Session, component: Component, placement: Placement) -> bool:
        """Bring a loaded session of this component to what adapters change in it now, and read no more than
        that. False if it has to be loaded anew. OutOfMemoryError leaves it closed."""
        ...

    def keep(self, placements: Mapping[str, Placement]) -> None:
        """Free the host memory cached between requests for every component whose placement is not in
        `placements`. Its sessions are not called again."""
        ...

    def trim(self, peak_bytes: int) -> Iterable[str]:
        """Free memory until at most `peak_bytes`, the next plan's peak, are held. Returns the components
        whose sessions were closed for that; they must be loaded again."""
        ...


class Engine(Protocol):
    """What an engine knows about any machine, present or not."""

    @staticmethod
    def refuses(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> str | None:
        """Why the component cannot run with this placement on that hardware at that size, or None if it
        can."""
        ...

    @staticmethod
    def check(spec: ModelSpec, component: Component) -> None:
        """Raise TightfitError for a component that this engine cannot run on any machine."""
        ...

    @staticmethod
    def footprint(
        spec: ModelSpec,
        component: Component,
        placement: Placement,
        hardware: Hardware,
        extent: Extent,
    ) -> Footprint:
        """Memory of a component called at `extent`: batch, and the picture's height and width in pixels."""
        ...


class GraphEngine(Engine, Protocol):
    """An engine that runs ONNX graphs."""

    title: ClassVar[str]
    has_providers: ClassVar[bool]
    """Whether one of ONNX Runtime's execution providers runs the graph."""
    converts: ClassVar[bool]
    """Whether plain weights are made what they are computed in."""
    for_one_shape: ClassVar[bool]
    """Whether a graph is prepared for the shape of a call, and again for another."""

    @staticmethod
    def arithmetics(graph: Graph, hardware: Hardware) -> tuple[tuple[str, str], ...]:
        """The precision of the weights and of what is computed with them, the preferred pair first."""
        ...

    @staticmethod
    def preparing_seconds(graph: Graph) -> float:
        """Seconds that a graph takes, beyond reading it, until it can be called."""
        ...
