"""A diffusers folder: a network in each subfolder, and model_index.json, which names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import TightfitError
from ...files import PICKLES, SINGLE, read_json, shortened
from ...placement import STORED
from .. import cures
from ..checks import check_fields, is_text, or_many
from ..families import FAMILIES, titles
from ..families.family import Network, Role
from ..families.networks import SCHEDULER_FIELDS
from ..manifest import read_manifest
from ..spec import ZEROED, Component
from ..tensors import Tensor
from .bitsandbytes import tensors_of
from .optimum import check_unmixed, read_network

# What model_index.json may say of the parts that are no networks, and of those that are never loaded; nothing
# is imported by it.
_CLIP = r"transformers CLIPTokenizer(Fast)?"
_OTHERS = {
    "scheduler": r"diffusers \w+Scheduler",
    "controlnet": r"diffusers (Multi)?ControlNetModel",  # read where a picture to follow is given
    **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "image_processor"), r"\S+ \w+"),
}
# The VAE in two, as Optimum lists it.
_ONNX_ENCODER = {"vae_encoder": "vae_decoder"}
_TELLING = Role.DENOISER, Role.DECODER, Role.TEXT
_MODELS = "'emoji', a checkpoint (.safetensors, .gguf), a diffusers folder or a hub id such as owner/name"


def check_classes(file: Path, index: Mapping[str, Any]) -> None:
    """Each part that `index`, read from a model_index.json, lists is of a class that is known.

    diffusers before 0.38 ran Python code from the folder for a class that it did not know.
    """
    pipeline = index.get("_class_name", "")
    if not isinstance(pipeline, str) or not re.fullmatch(r"\w{0,100}", pipeline):
        raise TightfitError(
            f"{file} wants code of its own to run (_class_name {shortened(pipeline)}): "
            "tightfit runs none from a model"
        )
    classes = _classes()
    for name, value in index.items():
        known = classes.get(_ONNX_ENCODER.get(name, name))
        if (
            name.startswith("_")
            or not isinstance(value, list | dict)
            or (isinstance(value, list) and not any(value))
        ):
            continue
        if known is None:
            raise TightfitError(
                f"{file} lists a part {shortened(name)}, which no model has that tightfit runs: "
                f"these are {titles()}"
            )
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        if not pair or not re.fullmatch(known, " ".join(value)):
            raise TightfitError(
                f"{file} has its {name} made by {shortened(value)}, which is not known: "
                "tightfit runs no code of a model"
            )


class DiffusersLayout:
    def claims(self, path: Path) -> bool:  # noqa: ARG002
        """Whatever no other layout claims: what it is instead is said when it is read."""
        return True

    def read(self, path: Path) -> DiffusersFolder:
        index = read_json(file := _index_file(path))
        check_classes(file, index)
        pipeline = index.get("_class_name", "unknown")
        listed = {
            key: value for key, value in index.items() if isinstance(value, list) and value and value[0]
        }
        # Of the family that it is most like, which of two alike is the simpler one.
        if lacking := min(([p for p in parts if p not in listed] for parts in _needed()), key=len):
            raise TightfitError(
                f"{path} is a {pipeline} without a {lacking[0]}: tightfit runs {titles()}, each whole"
            )
        said = {key: value for key, value in index.items() if not isinstance(value, list | dict)}
        settings = {ZEROED: "text_encoder_2" in listed, **said}
        return DiffusersFolder(path, str(pipeline), listed, read_manifest(path), settings)


def _classes() -> dict[str, str]:
    """What may be said of each part that a model of some family has, by its name: regular expressions."""
    every = [network for family in FAMILIES for network in (*family.networks, *family.on_demand)]
    named = [(part, network.listed) for network in every for part in (network.folder, network.name)]
    named += [(network.tokenizer, _tokenizer(network)) for network in every if network.tokenizer]
    parts = dict.fromkeys(part for part, _ in named)
    return _OTHERS | {
        part: "|".join(dict.fromkeys(listed for name, listed in named if name == part)) for part in parts
    }


def _is_spared(network: Network) -> bool:
    """Whether there are models of some family without it."""
    return any(network in family.fuller.networks and network not in family.networks for family in FAMILIES)


def _tokenizer(network: Network) -> str:
    return network.reading.listed if network.reading else _CLIP


def _needed() -> Iterator[list[str]]:
    """The parts of each family's models, the simplest first, those first that tell families apart."""
    for family in reversed(FAMILIES):
        networks = sorted(family.networks, key=lambda network: _TELLING.index(network.role))
        tokenizers = [network.tokenizer for network in networks if network.tokenizer]
        yield [*(network.folder for network in networks), *tokenizers, "scheduler"]


@dataclass(frozen=True)
class DiffusersFolder:
    """A Source: see layouts/__init__.py."""

    folder: Path
    pipeline: str
    listed: Mapping[str, Sequence[Any]]
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    sides = MappingProxyType({})

    def config(self, network: Network) -> Mapping[str, Any]:
        for folder in (network.folder, network.name):
            with suppress(TightfitError):
                return read_json(self.folder / folder / "config.json")
        return {}

    def component(self, network: Network) -> Component:
        """Tensors as diffusers keeps them, a graph as Optimum does, or both."""
        folder = self.folder / network.folder
        file = self.folder / (network.graph_folder or network.name) / "model.onnx"
        if not folder.exists() and _is_spared(network):
            raise TightfitError(
                f"{folder} is missing: copy or download it again, or to paint without, let model_index.json "
                f"say [null, null] of {network.folder} and {network.tokenizer}"
            )
        if file.exists() and not any(folder.glob("*.safetensors")):
            beside = next((f for f in (folder, file.parent) if (f / "config.json").exists()), file.parent)
            config = self._full_config(network, beside / "config.json")
            check_unmixed(file, self.manifest)
            return Component(network, file.parent, config, {}, None, read_network(network, config, file))
        self._check_for_weights(folder, file)
        config = self._full_config(network, folder / "config.json")
        tensors = {
            key: tensor for key, tensor in self.whole(network).items() if key.startswith(network.prefixes)
        }
        if not tensors:
            raise TightfitError(
                f"the weight files in {folder} hold nothing of a {network.name}: copy or download them again"
            )
        graph, unreadable = None, ""
        try:
            graph = read_network(network, config, file) if file.exists() else None
        except TightfitError as error:  # torch can do without
            unreadable = str(error)
        return Component(network, folder, config, tensors, self._formats(network), graph, unreadable)

    def _check_for_weights(self, folder: Path, file: Path) -> None:
        """Raise TightfitError where others of the model's networks are ONNX, and this one is missing or
        renamed."""
        weights = any(path for pattern in ("*.safetensors", *PICKLES) for path in folder.glob(pattern))
        if weights or not any(self.folder.glob("*/*.onnx")):
            return
        others = (other.name for other in file.parent.glob("*.onnx") if other.name != file.name)
        renamed = next((f"rename {other}, which is there, or " for other in others), "")
        raise TightfitError(
            f"{file if file.parent.is_dir() else file.parent} is missing: "
            f"{renamed}copy or export the model again"
        )

    def _formats(self, network: Network) -> Mapping[str, str] | None:
        """In which format each quantised layer is stored; None in a model that is not quantised."""
        if self.manifest.get("precision") not in STORED:
            return None
        formats = self.manifest.get("components", {}).get(network.folder, {}).get("formats", {})
        return {layer: form for layer, form in formats.items() if f"{layer}.".startswith(network.prefixes)}

    def _full_config(self, network: Network, file: Path) -> dict[str, Any]:
        """A network's config with what the libraries take for what it leaves out. The class of a text encoder
        is, as in diffusers, the one that model_index.json names, unless its own config says that it is of
        another kind."""
        config = {**network.defaults, **read_json(file)}
        if network.role is Role.TEXT:
            check_fields(
                file, config, {"architectures": lambda named: named in (None, []) or or_many(is_text)(named)}
            )
            named = self.listed[network.folder][-1]
            classes = (*(config.get("architectures") or ()), named)
            if all(str(one).startswith("CLIPTextModel") for one in classes):
                config["architectures"] = [named]
        return config

    def whole(self, network: Network) -> Mapping[str, Tensor]:
        stored = tensors_of(self.folder / network.folder)
        return {name: tensor for name, tensor in stored.items() if network.uses(name)}

    def scheduler(self) -> Mapping[str, Any]:
        file = self.folder / "scheduler" / "scheduler_config.json"
        check_fields(file, config := read_json(file), SCHEDULER_FIELDS)
        return config


def _index_file(folder: Path) -> Path:
    if folder.suffix in {pattern[1:] for pattern in PICKLES} and folder.is_file():
        raise TightfitError(f"{folder} is not opened: {cures.of_pickle(folder)}")
    if folder.is_file():
        raise TightfitError(f"{folder} is no model: a model is {_MODELS}")
    if not folder.is_dir():
        raise TightfitError(f"{folder} does not exist{near(folder)}: a model is {_MODELS}")
    index = folder / "model_index.json"
    if not index.exists():
        if singles := [file for ending in SINGLE for file in sorted(folder.glob(f"*{ending}"))]:
            raise TightfitError(
                f"{folder} has no model_index.json, but checkpoints: name one of them, such as {singles[0]}"
            )
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            pickle = min(path for pattern in PICKLES for path in folder.glob(pattern))
            raise TightfitError(f"{folder} holds a pickle and no diffusers model: {cures.of_pickle(pickle)}")
        raise TightfitError(
            f"{folder} has no model_index.json: it is not a diffusers folder (name the folder that has one)"
        )
    return index


def near(folder: Path) -> str:
    """' (did you mean emoji?)', if a name beside it, or a built-in one, is like that of `folder`."""
    is_model = lambda path: path.suffix in SINGLE or path.is_dir()  # noqa: E731
    beside: list[str] = []
    with suppress(OSError):
        beside = [path.name for path in islice(folder.parent.iterdir(), 1000) if is_model(path)]
    close = get_close_matches(folder.name, ["emoji", *beside], 1)
    return (
        f" (did you mean {close[0] if close[0] == 'emoji' else folder.parent / close[0]}?)" if close else ""
    )
