"""Figures and contact sheets for the emoji model's card: the built-in model, run as a user runs it.

    python -m tightfit.benchmarks.emoji WORK

WORK is the folder of the training (`python -m tightfit.export.emoji.autoencoder` downloads the pictures into
it). `--gallery` instead writes the small labelled pictures that metrics.py looks pictures up in.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from .. import Pipeline, Request, load
from ..export.emoji import data
from ..export.emoji.autoencoder import psnr
from ..export.emoji.diffusion import match
from .metrics import GALLERY, THUMBNAIL
from .record import record
from .suite import PROMPTS

SHEET = tuple(prompt for theme in range(4) for prompt in PROMPTS[theme::4])


def contact_sheet(pipe: Pipeline, prompts: tuple[str, ...], columns: int, seed: int) -> Image.Image:
    """A grid of pictures with their prompts beneath."""
    side, below = pipe.spec.native_size[0], 14
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + below)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * side, i // columns * (side + below)
        sheet.paste(pipe.generate(Request(prompt, seed=seed)).images[0], (x, y))
        draw.text((x + side / 2, y + side), prompt, "black", anchor="ma")
    return sheet


def gallery(chosen: list[data.Emoji], columns: int = 27) -> None:
    """All pictures on white, averaged down to THUMBNAIL pixels. The labels are in the file, in the same
    order."""
    side, pixels = THUMBNAIL, torch.from_numpy(data.pixels(chosen, 128)).permute(0, 3, 1, 2).float()
    small = (
        torch.nn.functional.interpolate(pixels, (side, side), mode="area")
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
    )
    sheet = Image.new("RGB", (columns * side, -(-len(small) // columns) * side), "white")
    for i, tile in enumerate(small):
        sheet.paste(Image.fromarray(tile), (i % columns * side, i // columns * side))
    info = PngInfo()
    info.add_text("labels", json.dumps([emoji.label for emoji in chosen]))
    info.add_text("Copyright", "Fluent Emoji, (c) Microsoft Corporation, MIT License")
    sheet.save(GALLERY, pnginfo=info, optimize=True)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("work", type=Path)
    parse.add_argument("--model", default="emoji")
    parse.add_argument("--precision", default="fp32")
    parse.add_argument("--labels", type=int, default=200)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--guidance-scale", type=float)
    parse.add_argument("--scheduler")
    parse.add_argument("--sheet", type=Path, help="write the contact sheet here and measure nothing")
    parse.add_argument(
        "--gallery", action="store_true", help="write the pictures that others are looked up in"
    )
    args = parse.parse_args()
    if args.gallery:
        data.fetch(args.work)
        gallery(data.emoji(args.work))
        return
    with load(args.model, precision=args.precision, device="cpu") as pipe:
        if args.sheet:
            contact_sheet(pipe, SHEET, 8, args.seed).save(args.sheet)
            return
        data.fetch(args.work)
        chosen = data.emoji(args.work)
        pictures = torch.from_numpy(data.pixels(chosen, pipe.spec.native_size[0])).permute(0, 3, 1, 2)
        vae = AutoencoderKL.from_pretrained(pipe.spec.decoder.folder, dtype=torch.float32)
        right = np.linspace(0, len(chosen) - 1, args.labels).round().astype(int).tolist()
        start = time.perf_counter()
        options = {"guidance_scale": args.guidance_scale, "scheduler": args.scheduler}
        results_of = [
            pipe.generate(Request(chosen[i].label, seed=args.seed, num_inference_steps=20, **options))
            for i in right
        ]
        drawn = [np.array(result.images[0]) for result in results_of]
        seconds = (time.perf_counter() - start) / len(drawn)
        top1, top5 = match(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2), pictures, right)
        results = {
            "pictures": len(chosen), "labels": len(right), "top1": top1, "top5": top5,
            "seconds_per_picture": round(seconds, 2),
            "autoencoder_psnr": round(psnr(vae, pictures), 2), "precision": args.precision,
            "plan": results_of[0].plan.summary(),
        }  # fmt: skip
    print(*(f"{name}: {value}" for name, value in results.items()), sep="\n")
    record("emoji", results)


if __name__ == "__main__":
    main()
