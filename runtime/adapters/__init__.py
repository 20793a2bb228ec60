"""Parts of what a model is that come in files of their own. A new kind is one file beside this one and one
line in ADAPTERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ..errors import TightfitError
from ..models.layouts import library
from ..models.spec import ModelSpec
from ..recent import Recent
from . import ip_adapter, lora, prediction, text_encoder, textual_inversion, unet, vae
from .header import contents, located, stamp

MOST = 100
"""Adapters of one request."""


class Adapter(Protocol):
    """One adapter and how strongly it acts. Hashable: two that are equal change a model in the same way."""

    option: ClassVar[str]
    """Under which it is given on the command line, and named in pictures."""

    @property
    def name(self) -> str:
        """As it is written after that option."""
        ...

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model with it: some tensors patched, or replaced. No weight is read.

        Raises TightfitError for a model that it is not for.
        """
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: how its option is called and explained, what a text after it means, and in which of
    the folders of models a name is looked for, unless it is the option's `word`."""

    option: str
    written: Callable[[str], Adapter]
    help: str
    shelf: library.Kind | None = None
    metavar: str = "FILE"
    word: str | None = None
    in_weights: bool = False
    """Whether all that it changes are weights, so that an export may hold it."""
    is_network: bool = False
    """Whether it is a whole network, which an export of a file, that may lack one, holds in its place."""


# In the order in which they are applied: a LoRA changes networks that take the place of the model's own.
ADAPTERS = (
    Kind(unet.Unet.option, unet.written, "In place of the model's.", library.Kind.UNET, in_weights=True),
    Kind(
        text_encoder.TextEncoder.option,
        text_encoder.written,
        "In place of the model's, or none.",
        library.Kind.TEXT_ENCODER,
        word=text_encoder.NONE,
        is_network=True,
    ),
    Kind(lora.Lora.option, lora.written, "As FILE:0.8; repeatable.", library.Kind.LORA, in_weights=True),
    Kind(
        textual_inversion.TextualInversion.option,
        textual_inversion.written,
        "A word, as FILE:word.",
        library.Kind.EMBEDDING,
    ),
    Kind(vae.Vae.option, vae.written, "In place of the model's.", library.Kind.VAE, is_network=True),
    Kind(ip_adapter.IPAdapter.option, ip_adapter.written, "As FILE:0.6.", library.Kind.IP_ADAPTER),
    Kind(prediction.Prediction.option, prediction.written, "Epsilon or v, of U-Nets.", metavar="KIND"),
)


def written(
    texts: Mapping[str, Sequence[str]], models_dirs: Sequence[str | Path] = ()
) -> tuple[Adapter, ...]:
    """The adapters that these texts mean, by the options that they were given under: each begins with a path,
    or with a name in a folder of models. Raises TightfitError for a text that means none."""
    check_count(sum(map(len, texts.values())))
    return tuple(
        kind.written(_placed(text, kind.shelf, models_dirs) if kind.shelf and text != kind.word else text)
        for kind in ADAPTERS
        for text in texts.get(kind.option, ())
    )


def _placed(text: str, shelf: library.Kind, models_dirs: Sequence[str | Path]) -> str:
    """The text with the path of the file in place of its name. What follows a colon stays."""
    if any(library.exists(text.rsplit(":", cuts)[0]) for cuts in range(3)):
        return text
    name, *others = [text] if Path(text).is_absolute() else text.split(":")
    return ":".join([library.located(name, shelf, models_dirs), *others])


def by_option(adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """Their names by their options."""
    options = dict.fromkeys(adapter.option for adapter in adapters)
    return {option: [adapter.name for adapter in adapters if adapter.option == option] for option in options}


def check(adapters: object) -> None:
    """Raise TightfitError for what are no adapters, or too many."""
    if not isinstance(adapters, tuple | list) or not all(hasattr(adapter, "apply") for adapter in adapters):
        raise TightfitError("adapters must be a list of what tightfit.read_adapter reads")
    check_count(len(adapters))


def check_count(count: int) -> None:
    """Raise TightfitError for more than one request may have."""
    if count > MOST:
        raise TightfitError(f"{count} adapters are asked for, and one request has at most {MOST}: name fewer")


def read_adapter(path: str | Path, weight: float = 1.0, text_weight: float | None = None) -> Adapter:
    """The LoRA or the embedding in a file, or in a folder as PEFT and diffusers write it.

    weight: how strongly a LoRA acts. text_weight: on text encoders, where that is to be another. Raises
    TightfitError for a file that is neither.
    """
    file = located(path, (*lora.IN_FOLDERS, *textual_inversion.IN_FOLDERS))
    stored, _ = contents(file, stamp(file))
    if lora.Lora.claims(stored):
        return lora.Lora.read(file, weight, text_weight)
    if textual_inversion.claims(stored):
        return textual_inversion.read(file)
    raise lora.no_lora(file, stored)


def check_whole(spec: ModelSpec) -> None:
    """Raise TightfitError for a model that lacks a network, after its adapters."""
    lacking = [component for component in spec.components.values() if not component.engines]
    if reasons := [component.unreadable for component in lacking if component.unreadable]:
        raise TightfitError("; ".join(reasons))
    if lacking:
        raise TightfitError(
            f"{spec.name} is a single file without a VAE: name one by --vae, "
            "or take a checkpoint that has all networks inside"
        )


_ADAPTED: Recent[ModelSpec] = Recent(16)


def adapted(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    """The model with all of them, their kinds in the order of ADAPTERS: the same object for the same
    adapters, so that what was planned and loaded for it is found again. Networks that none of them changes
    stay the same objects."""
    return _ADAPTED.get(tuple(adapters), lambda: _applied(spec, adapters), spec) if adapters else spec


def _applied(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    for adapter in adapters:
        spec.check_takes(adapter.option)
    order = [kind.option for kind in ADAPTERS]
    last = len(order)
    for adapter in sorted(adapters, key=lambda one: order.index(one.option) if one.option in order else last):
        spec = adapter.apply(spec)
    return spec
