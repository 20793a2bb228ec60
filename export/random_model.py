"""Whole Stable Diffusion folders with random weights: `python -m tightfit.export.random_model sd1 DIR`.

Architectures are real, from their public configs. The folders measure memory and speed, and stand in for
published weights in tests. `--tiny` shrinks every width, to a folder of a few hundred kilobytes. The pictures
are noise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..runtime.models import vocabulary
from .folder import appearing, write_component

Merges = Sequence[tuple[str, str]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DOWN, _UP = "DownBlock2D", "UpBlock2D"
_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
_CLIP_L = _TEXT | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_UNET1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
    "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
    "layers_per_block": 2,
}

# What the configs on the hub say: stable-diffusion-v1-5, stable-diffusion-2-1 and
# stable-diffusion-xl-base-1.0; below stable-diffusion-xl-refiner-1.0.
MODELS: dict[str, dict[str, Any]] = {
    "sd1": {
        "pipeline": "StableDiffusionPipeline",
        "unet": _UNET1 | {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": _VAE | {"scaling_factor": 0.18215},
        "text_encoder": _CLIP_L,
        "scheduler": _SCHEDULE | {
            "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True,
            "clip_sample": False,
        },
    },
    "sd2": {
        "pipeline": "StableDiffusionPipeline",
        "unet": _UNET1 | {
            "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "sample_size": 96,
            "use_linear_projection": True, "upcast_attention": True,
        },
        "vae": _VAE | {"scaling_factor": 0.18215, "sample_size": 768},
        "text_encoder": _TEXT | {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512,
        },
        "scheduler": _SCHEDULE | {
            "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False,
            "prediction_type": "v_prediction",
        },
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN),
            "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
            "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20), "sample_size": 128, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _TEXT | {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
        },
        "scheduler": _SCHEDULE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    },
}  # fmt: skip
MODELS["sdxl-refiner"] = {
    **{name: MODELS["sdxl"][name] for name in ("vae", "text_encoder_2", "scheduler")},
    "pipeline": "StableDiffusionXLImg2ImgPipeline",
    "unet": MODELS["sdxl"]["unet"] | {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
        "up_block_types": (_UP, _CROSS_UP, _CROSS_UP, _UP),
        "transformer_layers_per_block": 4, "cross_attention_dim": 1280, "attention_head_dim": (6, 12, 24, 24),
        "projection_class_embeddings_input_dim": 2560,
    },
}  # fmt: skip
_EXTRA: dict[str, dict[str, Any]] = {  # of model_index.json
    "sdxl": {"force_zeros_for_empty_prompt": True},
    "sdxl-refiner": {
        "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
        "text_encoder": [None, None], "tokenizer": [None, None],
    },
}  # fmt: skip

_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
_TINY_TEXT |= {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
_TINY_UNET = {
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 32,
    "sample_size": 8,
    "norm_num_groups": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "sd1": {"unet": _TINY_UNET | {"attention_head_dim": 4}},
    "sd2": {"unet": _TINY_UNET | {"attention_head_dim": (2, 4, 4, 4)}},
    "sdxl": {
        "unet": _TINY_UNET | {
            "block_out_channels": (32, 64, 64), "cross_attention_dim": 64, "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        "text_encoder_2": _TINY_TEXT,
    },
    "sdxl-refiner": {
        "unet": _TINY_UNET | {
            "attention_head_dim": (2, 4, 4, 4), "transformer_layers_per_block": 2,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72,
        },
        "text_encoder_2": _TINY_TEXT,
    },
}  # fmt: skip
for _tiny in TINY.values():
    _tiny |= {
        "text_encoder": _TINY_TEXT,
        "vae": {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 64},
    }


def build(name: str, config: dict[str, Any], projected: bool) -> Any:
    """The network `name` (unet, vae, text_encoder, text_encoder_2) on the meta device: shapes and no
    memory."""
    with torch.device("meta"):
        if name == "unet":
            return UNet2DConditionModel(**config)
        if name == "vae":
            blocks = len(config["block_out_channels"])
            kinds = {
                "down_block_types": ("DownEncoderBlock2D",) * blocks,
                "up_block_types": ("UpDecoderBlock2D",) * blocks,
            }
            return AutoencoderKL(**kinds, **config)
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))


def random_weights(
    module: torch.nn.Module, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Matrices and convolutions as torch initialises them (variance 1 / 3 fan-in), norms one, biases zero."""
    weights = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            deviation = (
                0.02
                if "embedding" in name and "time" not in name
                else (3 * math.prod(parameter.shape[1:])) ** -0.5
            )
            weights[name] = (torch.randn(parameter.shape, generator=generator) * deviation).to(dtype)
        else:
            weights[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=dtype)
    return weights


def write(
    family: str,
    folder: Path,
    *,
    tiny: bool = False,
    precision: str = "fp16",
    seed: int = 0,
    merges: Merges = (),
) -> dict[str, int]:
    """Write the model into `folder`, which must not exist yet. Returns the number of parameters per network.

    `merges` are the tokenizer's (`vocabulary.clip_merges()` for SD's own). Without merges each letter is a
    token.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder")
    model = MODELS[family]
    generator, counts = torch.Generator().manual_seed(seed), {}
    index: dict[str, Any] = {
        "_class_name": model["pipeline"],
        "scheduler": ["diffusers", model["scheduler"]["_class_name"]],
    }
    with appearing(folder) as partial:
        for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
            if name not in model:
                continue
            module = build(
                name,
                model[name] | (TINY[family].get(name, {}) if tiny else {}),
                projected=name == "text_encoder_2",
            )
            index[name] = write_component(
                partial / name, module, random_weights(module, DTYPES[precision], generator)
            )
            if name.startswith("text_encoder"):
                tokenizer = name.replace("text_encoder", "tokenizer")
                vocabulary.write(
                    partial / tokenizer, merges, 77, "!" if name.endswith("2") else vocabulary.END
                )
                index[tokenizer] = ["transformers", "CLIPTokenizer"]
            counts[name] = sum(p.numel() for p in module.parameters())
        (partial / "scheduler").mkdir()
        (partial / "scheduler" / "scheduler_config.json").write_text(json.dumps(model["scheduler"], indent=2))
        extra = _EXTRA.get(family, {"safety_checker": [None, None], "feature_extractor": [None, None]})
        (partial / "model_index.json").write_text(json.dumps(index | extra, indent=2))
    return counts


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("family", choices=MODELS)
    parse.add_argument("folder", type=Path)
    parse.add_argument("--precision", choices=DTYPES, default="fp16")
    parse.add_argument("--tiny", action="store_true")
    parse.add_argument("--seed", type=int, default=0)
    args = parse.parse_args()
    try:
        merges = () if args.tiny else vocabulary.clip_merges()
        counts = write(
            args.family, args.folder, tiny=args.tiny, precision=args.precision, seed=args.seed, merges=merges
        )
    except OSError as error:
        raise SystemExit(str(error)) from None
    print(args.folder, *(f"{name} {count:,} parameters" for name, count in counts.items()), sep="\n  ")


if __name__ == "__main__":
    main()
