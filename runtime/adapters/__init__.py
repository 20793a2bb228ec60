"""Parts of what a model is that come in files of their own. A new kind is one file beside this one and one
line in ADAPTERS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..models.spec import ModelSpec
from ..recent import Recent


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


_ADAPTED: Recent[ModelSpec] = Recent(16)


def adapted(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    """The model with all of them, in order: the same object for the same adapters, so that what was planned
    and loaded for it is found again. Networks that none of them changes stay the same objects."""
    return _ADAPTED.get(tuple(adapters), lambda: _applied(spec, adapters), spec) if adapters else spec


def _applied(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    for adapter in adapters:
        spec = adapter.apply(spec)
    return spec
