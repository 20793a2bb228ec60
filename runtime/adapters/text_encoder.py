"""Another text encoder in place of one of the model's own, or where its files have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import TightfitError
from ..models.families import FAMILIES
from ..models.families.networks import check_config
from ..models.layouts.published import published_of
from ..models.layouts.text_encoders import TextEncoder as Kind
from ..models.layouts.weights import INDEX
from ..models.spec import Component, ModelSpec
from ..models.tensors import Tensor
from .header import OfFile, contents, located, stamp

Tensors = Mapping[str, Tensor]
IN_FOLDERS = "model.safetensors", f"model{INDEX}"  # as transformers names a file, or one in parts
NONE = "none"


@dataclass(frozen=True)
class TextEncoder(OfFile):
    """The text encoder in a file."""

    option: ClassVar = "text_encoder"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with it, in the place of one of its kind and width. Raises TightfitError where the model
        reads texts by no such, and where there is no tokenizer."""
        published = published_of(spec.denoiser.config)
        if published is None:
            raise TightfitError(
                f"{self.path} is a text encoder, and {spec.name} reads texts by CLIP of its own: leave it out"
            )
        stored, refused = contents(self.path, self.written)[0], ""
        widths = published.widths(spec.denoiser.config)
        for (folder, kind), wanted in zip(published.encoders.items(), widths, strict=True):
            config, tensors = kind.read(stored)
            if not config:
                continue
            if (given := config[kind.widths[0]]) == wanted:
                return self._taken(spec, folder, kind, (config, tensors))
            refused = f"is a {kind.title} {given} wide, and {spec.name} reads texts of one {wanted} wide"
        titles = " or ".join(dict.fromkeys(kind.title for kind in published.encoders.values()))
        raise TightfitError(
            f"{self.path} {refused or f'holds no {titles}'}: name such a text encoder, or leave it out"
        )

    def _taken(self, spec: ModelSpec, folder: str, kind: Kind, read: tuple[Any, Tensors]) -> ModelSpec:
        """The model with a text encoder of this kind, which was read, in this folder's place."""
        (config, tensors), design = read, spec.design.fuller
        network = next(network for network in design.networks if network.folder == folder)
        own = spec.components.get(network.name) or Component(network, spec.folder, {}, {})
        if own.patches:
            raise TightfitError(f"{self.path} replaces what adapters changed: name it before them")
        if spec.precision is not None:
            raise TightfitError(
                f"{self.path} cannot replace the text encoder of {spec.name}, which is stored in "
                f"{spec.precision}: name {spec.source or 'the model'}, from which that was made, by --model"
            )
        used = {name: tensor for name, tensor in tensors.items() if network.uses(name)}
        made = Component(network, self.path, {**network.defaults, **config}, used)
        made = self._reading(made, spec, own, kind)
        check_config(made)
        return _with(spec, made)

    def _reading(self, made: Component, spec: ModelSpec, own: Component, kind: Kind) -> Component:
        """With the tokenizer of the model, or beside the file."""
        files = () if spec.folder.is_dir() else (spec.folder,)
        if kind.pad is None:
            folder, lacking = kind.tokenizer(self.path, *files)
            if not lacking:
                return replace(made, tokenizer=folder)
            if not own.engines:
                raise TightfitError(lacking)
        elif not own.engines:
            return replace(made, pad=kind.pad)
        words, ours = (one.setting("vocab_size") for one in (made, own))
        if words != ours:
            raise TightfitError(
                f"{self.path} has {words} words, and that of {spec.name} {ours}: take one of the same kind"
            )
        return replace(made, pad=own.pad, tokenizer=own.tokenizer)


@dataclass(frozen=True)
class Fewer:
    """No text encoder where there is one that the model can do without."""

    option: ClassVar = TextEncoder.option

    @property
    def name(self) -> str:
        return NONE

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """Raises TightfitError for a model that needs all of its text encoders."""
        own = spec.design
        if own.fuller.name != own.name:
            return spec
        design = next((one for one in FAMILIES if one.fuller.name == own.name != one.name), None)
        if design is None:
            raise TightfitError(
                f"{spec.name} needs all of its text encoders: leave --text-encoder {NONE} out"
            )
        spared = {network.name for network in own.networks} - {network.name for network in design.networks}
        components = {name: one for name, one in spec.components.items() if name not in spared}
        changed = replace(spec, design=design, components=components)
        design.check(changed)
        return changed


def _with(spec: ModelSpec, made: Component) -> ModelSpec:
    """The model with one of its own text encoders, or with one more, as a fuller family has it."""
    design = spec.design if made.name in spec.components else spec.design.fuller
    components = {**spec.components, made.name: made}
    in_order = {one.name: components[one.name] for one in design.networks}
    changed = replace(spec, design=design, components={**in_order, **components})
    design.check(changed)
    return changed


def written(text: str) -> TextEncoder | Fewer:
    """The text encoder in a file, or in a folder as transformers writes it; or none."""
    if text == NONE:
        return Fewer()
    path = located(text, IN_FOLDERS)
    return TextEncoder(path, stamp(path))
