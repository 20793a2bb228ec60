"""Networks that bitsandbytes quantised: its codes and what lies beside them, as one tensor each.

In 4 bits `X.weight` has two codes in a byte, the first in the high bits, whatever the shape; blocks of values
go through the weight in torch's order. `X.weight.absmax` has a scale for each block, as fp32, or as codes of
a second quantisation, whose blocks have their scales in `X.weight.nested_absmax` and whose values are in
`X.weight.nested_quant_map`. `X.weight.quant_state.bitsandbytes__nf4` (or fp4) is JSON: the shape, the sizes
of blocks, and what is added to the scales. In 8 bits `X.SCB` has 127 times the scale of each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import WEIGHTS_BYTES, open_regular, parsed, read_json, shortened
from ..checks import check_fields, is_count, is_number, many, or_none, whole
from ..tensors import Encoding, Tensor
from .safetensors import all_tensors

# FP4's values: twelfths, the smallest a sixteenth of one; then the same below zero.
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(value / 12 for value in _TWELFTHS), *((0.0 - value) / 12 for value in _TWELFTHS))
_A_127TH = 7.874015718698502e-3
_STATE, _STATE_BYTES = ".quant_state.bitsandbytes__", 4096
_AGAIN = "copy or download the model again"
_FLOATS = ("F32", "F16", "BF16")
_KEPT = ("nf4", 64)  # what kernels/formats.py has a format for


def _is_size(value: Any) -> bool:
    return whole(32, 65_536)(value) and value & (value - 1) == 0


_STATE_FIELDS = {
    "quant_type": lambda value: value in ("nf4", "fp4"),
    "blocksize": _is_size,
    "shape": many(is_count, 4),
    "nested_blocksize": or_none(_is_size),
    "nested_offset": or_none(is_number),
}


@dataclass(frozen=True, kw_only=True)
class Blocks(Encoding):
    """4-bit codes, of which `size` in a row share a scale; `nested_size` scales share one if they are codes
    themselves, and `offset` is then added to them. `first`: the scale that is stored as that is its own."""

    kind: str
    values: int
    tensors: tuple[Tensor, ...]
    size: int
    form: str
    nested_size: int = 0
    offset: float = 0.0
    first: int = 0

    def begun(self, values: int) -> Blocks:
        return replace(self, first=self.first + _whole(values, self.size))

    def prepared(self, parts: tuple[Any, ...]) -> Any:
        """The scales, fp32."""
        absmax, *nested = (part.flatten() for part in parts)
        if not nested:
            return absmax.float().roll(-self.first)
        largest, table = (part.float() for part in nested)
        scales = table[absmax.int()]
        scales *= largest.repeat_interleave(self.nested_size)[: len(scales)]
        return scales.add_(self.offset).roll(-self.first)

    def decode(self, raw: Any, first: int, parts: Any) -> Any:
        from ....kernels.formats import NF4

        table = parts.new_tensor(NF4 if self.kind == "nf4" else FP4)
        values = parts.new_empty(len(raw), 2 * raw.shape[1])
        values[:, ::2] = table[(raw >> 4).int()]
        values[:, 1::2] = table[(raw & 15).int()]
        return values.mul_(_scales_of(parts, self.size // self.values, first, len(raw))[:, None])

    def packed(self, raw: Any, shape: Sequence[int], parts: Any) -> Mapping[str, Any]:
        """In our order a byte has a code of a row's first half in its low bits, and one of its second half
        in its high ones."""
        low, high = raw.view(shape[0], -1).chunk(2, 1)
        packed = raw.new_empty(shape[0], shape[1] // 2)
        packed[:, ::2] = low >> 4 | high & 0xF0
        packed[:, 1::2] = low & 15 | high << 4
        scales = parts[: math.prod(shape) // self.size]
        return {"packed": packed, "scale": scales.view(shape[0], -1)}


@dataclass(frozen=True, kw_only=True)
class Rows(Encoding):
    """int8 codes, of which a row of `size` shares a scale. `first`: as of Blocks."""

    values: int
    tensors: tuple[Tensor, ...]
    size: int
    form: str = "int8-wide"
    first: int = 0

    def begun(self, values: int) -> Rows:
        return replace(self, first=self.first + _whole(values, self.size))

    def prepared(self, parts: tuple[Any, ...]) -> Any:
        """127 times the scales, fp32."""
        return parts[0].float().flatten().roll(-self.first)

    def decode(self, raw: Any, first: int, parts: Any) -> Any:
        import torch

        values = raw.view(torch.int8).float()
        values *= _scales_of(parts, self.size // self.values, first, len(raw))[:, None]
        return values.mul_(_A_127TH)

    def packed(self, raw: Any, shape: Sequence[int], parts: Any) -> Mapping[str, Any]:
        import torch

        scales = parts[: shape[0], None]
        return {"packed": raw.view(torch.int8).view(*shape).clone(), "scale": scales * _A_127TH}


def _whole(values: int, size: int) -> int:
    """How many of such a size these are. Raises ValueError for parts of one."""
    if values % size:
        raise ValueError(values)
    return values // size


def _scales_of(scales: Any, blocks: int, first: int, count: int) -> Any:
    """The scale of each of `count` blocks from `first` on, of which `blocks` share one."""
    begin = first // blocks
    some = scales[begin : -(-(first + count) // blocks)].repeat_interleave(blocks)
    return some[first - begin * blocks :][:count]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What the safetensors files of one component's folder hold, by the names that plain models have. Raises
    TightfitError for what does not fit together, or if something else than bitsandbytes quantised it."""
    stored = all_tensors(folder)
    return joined(stored) if _is_quantised(folder / "config.json") else stored


def joined(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one network or several, each weight with what lies beside it, by the names that plain
    models have. Raises TightfitError for what does not fit together."""
    orders = _contents(stored, ".weight_format")
    for name, state in _states(stored).items():
        del stored[name]
        weight, _, kind = name.partition(_STATE)
        stored[weight] = _in_blocks(stored, weight, kind, state)
    for layer in [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]:
        order = orders.get(f"{layer}.weight_format", b"\0")
        stored[f"{layer}.weight"] = _in_rows(stored, layer, order)
    return stored


def _is_quantised(file: Path) -> bool:
    """Whether a component's config.json says that bitsandbytes quantised it."""
    how = read_json(file).get("quantization_config")
    if how is None:
        return False
    said = how if isinstance(how, dict) else {"quant_method": how}
    of_old = "bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else None
    if (method := said.get("quant_method", of_old)) != "bitsandbytes":
        raise TightfitError(
            f"{file} says that the weights are quantised by {shortened(method)}, which is not read: "
            "use the original model; --precision int4 makes it as small"
        )
    return True


def _states(stored: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What is said of each weight in 4 bits, by the name of the tensor that says it."""
    states = {}
    for name, raw in _contents(stored, _STATE).items():
        try:
            state = parsed(raw)
        except ValueError as error:
            raise _broken(stored[name], f"{name}, which is no JSON ({error})") from None
        if not isinstance(state, dict) or not state.keys() >= {"quant_type", "blocksize", "shape"}:
            raise _broken(stored[name], f"{name} without a quant_type, a blocksize or a shape")
        check_fields(stored[name].file, state, _STATE_FIELDS)
        states[name] = state
    return states


def _contents(stored: Mapping[str, Tensor], part: str) -> dict[str, bytes]:
    """What the small tensors hold in whose names `part` is. A file is opened once for all of them."""
    contents = {}
    small = {name: tensor for name, tensor in stored.items() if part in name}
    for file in dict.fromkeys(tensor.file for tensor in small.values()):
        with open_regular(file, WEIGHTS_BYTES) as stream:
            for name, tensor in small.items():
                if tensor.stored_bytes > _STATE_BYTES:
                    raise _broken(tensor, f"{name} of {tensor.stored_bytes} bytes")
                if tensor.file == file:
                    stream.seek(tensor.offset)
                    contents[name] = stream.read(tensor.stored_bytes)
    return contents


def _in_blocks(stored: dict[str, Tensor], name: str, kind: str, state: Mapping[str, Any]) -> Tensor:
    """The weight `name`, with what is beside it taken out of `stored`."""
    shape, size = tuple(state["shape"]), state["blocksize"]
    count, nested = math.prod(shape), f"{name}.nested_absmax" in stored
    blocks = -(-count // size)
    weight = _taken(stored, name)
    if state["quant_type"] != kind or weight.stored_bytes != -(-count // 2):
        raise _broken(weight, f"{name} of {weight.stored_bytes} bytes, said to be {list(shape)} in {kind}")
    stored.pop(f"{name}.quant_map", None)  # the kind says it
    beside = [_taken(stored, f"{name}.absmax", ("U8",) if nested else _FLOATS, blocks)]
    if nested:
        outer = state.get("nested_blocksize") or 0
        beside.append(_taken(stored, f"{name}.nested_absmax", _FLOATS, -(-blocks // outer) if outer else 0))
        beside.append(_taken(stored, f"{name}.nested_quant_map", _FLOATS, 256))
    encoding = Blocks(
        kind=kind,
        form="nf4-b64" if (kind, size) == _KEPT and len(shape) == 2 and shape[1] % size == 0 else "",
        values=max(2, min(size, count & -count)),  # as many in each, where the last block is not whole
        size=size,
        tensors=tuple(beside),
        nested_size=state.get("nested_blocksize") or 0,
        offset=state.get("nested_offset") or 0.0,
    )
    return replace(weight, dtype=kind.upper(), shape=shape, encoding=encoding)


def _in_rows(stored: dict[str, Tensor], layer: str, order: bytes) -> Tensor:
    """The int8 weight of `layer`, with what is beside it taken out of `stored`."""
    stored.pop(f"{layer}.weight_format", None)
    weight = _taken(stored, f"{layer}.weight", ("I8",))
    scales = _taken(stored, f"{layer}.SCB", _FLOATS, weight.shape[0] if weight.shape else 1)
    if len(weight.shape) != 2 or not weight.count or any(order):
        raise _broken(weight, f"{layer}.weight of shape {list(weight.shape)} in the order {order.hex()}")
    row = weight.shape[1]
    return replace(
        weight, dtype="LLM.int8", encoding=Rows(values=min(65_536, row & -row), size=row, tensors=(scales,))
    )


def _taken(
    stored: dict[str, Tensor], name: str, dtypes: Sequence[str] = (), count: int | None = None
) -> Tensor:
    """The tensor `name`, no longer in `stored`. Raises TightfitError if it is missing, of other types, or of
    another number of values."""
    if (tensor := stored.pop(name, None)) is None:
        some = next(iter(stored.values()), None)
        where = some.file if some else "the model"
        raise TightfitError(f"{where} lacks {name}, without which a weight cannot be decoded: {_AGAIN}")
    if (dtypes and tensor.dtype not in dtypes) or count not in (None, tensor.count):
        right = f"{count} values of {' or '.join(dtypes)}"
        raise _broken(tensor, f"{name} as {tensor.count} of {tensor.dtype}, in place of {right}")
    return tensor


def _broken(tensor: Tensor, what: str) -> TightfitError:
    return TightfitError(f"{tensor.file} has {what}: {_AGAIN}")
