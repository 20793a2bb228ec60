"""Clip skip: text encoders whose last layers are left out, so that a plan has fewer bytes."""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import TightfitError
from ..recent import Recent
from .families.family import Role
from .spec import Component, ModelSpec

_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
_SKIPPED: Recent[ModelSpec] = Recent(16)


def skipping(spec: ModelSpec, count: int) -> ModelSpec:
    """The model whose texts are read `count` layers from the end, 1 being the last, as A1111 counts; the same
    object for the same count. Raises TightfitError for more than there are."""
    return spec if count == 1 else _SKIPPED.get(count, lambda: _skipped(spec, count), spec)


def _skipped(spec: ModelSpec, count: int) -> ModelSpec:
    changed = {encoder.name: encoder.network.skip(encoder, count) for encoder in spec.of_role(Role.TEXT)}
    return replace(spec, components={**spec.components, **changed})


def without_layers(encoder: Component, count: int) -> Component:
    """A text encoder without its last `count` layers."""
    if not count:
        return encoder
    kept = check(encoder, count) - count

    def stays(name: str) -> bool:
        match = _LAYER.match(name)
        return not match or int(match[1]) < kept

    return replace(
        encoder,
        config={**encoder.config, "num_hidden_layers": kept},
        tensors={name: tensor for name, tensor in encoder.tensors.items() if stays(name)},
        formats=encoder.formats and {k: form for k, form in encoder.formats.items() if stays(f"{k}.")},
        graph=None,
    )


def check(encoder: Component, count: int) -> int:
    """How many layers a text encoder has. Raises TightfitError where `count` cannot be left out."""
    if not encoder.tensors:
        raise TightfitError(
            f"the {encoder.name} is here as ONNX alone, whose layers are fixed: leave out --clip-skip, "
            "or use the model that it was exported from"
        )
    layers = encoder.setting("num_hidden_layers")
    if count >= layers:
        raise TightfitError(
            f"clip skip leaves none of the {layers} layers of the {encoder.name}: take a smaller one"
        )
    return layers
