"""Write a safetensors file tensor by tensor, so that only one is in memory. The format is in the safetensors
README."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.bool: "BOOL",
}  # fmt: skip


Promised = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Of tensors that are yet to be written, by their names: dtypes and shapes."""


def first_side(shape: Sequence[int]) -> int:
    """Which side of a tensor its rows are counted along: the first that is not 1."""
    return next((number for number, side in enumerate(shape) if side > 1), 0)


class SafetensorsFile:
    """A file whose tensors are promised first, and then written one by one in that order."""

    def __init__(self, path: Path, promised: Promised) -> None:
        self._left, end = dict(promised), 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in promised.items():
            count = dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + count]}
            end += count
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._stream = path.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, which must be the one that was promised; or its first rows, after which a hole
        is left, that reads as zeros and takes no disk."""
        promised, (dtype, shape) = next(iter(self._left.items()), ("nothing", (None, ())))
        given, first = tuple(tensor.shape), first_side(shape)
        like = (*shape[:first], *given[first : first + 1], *shape[first + 1 :])
        fits = len(given) == len(shape) and given == like and tensor.numel() <= math.prod(shape)
        if (promised, dtype) != (name, tensor.dtype) or not fits:
            raise ValueError(
                f"{name} {tensor.dtype} {given} comes where {promised} {dtype} {shape} was promised"
            )
        del self._left[name]
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._stream.seek(tensor.dtype.itemsize * (math.prod(shape) - tensor.numel()), os.SEEK_CUR)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stream.truncate()  # as long as it is with a hole at its end
        self._stream.close()
        if kind is None and self._left:
            raise ValueError(
                f"{len(self._left)} promised tensors were not written, such as {next(iter(self._left))}"
            )
