"""Checkpoints to the diffusers folder that ships: `python -m tightfit.export.emoji.publish WORK FOLDER`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from ..folder import write_component
from . import autoencoder, diffusion
from .run import load_checkpoint


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument(
        "work", type=Path, help="folder with autoencoder.pt, diffusion.pt and, if trained, decoder.pt"
    )
    parse.add_argument("folder", type=Path, help="replaced, but for a README.md in it")
    args = parse.parse_args()

    present = {path.name for path in args.folder.iterdir()} if args.folder.exists() else set()
    if present - {"README.md"} and "model_index.json" not in present:
        raise SystemExit(f"{args.folder} is not empty and holds no model: name another folder")
    vae = autoencoder.build()
    best = next(args.work / name for name in ("decoder.pt", "autoencoder.pt") if (args.work / name).exists())
    vae.load_state_dict(load_checkpoint(best)["average"])
    trained = load_checkpoint(args.work / "diffusion.pt")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    model = diffusion.Conditional(
        diffusion.build_unet(trained.get("side", 16)), diffusion.build_text_encoder(tokenizer)
    )
    model.load_state_dict(trained["average"])
    vae.register_to_config(
        scaling_factor=trained["scaling"],
        sample_size=model.unet.config["sample_size"] * 8,
        force_upcast=False,
    )

    partial = args.folder.with_name(f".{args.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # What transformers loads it as unless told; diffusers loads the rest so.
    model.text_encoder.config.dtype = torch.float32
    networks = {"text_encoder": model.text_encoder, "unet": model.unet, "vae": vae}
    index: dict[str, Any] = {
        name: write_component(
            partial / name,
            network,
            {n: (torch.float16, w.shape) for n, w in network.state_dict().items()},
            (w.half() for w in network.state_dict().values()),
        )
        for name, network in networks.items()
    }
    shutil.copytree(args.work / "tokenizer", partial / "tokenizer")
    diffusion.noise_schedule().save_config(partial / "scheduler")
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (partial / "model_index.json").write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
    manifest = {
        "version": 1,
        "source": "tightfit.export.emoji",
        "defaults": {"guidance_scale": diffusion.GUIDANCE},
    }
    (partial / "tightfit.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if (args.folder / "README.md").exists():
        shutil.copy(args.folder / "README.md", partial)
    shutil.rmtree(args.folder, ignore_errors=True)
    partial.rename(args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(
        f"{args.folder}: {size / 1e6:.1f} MB, scaling factor {trained['scaling']:.4f}, "
        f"from {best.name} and diffusion.pt"
    )


if __name__ == "__main__":
    main()
