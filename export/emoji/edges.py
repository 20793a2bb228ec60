"""Train a ControlNet by which the emoji model follows edges: `python -m tightfit.export.emoji.edges --help`.

It learns from the pictures turned, mirrored, moved and made smaller, which the model itself never paints:
the prompt says what is painted, the edges where.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from ...runtime.conditions.preprocess import canny
from ..folder import appearing
from . import built_in, caption, data, diffusion, optim
from .run import Run, options

HINT = (16, 32, 64, 96)  # channels between 128x128 edges and 16x16 latents; SD's are 16, 32, 96, 256
COPIES = 6  # of each picture
EMPTY = 0.3  # of captions, so that edges alone mean something


def build(unet: Any) -> Any:
    """A copy of the half of the U-Net that goes down, whose answers begin as zeros."""
    kind: Any = ControlNetModel
    control = kind.from_unet(unet, conditioning_embedding_out_channels=HINT)
    control.set_attn_processor(AttnProcessor())
    return control.requires_grad_(True)


def moved(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture (side, side, 3) elsewhere on white."""
    side = len(picture)
    image = Image.fromarray(picture)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    small = round(side * rng.uniform(0.5, 1))
    image, canvas = (
        image.resize((small, small), Image.Resampling.LANCZOS),
        Image.new("RGB", (side, side), "white"),
    )
    canvas.paste(image, (rng.randint(0, side - small), rng.randint(0, side - small)))
    return np.asarray(canvas)


class Following(torch.nn.Module):
    """The frozen model, whose U-Net is told the edges by the ControlNet."""

    def __init__(self, base: diffusion.Conditional, control: Any) -> None:
        super().__init__()
        self.base, self.control = base, control
        self.edges = torch.empty(0)

    def forward(self, noisy, step, tokens):
        hidden = self.base.text_encoder(tokens).last_hidden_state
        down, middle = self.control(noisy, step, hidden, self.edges, return_dict=False)
        beside = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.base.unet(noisy, step, hidden, **beside).sample


def write(control: Any, folder: Path) -> None:
    """In fp16, as diffusers writes it; replaces `folder`."""
    with appearing(folder) as partial:
        control.half().save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parse = options(__doc__, minutes=40, batch=16)
    parse.add_argument("folder", type=Path, help="replaced by the ControlNet, as diffusers writes one")
    args = parse.parse_args()
    data.fetch(args.work)
    chosen, rng = data.emoji(args.work), random.Random(0)
    shown = np.stack([
        moved(picture, rng) if copy else picture
        for copy in range(COPIES)
        for picture in data.pixels(chosen, args.size)
    ])  # fmt: skip
    edges = torch.from_numpy(np.stack([canny(picture)[..., 0] for picture in shown]))
    vae = built_in.autoencoder()
    latents = (
        diffusion.encode_all(vae, torch.from_numpy(shown).permute(0, 3, 1, 2)) * vae.config.scaling_factor
    )
    base, tokenizer = built_in.conditional()
    torch.manual_seed(0)
    control = build(base.unet)
    model = Following(base, control)
    optimizer = optim.Optimizer([control], muon_lr=2e-3, adam_lr=1e-3)
    run = Run("edges", args, control, optimizer, optim.Average(control, decay=0.995))
    alphas, rng = diffusion.noise_schedule().alphas_cumprod, random.Random(run.steps)

    def loss() -> torch.Tensor:
        rows = torch.randperm(len(latents))[: args.batch].tolist()
        texts = [caption.caption(chosen[row % len(chosen)], rng, EMPTY) for row in rows]
        model.edges = (edges[rows, None].float() / 255).expand(-1, 3, -1, -1)
        return diffusion.min_snr_loss(model, latents[rows], caption.ids(tokenizer, texts), alphas)

    run.train(loss)
    write(run.average.module, args.folder)


if __name__ == "__main__":
    main()
