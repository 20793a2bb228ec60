"""Train the autoencoder of the emoji model: `python -m tightfit.export.emoji.autoencoder --help`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from . import data, optim

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
    """Mean over pictures (count, 3, h, w; uint8) of the decibels of decode(encode(x)), as rounded to 8 bits."""
    values = []
    for batch in pictures.split(16):
        x = batch.float() / 127.5 - 1
        y = model.decode(model.encode(x).latent_dist.mode()).sample
        error = (((y.clamp(-1, 1) + 1) * 127.5).round() - batch.float()) / 255
        values.append(-10 * error.square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("work", type=Path, help="folder for the data, checkpoints and log")
    parse.add_argument("--minutes", type=float, default=30, help="training time, this run and those it resumes")
    parse.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parse.add_argument("--batch", type=int, default=4)
    parse.add_argument("--decoder-only", action="store_true", help="keep the latents as they are (the U-Net knows them)")
    parse.add_argument("--device", default="cpu")
    args = parse.parse_args()

    data.fetch(args.work)
    chosen = data.emoji(args.work)
    pictures = torch.from_numpy(data.pixels(chosen, args.size)).permute(0, 3, 1, 2).contiguous().to(args.device)
    torch.manual_seed(0)
    model = build().to(args.device)
    trained = [model.decoder, model.post_quant_conv] if args.decoder_only else [model]
    name = "decoder" if args.decoder_only else "autoencoder"
    checkpoint, spent, steps = args.work / f"{name}.pt", 0.0, 0
    if args.decoder_only:
        model.load_state_dict(torch.load(args.work / "autoencoder.pt", weights_only=True)["average"])
    optimizer = optim.Optimizer(trained, muon_lr=5e-3, adam_lr=1e-3)
    average = optim.Average(model, decay=0.998)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        spent, steps, average.steps = state["spent"], state["steps"], state["steps"]

    budget, last, report = args.minutes * 60, time.monotonic(), spent
    while spent < budget:
        x = pictures[torch.randint(len(pictures), (args.batch,))].float() / 127.5 - 1
        with torch.autocast(args.device, torch.bfloat16):
            with torch.set_grad_enabled(not args.decoder_only):
                posterior = model.encode(x).latent_dist
                latents = posterior.sample()
            y = model.decode(latents).sample
        loss = (y.float() - x).square().mean()
        if not args.decoder_only:
            loss = loss + 1e-6 * posterior.kl().sum() / x.numel()
        loss.backward()
        optimizer.step(optim.schedule(spent / budget))
        average.update(model)
        steps += 1
        spent, last = spent + time.monotonic() - last, time.monotonic()
        if spent - report > 120 or spent >= budget:
            report = spent
            line = f"{spent / 60:.1f} min, {steps} steps, loss {loss.item():.5f}, {psnr(average.module, pictures[::8]):.2f} dB"
            with (args.work / f"{name}.log").open("a") as log:
                print(line, file=log)
            print(line, flush=True)
            state = {"model": model.state_dict(), "average": average.module.state_dict(), "spent": spent, "steps": steps}
            torch.save(state | {"optimizer": optimizer.state_dict()}, checkpoint)
    print(f"all {len(pictures)} pictures: {psnr(average.module, pictures):.2f} dB")


if __name__ == "__main__":
    main()
