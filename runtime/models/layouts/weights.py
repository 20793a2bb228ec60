"""One file's tensors, whichever format it is in."""

from __future__ import annotations

from pathlib import Path

from ..tensors import Tensor
from . import bitsandbytes, gguf, safetensors


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What its header promises, and what it says of it. Raises TightfitError."""
    if file.suffix.lower() == ".gguf":
        return gguf.read_file(file)
    tensors, said = safetensors.read_file(file)
    return bitsandbytes.joined(tensors), said
