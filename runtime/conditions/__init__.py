"""What a request asks besides its text: pictures and the like, each with what it does to the denoising. A new
kind is one file beside this one and one line in CONDITIONS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..fields import described, kinds
from ..models.families.family import Network
from .condition import Arrays, Call, Condition, Draw, Painted, Steering, Steerings
from .controlnet import ControlNets
from .handed import EnlargedByNetwork
from .image_prompt import ImagePrompt
from .outpaint import Outpainting
from .reference import References

__all__ = [
    "CONDITIONS", "Arrays", "Call", "Condition", "Draw", "Painted", "Steering", "Steerings", "asked",
    "networks",
]  # fmt: skip

CONDITIONS: tuple[type[Condition], ...] = (
    Outpainting, References, ImagePrompt, ControlNets, EnlargedByNetwork,
)  # fmt: skip


def networks() -> dict[str, Network]:
    """Every network that a condition may add, by its name."""
    return {network.name: network for kind in CONDITIONS for network in kind.networks}


def options() -> tuple[str, ...]:
    """The names of what asks for conditions."""
    kinds = [kind.options for kind in CONDITIONS if kind.options]
    return tuple(field.name for options in kinds for field in dataclasses.fields(options))


def carried() -> dict[str, type]:
    """The options of conditions that a picture carries, and their types."""
    return {
        name: kinds(kind.options)[name]
        for kind in CONDITIONS
        if kind.options
        for name, about in described(kind.options).items()
        if about.carried
    }


def asked(given: Mapping[str, Any]) -> tuple[Condition, ...]:
    """The conditions that these values ask, by the names of the kinds' options. Raises TightfitError."""
    return tuple(condition for kind in CONDITIONS if kind.options and (condition := kind.asked(given)))
