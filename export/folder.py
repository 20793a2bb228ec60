"""A model's folder, whole or not there; and in it one network in diffusers' layout: its config and its safetensors file."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_DNS, uuid4, uuid5

import psutil
import torch
from safetensors.torch import save_file


def write_component(folder: Path, module: Any, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Write the config of a diffusers or transformers `module` and its `weights`; returns its entry in model_index.json."""
    kind = type(module).__name__
    folder.mkdir(parents=True)
    if not kind.startswith("CLIPText"):
        module.save_config(folder)
        save_file(dict(weights), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return ["diffusers", kind]
    module.config.architectures = [kind]
    module.config.save_pretrained(folder)
    # the names that published models have, whatever today's transformers calls them
    prefixed = {n if n.startswith("text_") else f"text_model.{n}": w for n, w in weights.items()}
    save_file(prefixed, folder / "model.safetensors", {"format": "pt"})
    return ["transformers", kind]


def copy_the_rest(
    source: Path, folder: Path, components: Container[str], become: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Configs, tokenizers, scheduler. Parts that tightfit does not run, such as a safety checker, are left out of the index.

    `become` names the folders that a component's files go to, if not to one of its own name.
    """
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    kept = [name for name in index if name in components or name.startswith(("tokenizer", "scheduler"))]
    for name, value in index.items():
        if isinstance(value, list) and name not in kept:
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name in kept:
        for target in (become or {}).get(name, [name]):
            (folder / target).mkdir(exist_ok=True)
            for file in (source / name).iterdir():
                if file.suffix in (".json", ".txt") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / target / file.name)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` at the end, or is gone; those that killed processes left there go first."""
    place = target.absolute().parent
    here = uuid5(NAMESPACE_DNS, platform.node()).hex[:8]  # processes of other machines, or containers, are not known
    for left in place.glob(f".tightfit-{here}-*-*.partial"):
        number = left.name.split("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    partial = place / f".tightfit-{here}-{os.getpid()}-{uuid4().hex}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
