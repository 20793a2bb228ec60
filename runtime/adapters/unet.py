"""Another denoiser in place of the model's own, most often a U-Net: from a file of that alone, or from inside
a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import TightfitError
from ..models.families import known_by
from ..models.layouts import published, single_file, weights
from ..models.spec import ModelSpec
from ..models.tensors import Tensor
from .header import OfFile, contents, located, stamp

IN_FOLDERS = weights.DENOISERS
_READS = ".attn2.to_k.weight"  # its rows are as wide as texts


@dataclass(frozen=True)
class Unet(OfFile):
    """The U-Net in a file."""

    option: ClassVar = "unet"

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with its U-Net. Raises TightfitError for one of another kind than the model's own, or
        that is none."""
        own = spec.denoiser
        if own.patches:
            raise TightfitError(f"{self.path} replaces a U-Net that adapters changed: name it before them")
        if own.formats is not None or not own.tensors:
            state = f"stored in {spec.precision}" if own.formats is not None else "there as ONNX alone"
            raise TightfitError(
                f"{self.path} cannot replace the denoiser of {spec.name}, which is {state}: "
                f"name {spec.source or 'the model'}, from which that was made, by --model"
            )
        stored, metadata = contents(self.path, stamp(self.path))
        kind, named = next(published.told(stored), (None, {}))
        if kind and kind is not published.published_of(own.config):
            ours = spec.design.title or spec.family
            raise TightfitError(
                f"{self.path} is of a {kind.pipeline}, and {spec.name} is {ours}: name one of its kind"
            )
        tensors = named or single_file.denoiser(stored)
        self._check(spec, tensors)
        if more := next((name for name in named if name not in own.tensors), ""):
            raise TightfitError(f"{self.path} has {more}, and {spec.name} none: name a model of its kind")
        denoiser = replace(own, folder=self.path, tensors=tensors, graph=None, unreadable="")
        trained = single_file.told(self.path, stored, metadata)
        return replace(
            spec,
            components={**spec.components, own.name: denoiser},
            scheduler={**spec.scheduler, **trained},
            notes=(
                *spec.notes,
                *(f"{self.path.name} has {key} {value}" for key, value in trained.items()),
                *self._of_another_kind(spec),
            ),
        )

    def _of_another_kind(self, spec: ModelSpec) -> Iterator[str]:
        """A note on one that was distilled, by its name, for a model that was not; or the other way round."""
        config, known = spec.denoiser.config, published.published_of(spec.denoiser.config)
        if known is None or not known.base:
            return
        is_distilled = known.is_distilled(name := weights.name_of(self.path))
        own, other = (
            {**known.scheduler(config, each), **known.settings(each)}
            for each in (is_distilled, not is_distilled)
        )
        said = {**spec.scheduler, **spec.settings}
        if any(said.get(key) == value != own[key] for key, value in other.items()):
            kinds = ("distilled", "the base model")
            kind, model = kinds if is_distilled else kinds[::-1]
            yield (
                f"{name} is taken for {kind}, by its name, and {spec.name} is {model}: "
                "steps, guidance and noise levels are still that's"
            )

    def _check(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """Raise TightfitError unless they are the tensors of a U-Net like the model's own."""
        own = spec.denoiser.tensors
        if not tensors:
            raise TightfitError(
                f"{self.path} holds no denoiser that tightfit knows: name one, in GGUF or safetensors"
            )
        width, ours = _text_width(tensors), _text_width(own)
        if "cross_attention_dim" in spec.denoiser.config and ours != width:  # SD 3.5's attn2 reads no texts
            kind, other = (known_by(side) or f"texts {side} wide" for side in (width, ours))
            raise TightfitError(
                f"{self.path} is a U-Net of {kind}, and {spec.name} has one of {other}: "
                "take one of the same family"
            )
        wrong = next((name for name, tensor in own.items() if not _alike(tensors.get(name), tensor)), None)
        if wrong:
            there = f"of shape {list(tensors[wrong].shape)}" if wrong in tensors else "nowhere"
            raise TightfitError(
                f"{self.path} has {wrong} {there}, and {spec.name} of shape {list(own[wrong].shape)}: "
                "take one of the same kind"
            )


def _text_width(tensors: Mapping[str, Tensor]) -> int:
    sides = (tensor.shape for name, tensor in tensors.items() if name.endswith(_READS))
    return next((shape[1] for shape in sides if len(shape) > 1), 0)


def _alike(tensor: Tensor | None, other: Tensor) -> bool:
    """Whether their shapes are the same but for sides of 1, which linears may have as convolutions."""
    sides: list[Any] = [[side for side in each.shape if side != 1] for each in (tensor, other) if each]
    return len(sides) == 2 and sides[0] == sides[1]


def written(text: str) -> Unet:
    """The U-Net in a file, or in a folder as diffusers writes it."""
    path = located(text, IN_FOLDERS)
    return Unet(path, stamp(path))
