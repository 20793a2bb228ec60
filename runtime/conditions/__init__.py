"""What a request asks besides its text: pictures and the like, each with what it does to the denoising. A new
kind is one file beside this one and one line in CONDITIONS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..models.families.family import Network
from ..models.spec import Component, ModelSpec

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job

Arrays = Mapping[str, "np.ndarray"]
Call = Callable[..., tuple["np.ndarray", ...]]
"""(name of a network, **arrays) → what its session answers."""


class Steering:
    """What a condition does to one picture's denoising. What is not overridden changes nothing."""

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any) -> np.ndarray:  # noqa: ARG002
        """The latents to begin with, instead of `latents`: the noise, scaled as the scheduler wants it."""
        return latents

    def inputs(self, arrays: Arrays) -> Arrays:
        """What the denoiser is called with, instead of `arrays`. It is asked once for each call: twice a step
        where guidance takes two, and again after memory ran out."""
        return arrays

    def after(self, latents: np.ndarray, step: int) -> np.ndarray:  # noqa: ARG002
        """The latents after step `step`, counted from 1, instead of `latents`."""
        return latents


class Condition(Protocol):
    """One part of a request. Hashable: two that are equal ask the same."""

    networks: tuple[Network, ...]
    """All that a condition of this kind may call besides the family's; of the class."""

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        """Those that it calls with this model: they are costed and placed as the model's own are. The same
        objects for the same model. Raises TightfitError for a model that it cannot be asked of."""
        ...

    def prepare(self, job: Job, call: Call) -> Steering:
        """Called once for a request, while texts are encoded. It may call encoders."""
        ...


CONDITIONS: tuple[type[Condition], ...] = ()


def networks() -> dict[str, Network]:
    """Every network that a condition may add, by its name."""
    return {network.name: network for kind in CONDITIONS for network in kind.networks}


class Steerings(Steering):
    """Several, one after another; without any, what changes nothing."""

    def __init__(self, steerings: Sequence[Steering]) -> None:
        self._steerings = steerings

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any) -> np.ndarray:
        for steering in self._steerings:
            latents = steering.start(latents, noise, scheduler)
        return latents

    def inputs(self, arrays: Arrays) -> Arrays:
        for steering in self._steerings:
            arrays = steering.inputs(arrays)
        return arrays

    def after(self, latents: np.ndarray, step: int) -> np.ndarray:
        for steering in self._steerings:
            latents = steering.after(latents, step)
        return latents
