"""Textual inversion: words that a text encoder learns, each as one or several vectors in its embedding.

The formats are those of diffusers (one tensor, named as the word), of A1111 (`emb_params`) and of SDXL
trainers (`clip_l`, `clip_g`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ..errors import TightfitError
from ..files import shortened
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from .header import contents, exists, located, stamp

_MOST_VECTORS = 75  # as many as one text has room for
# As diffusers' trainer calls it in the folder that it writes.
IN_FOLDERS = ("learned_embeds.safetensors",)
_FLOATS = ("F32", "F16", "BF16")
_NAMES = ("emb_params", "clip_l", "clip_g")


@dataclass(frozen=True)
class TextualInversion:
    """The word `token`, whose vectors are `tensors`: one for each text encoder, in their order."""

    option: ClassVar = "embedding"

    file: Path
    token: str
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return f"{self.file}:{self.token}"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model whose text encoders know the word. Raises TightfitError if one of them has embeddings of
        another width."""
        encoders = spec.text_encoders
        widths = [encoder.setting("hidden_size") for encoder in encoders]
        trained = [tensor.shape[-1] for tensor in self.tensors]
        if trained != widths:
            raise TightfitError(
                f"{self.file} has vectors {_listed(trained)} wide, the text encoders of {spec.name} "
                f"read {_listed(widths)}: it was made for another family of models"
            )
        taught = {
            encoder.name: self._taught(encoder, tensor)
            for encoder, tensor in zip(encoders, self.tensors, strict=True)
        }
        return replace(spec, components={**spec.components, **taught})

    def _taught(self, encoder: Component, tensor: Tensor) -> Component:
        if not encoder.tensors:
            raise TightfitError(
                f"{encoder.folder} is there as ONNX alone, which learns no words: "
                "use the model from which it was exported"
            )
        if self.token in encoder.words:
            raise TightfitError(
                f"the word {self.token} comes twice, the second time from {self.file}: "
                "rename one, as in FILE:other"
            )
        vectors = replace(tensor, shape=(tensor.count // tensor.shape[-1], tensor.shape[-1]))
        return replace(encoder, words={**encoder.words, self.token: vectors})


def read(file: Path, token: str = "") -> TextualInversion:
    """The embedding in a safetensors file, for `token`, else for the word that the file names, else for the
    file's own name. Raises TightfitError if it holds none."""
    stored, _ = contents(file, stamp(file))
    names = [name for name in _NAMES if name in stored] or [*stored][:1]
    if not claims(stored):
        raise TightfitError(
            f"{file} is no embedding (it holds {shortened(next(iter(stored), 'nothing'))}): "
            "name a file of textual inversion"
        )
    tensors = tuple(stored[name] for name in names)
    for tensor in tensors:
        if tensor.dtype not in _FLOATS or not 0 < _count(tensor) <= _MOST_VECTORS:
            raise TightfitError(
                f"{file} has an embedding of shape {list(tensor.shape)} in {tensor.dtype}, "
                f"which cannot be: a word has 1 to {_MOST_VECTORS} vectors; copy or download it again"
            )
    word = token or (names[0] if names[0] not in _NAMES else file.stem)
    if not re.fullmatch(r"\S{1,100}", word):
        raise TightfitError(f"{file} teaches the word {word!r}, which has spaces: name another, FILE:word")
    return TextualInversion(file, word, tensors)


def written(text: str) -> TextualInversion:
    """The word that FILE[:word] says."""
    path, _, word = text.rpartition(":")
    if exists(text) or not path:
        return read(located(text, IN_FOLDERS))
    return read(located(path, IN_FOLDERS), word)


def claims(stored: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are vectors of words."""
    if any(name in stored for name in _NAMES):
        return True
    # diffusers names it as the word; a weight of a network has dots in its name
    return len(stored) == 1 and all(
        len(tensor.shape) in (1, 2) and tensor.count and "." not in name for name, tensor in stored.items()
    )


def _count(tensor: Tensor) -> int:
    """Vectors in a tensor whose last side is their width."""
    return tensor.count // tensor.shape[-1] if tensor.shape and tensor.count else 0


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
