"""Checkpoints to the diffusers folder that ships: `python -m tightfit.export.emoji.publish WORK FOLDER`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from . import autoencoder, diffusion
from .run import load_checkpoint


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("work", type=Path, help="folder with autoencoder.pt, diffusion.pt and, if trained, decoder.pt")
    parse.add_argument("folder", type=Path, help="replaced, but for a README.md in it")
    args = parse.parse_args()

    there = {path.name for path in args.folder.iterdir()} if args.folder.exists() else set()
    if there - {"README.md"} and "model_index.json" not in there:
        raise SystemExit(f"{args.folder} is not empty and holds no model: name another folder")
    vae = autoencoder.build()
    best = next(args.work / name for name in ("decoder.pt", "autoencoder.pt") if (args.work / name).exists())
    vae.load_state_dict(load_checkpoint(best)["average"])
    trained = load_checkpoint(args.work / "diffusion.pt")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    model = diffusion.Conditional(diffusion.build_unet(trained.get("side", 16)), diffusion.build_text_encoder(tokenizer))
    model.load_state_dict(trained["average"])
    vae.register_to_config(scaling_factor=trained["scaling"], sample_size=model.unet.config["sample_size"] * 8, force_upcast=False)

    partial = args.folder.with_name(f".{args.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial / "unet", model.unet, model.unet.state_dict(), "diffusion_pytorch_model")
    write(partial / "vae", vae, vae.state_dict(), "diffusion_pytorch_model")
    text = {n if n.startswith("text_model.") else f"text_model.{n}": w for n, w in model.text_encoder.state_dict().items()}
    model.text_encoder.config.architectures = ["CLIPTextModel"]
    model.text_encoder.config.dtype = torch.float32  # what transformers loads it as unless told; diffusers loads the rest so
    write(partial / "text_encoder", model.text_encoder.config, text, "model")
    shutil.copytree(args.work / "tokenizer", partial / "tokenizer")
    diffusion.noise_schedule().save_config(partial / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    manifest = {"version": 1, "source": "tightfit.export.emoji", "defaults": {"guidance_scale": diffusion.GUIDANCE}}
    (partial / "tightfit.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if (args.folder / "README.md").exists():
        shutil.copy(args.folder / "README.md", partial)
    shutil.rmtree(args.folder, ignore_errors=True)
    partial.rename(args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB, scaling factor {trained['scaling']:.4f}, from {best.name} and diffusion.pt")


def write(folder: Path, config: Any, weights: dict[str, torch.Tensor], stem: str) -> None:
    """Config and fp16 weights of one component."""
    folder.mkdir(parents=True)
    save = config.save_pretrained if stem == "model" else config.save_config
    save(folder)
    save_file({n: w.half().contiguous() for n, w in weights.items()}, folder / f"{stem}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
