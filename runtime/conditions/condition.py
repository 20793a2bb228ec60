"""What a condition is: a part of a request, and what it does to the denoising."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..models.families.family import Network
from ..models.spec import Component, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..request import Job

Arrays = Mapping[str, "np.ndarray"]
Call = Callable[..., tuple["np.ndarray", ...]]
"""(name of a network, **arrays) → what its session answers."""


Draw = Callable[[Sequence[int]], "np.ndarray"]
"""(shape) → standard normal noise, the next of the picture's generator."""


@dataclass(frozen=True)
class Painted:
    """What a pass hands to the next: of each picture its latents, the generator of its noise, and, if they
    were decoded, the picture."""

    latents: Sequence[np.ndarray]
    generators: Sequence[Any]
    images: Sequence[Image.Image]


class Steering:
    """What a condition does to the denoising of a request's pictures, one after another. What is not
    overridden changes nothing."""

    def draw(self, draw: Draw) -> None:
        """Draw from a picture's noise, before its latents are drawn."""

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:  # noqa: ARG002
        """The latents to begin with, at call `call` of the scheduler, not `latents`: the noise, scaled as
        the scheduler wants it."""
        return latents

    def generator(self, own: Any) -> Any:
        """What draws the noise of the steps, instead of the picture's `own` generator. It is asked after
        `start`."""
        return own

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:  # noqa: ARG002
        """What the denoiser is called with, instead of `arrays`, which are of these `rows` of the job's
        branches. It is asked once for each call: twice a step where guidance takes two, and again after
        memory ran out."""
        return arrays

    def beside(self, arrays: Arrays, rows: range) -> Mapping[str, Any]:  # noqa: ARG002
        """Inputs of the denoiser beside `arrays` that other networks answer in the same call, which is of
        these `rows` of the branches, the unguided one first. Asked before `inputs`."""
        return {}

    def after(self, latents: np.ndarray, call: int) -> np.ndarray:  # noqa: ARG002
        """The latents after call `call` of the scheduler, counted from 0, instead of `latents`."""
        return latents

    def finish(self, image: Image.Image) -> Image.Image:
        """The picture, instead of `image`, which was decoded."""
        return image


class Condition:
    """One part of a request. Hashable: two that are equal ask the same."""

    networks: ClassVar[tuple[Network, ...]] = ()
    """All that a condition of this kind may call besides the family's."""
    options: ClassVar[type | None] = None
    """A dataclass of what is typed or sent to ask it, in the words of fields.py; None in Python alone."""
    limited: ClassVar[tuple[str, ...]] = ()
    """Of the options those by which it is asked, if not every family takes it; the first is how it is typed,
    and what a family's `takes` says."""

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Condition | None:
        """The condition that values of these options ask, None for none of them."""
        raise NotImplementedError

    def resolved(self, spec: ModelSpec) -> Condition:  # noqa: ARG002
        """What it is for this model, with everything decided."""
        return self

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:  # noqa: ARG002
        """Those that it calls with this model: they are costed and placed as the model's own are. The same
        objects for the same model. Raises TightfitError for a model that it cannot be asked of."""
        return ()

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:  # noqa: ARG002
        """Height and width in pixels that are taken where none are asked for; None leaves that open."""
        return None

    def said(self) -> dict[str, Any]:
        """Values of its options that a picture carries: all that are no pictures themselves."""
        return {}

    def a1111(self) -> dict[str, Any]:
        """What of it A1111 writes into a picture, by its names."""
        return {}

    def channels(self, spec: ModelSpec) -> int:  # noqa: ARG002
        """Of the denoiser's input, how many it fills beside the latents."""
        return 0

    def tokens(self, spec: ModelSpec) -> int:  # noqa: ARG002
        """How many it puts after the texts."""
        return 0

    def references(self, spec: ModelSpec) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        """Height and width in pixels of each picture that the denoiser reads beside its latents."""
        return ()

    def scales(self) -> tuple[float, ...]:
        """Of guidance by what it asks. Each takes a branch more: the unguided one, which lacks just that."""
        return ()

    def skipped(self, steps: int) -> int:  # noqa: ARG002
        """Of so many steps, how many are left out. Raises TightfitError where none would be left."""
        return 0

    def acting(self, name: str, calls: int) -> range | None:  # noqa: ARG002
        """Of so many calls of the denoiser, from 0, those in which it calls its network `name` beside; None
        for a network that is none of its own."""
        return None

    def varies(self, job: Job) -> bool:  # noqa: ARG002
        """Whether some calls of the denoiser have inputs that others of as many rows have not."""
        return False

    def encodings(self, name: str, job: Job) -> int:  # noqa: ARG002
        """How often it calls the encoder of that name: once, if it has it."""
        return sum(network.name == name for network in self.networks)

    def check(self, job: Job) -> None:
        """Raise TightfitError for a job that asks something else besides."""

    def sides(self, job: Job) -> Mapping[str, tuple[int, int]]:  # noqa: ARG002
        """Height and width of the pictures that its networks are called with, where these are not the
        job's."""
        return {}

    def after(self, painted: Painted) -> Condition:  # noqa: ARG002
        """The condition as a second pass asks it, which is handed what the first has painted."""
        return self

    def prepare(self, job: Job, call: Call) -> Steering:
        """Called once for a request, while texts are encoded. It may call encoders."""
        raise NotImplementedError


class Steerings(Steering):
    """Several, one after another; without any, what changes nothing."""

    def __init__(self, steerings: Sequence[Steering]) -> None:
        self._steerings = steerings

    def draw(self, draw: Draw) -> None:
        for steering in self._steerings:
            steering.draw(draw)

    def start(self, latents: np.ndarray, noise: np.ndarray, scheduler: Any, call: int) -> np.ndarray:
        for steering in self._steerings:
            latents = steering.start(latents, noise, scheduler, call)
        return latents

    def generator(self, own: Any) -> Any:
        for steering in self._steerings:
            own = steering.generator(own)
        return own

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:
        for steering in self._steerings:
            arrays = steering.inputs(arrays, rows)
        return arrays

    def beside(self, arrays: Arrays, rows: range) -> Mapping[str, Any]:
        return {name: value for each in self._steerings for name, value in each.beside(arrays, rows).items()}

    def after(self, latents: np.ndarray, call: int) -> np.ndarray:
        for steering in self._steerings:
            latents = steering.after(latents, call)
        return latents

    def finish(self, image: Image.Image) -> Image.Image:
        for steering in self._steerings:
            image = steering.finish(image)
        return image
