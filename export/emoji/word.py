"""Teach the built-in model a word by textual inversion: `python -m tightfit.export.emoji.word --help`.

The word's vectors are all that is trained, on the one picture. Written as A1111 does (`emb_params`).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrize import register_parametrization

from . import built_in, caption, data, diffusion, optim
from .run import Run, options


class Taught(torch.nn.Module):
    """An embedding table with `count` rows more, which are learned."""

    def __init__(self, table: torch.Tensor, count: int) -> None:
        super().__init__()
        start = table.mean(0) + 0.1 * table.std() * torch.randn(count, table.shape[1])
        self.vectors = torch.nn.Parameter(start)

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return torch.cat([table, self.vectors])


def main() -> None:
    parse = options(__doc__, minutes=3, batch=8)
    parse.add_argument("file", type=Path, help="written as safetensors")
    parse.add_argument("--label", default="pizza", help="the emoji whose picture the word comes to mean")
    parse.add_argument("--vectors", type=int, default=4)
    args = parse.parse_args()
    data.fetch(args.work)
    chosen = [one for one in data.emoji(args.work) if one.label == args.label]
    if not chosen:
        raise SystemExit(f"no emoji is called {args.label!r}: take a label of emojibase, such as pizza")
    _, latents = built_in.pictures_and_latents(chosen, args.size)
    base, tokenizer = built_in.conditional()
    torch.manual_seed(0)
    encoder: Any = base.text_encoder
    table = encoder.get_input_embeddings()
    taught = Taught(table.weight.detach(), args.vectors)
    register_parametrization(table, "weight", taught, unsafe=True)  # of another shape
    word = [f"<{i}>" for i in range(args.vectors)]
    tokenizer.add_tokens(word)
    average = optim.Average(taught, decay=0.9)
    run = Run("word", args, taught, optim.Optimizer([taught], muon_lr=0, adam_lr=2e-2), average)
    alphas, rng = diffusion.noise_schedule().alphas_cumprod, random.Random(run.steps)
    while run.unfinished:
        texts = [rng.choice(caption.TEMPLATES).format(" ".join(word)) for _ in range(args.batch)]
        ids = caption.ids(tokenizer, texts)
        loss = diffusion.min_snr_loss(base, latents.expand(args.batch, -1, -1, -1), ids, alphas)
        run.step(loss)
        if run.due(30):
            run.report(f"loss {loss.item():.4f}")
    vectors: Any = average.module.vectors
    save_file({"emb_params": vectors.detach()}, args.file)


if __name__ == "__main__":
    main()
