"""A model as `tightfit export` would write it, so that it is planned before that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...kernels.recipe import recipe
from ..models.spec import Component, ModelSpec
from ..models.tensors import STORED_BYTES, Tensor
from ..recent import Recent

_EXPORTED: Recent[ModelSpec] = Recent(4)
_SIDES = 2, 4  # of weights that are quantised
_FLOATS = "BF16", "F16", "F32", "F64"


def may_export(spec: ModelSpec) -> bool:
    """Whether it can be written in 8 or 4 bits: weights that are there, and in neither."""
    return not spec.precision and all(component.tensors for component in spec.components.values())


def exported(spec: ModelSpec, precision: str) -> ModelSpec:
    """The model in int8 or int4, by the recipe. Its tensors have no bytes: it can be planned alone."""

    def made() -> ModelSpec:
        components = {name: _exported(component, precision) for name, component in spec.components.items()}
        return replace(spec, components=components, precision=precision)

    return _EXPORTED.get(precision, made, spec)


def _exported(component: Component, precision: str) -> Component:
    formats = {
        layer: form
        for name, tensor in component.tensors.items()
        if (layer := name.removesuffix(".weight")) != name
        and _is_float(tensor)
        and len(tensor.shape) in _SIDES
        if (form := recipe(precision, layer, tensor.shape, component.network.least_bits))
    }
    tensors = dict(_tensors(component.tensors, formats))
    return replace(component, tensors=tensors, formats=formats, graph=None)


def _tensors(tensors: Mapping[str, Tensor], formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    from ...kernels.formats import FORMATS

    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in formats:
            for part, (dtype, shape) in FORMATS[formats[layer]].parts(tensor.shape).items():
                yield f"{layer}.{part}", _stored(tensor, _NAMES[str(dtype)], shape)
        elif _is_float(tensor):
            yield name, _stored(tensor, "BF16" if tensor.dtype == "BF16" else "F16", tensor.shape)


_NAMES = {"torch.int8": "I8", "torch.uint8": "U8", "torch.float16": "F16", "torch.float32": "F32"}


def _stored(tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(dtype, shape, tensor.file, 0, math.prod(shape) * STORED_BYTES[dtype])


def _is_float(tensor: Tensor) -> bool:
    return bool(tensor.encoding) or tensor.dtype in _FLOATS
