"""How a model lies in its files. The first layout that claims a path reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..families.family import Network
from ..spec import Component
from ..tensors import Tensor


class Source(Protocol):
    """What a layout found. No weight is read; which networks there are, the family says."""

    @property
    def folder(self) -> Path: ...

    @property
    def pipeline(self) -> str:
        """The class of diffusers that the model names."""
        ...

    @property
    def listed(self) -> Mapping[str, Any]:
        """What is said of each part that is there, by the name of its folder."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """tightfit.json, empty without one."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the model says besides its parts, as model_index.json has it."""
        ...

    def config(self, network: Network) -> Mapping[str, Any]:
        """A network's config as it is stored, empty where there is none that can be read."""
        ...

    def component(self, network: Network) -> Component:
        """The network with its tensors. Raises TightfitError for what is missing or broken."""
        ...

    def whole(self, network: Network) -> Mapping[str, Tensor]:
        """All that is stored with the network's tensors, also what is not run: of a decoder the encoder."""
        ...

    def scheduler(self) -> Mapping[str, Any]: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the files leave open, and what was taken for it: a line each."""
        ...

    @property
    def sides(self) -> Mapping[str, int]:
        """Of latents, by what the denoiser predicts, where the files leave that open."""
        ...


class Layout(Protocol):
    def claims(self, path: Path) -> bool: ...

    def read(self, path: Path) -> Source:
        """Raises TightfitError that says what the path is instead of a model, or what it lacks."""
        ...
