"""Another VAE in place of the model's own, against diffusers' pipeline with the same one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import save_file
from tightfit.runtime.adapters import adapted
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.conditions.image import narrowed
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import inspect

SMALL = {"seed": 3, "num_inference_steps": 2, "width": 64, "height": 64, "scheduler": "euler"}


def tiny_vae(**config):
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    widths, blocks = (8, 8, 8, 8), (1, 2, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks, **config,
    )  # fmt: skip


def by_diffusers(folder, vae):
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe(
        "a cat", num_inference_steps=2, guidance_scale=5.0, width=64, height=64,
        generator=torch.Generator().manual_seed(3), output_type="pil",
    ).images[0]  # fmt: skip


# Calls of a changed network are followed anew by each pipeline, once for each way.
ONE_WAY = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}


def painted(folder, path, **wishes) -> tightfit.Result:
    with tightfit.load(str(folder), device="cpu", adapters=[Vae(path)], **{**ONE_WAY, **wishes}) as pipe:
        return pipe.generate(tightfit.Request("a cat", guidance_scale=5.0, **SMALL))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_tiny_decoder_paints_what_diffusers_paints(tiny_models, tmp_path, family):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "tiny")
    result = painted(tiny_models[family], tmp_path / "tiny")
    theirs = np.asarray(by_diffusers(tiny_models[family], vae), int)
    assert np.abs(np.asarray(result.images[0], int) - theirs).max() <= 1
    for stage, measured in result.stages.items():
        if (predicted := result.plan.predicted.stages.get(stage)) and stage != "encode":
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage


@pytest.mark.parametrize("family", ["sd1", "z-image"])
def test_a_picture_to_begin_with_is_the_same_beside_a_tiny_decoder(family, tiny_models, tiny_model, tmp_path):
    """The model's own encoder answers it, by whose numbers latents are scaled."""
    spec = inspect(tiny_models[family] if family in tiny_models else tiny_model(family))
    tiny_vae(latent_channels=spec.latents.channels).save_pretrained(tmp_path / "tiny")
    with_tiny = adapted(spec, [Vae(tmp_path / "tiny")])
    assert with_tiny.latent_affine != spec.latent_affine
    latents = np.random.default_rng(0).normal(size=(1, spec.latents.channels, 2, 3)).astype(np.float32)
    wanted = (latents - (spec.vae.get("shift_factor") or 0)) * spec.vae["scaling_factor"]
    np.testing.assert_allclose(narrowed(with_tiny, latents), wanted, rtol=1e-5)


def test_the_tiny_decoders_own_file_and_precisions(sd1, tmp_path):
    """The authors' file numbers its layers, with a clamp before the first."""
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "tiny")
    numbered = {
        f"{int(number) + 1}.{leaf}": weight.contiguous()
        for name, weight in vae.state_dict().items()
        for number, leaf in re.findall(r"^decoder\.layers\.(\d+)\.(.+)", name)
    }
    assert numbered
    # its widths and blocks are those of the published one, and not this one's
    save_file(numbered, tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(TightfitError, match="taesd"):
        painted(sd1, tmp_path / "taesd_decoder.safetensors")
    whole = painted(sd1, tmp_path / "tiny").images[0]
    half = painted(sd1, tmp_path / "tiny", precision="bf16").images[0]
    assert np.abs(np.asarray(whole, int) - np.asarray(half, int)).mean() < 5


def test_published_tiny_decoder_by_its_authors_names(sd1, tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(6)
    vae = AutoencoderTiny()
    numbered = {
        f"{int(number) + 1}.{leaf}": weight.contiguous()
        for name, weight in vae.state_dict().items()
        for number, leaf in re.findall(r"^decoder\.layers\.(\d+)\.(.+)", name)
    }
    save_file(numbered, tmp_path / "taesd_decoder.safetensors")
    theirs = np.asarray(by_diffusers(sd1, vae), int)
    ours = painted(sd1, tmp_path / "taesd_decoder.safetensors").images[0]
    assert np.abs(np.asarray(ours, int) - theirs).max() <= 1


def test_another_whole_vae(sd1, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    vae: AutoencoderKL = AutoencoderKL.from_config(AutoencoderKL.load_config(sd1 / "vae"))
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    theirs = np.asarray(by_diffusers(sd1, vae), int)
    assert np.abs(np.asarray(painted(sd1, tmp_path / "vae").images[0], int) - theirs).max() <= 1


def test_what_is_no_vae_for_the_model_is_refused(sd1, tmp_path):
    spec = inspect(str(sd1))
    tiny_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"9" * 5000 + ".weight": torch.zeros(2)}, tmp_path / "digits.safetensors")
    for path, said in {
        tmp_path / "wide": "decodes 16 channels",
        tmp_path / "other.safetensors": "nothing of a VAE's decoder",
        tmp_path / "digits.safetensors": "nothing of a VAE's decoder",
        sd1 / "unet": "holds a UNet2DConditionModel",
        tmp_path / "missing": "missing",
    }.items():
        with pytest.raises(TightfitError, match=said):
            adapted(spec, [Vae(path)])
