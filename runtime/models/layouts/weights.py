"""One file's tensors, whichever format it is in."""

from __future__ import annotations

from pathlib import Path

from ..tensors import Tensor
from . import gguf, safetensors


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What its header promises, and what it says of it. Raises TightfitError."""
    return (gguf if file.suffix.lower() == ".gguf" else safetensors).read_file(file)
