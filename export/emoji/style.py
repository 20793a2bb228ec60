"""Train a LoRA that gives the built-in emoji a flat style: `python -m tightfit.export.emoji.style --help`.

Written in kohya's format. Linears and 1x1 convolutions have DIM ranks, 3x3 convolutions CONV_DIM.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrize import register_parametrization

from . import built_in, caption, data, diffusion, flat, optim
from .run import Run, options

DIM, CONV_DIM = 8, 4
TRIGGER = "flat"  # in half of the captions: the style comes without it too
ADAPTED = ("down_blocks.", "mid_block.", "up_blocks.")


class LowRank(torch.nn.Module):
    """A weight with up @ down added to it. Begins as no change."""

    def __init__(self, shape: torch.Size, rank: int) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, *shape[1:]) / shape[1:].numel() ** 0.5)
        self.up = torch.nn.Parameter(torch.zeros(shape[0], rank, *(1 for _ in shape[2:])))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)


def adapt(base: diffusion.Conditional) -> torch.nn.ModuleDict:
    """Add low ranks to every linear and convolution between the first and the last; by kohya's names."""
    adapter = torch.nn.ModuleDict()
    layers = [
        *(
            ("lora_unet", name, layer)
            for name, layer in base.unet.named_modules()
            if name.startswith(ADAPTED)
        ),
        *(("lora_te_text_model", name, layer) for name, layer in base.text_encoder.named_modules()),
    ]
    for prefix, name, layer in layers:
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "time_emb" not in name:
            shape = layer.weight.shape
            low = LowRank(shape, CONV_DIM if shape[2:].numel() > 1 else DIM)
            adapter[f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"] = low
            register_parametrization(layer, "weight", low)
    return adapter


def write(adapter: Any, file: Path, texts: list[str], steps: int) -> None:
    """kohya's format: fp16, each alpha as large as its rank, and what it was trained on in the metadata."""
    tensors = {}
    for name, low in adapter.items():
        tensors[f"{name}.lora_down.weight"] = low.down.detach().half().contiguous()
        tensors[f"{name}.lora_up.weight"] = low.up.detach().half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(len(low.down)))
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "Flat emoji",
        "modelspec.trigger_phrase": TRIGGER,
        "modelspec.license": "Apache-2.0; trained on Fluent flat emoji, MIT, (c) Microsoft Corporation",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "emoji",
        "ss_output_name": file.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(DIM),
        "ss_network_alpha": str(DIM),
        "ss_network_args": json.dumps({"conv_dim": str(CONV_DIM), "conv_alpha": str(CONV_DIM)}),
        "ss_steps": str(steps),
        "ss_tag_frequency": json.dumps({f"1_{TRIGGER}": Counter([TRIGGER] * len(texts) + texts)}),
    }
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(file)


def main() -> None:
    parse = options(__doc__, minutes=12, batch=16)
    parse.add_argument("file", type=Path, help="written as safetensors")
    args = parse.parse_args()
    flat.fetch(args.work)
    chosen = flat.emoji(args.work)
    _, latents = built_in.pictures_and_latents(chosen, args.size)
    base, tokenizer = built_in.conditional()
    torch.manual_seed(0)
    adapter = adapt(base)
    average = optim.Average(adapter, decay=0.99)
    run = Run("style", args, adapter, optim.Optimizer([adapter], muon_lr=0, adam_lr=6e-3), average)
    alphas, rng = diffusion.noise_schedule().alphas_cumprod, random.Random(run.steps)

    def loss() -> torch.Tensor:
        rows = torch.randperm(len(chosen))[: args.batch].tolist()
        texts = [captioned(chosen[i], rng) for i in rows]
        return diffusion.min_snr_loss(base, latents[rows], caption.ids(tokenizer, texts), alphas)

    run.train(loss)
    write(average.module, args.file, [one.label for one in chosen], run.steps)


def captioned(one: data.Emoji, rng: random.Random) -> str:
    """The captions that the model knows, half of them with the trigger."""
    text = caption.caption(one, rng)
    return f"{text}, {TRIGGER}" if text and rng.random() < 0.5 else text


if __name__ == "__main__":
    main()
