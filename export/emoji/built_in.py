"""The model in the box, as it ships, for what is trained on top of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from ...runtime.models.hub import BUILT_IN
from . import data
from .diffusion import Conditional, encode_all

FOLDER = BUILT_IN["emoji"]


def autoencoder() -> Any:
    kind: Any = AutoencoderKL
    return kind.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()


def conditional() -> tuple[Conditional, Any]:
    """The U-Net and the text encoder, frozen, and their tokenizer."""
    kind: Any = UNet2DConditionModel
    unet = kind.from_pretrained(FOLDER / "unet", torch_dtype=torch.float32)
    unet.set_attn_processor(AttnProcessor())  # as in diffusion.py: its backward is faster on a CPU
    text_encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    return Conditional(unet, text_encoder).requires_grad_(False), tokenizer


def pictures_and_latents(chosen: list[data.Emoji], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures, uint8 (count, 3, size, size), and their scaled latents."""
    pictures = torch.from_numpy(data.pixels(chosen, size)).permute(0, 3, 1, 2).contiguous()
    vae = autoencoder()
    return pictures, encode_all(vae, pictures) * vae.config.scaling_factor
