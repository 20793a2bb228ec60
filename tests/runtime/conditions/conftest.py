"""Tiny models whose denoisers read more than latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def with_channels(tiny_models, made_once) -> Callable[[str, int], Path]:
    """Called with a family and a number: that model with a random U-Net that reads so many channels."""

    def made(family: str, channels: int) -> Path:
        def write(folder: Path) -> None:
            import torch
            from diffusers import UNet2DConditionModel

            shutil.copytree(tiny_models[family], folder, dirs_exist_ok=True)
            config = json.loads((folder / "unet/config.json").read_text()) | {"in_channels": channels}
            torch.manual_seed(2)
            unet = UNet2DConditionModel.from_config(config)
            shutil.rmtree(folder / "unet")
            unet.save_pretrained(folder / "unet")

        return made_once(f"channels/{family}-{channels}", write)

    return made
