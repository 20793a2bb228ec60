"""A tensor in a file: where it is, how it is read, and what adapters change in it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from ..files import WEIGHTS_BYTES, open_regular

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


class Patch:
    """A change to the values of one stored tensor, by an adapter or to decode them. Hashable."""

    tensors: tuple[Tensor, ...]
    """The tensors of the adapter's file that it is computed from."""

    @property
    def decodes(self) -> bool:
        """Whether the tensor's values are meaningless without it, so that it stays where no adapter may."""
        return False

    @property
    def flops(self) -> int:
        """Operations for each value of the tensor that it changes."""
        return 2

    @property
    def low_rank(self) -> bool:
        """Whether it adds its `scale` times the product of its two tensors and does nothing else."""
        return False

    @property
    def whole(self) -> bool:
        """Whether `tensors` has the tensor itself, as all of it is needed before a row is changed."""
        return False

    def fits(self, shape: Sequence[int]) -> bool:  # noqa: ARG002
        """Whether it is for a tensor of that shape."""
        return True

    def prepared(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `apply` takes for all rows, made of the values of `tensors`, fp32."""
        return parts

    def apply(self, rows: Any, start: int, parts: tuple[Any, ...]) -> None:
        """Change `rows` in place: the tensor's values from row `start` on, fp32, of its shape but for the
        first side. It may allocate as much as `rows` takes."""
        raise NotImplementedError


class Encoding:
    """How the values of a tensor lie in its bytes, where these are no plain numbers: in blocks of `values`,
    row after row. Hashable. Arrays are torch's."""

    values: int
    """Of one block; at most 65,536, a power of two. All blocks of a tensor take equally many bytes."""
    tensors: tuple[Tensor, ...] = ()
    """What is stored beside the tensor to decode it, such as scales."""
    form: str = ""
    """In kernels/formats.py: what a layer can keep just these values in, none rounded; "" for none."""

    def begun(self, values: int) -> Encoding:  # noqa: ARG002
        """That of a tensor which begins so many values later, and ends with what was before these. Raises
        ValueError where no block begins there."""
        return self

    def prepared(self, parts: tuple[Any, ...]) -> Any:
        """What `decode` and `packed` take for all blocks, made of `tensors` as they are stored."""
        return parts

    def decode(self, raw: Any, first: int, parts: Any) -> Any:
        """Bytes of whole blocks (uint8), of which `first` is the number of the first → their values, fp32."""
        raise NotImplementedError

    def packing_bytes(self, shape: Sequence[int]) -> int:
        """What `packed` takes at once beside the parts that it makes."""
        return 3 * math.prod(shape)

    def packed(self, raw: Any, shape: Sequence[int], parts: Any) -> Mapping[str, Any]:
        """All bytes of a weight of `shape` → the parts that `form` has of it. Asked for where each of its
        rows is whole blocks, or groups of `form`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file: its dtype, in the spelling of safetensors or of what else the file is, its shape,
    and its bytes' place there.

    transposed: the file has the transpose of these two sides. patches: applied to its values in order,
    whenever they are read. written_ns: when the file was last written, as its header was read; 0 is unknown.
    encoding: how its bytes become values, if they are no plain numbers. turned_bytes: so many of the bytes
    that the file begins it with are its last.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    stored_bytes: int
    transposed: bool = False
    patches: tuple[Patch, ...] = ()
    written_ns: int = 0
    encoding: Encoding | None = None
    turned_bytes: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def as_stored(self) -> bool:
        """Whether its values are the file's bytes in order."""
        return not (self.transposed or self.patches or self.encoding)

    @property
    def form(self) -> str:
        """In kernels/formats.py: what a layer can keep its values in as they are stored; "" for none."""
        decodes = any(patch.decodes for patch in self.patches)
        return self.encoding.form if self.encoding and not (self.transposed or decodes) else ""

    def floats(self, start: int, count: int) -> Any:
        """Some values in fp32, as numpy has them, of which alone the bytes are read. Raises TightfitError for
        values that are no plain numbers."""
        import torch

        kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        kinds |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
        if not self.as_stored or self.turned_bytes or self.dtype not in kinds:
            raise TightfitError(
                f"{self.file} has a table as {self.dtype}, which is read from floats alone: "
                "take another copy of it"
            )
        size = STORED_BYTES[self.dtype]
        raw, offset = bytearray(count * size), self.offset + start * size
        replace(self, offset=offset, shape=(count,), stored_bytes=len(raw)).read_into(raw)
        return torch.frombuffer(raw, dtype=kinds[self.dtype]).float().numpy()

    def read_into(self, buffer: Any) -> None:
        """Fill a writable buffer of `stored_bytes` bytes: read, not mapped, so that it is in memory once."""
        try:
            with open_regular(self.file, WEIGHTS_BYTES) as stream:
                if self.written_ns not in (0, os.fstat(stream.fileno()).st_mtime_ns):
                    raise TightfitError(f"{self.file} was written again since it was opened: load it anew")
                first, whole = self.stored_bytes - self.turned_bytes, memoryview(buffer).cast("B")
                stream.seek(self.offset + self.turned_bytes)
                read = stream.readinto(whole[:first])
                if self.turned_bytes:
                    stream.seek(self.offset)
                    read += stream.readinto(whole[first:])
                if read != self.stored_bytes:
                    raise TightfitError(
                        f"{self.file} was cut short while it was read: copy or download it again"
                    )
        except OSError as error:
            raise TightfitError(
                f"{self.file} cannot be read ({error.strerror}): copy or download it again"
            ) from None
