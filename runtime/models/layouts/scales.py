"""Weights that are stored with a scale beside them, as fp8 checkpoints have: a weight is its values times
that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import TightfitError
from ..tensors import Patch, Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types in which numbers of scales and adapters are stored."""
_ENDS = (".scale_weight", ".weight_scale")  # ComfyUI's first and second spelling
# What answers are rounded by where layers compute in fp8, and what says in which format a weight is.
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True)
class Scale(Patch):
    """A weight's values times one number."""

    tensors: tuple[Tensor, ...]

    @property
    def decodes(self) -> bool:
        return True

    def apply(self, rows: Any, start: int, parts: tuple[Any, ...]) -> None:  # noqa: ARG002
        rows *= parts[0].item()


def scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the scales, which become a patch of those that they are of."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_ENDS, *_UNUSED))}
    for name in (name for name in tensors if name.endswith(_ENDS)):
        scale, weight = tensors[name], f"{name.rpartition('.')[0]}.weight"
        if scale.count != 1 or scale.dtype not in FLOATS:
            raise TightfitError(
                f"{scale.file} has {scale.count} scales of type {scale.dtype} in {name}, where one "
                "floating-point number is read: take the fp16 or bf16 model"
            )
        if weight in plain:
            plain[weight] = replace(plain[weight], patches=(Scale((scale,)),))
    return plain
