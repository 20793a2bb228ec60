"""Train the autoencoder of the emoji model: `python -m tightfit.export.emoji.autoencoder --help`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from . import optim
from .run import Run, emoji_and_pixels, load_checkpoint, options

CHANNELS = (16, 32, 64, 128)


def build() -> Any:
    """128x128x3 pixels to 16x16x4 latents: SD's own factor of eight, in miniature."""
    kind: Any = AutoencoderKL
    return kind(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def psnr(model: Any, pictures: torch.Tensor) -> float:
    """Mean over pictures (count, 3, h, w; uint8) of the decibels of decode(encode(x)), as rounded to 8
    bits."""
    values = []
    for batch in pictures.split(16):
        x = batch.float() / 127.5 - 1
        y = model.decode(model.encode(x).latent_dist.mode()).sample
        error = (((y.clamp(-1, 1) + 1) * 127.5).round() - batch.float()) / 255
        values.append(-10 * error.square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def main() -> None:
    parse = options(__doc__, minutes=30, batch=4)
    parse.add_argument(
        "--decoder-only", action="store_true", help="keep the latents as they are (the U-Net knows them)"
    )
    args = parse.parse_args()
    _, pictures = emoji_and_pixels(args)
    model = build().to(args.device)
    if args.decoder_only:
        model.load_state_dict(load_checkpoint(args.work / "autoencoder.pt", args.device)["average"])
    trained = [model.decoder, model.post_quant_conv] if args.decoder_only else [model]
    optimizer = optim.Optimizer(trained, muon_lr=5e-3, adam_lr=1e-3)
    run = Run(
        "decoder" if args.decoder_only else "autoencoder",
        args,
        model,
        optimizer,
        optim.Average(model, decay=0.998),
    )
    while run.unfinished:
        x = pictures[torch.randint(len(pictures), (args.batch,))].float() / 127.5 - 1
        with torch.autocast(args.device, torch.bfloat16):
            with torch.set_grad_enabled(not args.decoder_only):
                posterior = model.encode(x).latent_dist
                latents = posterior.sample()
            y = model.decode(latents).sample
        loss = (y.float() - x).square().mean()
        run.step(loss if args.decoder_only else loss + 1e-6 * posterior.kl().sum() / x.numel())
        if run.due(120):
            run.report(f"loss {loss.item():.5f}, {psnr(run.average.module, pictures[::8]):.2f} dB")
    print(f"all {len(pictures)} pictures: {psnr(run.average.module, pictures):.2f} dB")


if __name__ == "__main__":
    main()
