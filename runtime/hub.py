"""From what a person calls a model to the folder it lies in."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from .errors import TightfitError
from .spec import PICKLES

BUILT_IN = {"emoji": Path(__file__).parent / "models" / "emoji"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL = ("*.json", "*.txt")


def locate(model: str) -> Path:
    """The folder of a built-in model, of a local path, or of a hub id such as `owner/name` (fetched once, then cached)."""
    if model in BUILT_IN:
        return BUILT_IN[model]
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(model) or path.suffix in {p[1:] for p in PICKLES} | {".safetensors"}:
        return path
    return _fetch(model)


def wanted(files: list[str]) -> list[str]:
    """Of a repository's files, those a run needs: configs, vocabularies, and one set of safetensors per component.

    The plain weights are taken, or the fp16 variant where a component has no plain ones; never a pickle.
    """
    chosen = [f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in _SMALL) and f.count("/") <= 1]
    for folder in ("text_encoder", "text_encoder_2", "unet", "vae"):
        here = [f for f in files if re.fullmatch(rf"{folder}/(diffusion_pytorch_)?model[^/]*\.safetensors", f)]
        plain = [f for f in here if re.search(r"/(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors$", f)]
        chosen += plain or [f for f in here if ".fp16" in f]
    return chosen


def _fetch(repository: str) -> Path:
    """Bring what `wanted` names up to date in the hub's own cache; with no connection, use what is there."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [entry.rfilename for entry in HfApi().model_info(repository).siblings or []]
        return Path(snapshot_download(repository, allow_patterns=wanted(files)))
    except Exception as error:  # the hub's HTTP library has changed before, and any failure has the same cure
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except (OSError, ValueError):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TightfitError(
                f"'{repository}' is no folder here, is not in the hub's cache and cannot be fetched ({reason}): "
                "check the name and the connection, or give --model a diffusers folder on this machine"
            ) from None
