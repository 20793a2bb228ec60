"""Parts of what a model is that come in files of their own. A new kind is one file beside this one and one
line in ADAPTERS."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import TightfitError
from ..files import shortened
from ..models.spec import ModelSpec
from ..recent import Recent
from .header import keys_of, located
from .lora import Lora


class Adapter(Protocol):
    """One adapter and how strongly it acts. Hashable: two that are equal change a model in the same way."""

    @property
    def name(self) -> str:
        """As plans and pictures name it."""
        ...

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with it: some tensors patched, or replaced. No weight is read.

        Raises TightfitError for a model that it is not for.
        """
        ...


class Kind(Protocol):
    """A kind of file that adapters come in."""

    def claims(self, keys: Collection[str]) -> bool:
        """Whether a file whose tensors have these names is one."""
        ...

    def read(self, path: Path, weight: float, text_weight: float | None) -> Adapter: ...


ADAPTERS: tuple[Kind, ...] = (Lora,)
_WEIGHT = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)


def read_adapter(path: str | Path, weight: float = 1.0, text_weight: float | None = None) -> Adapter:
    """The adapter in a file, such as a LoRA, or in a folder as PEFT and diffusers write it.

    weight: how strongly it acts. text_weight: on text encoders, where that is to be another. Raises
    TightfitError for a file that is none.
    """
    file = located(Path(path))
    keys = keys_of(file)
    for kind in ADAPTERS:
        if kind.claims(keys):
            return kind.read(file, weight, text_weight)
    raise TightfitError(f"{file} is no LoRA or the like: a whole model is given by --model")


def written(text: str) -> Adapter:
    """The adapter that FILE[:weight[:text_weight]] says."""
    path, weights = text, []
    while len(weights) < 2 and not Path(path).exists() and (match := _WEIGHT.fullmatch(path)):
        path, weight = match.groups()
        try:
            weights.insert(0, float(weight))
        except ValueError:
            raise TightfitError(
                f"{shortened(weight)} in {shortened(text)} is no number: say FILE:0.8"
            ) from None
    return read_adapter(path, *weights)


_ADAPTED: Recent[ModelSpec] = Recent(16)


def adapted(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    """The model with all of them, in order: the same object for the same adapters, so that what was planned
    and loaded for it is found again. Networks that none of them changes stay the same objects."""
    return _ADAPTED.get(tuple(adapters), lambda: _applied(spec, adapters), spec) if adapters else spec


def _applied(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    for adapter in adapters:
        spec = adapter.apply(spec)
    return spec
