"""Figures and pictures of what ships beside the emoji model: a style, a word and a tiny decoder.

    python -m tightfit.benchmarks.emoji_extras WORK

WORK is the folder of the training (`python -m tightfit.export.emoji.style` downloads the pictures into it).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import Pipeline, Request, load, read_adapter
from ..export.emoji import built_in, data, flat
from ..export.emoji.diffusion import match
from ..export.emoji.tiny import psnr
from ..runtime.adapters import textual_inversion
from ..runtime.adapters.vae import Vae
from ..runtime.models.hub import BESIDE
from .record import record

WEIGHTS = (0.0, 0.5, 1.0)
WORDS = ("🍕", "🍕", "🍕 emoji", "a picture of a 🍕")  # each with another seed
SHEET = ("a red heart", "grinning face", "cat face", "pizza emoji", "a picture of a rocket", "hot beverage")


def decibels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR of each picture (count, 3, h, w; values to 255)."""
    return -10 * ((a.double() - b.double()) / 255).square().mean((1, 2, 3)).log10()


def as_tensor(pictures: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def sheet(pipe: Pipeline, lora: Path) -> Image.Image:
    """A column for each prompt, a row for each weight."""
    side, below, left = pipe.spec.native_size[0], 14, 28
    image = Image.new("RGB", (left + len(SHEET) * side, len(WEIGHTS) * side + below), "white")
    draw = ImageDraw.Draw(image)
    for row, weight in enumerate(WEIGHTS):
        draw.text((4, row * side + side / 2), f"{weight:g}", "black", anchor="lm")
        for column, prompt in enumerate(SHEET):
            request = Request(prompt, seed=0, adapters=(read_adapter(lora, weight),))
            image.paste(pipe.generate(request).images[0], (left + column * side, row * side))
            at = left + (column + 0.5) * side, image.height - below
            draw.text(at, prompt, "black", anchor="ma")
    return image


def style(
    pipe: Pipeline, lora: Path, labels: list[str], right: list[int], styles: dict[str, torch.Tensor]
) -> Iterator[dict[str, Any]]:
    """Of pictures painted at each weight: how near they are to each style's, and how often the nearest of
    all flat pictures is the right one."""
    for weight in WEIGHTS:
        adapters = (read_adapter(lora, weight),)
        drawn = as_tensor(
            [pipe.generate(Request(label, seed=0, adapters=adapters)).images[0] for label in labels]
        )
        near = {name: decibels(drawn, pictures[right]) for name, pictures in styles.items()}
        yield {
            "weight": weight,
            **{f"db_to_{name}": round(values.mean().item(), 2) for name, values in near.items()},
            "nearer_to_flat": (near["flat"] > near["3d"]).float().mean().item(),
            "match_among_flat": match(drawn, styles["flat"], right)[0],
        }


def tiny(pipe: Pipeline, folder: Path, labels: list[str]) -> dict[str, Any]:
    """Of painted pictures, seconds in turns: the tiny decoder beside the model's own."""
    pictures: dict[str, list] = {"full": [], "tiny": []}
    seconds: dict[str, list[float]] = {"full": [], "tiny": []}
    for label in labels:
        for name, adapters in (("full", ()), ("tiny", (Vae(folder),))):
            result = pipe.generate(Request(label, seed=0, adapters=adapters))
            pictures[name].append(result.images[0])
            seconds[name].append(result.stages["decode"].seconds)
    near = decibels(as_tensor(pictures["full"]), as_tensor(pictures["tiny"]))
    spent = {f"{name}_decode_seconds": round(statistics.median(seconds[name]), 4) for name in seconds}
    return {
        "tiny_db_to_full_mean": round(near.mean().item(), 2),
        "tiny_db_to_full_least": round(near.min().item(), 2),
        **spent,
    }


def word(pipe: Pipeline, file: Path, pictures: torch.Tensor, labels: list[str]) -> dict[str, float]:
    """How often a pizza is painted for its character, which the model does not know, without and with it."""
    right = [labels.index("pizza")] * len(WORDS)
    matches = {}
    for name, adapters in (("without", ()), ("with", (textual_inversion.read(file, "🍕"),))):
        requests = [Request(text, seed=seed, adapters=adapters) for seed, text in enumerate(WORDS)]
        drawn = as_tensor([pipe.generate(request).images[0] for request in requests])
        matches[name] = match(drawn, pictures, right)[0]
    return matches


def encoded(folder: Path, chosen: list[data.Emoji]) -> dict[str, float]:
    """PSNR of pictures encoded and decoded, by the tiny decoder and by the model's own."""
    from diffusers import AutoencoderTiny

    kind: Any = AutoencoderTiny
    pictures, latents = built_in.pictures_and_latents(chosen, 128)
    whole = built_in.autoencoder()
    decoders = {
        "tiny": kind.from_pretrained(folder, torch_dtype=torch.float32).decoder,
        "full": lambda z: whole.decode(z / whole.config.scaling_factor).sample,
    }
    return {name: round(psnr(decoder, latents, pictures), 2) for name, decoder in decoders.items()}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("work", type=Path)
    parse.add_argument("--labels", type=int, default=16)
    parse.add_argument("--lora", type=Path, default=BESIDE["flat"])
    parse.add_argument("--vae", type=Path, default=BESIDE["tiny"])
    parse.add_argument("--sheet", type=Path, help="write the pictures here and measure nothing")
    args = parse.parse_args()
    with load("emoji", precision="fp32", device="cpu") as pipe:
        if args.sheet:
            sheet(pipe, args.lora).quantize(256).save(args.sheet, optimize=True)
            return
        flat.fetch(args.work)
        chosen = {"3d": data.emoji(args.work), "flat": flat.emoji(args.work)}
        styles = {name: as_tensor(list(data.pixels(those, 128))) for name, those in chosen.items()}
        right = np.linspace(0, len(chosen["3d"]) - 1, args.labels).round().astype(int).tolist()
        labels = [chosen["3d"][i].label for i in right]
        results = {
            "labels": len(labels),
            "style": list(style(pipe, args.lora, labels, right, styles)),
            "tiny": tiny(pipe, args.vae, labels),
            "encoded_psnr": {
                name: encoded(args.vae, [those[i] for i in right]) for name, those in chosen.items()
            },
            "word_match": word(pipe, BESIDE["pizza"], styles["3d"], [one.label for one in chosen["3d"]]),
            "lora_bytes": args.lora.stat().st_size,
            "vae_bytes": sum(file.stat().st_size for file in args.vae.iterdir()),
        }
    for name, value in results.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{name}: {line}")
    record("emoji_extras", results)


if __name__ == "__main__":
    main()
