"""From a model's name to its spec: built in, a folder, or a repository on the hub."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import TightfitError, first_line
from ..files import PICKLES, SINGLE
from .cures import of_pickles
from .families import networks
from .layouts import library
from .layouts.diffusers import near
from .reading import read_model
from .spec import ModelSpec

BUILT_IN = {"emoji": Path(__file__).parent / "emoji"}
# Adapters that ship with it, by the names that --lora, --embedding and --vae know. They are for it alone.
BESIDE = {
    "flat": BUILT_IN["emoji"] / "lora" / "flat.safetensors",
    "pizza": BUILT_IN["emoji"] / "embeddings" / "pizza.safetensors",
    "tiny": BUILT_IN["emoji"] / "tiny_vae",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS, _PICKLED = re.compile(r"unet/.*\.(safetensors|onnx)"), re.compile(r"unet/.*\.bin")
_SMALL = ("*.json", "*.txt")


def inspect(model: str | Path, *, local_files_only: bool = False) -> ModelSpec:
    """The spec of `model`: a built-in name, a checkpoint file, a diffusers folder, the name of one in the
    folders of models, or a hub id. Reads only configs and headers.

    A hub repository is first downloaded into the hub's own cache, unless `local_files_only`. Raises
    TightfitError.
    """
    name = located(str(model))
    if not name.strip():
        raise TightfitError(
            "the model has no name: give --model emoji, a file, a folder or a hub id such as owner/name"
        )
    if "://" in name:
        raise TightfitError(_address(name))
    if name in BUILT_IN:
        return read_model(BUILT_IN[name], name)
    path, exists = _place(name)
    return _fetch(name, local_files_only) if not exists and _is_hub_id(name) else read_model(path)


def located(name: str, models_dirs: Sequence[str | Path] = ()) -> str:
    """The path of the model that is called so in `models_dirs` or in the user's folders of models; `name`
    itself where it is a path, built in, or can be a hub id that none is called by. Raises TightfitError."""
    if not name.strip() or "://" in name or name in BUILT_IN or _place(name)[1]:
        return name
    return library.located(name, library.Kind.MODEL, models_dirs, or_name=_is_hub_id(name))


def placed(name: str) -> str:
    """What names the same model from any folder: its absolute path, where it is one. Raises TightfitError."""
    place = located(name)
    path, exists = _place(place)
    return str(path.absolute()) if exists and place not in BUILT_IN else place


def _place(name: str) -> tuple[Path, bool]:
    """A path, and whether there is something."""
    try:
        path = Path(name).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # name too long, no such user, null character
        raise TightfitError(f"no model can be called '{name[:60]}' ({first_line(error)})") from None


def _is_hub_id(name: str) -> bool:
    is_file = Path(name).suffix in {pattern[1:] for pattern in PICKLES} | {*SINGLE}
    return not is_file and bool(_HUB_ID.fullmatch(name))


def _address(url: str) -> str:
    """Why a URL is no model, and what to give instead; for a page of the hub that is its id."""
    page = re.match(r"https?://[\w.-]*(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", url)
    cure = (
        f"give --model {page[1]}"
        if page
        else "download the model first, and give --model its folder, or a hub id"
    )
    return f"{url[:200]} is an address, and models are not read from one: {cure}"


def wanted(files: list[str]) -> list[str]:
    """The files of a repository that a run needs: configs, vocabularies, and one set of weights per
    component.

    Plain safetensors are preferred, then the fp16 variant, then ONNX; never a pickle.
    """
    chosen = [
        f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in _SMALL) and f.count("/") <= 1
    ]
    for folder, graph in {network.folder: network.name for network in networks().values()}.items():
        tensors = [
            f for f in files if re.fullmatch(rf"{folder}/(diffusion_pytorch_)?model[^/]*\.safetensors", f)
        ]
        suffix = r"/(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors$"
        plain = [f for f in tensors if re.search(suffix, f)]
        onnx = [f for f in files if re.fullmatch(rf"{graph}/(model\.onnx[^/]*|weights\.pb)", f)]
        chosen += plain or [f for f in tensors if ".fp16" in f] or onnx
    return chosen


def _fetch(repository: str, local_files_only: bool) -> ModelSpec:
    """Update the files that `wanted` names in the hub's cache. Without a connection, use a complete cached
    copy."""
    from huggingface_hub import HfApi, snapshot_download

    problem, cure = "a picture alone starts no download", f"name it with --model {repository}"
    if not local_files_only:
        try:
            files = [entry.rfilename for entry in HfApi().model_info(repository).siblings or []]
            if not any(map(_WEIGHTS.match, wanted(files))) and any(map(_PICKLED.match, files)):
                raise TightfitError(
                    f"'{repository}' has its weights as pickles only: {of_pickles(repository)}"
                )
            folder = Path(snapshot_download(repository, allow_patterns=wanted(files)))
        except TightfitError:
            raise
        # The hub's HTTP library has changed before, and every failure has the same cure.
        except Exception as error:
            said = " ".join(re.sub(r"\(Request ID: [^)]*\)", "", str(error)).split())
            problem = said[:120] or type(error).__name__
            cure = "check the name and the connection, or give --model a file or folder on this machine"
        else:
            return read_model(folder, repository)
    try:
        return read_model(Path(snapshot_download(repository, local_files_only=True)), repository)
    except (OSError, ValueError):  # not cached at all
        state = "is not in the hub's cache"
    except TightfitError as error:
        state = f"is in the hub's cache, but that copy cannot be used ({error})"
    raise TightfitError(
        f"'{repository}'{near(Path(repository))} {state}, and was not fetched ({problem}): {cure}"
    )
