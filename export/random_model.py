"""Whole model folders with random weights: `python -m tightfit.export.random_model sd1 DIR`.

Architectures are real, from their public configs. The folders measure memory and speed, and stand in for
published weights in tests. `--tiny` shrinks every width, to a folder of a few hundred kilobytes. `--sparse`
draws the first rows of each weight alone and leaves holes for the rest, so that a model of 16 GB takes some
hundred megabytes of disk. The pictures are noise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..runtime.models import vocabulary
from ..runtime.models.families import qwen3, t5
from .folder import appearing, write_component
from .safetensors_file import first_side

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
MODELS["flux2-klein"] = {  # FLUX.2-klein-4B
    "pipeline": "Flux2KleinPipeline",
    "classes": {
        "text_encoder": "Qwen3ForCausalLM", "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2", "tokenizer": "Qwen2Tokenizer",
    },
    "transformer": {
        "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": False,
    },
    "vae": {},
    "text_encoder": qwen3.DEFAULTS | {"tie_word_embeddings": True},
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
        "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True,
        "time_shift_type": "exponential", "num_train_timesteps": 1000,
    },
    "gain": 3.0,  # else a block changes its input by a thousandth, and errors in it would not be seen
}  # fmt: skip
MODELS["z-image"] = {  # Z-Image-Turbo
    "pipeline": "ZImagePipeline",
    "classes": {
        "text_encoder": "Qwen3ForCausalLM", "transformer": "ZImageTransformer2DModel",
        "tokenizer": "Qwen2Tokenizer",
    },
    "transformer": {},
    "vae": _VAE | {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False, "sample_size": 1024,
    },
    "text_encoder": qwen3.DEFAULTS | {"tie_word_embeddings": True},
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": False,
    },
    "gain": 3.0,
}  # fmt: skip
MODELS["sd3"] = {  # stable-diffusion-3.5-medium
    "pipeline": "StableDiffusion3Pipeline",
    "classes": {
        "text_encoder": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel", "tokenizer_3": "T5TokenizerFast",
    },
    "transformer": {
        "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
    "vae": MODELS["z-image"]["vae"] | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": _CLIP_L,
    "text_encoder_2": MODELS["sdxl"]["text_encoder_2"],
    "text_encoder_3": t5.DEFAULTS,
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    },
    "gain": 3.0,
}  # fmt: skip
MODELS["sd3-without-t5"] = {name: part for name, part in MODELS["sd3"].items() if name != "text_encoder_3"}
MODELS["flux1-dev"] = {  # FLUX.1-dev
    "pipeline": "FluxPipeline",
    "classes": {
        "text_encoder_2": "T5EncoderModel", "transformer": "FluxTransformer2DModel",
        "tokenizer_2": "T5TokenizerFast",
    },
    "transformer": {"guidance_embeds": True},
    "vae": MODELS["z-image"]["vae"],
    "text_encoder": _CLIP_L,
    "text_encoder_2": t5.DEFAULTS,
    "scheduler": MODELS["flux2-klein"]["scheduler"],
    "gain": 3.0,
}  # fmt: skip
MODELS["flux1-schnell"] = MODELS["flux1-dev"] | {  # FLUX.1-schnell
    "transformer": {"guidance_embeds": False},
    "scheduler": MODELS["flux2-klein"]["scheduler"] | {"shift": 1.0, "use_dynamic_shifting": False},
}
CLASSES = {
    "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "tokenizer": "CLIPTokenizer",
}  # fmt: skip
_EXTRA: dict[str, dict[str, Any]] = {  # of model_index.json
    "sdxl": {"force_zeros_for_empty_prompt": True},
    "sdxl-refiner": {
        "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
        "text_encoder": [None, None], "tokenizer": [None, None],
    },
    "flux2-klein": {"is_distilled": True},
    "z-image": {},
    "sd3": {},
    "flux1-dev": {},
    "flux1-schnell": {},
    "sd3-without-t5": {"text_encoder_3": [None, None], "tokenizer_3": [None, None]},
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
_VAE_TINY = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 64}
for _tiny in TINY.values():
    _tiny |= {
        "text_encoder": _TINY_TEXT,
        "vae": _VAE_TINY,
    }
# Of those that follow what no shape tells is as published, so that files of ComfyUI can be them: groups
# of 32 in the VAE, and how fast positions turn.
_VAE_32 = _VAE_TINY | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
# Layers enough for those that are read, and one that is not, and so wide that most are quantised.
TINY["flux2-klein"] = {
    "transformer": {
        "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 4, "joint_attention_dim": 192, "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 32,
    },
    "vae": {"latent_channels": 8, **_VAE_32},
    "text_encoder": {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 28,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip
# Layers as many as there are, as the last but one is read.
TINY["z-image"] = {
    "transformer": {
        "dim": 192, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6, "cap_feat_dim": 64,
        "axes_dims": (8, 12, 12),
    },
    "vae": _VAE_32,
    "text_encoder": TINY["flux2-klein"]["text_encoder"] | {"num_hidden_layers": 36},
}  # fmt: skip
# A block of each kind: with dual attention, without, and the last. Texts are padded to T5's width.
TINY["sd3"] = {
    "transformer": {
        "sample_size": 32, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 128,
        "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
    },
    "vae": _VAE_TINY,
    "text_encoder": _TINY_TEXT,
    "text_encoder_2": _TINY_TEXT,
    "text_encoder_3": {
        "vocab_size": 104, "d_model": 128, "d_kv": 16, "d_ff": 256, "num_layers": 3, "num_heads": 4,
    },
}  # fmt: skip
TINY["sd3-without-t5"] = TINY["sd3"]
TINY["flux1-dev"] = {
    "transformer": {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 128, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
    },
    "vae": _VAE_TINY,
    "text_encoder": _TINY_TEXT,
    "text_encoder_2": TINY["sd3"]["text_encoder_3"],
}  # fmt: skip
TINY["flux1-schnell"] = TINY["flux1-dev"]


def build(kind: str, config: dict[str, Any]) -> Any:
    """A network of that class on the meta device: shapes and no memory."""
    with torch.device("meta"):
        if made := getattr(diffusers, kind, None):
            blocks = len(config.get("block_out_channels", ()))
            halves = {
                "down_block_types": ("DownEncoderBlock2D",) * blocks,
                "up_block_types": ("UpDecoderBlock2D",) * blocks,
            }
            return made(**(halves if kind.startswith("AutoencoderKL") and blocks else {}), **config)
        made = getattr(transformers, kind)
        return made(made.config_class(**config))


@dataclass(frozen=True)
class Weights:
    """How weights are drawn: in which dtype, how large beside what torch initialises them to (variance 1 / 3
    fan-in), and whether only the first rows of each are."""

    dtype: torch.dtype
    gain: float = 1.0
    sparse: bool = False

    def drawn(self, module: torch.nn.Module, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Of each tensor of a state: matrices and convolutions random, norms one, biases zero, and a batch
        norm's statistics random too."""
        for name, (dtype, shape) in self.promised(module).items():
            yield self._drawn(name, shape, generator).to(dtype)

    def promised(self, module: torch.nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each tensor; of two that are one, the first alone."""
        stored = {*module.state_dict()}
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {
            name: (self.dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in tensors
            if name in stored
        }

    def _drawn(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        if name.endswith("running_mean"):
            return 0.5 * torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            return 0.5 + torch.rand(shape, generator=generator)
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")))
        is_table = "embedding" in name and "time" not in name
        deviation = 0.02 if is_table else (self.gain / (3 * math.prod(shape[1:]))) ** 0.5
        if name.endswith("pos_embed"):
            deviation = 0.5  # as of sines and cosines
        if self.sparse:
            first = first_side(shape)
            rows = max(1, _SPARSE // math.prod(shape[first + 1 :]))
            shape = (*shape[:first], min(rows, shape[first]), *shape[first + 1 :])
        return torch.randn(shape, generator=generator) * deviation


_TOKENIZERS = {"Qwen2Tokenizer": vocabulary.write_qwen, "T5TokenizerFast": vocabulary.write_t5}
_SPARSE = 2**16  # values of each tensor, where all others are holes


def write(
    family: str,
    folder: Path,
    *,
    tiny: bool = False,
    precision: str = "fp16",
    seed: int = 0,
    merges: Merges = (),
    sparse: bool = False,
) -> dict[str, int]:
    """Write the model into `folder`, which must not exist yet, a tensor at a time. Returns the number of
    parameters per network.

    `merges` are the tokenizer's (`vocabulary.clip_merges()` for SD's own). Without merges each letter is a
    token. `sparse`: only the first rows of each weight are drawn; the rest is zeros that take no disk.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder")
    model = MODELS[family]
    classes = CLASSES | model.get("classes", {})
    weights = Weights(DTYPES[precision], model.get("gain", 1.0), sparse)
    generator, counts = torch.Generator().manual_seed(seed), {}
    index: dict[str, Any] = {
        "_class_name": model["pipeline"],
        "scheduler": ["diffusers", model["scheduler"]["_class_name"]],
    }
    with appearing(folder) as partial:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae"):
            if name not in model:
                continue
            module = build(classes[name], model[name] | (TINY[family].get(name, {}) if tiny else {}))
            index[name] = write_component(
                partial / name, module, weights.promised(module), weights.drawn(module, generator)
            )
            if name.startswith("text_encoder"):
                tokenizer = name.replace("text_encoder", "tokenizer")
                kind = classes.get(tokenizer, classes["tokenizer"])
                index[tokenizer] = ["transformers", kind]
                if kind == "CLIPTokenizer":
                    pad = "!" if name.endswith("2") else vocabulary.END
                    vocabulary.write(partial / tokenizer, merges, 77, pad)
                else:
                    _TOKENIZERS[kind](partial / tokenizer)
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
    parse.add_argument("--sparse", action="store_true")
    parse.add_argument("--seed", type=int, default=0)
    args = parse.parse_args()
    try:
        merges = () if args.tiny else vocabulary.clip_merges()
        how = {name: getattr(args, name) for name in ("tiny", "sparse", "precision", "seed")}
        counts = write(args.family, args.folder, merges=merges, **how)
    except OSError as error:
        raise SystemExit(str(error)) from None
    print(args.folder, *(f"{name} {count:,} parameters" for name, count in counts.items()), sep="\n  ")


if __name__ == "__main__":
    main()
