"""A model's folder, whole or not there; and in it one network in diffusers' layout: its config and its safetensors file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

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


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` at the end, or is gone."""
    partial = target.absolute().with_name(f".tightfit-{uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
