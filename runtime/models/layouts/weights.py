"""One file's tensors, whichever format it is in."""

from __future__ import annotations

from pathlib import Path

from ..tensors import Tensor
from . import bitsandbytes, gguf, safetensors

INDEX = ".safetensors.index.json"
"""How the file is called that says in which files one network's weights are."""
# As diffusers names the file in a denoiser's folder.
DENOISERS = tuple(
    f"diffusion_pytorch_model{ending}" for ending in (".safetensors", ".fp16.safetensors", INDEX)
)


def name_of(path: Path) -> str:
    """What a denoiser's file is called; where all names are diffusers', the folder of the whole model."""
    path = path.absolute()
    if path.is_file() and not path.name.startswith(DENOISERS[0].partition(".")[0]):
        return path.stem
    folder = path if path.is_dir() else path.parent
    return folder.parent.name if folder.name == "transformer" else folder.name


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What its header promises, or those of all files of an index, and what it says of it. Raises
    TightfitError."""
    if file.name.endswith(INDEX):
        return bitsandbytes.joined(safetensors.all_tensors(file)), {}
    if file.suffix.lower() == ".gguf":
        return gguf.read_file(file)
    tensors, said = safetensors.read_file(file)
    return bitsandbytes.joined(tensors), said
