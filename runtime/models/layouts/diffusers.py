"""A diffusers folder: a network in each subfolder, and model_index.json, which names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import TightfitError
from ...files import PICKLES, read_json, readable, sha256, shortened
from .. import cures
from ..checks import check_fields, is_text, or_many
from ..families.stable_diffusion import DEFAULTS, SCHEDULER_FIELDS, check_config, family_of
from ..manifest import read_manifest
from ..spec import Component, ModelSpec
from .optimum import read_network
from .safetensors import all_tensors, read_header

# What model_index.json may say that a part is made by; never imported by that name. Pipelines themselves are told by their parts.
_CLASSES = {
    "unet": r"diffusers (UNet2DConditionModel|OnnxRuntimeModel)|optimum\S* ORT\w+",
    "vae": r"diffusers (AutoencoderKL|OnnxRuntimeModel)|optimum\S* ORT\w+",
    "text_encoder": r"transformers CLIPTextModel(WithProjection)?|diffusers OnnxRuntimeModel|optimum\S* ORT\w+",
    "tokenizer": r"transformers CLIPTokenizer(Fast)?",
    "scheduler": r"diffusers \w+Scheduler",
} | dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "image_processor"), r"\S+ \w+")  # never loaded
_ALIKE = {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer", "vae_encoder": "vae", "vae_decoder": "vae"}


def check_classes(file: Path, index: Mapping[str, Any]) -> None:
    """Each part that `index`, read from a model_index.json, lists is of a class that is known.

    diffusers before 0.38 ran Python code from the folder for a class that it did not know.
    """
    pipeline = index.get("_class_name", "")
    if not isinstance(pipeline, str) or not re.fullmatch(r"\w{0,100}", pipeline):
        raise TightfitError(
            f"{file} wants code of its own to run (_class_name {shortened(pipeline)}): tightfit runs none from a model"
        )
    for name, value in index.items():
        known = _CLASSES.get(_ALIKE.get(name, name))
        if name.startswith("_") or not isinstance(value, list | dict) or (isinstance(value, list) and not any(value)):
            continue
        if known is None:
            raise TightfitError(
                f"{file} lists a part {shortened(name)}, which no SD model has: tightfit runs SD 1.x, SD 2.x and SDXL"
            )
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        if not pair or not re.fullmatch(known, " ".join(value)):
            raise TightfitError(
                f"{file} has its {name} made by {shortened(value)}, which is not known: tightfit runs no code of a model"
            )


def read_model(folder: Path, name: str | None = None) -> ModelSpec:
    """Read the diffusers folder `folder`. Raises TightfitError for whatever is missing, broken or not supported."""
    with readable(folder):
        return _read_model(folder, name)


def _read_model(folder: Path, name: str | None) -> ModelSpec:
    index = read_json(file := _index_file(folder))
    check_classes(file, index)
    pipeline = index.get("_class_name", "unknown")
    listed = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    for needed in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if needed not in listed:
            raise TightfitError(f"{folder} is a {pipeline} without a {needed}: tightfit runs SD 1.x, SD 2.x and SDXL base models")
    manifest = read_manifest(folder)
    components = {}
    for part in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
        if part != "text_encoder_2" or part in listed:
            components[part] = _component(part, folder, manifest, index[part.removesuffix("_decoder")])
    for component in components.values():
        check_config(component)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    check_fields(folder / "scheduler" / "scheduler_config.json", scheduler, SCHEDULER_FIELDS)
    return ModelSpec(
        name=name or str(folder.absolute()),
        folder=folder,
        family=family_of(folder, pipeline, components),
        components=components,
        scheduler=scheduler,
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in listed)),
        defaults=manifest.get("defaults", {}),
        precision=manifest.get("precision") if components["unet"].formats is not None else None,
        source=manifest.get("source"),
        pipeline=str(pipeline),
    )


def _index_file(folder: Path) -> Path:
    if folder.suffix in {pattern[1:] for pattern in PICKLES} and folder.is_file():
        raise TightfitError(f"{folder} is not opened: {cures.of_pickle(folder)}")
    if folder.is_file():
        raise TightfitError(_single_file(folder))
    if not folder.is_dir():
        raise TightfitError(
            f"{folder} does not exist{near(folder)}: a model is 'emoji', a diffusers folder or a hub id such as owner/name"
        )
    index = folder / "model_index.json"
    try:
        found = index.exists()
    except PermissionError:
        raise TightfitError(f"{folder} may not be entered: allow it, or copy the model to a folder of yours") from None
    if not found:
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            pickle = min(path for pattern in PICKLES for path in folder.glob(pattern))
            raise TightfitError(f"{folder} holds a pickle and no diffusers model: {cures.of_pickle(pickle)}")
        if single := sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf")):
            raise TightfitError(f"{folder} has no model_index.json: {_single_file(single[0])}")
        raise TightfitError(f"{folder} has no model_index.json: it is not a diffusers folder (name the folder that has one)")
    return index


def _single_file(file: Path) -> str:
    """Why a file is no model here, and how it becomes one."""
    if file.suffix.lower() == ".gguf":
        return f"{file} is not opened, as {cures.GGUF}"
    if file.suffix.lower() != ".safetensors":
        return f"{file} is no model: a model is 'emoji', a diffusers folder or a hub id such as owner/name"
    tensors = frozenset(read_header(file))
    if cures.is_adapter(tensors):
        return f"{file} is a LoRA, an addition to a model, which is not read in this version: name the model itself"
    return f"{file} is a single file; a model is a diffusers folder or a hub id: {cures.of_file(file, tensors)}"


def near(folder: Path) -> str:
    """' (did you mean emoji?)', if a name beside it, or a built-in one, is like that of `folder`."""
    beside: list[str] = []
    with suppress(OSError):
        beside = [path.name for path in islice(folder.parent.iterdir(), 1000) if path.is_dir()]
    close = get_close_matches(folder.name, ["emoji", *beside], 1)
    return f" (did you mean {close[0] if close[0] == 'emoji' else folder.parent / close[0]}?)" if close else ""


def _component(name: str, model: Path, manifest: Mapping[str, Any], listed: Sequence[Any]) -> Component:
    """What is there of it: tensors as diffusers keeps them, a graph as Optimum does, or both. `listed` is what model_index.json
    says of it, a library and a class."""
    folder, file = model / name.removesuffix("_decoder"), model / name / "model.onnx"
    torch = any(folder.glob("*.safetensors"))
    if file.exists() and not torch:
        beside = next((f for f in (folder, model / name) if (f / "config.json").exists()), model / name)
        config = _config(name, beside / "config.json", listed)
        _check_unmixed(file, manifest)
        return Component(name, model / name, config, {}, None, read_network(name, config, file))
    if not any(path for pattern in ("*.safetensors", *PICKLES) for path in folder.glob(pattern)) and any(model.glob("*/*.onnx")):
        others = (each.name for each in file.parent.glob("*.onnx") if each.name != file.name)
        renamed = next((f"rename {each}, which is there, or " for each in others), "")
        raise TightfitError(f"{file if file.parent.is_dir() else file.parent} is missing: {renamed}copy or export the model again")
    prefixes = ("decoder.", "post_quant_conv.") if name == "vae_decoder" else ("",)
    config = _config(name, folder / "config.json", listed)
    tensors = {key: tensor for key, tensor in all_tensors(folder).items() if key.startswith(prefixes)}
    if not tensors:
        raise TightfitError(f"the weight files in {folder} hold nothing of a {name}: copy or download them again")
    formats = manifest.get("components", {}).get(folder.name, {}).get("formats", {})
    of_these = {layer: form for layer, form in formats.items() if layer.startswith(prefixes)}
    stored = manifest.get("precision") in ("int8", "int4")
    graph, unreadable = None, ""
    try:
        graph = read_network(name, config, file) if file.exists() else None
    except TightfitError as error:  # torch can do without
        unreadable = str(error)
    return Component(name, folder, config, tensors, of_these if stored else None, graph, unreadable)


def _config(name: str, file: Path, listed: Sequence[Any]) -> dict[str, Any]:
    """A network's config with what the libraries take for what it leaves out. The class of a text encoder is, as in diffusers,
    the one that model_index.json names, unless its own config says that it is of another kind."""
    config = {**DEFAULTS[name.removesuffix("_2")], **read_json(file)}
    if name.startswith("text_encoder"):
        check_fields(file, config, {"architectures": lambda named: named in (None, []) or or_many(is_text)(named)})
        classes = (*(config.get("architectures") or ()), listed[-1])
        if all(str(each).startswith("CLIPTextModel") for each in classes):
            config["architectures"] = [listed[-1]]
    return config


def _check_unmixed(file: Path, manifest: Mapping[str, Any]) -> None:
    """A graph of another export would read its weights from wrong places in the file beside it. The weights are not read here."""
    told = manifest.get("components", {}).get(file.parent.name, {}).get("sha256", {}).get(file.name)
    if told and sha256(file) != told:
        raise TightfitError(
            f"{file} is not the one that was exported into this folder: copy or export the model again "
            "(or delete its tightfit.json, if you changed the graph yourself)"
        )
