"""One network in diffusers' folder layout: its config and its safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
