"""Write a safetensors file tensor by tensor, so that only one is in memory. The format is in the safetensors
README."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.bool: "BOOL",
}  # fmt: skip


class SafetensorsFile:
    """A file whose tensors are promised first, by dtype and shape, and then written one by one in that
    order."""

    def __init__(self, path: Path, promised: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
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
        """The next tensor, which must be the one that was promised."""
        promised = next(iter(self._left.items()), None)
        if promised != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(
                f"{name} {tensor.dtype} {tuple(tensor.shape)} comes where {promised} was promised"
            )
        del self._left[name]
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stream.close()
        if kind is None and self._left:
            raise ValueError(
                f"{len(self._left)} promised tensors were not written, such as {next(iter(self._left))}"
            )
