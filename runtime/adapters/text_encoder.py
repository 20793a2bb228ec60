"""Another text encoder in place of the model's own, or where its file has none: a language model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ..errors import TightfitError
from ..models.families.networks import check_config
from ..models.layouts import split_file
from ..models.spec import Component, ModelSpec
from .header import OfFile, contents, located, stamp

IN_FOLDERS = ("model.safetensors",)  # as transformers names a file that is not in parts


@dataclass(frozen=True)
class TextEncoder(OfFile):
    """The text encoder in a file."""

    option: ClassVar = "text_encoder"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with it. Raises TightfitError for another kind than the model's, and where there is no
        tokenizer."""
        own = spec.text_encoders[0]
        if own.network.reading is None or own.patches:
            what = "reads texts by CLIP" if own.network.reading is None else "has a LoRA in its text encoder"
            raise TightfitError(f"{self.path} is a language model, and {spec.name} {what}: leave it out")
        if own.formats is not None:
            raise TightfitError(
                f"{self.path} cannot replace the text encoder of {spec.name}, which is stored in "
                f"{spec.precision}: name {spec.source or 'the model'}, from which that was made, by --model"
            )
        config, tensors = split_file.text_encoder(contents(self.path, self.written)[0])
        if not config:
            raise TightfitError(f"{self.path} holds no Qwen3: name such a text encoder, or leave it out")
        network = own.network
        made = Component(
            network,
            self.path,
            {**network.defaults, **config},
            {name: tensor for name, tensor in tensors.items() if network.uses(name)},
            tokenizer=self._tokenizer(spec, own),
        )
        if (width := made.config["hidden_size"]) != own.config["hidden_size"]:
            raise TightfitError(
                f"{self.path} is {width} wide, and {spec.name} reads texts of one "
                f"{own.config['hidden_size']} wide: take that"
            )
        check_config(made)
        return replace(spec, components={**spec.components, own.name: made})

    def _tokenizer(self, spec: ModelSpec, own: Component) -> Path:
        """The one beside the file, or the model's."""
        files = () if spec.folder.is_dir() else (spec.folder,)
        folder, lacking = split_file.tokenizer_for(self.path, *files)
        if not lacking:
            return folder
        if own.engines:
            return own.tokenizer or spec.folder / own.network.tokenizer
        raise TightfitError(lacking)


def written(text: str) -> TextEncoder:
    """The text encoder in a file, or in a folder as transformers writes it."""
    path = located(text, IN_FOLDERS)
    return TextEncoder(path, stamp(path))
