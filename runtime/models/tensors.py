"""A tensor in a file: where it is, and how it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from ..files import WEIGHTS_BYTES, open_regular

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: its dtype in that format's spelling, its shape, and its bytes' place
    there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    stored_bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def read_into(self, buffer: Any) -> None:
        """Fill a writable buffer of `stored_bytes` bytes: read, not mapped, so that it is in memory once."""
        try:
            with open_regular(self.file, WEIGHTS_BYTES) as stream:
                stream.seek(self.offset)
                if stream.readinto(buffer) != self.stored_bytes:
                    raise TightfitError(
                        f"{self.file} was cut short while it was read: copy or download it again"
                    )
        except OSError as error:
            raise TightfitError(
                f"{self.file} cannot be read ({error.strerror}): copy or download it again"
            ) from None
