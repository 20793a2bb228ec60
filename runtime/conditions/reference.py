"""Reference pictures: the denoiser reads them beside its latents, and a text says what to make of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TightfitError
from ..fields import option
from ..models.families.family import REFERENCE
from ..models.families.networks import REFERENCE_ENCODER
from ..models.spec import Component, ModelSpec
from .condition import Arrays, Call, Condition, Steering
from .image import PANEL
from .input_pictures import Picture, open_picture

if TYPE_CHECKING:
    import numpy as np

    from ..request import Job

MOST = 8
OPTION = "reference"
_LEAST_SIDE = 64  # pixels: diffusers'


@dataclass(frozen=True)
class Options:
    """What asks for pictures to refer to. In Python one of them, or a list."""

    reference: list[str] | None = option(None, "Edit, refer to it.", "FILE", panel=PANEL, carried=True)  # noqa: RUF009


@dataclass(frozen=True)
class References(Condition):
    """Read `pictures` in all steps, which begin with noise: "the cat of the first, in the room of the
    second"."""

    pictures: tuple[Picture, ...]

    networks: ClassVar = (REFERENCE_ENCODER,)
    options: ClassVar = Options
    limited: ClassVar = (OPTION,)

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> References | None:
        several = given.get(OPTION)
        if not isinstance(several, list | tuple):
            several = () if several is None else (several,)
        return cls(tuple(map(open_picture, several))) if several else None

    def __post_init__(self) -> None:
        if len(self.pictures) > MOST:
            raise TightfitError(
                f"{len(self.pictures)} reference pictures are given, and a request has at most {MOST}: "
                "give fewer"
            )
        for picture in self.pictures:
            if min(picture.width, picture.height) < _LEAST_SIDE:
                raise TightfitError(
                    f"{picture.source} has {picture.width}x{picture.height} pixels, where a reference "
                    f"picture has {_LEAST_SIDE} a side or more: give a larger one"
                )

    def resolved(self, spec: ModelSpec) -> References:
        spec.check_takes(OPTION)
        return self

    def components(self, spec: ModelSpec) -> tuple[Component, ...]:
        return (spec.on_demand(REFERENCE_ENCODER),)

    def size(self, spec: ModelSpec) -> tuple[int, int] | None:
        return next(iter(self.references(spec)), None)

    def said(self) -> dict[str, Any]:
        return {OPTION: [""] * len(self.pictures)}

    def a1111(self) -> dict[str, Any]:
        return {"Reference pictures": len(self.pictures)}

    def encodings(self, name: str, job: Job) -> int:
        return super().encodings(name, job) * len(self.pictures)

    def references(self, spec: ModelSpec) -> tuple[tuple[int, int], ...]:
        return tuple(_cut(*_scaled(picture, spec), spec) for picture in self.pictures)

    def sides(self, job: Job) -> Mapping[str, tuple[int, int]]:
        """The largest one's, which takes the most memory."""
        return {REFERENCE_ENCODER.name: max(self.references(job.spec), key=math.prod)}

    def prepare(self, job: Job, call: Call) -> Steering:
        latents = [call(REFERENCE_ENCODER.name, pixels=pixels(one, job.spec))[0] for one in self.pictures]
        return Referring(latents)


def _scaled(picture: Picture, spec: ModelSpec) -> tuple[int, int]:
    """Height and width: the picture's, or in its proportions as many pixels as a reference has at most."""
    most, sides = spec.design.reference_pixels, (picture.height, picture.width)
    if math.prod(sides) <= most:
        return sides
    factor = math.sqrt(most / math.prod(sides))
    return int(sides[0] * factor), int(sides[1] * factor)


def _cut(height: int, width: int, spec: ModelSpec) -> tuple[int, int]:
    """The sides, as whole latents."""
    step = spec.latents.multiple
    return max(step, height // step * step), max(step, width // step * step)


def pixels(picture: Picture, spec: ModelSpec) -> np.ndarray:
    """(1, 3, height, width) in -1..1: scaled, then cut around its middle, as diffusers' Flux2ImageProcessor
    does."""
    import numpy as np

    height, width = _scaled(picture, spec)
    tall, wide = _cut(height, width, spec)
    left, top = (width - wide) // 2, (height - tall) // 2
    cut = picture.fitted(width, height).crop((left, top, left + wide, top + tall))
    return (2 * (np.asarray(cut, np.float32) / 255) - 1).transpose(2, 0, 1)[None]


class Referring(Steering):
    """Shows the denoiser the latents of pictures beside its own."""

    def __init__(self, latents: Sequence[np.ndarray]) -> None:
        self._latents = {f"{REFERENCE}{number}": one for number, one in enumerate(latents)}

    def inputs(self, arrays: Arrays, rows: range) -> Arrays:  # noqa: ARG002
        return {**arrays, **self._latents}


def check_carried(said: Sequence[str], given: Sequence[str], source: object) -> Iterator[str]:
    """What to say where fewer pictures are given than a picture was painted after. Raises TightfitError where
    none is."""
    if len(given) >= len(said):
        return
    count = "a reference picture" if len(said) == 1 else f"{len(said)} reference pictures"
    painted = f"{source} was painted after {count}"
    if not given:
        raise TightfitError(f"{painted} it does not carry: give each by --{OPTION}, in their order")
    yield f"{painted}, and {len(given)} {'is' if len(given) == 1 else 'are'} given"
