"""Narrow models of each family, as diffusers folders and as checkpoints, by a mapping of the tests' own."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tightfit.export import random_model
from tightfit.runtime.models import vocabulary

FAMILIES = ("sd1", "sd2", "sdxl")
# As published, but narrow: heads are 64 wide but in SD 1.x's U-Net, groups are 32, the vocabulary is CLIP's.
WIDTHS = {"sd1": (64, 64, 96), "sd2": (64, 64, 128), "sdxl": (64, 64, 128)}
DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
KINDS = {"sd1": (CROSS, CROSS, DOWN), "sd2": (CROSS, CROSS, DOWN), "sdxl": (DOWN, CROSS, CROSS)}
ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "projection_dim": 64}


def narrow(family: str) -> dict:
    kinds = KINDS[family]
    unet = {
        "block_out_channels": WIDTHS[family],
        "down_block_types": kinds,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        "cross_attention_dim": 192 if family == "sdxl" else 64,
        "attention_head_dim": 8 if family == "sd1" else (1, 1, 2),
    }
    if family == "sdxl":
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 176}
        unet |= {"transformer_layers_per_block": (1, 1, 2)}
    layers = {"num_hidden_layers": 23 if family == "sd2" else 3}
    return {
        "unet": unet,
        "vae": {"block_out_channels": (32, 64), "layers_per_block": 1},
        "text_encoder": ENCODER | layers,
        "text_encoder_2": ENCODER
        | {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128}
        | layers,
    }


@pytest.fixture(scope="session")
def folders(made_once) -> dict[str, Path]:
    """A narrow diffusers folder of each family, fp32; tests must not change them."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            patch.setitem(random_model.TINY, family, narrow(family))
            write = partial(written, family)
            made[family] = made_once(f"narrow/{family}", write)
    return made


def written(family: str, folder: Path) -> None:
    merges = vocabulary.clip_merges()
    random_model.write(family, folder, tiny=True, precision="fp32", merges=merges)
    if family == "sd2":
        vocabulary.write(folder / "tokenizer", merges, 77, "!")  # as Stability's


@pytest.fixture(scope="session")
def files(folders, made_once) -> dict[str, Path]:
    """The same models, each in one file."""

    def write(family: str, file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        save_file(original(folders[family], family), file)

    return {family: made_once(f"single/{family}.safetensors", partial(write, family)) for family in FAMILIES}


@pytest.fixture
def refiner_twice(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """SDXL's refiner as a narrow folder, and in one file."""
    tiny = narrow("sdxl")
    tiny["unet"] |= {
        "down_block_types": (DOWN, CROSS, DOWN),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 128, "projection_class_embeddings_input_dim": 168,
        "transformer_layers_per_block": 2,
    }  # fmt: skip
    monkeypatch.setitem(random_model.TINY, "sdxl-refiner", tiny)
    folder, file = tmp_path / "refiner", tmp_path / "refiner.safetensors"
    random_model.write("sdxl-refiner", folder, tiny=True, precision="fp32")
    save_file(original(folder, "sdxl-refiner"), file)
    return folder, file


# -------------------------------------------------------------------------- the test's own mapping

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
         "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original(folder: Path, family: str) -> dict[str, torch.Tensor]:
    stored = {part.name: load_file(next(part.glob("*.safetensors"))) for part in folder.iterdir()
              if any(part.glob("*.safetensors"))}  # fmt: skip
    state = {f"model.diffusion_model.{unet_name(n, stored['unet'])}": t for n, t in stored["unet"].items()}
    for name, tensor in stored["vae"].items():
        pixel = ".attentions." in name and tensor.ndim == 2
        state[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if pixel else tensor
    if family == "sd2":
        state |= open_clip(stored["text_encoder"], "cond_stage_model.model.")
    elif family == "sdxl-refiner":
        state |= open_clip(stored["text_encoder_2"], "conditioner.embedders.0.model.")
    else:
        start = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        state |= {f"{start}.transformer.{name}": tensor for name, tensor in stored["text_encoder"].items()}
    if family == "sdxl":
        state |= open_clip(stored["text_encoder_2"], "conditioner.embedders.1.model.")
    # What training leaves in published files.
    state |= {"model_ema.decay": torch.ones(()), "betas": torch.ones(1000)}
    state |= {f"model_ema.{n[6:].replace('.', '')}": torch.zeros(1) for n in [*state] if "output_blocks" in n}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def unet_name(name: str, all_names) -> str:
    part, leaf = name.rsplit(".", 1)
    if part in ENDS:
        return f"{ENDS[part]}.{leaf}"
    side, *words = name.split(".")
    if side == "mid_block":
        number = 1 if words[0] == "attentions" else 2 * int(words[1])
        return f"middle_block.{number}.{unet_part(words[0], words[2:])}"
    block, kind, number = int(words[0]), words[1], int(words[2])
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.op.{leaf}"
        return f"input_blocks.{3 * block + number + 1}.{kind[0] == 'a':d}.{unet_part(kind, words[3:])}"
    if kind == "upsamplers":
        beside = f"up_blocks.{block}.attentions.2.norm.weight" in all_names
        return f"output_blocks.{3 * block + 2}.{1 + beside}.conv.{leaf}"
    return f"output_blocks.{3 * block + number}.{kind[0] == 'a':d}.{unet_part(kind, words[3:])}"


def unet_part(kind: str, words: list[str]) -> str:
    return ".".join([RESNET[words[0]], *words[1:]] if kind == "resnets" else words)


def vae_name(name: str, blocks: int = 2) -> str:
    for new, old in VAE_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{blocks - 1 - int(m[1])}.", name)
    for new, old in (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                     ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")):  # fmt: skip
        name = name.replace(new, old)
    return name


def open_clip(tensors, start: str) -> dict[str, torch.Tensor]:
    state = {"logit_scale": torch.ones(())}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            state["text_projection"] = tensor.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            parts = [tensors[f"text_model.{name.replace('q_proj', f'{x}_proj')}"] for x in "qkv"]
            state[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", name):
            if match[2] in LAYER:
                state[f"transformer.resblocks.{match[1]}.{LAYER[match[2]]}.{match[3]}"] = tensor
        else:
            name = name.replace("embeddings.token", "token").replace("final_layer_norm", "ln_final")
            state[name.replace("embeddings.position_embedding.weight", "positional_embedding")] = tensor
    if "transformer.resblocks.22.ln_1.bias" in state:  # SD 2.x has one more, which is not used
        last = {n: t for n, t in state.items() if ".22." in n}
        state |= {name.replace(".22.", ".23."): torch.full_like(t, torch.nan) for name, t in last.items()}
        state["text_projection"] = torch.full((64, 64), torch.nan)
    return {start + name: tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def parts_at_once():
    """Called with a count of bytes as a file begins (`dry_runs_once`): wide layers answer some tokens at a
    time."""
    from tightfit.runtime.models.families import parts

    with pytest.MonkeyPatch.context() as patch:
        yield lambda count: patch.setattr(parts, "AT_ONCE", count)


def _decibels(image, wanted) -> float:
    error = np.square(np.asarray(image, float) - wanted).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def _check_predicted(result) -> None:
    for stage, predicted in result.plan.predicted.stages.items():
        measured = result.stages[stage].peak_bytes
        assert abs(measured - predicted) <= 0.05 * predicted, (stage, measured, predicted)


@pytest.fixture(scope="session")
def opened():
    """Called with the name of a pipeline of diffusers', and its folder, or its parts: that, in silence."""

    def made(kind, *of, **parts):
        import diffusers

        pipeline = getattr(diffusers, kind)
        pipe = pipeline.from_pretrained(*of, **parts) if of else pipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


@pytest.fixture(scope="session")
def decibels():
    """PSNR of a picture to wanted values of 0 to 255; infinite for the same."""
    return _decibels


@pytest.fixture(scope="session")
def check_predicted():
    """Called with a result: each stage took what was predicted, within 5 %."""
    return _check_predicted


@pytest.fixture(scope="session")
def check_pictures():
    """Called with a folder, requests by name ("oblong" and "cut" among them) and what paints one by
    diffusers: ours are those, staged and streamed, within what was predicted."""

    def check(folder, cases, reference) -> None:
        wanted = {name: reference(request) for name, request in cases.items()}
        other = reference(replace(cases["oblong"], prompt="a dog"))
        assert _decibels(other, wanted["oblong"]) < 40  # the text is seen
        way = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}  # as few plans as can be
        for residency, names in {"staged": [*cases], "streamed": ["oblong"]}.items():
            with tightfit.load(str(folder), precision="fp32", residency=residency, **way) as ours:
                for name, request in ((name, cases[name]) for name in names):
                    result = ours.generate(request)
                    assert _decibels(result.images[0], wanted[name]) >= 75, (name, residency)
                    _check_predicted(result)
                    assert any("too long" in notice for notice in result.notices) == (name == "cut")

    return check


@pytest.fixture(scope="session")
def check_painted_over():
    """Called with a folder, an oblong request, and what paints one by diffusers over a picture under a mask:
    there ours is the same, within what was predicted."""

    def check(folder, request, theirs) -> None:
        from tightfit.runtime.conditions.input_pictures import open_picture
        from tightfit.runtime.conditions.mask import Inpainting

        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))
        white = np.zeros((96, 64), np.uint8)
        white[16:50, 8:40] = 255
        mask, request = Image.fromarray(white), replace(request, num_inference_steps=4)
        over = Inpainting(open_picture(picture), mask=open_picture(mask), strength=0.5, blur=0)
        way = {"device": "cpu", "attention": "sdpa", "tiling": "whole"}
        with tightfit.load(str(folder), precision="fp32", residency="staged", **way) as ours:
            result = ours.generate(replace(request, conditions=(over,)))
        _check_predicted(result)
        wanted = theirs(request, image=picture, mask_image=mask, strength=0.5)
        assert _decibels(np.asarray(result.images[0])[white > 0], wanted[white > 0]) >= 75

    return check
