"""A transformer that takes noise out, alone in a file, as it is published for ComfyUI: the text encoders and
the VAE lie in files of their own, which are found in the folders of models or named; or all in one file.

Which model it is, and the configs, are told from names and shapes. What no shape tells is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import TightfitError
from ...files import SINGLE
from ..families.family import Network
from ..spec import Component
from ..tensors import Tensor
from . import renames
from .library import PART_OF, Kind, near
from .published import Published, told, transformer
from .single_file import Config, Shapes, Tensors, vae_config
from .text_encoders import TextEncoder
from .weights import DENOISERS, INDEX, name_of, read_file

_BEFORE_VAE = ("first_stage_model.", "vae.", "")


class SplitLayout:
    def claims(self, path: Path) -> bool:
        file = _weights(path)
        of_kind = file.suffix.lower() in SINGLE or file.name.endswith(INDEX)
        return of_kind and file.is_file() and any(told(read_file(file)[0]))

    def read(self, path: Path) -> SplitFile:
        return SplitFile(path, *next(told(_stored(path))))


def _weights(path: Path) -> Path:
    """What says where all weights of a denoiser are: a file, or that in its folder as diffusers writes it, or
    the index of which it is a part."""
    if path.is_dir():
        return next((file for name in DENOISERS if (file := path / name).is_file()), path)
    index = path.with_name(f"{PART_OF.sub('', path.stem)}{INDEX}")
    return index if PART_OF.search(path.stem) and index.is_file() else path


def _stored(path: Path) -> dict[str, Tensor]:
    return read_file(_weights(path))[0]


def vae(tensors: Tensors) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors of Flux.2's, or of one without convolutions around its latents, as Flux.1's;
    both empty for a file of another network."""
    for start in _BEFORE_VAE:
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        named = renames.vae(own) if "decoder.mid.block_1.norm1.weight" in own else own
        if "bn.running_mean" in named:
            return _of_flux2_vae(named), named
        if "decoder.conv_norm_out.weight" in named and "post_quant_conv.weight" not in named:
            return vae_config(named) | {"use_quant_conv": False, "use_post_quant_conv": False}, named
    return {}, {}


def _of_flux2_vae(tensors: Tensors) -> Config:
    """Some have a narrower decoder than the first."""
    config, shapes = vae_config(tensors), Shapes(tensors)
    down = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    blocks = shapes.count(r"encoder\.down_blocks\.(\d+)\.resnets\.")
    return {
        **config,
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [shapes.side(down.format(block)) for block in range(blocks)]
        or config["block_out_channels"],
        "decoder_block_out_channels": config["block_out_channels"],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


# ---------------------------------------------------------------------------------- files beside


class _Part(NamedTuple):
    """A network of the model from a file: that, its config and tensors, or why there are none. is_nowhere:
    that is so because no file has one."""

    file: Path
    config: Config
    tensors: Tensors
    lacking: str = ""
    is_nowhere: bool = False


_Reads = Callable[[Tensors], tuple[Config, dict[str, Tensor]]]


@dataclass(frozen=True)
class _Places:
    """Where a model's networks are: in its file, or in one near it, of which each is read once."""

    file: Path
    contents: dict[Path, Tensors | TightfitError] = field(default_factory=dict)

    def found(self, kind: Kind, reads: _Reads, usual: Config, needs: str) -> _Part:
        """What is inside the file, or the one file of a kind near it, whose config has what `usual` has."""
        fitting: list[_Part] = []
        unread = ""
        for path in self._of(kind):
            try:
                config, tensors = reads(self._contents(path))
            except TightfitError as error:  # of a file that nobody named: it may be of another model
                unread = unread or f" ({error})"
                continue
            if config and all(config[name] == usual[name] for name in usual):
                fitting.append(_Part(path, config, tensors))
                if path == self.file:
                    break
        if len(fitting) == 1:
            return fitting[0]
        option = kind.name.lower().replace("_", "-")
        if not fitting:
            said = f"{self.file.name} needs {needs}, and none is near it{unread}: name it by --{option} FILE"
            return _Part(self.file, usual, {}, said, True)
        names = " and ".join(str(part.file) for part in fitting[:2])
        return _Part(self.file, usual, {}, f"{names} are both for {self.file}: name one by --{option} FILE")

    def _of(self, kind: Kind) -> Iterator[Path]:
        """Folders are looked through only for what is not in the file itself."""
        yield self.file
        yield from near(self.file, kind)

    def _contents(self, path: Path) -> Tensors:
        """Nothing of another whole model. Raises TightfitError."""
        if path not in self.contents:
            try:
                stored = _stored(path)
                self.contents[path] = stored if path == self.file or not transformer(stored) else {}
            except TightfitError as error:
                self.contents[path] = error
        if isinstance(known := self.contents[path], TightfitError):
            raise known
        return known


# --------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class SplitFile:
    """A Source: see layouts/__init__.py. `tensors` are the transformer's, by diffusers' names."""

    folder: Path
    kind: Published
    tensors: Tensors

    manifest = MappingProxyType({})
    sides = MappingProxyType({})

    @property
    def pipeline(self) -> str:
        return self.kind.pipeline

    @property
    def is_distilled(self) -> bool:
        return self.kind.is_distilled(name_of(self.folder))

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.kind.settings(self.is_distilled)

    @property
    def listed(self) -> Mapping[str, Any]:
        return {name: part.tensors for name, part in self._parts.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._told_by_name, *self._found_beside, *self._left_out)

    @property
    def _told_by_name(self) -> Iterator[str]:
        if self.kind.base:
            kind = "distilled" if self.is_distilled else "the base model"
            yield f"{name_of(self.folder)} is taken for {kind}, by its name: no tensor says it"

    @property
    def _found_beside(self) -> Iterator[str]:
        parts = (part for part in self._parts.values() if part.tensors and part.file != self.folder)
        if files := " and ".join(dict.fromkeys(part.file.name for part in parts)):
            yield f"beside {self.folder.name} were found {files}"

    @property
    def _left_out(self) -> Iterator[str]:
        for name in self.kind.encoders.keys() - self._parts.keys():
            yield f"{self._everywhere[name].lacking}; else it paints without"

    @property
    def _parts(self) -> Mapping[str, _Part]:
        """By the folder that each would have, without what a model is run without."""
        optional = self.kind.optional
        return {n: p for n, p in self._everywhere.items() if not (p.is_nowhere and n in optional)}

    @cached_property
    def _everywhere(self) -> Mapping[str, _Part]:
        config, places = self.kind.config(self.tensors), _Places(self.folder)
        parts = {"transformer": _Part(self.folder, config, self.tensors)}
        widths = zip(self.kind.encoders.items(), self.kind.widths(config), strict=True)
        parts |= {name: self._encoder(places, encoder, width) for (name, encoder), width in widths}
        of_vae = self.kind.beside(config)
        needs = f"a VAE of {of_vae['latent_channels']} channels ({self.kind.vae})"
        return {**parts, "vae": places.found(Kind.VAE, vae, of_vae, needs)}

    def _encoder(self, places: _Places, encoder: TextEncoder, width: int) -> _Part:
        usual = dict.fromkeys(encoder.widths, width)
        needs = f"a {encoder.title} {width} wide (such as {encoder.file})"
        part = places.found(Kind.TEXT_ENCODER, encoder.read, usual, needs)
        if not part.tensors:
            return part._replace(config=encoder.wide(width))
        lacking = "" if encoder.pad else encoder.tokenizer(part.file, self.folder)[1]
        return part._replace(tensors={}, lacking=lacking) if lacking else part

    def config(self, network: Network) -> Mapping[str, Any]:
        return self._parts[network.folder].config if network.folder in self._parts else {}

    def component(self, network: Network) -> Component:
        part = self._parts[network.folder]
        tensors = {k: t for k, t in self.whole(network).items() if k.startswith(network.prefixes)}
        config = {**network.defaults, **part.config}
        made = Component(network, part.file, config, tensors, unreadable=part.lacking)
        if (encoder := self.kind.encoders.get(network.folder)) is None:
            return made
        return encoder.with_tokenizer(made, self.folder)

    def whole(self, network: Network) -> Mapping[str, Tensor]:
        tensors = self._parts[network.folder].tensors
        return {name: tensor for name, tensor in tensors.items() if network.uses(name)}

    def scheduler(self) -> Mapping[str, Any]:
        return self.kind.scheduler(self._parts["transformer"].config, self.is_distilled)
