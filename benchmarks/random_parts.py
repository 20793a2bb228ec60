"""Random files beside a tiny model, made to fit its folder: what reads pictures, and a LoRA. For
parity_pictures.py and tests/conditions_table.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..kernels.upscalers import SRVGGNetCompact
from ..runtime.models.families.networks import UNET

# Zeros before training, after which they change pictures.
_ZEROS = ("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")
VISION_SIDE = 32
VISION_WIDTH, _PROJECTED, _INNER, _QUERY = 64, 48, 128, 128


def wider(folder: Path, channels: int, made: Path) -> Path:
    """A copy whose U-Net reads so many channels."""
    shutil.copytree(folder, made)
    config = json.loads((folder / UNET.folder / "config.json").read_text()) | {"in_channels": channels}
    shutil.rmtree(made / UNET.folder)
    torch.manual_seed(channels)
    unet: Any = diffusers.UNet2DConditionModel.from_config(config)
    unet.save_pretrained(made / UNET.folder)
    return made


def controlnet(folder: Path, seed: int, made: Path, **options: Any) -> Path:
    torch.manual_seed(seed)
    net: Any = diffusers.ControlNetModel.from_unet(_unet(folder), **options)
    for name, parameter in net.named_parameters():
        if name.startswith(_ZEROS):
            nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(made)
    return made


def t2i_adapter(folder: Path, made: Path) -> Path:
    config = _unet(folder).config
    widths = [*config.block_out_channels]
    torch.manual_seed(4)
    if config.addition_embed_type:  # SDXL's, of whose features the last is for the middle
        adapter = diffusers.T2IAdapter(3, [*widths, widths[-1]], 2, 16, "full_adapter_xl")
    else:
        adapter = diffusers.T2IAdapter(3, widths, 2, 8, "full_adapter")
    adapter.save_pretrained(made)
    return made


def ip_adapter(folder: Path, plus: bool, made: Path) -> Path:
    """A file, beside its image encoder in made/image_encoder."""
    torch.manual_seed(5)
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=96, projection_dim=_PROJECTED, num_hidden_layers=3,
        num_attention_heads=2, image_size=VISION_SIDE, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(made / "image_encoder")
    unet = _unet(folder)
    projection = (_resampler if plus else _projection)(unet.config.cross_attention_dim)
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.state_dict().items()}
    for number, path in enumerate(unet.attn_processors):  # by numbers, as diffusers orders the layers
        if path.endswith("attn2.processor"):
            shape = unet.get_submodule(path.removesuffix(".processor")).to_k.weight.shape
            names = (f"ip_adapter.{number}.{part}.weight" for part in ("to_k_ip", "to_v_ip"))
            tensors |= {name: 0.3 * torch.randn(shape) for name in names}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "ip.safetensors")
    return made / "ip.safetensors"


def lora(folder: Path, made: Path) -> Path:
    """A file for the U-Net's attention, as PEFT names its tensors."""
    torch.manual_seed(6)
    tensors = {}
    for name, weight in _unet(folder).state_dict().items():
        if ".attentions." in name and name.endswith(".weight") and weight.ndim == 2:
            start, (rows, columns) = f"{UNET.folder}.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{start}.lora_A.weight"] = torch.randn(4, columns) / columns**0.5
            tensors[f"{start}.lora_B.weight"] = 0.1 * torch.randn(rows, 4)
    save_file(tensors, made)
    return made


def upscaler(made: Path) -> Path:
    """A file that enlarges four times."""
    torch.manual_seed(0)
    save_file(SRVGGNetCompact(3, 8, 2, 4).state_dict(), made)
    return made


def _unet(folder: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(folder / UNET.folder)


def _projection(texts: int) -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(_PROJECTED, 4 * texts), "norm": nn.LayerNorm(texts)})


def _resampler(texts: int) -> nn.Module:
    """As IP-Adapter plus names its parts."""
    module = nn.ModuleDict(
        {
            "proj_in": nn.Linear(VISION_WIDTH, _INNER),
            "layers": nn.ModuleList(map(_layer, range(4))),  # so many as diffusers needs
            "proj_out": nn.Linear(_INNER, texts),
            "norm_out": nn.LayerNorm(texts),
        }
    )
    module.register_parameter("latents", nn.Parameter(torch.randn(1, 16, _INNER)))
    return module.requires_grad_(False)


def _layer(_: int) -> nn.Module:
    sizes = {"to_q": (_INNER, _QUERY), "to_kv": (_INNER, 2 * _QUERY), "to_out": (_QUERY, _INNER)}
    attention = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
    attention.update({name: nn.LayerNorm(_INNER) for name in ("norm1", "norm2")})
    grown, shrunk = (nn.Linear(*size, bias=False) for size in ((_INNER, 4 * _INNER), (4 * _INNER, _INNER)))
    return nn.ModuleList([attention, nn.Sequential(nn.LayerNorm(_INNER), grown, nn.GELU(), shrunk)])
