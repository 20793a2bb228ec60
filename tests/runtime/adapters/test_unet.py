"""Another U-Net in place of the model's own, against diffusers' pipeline with the same one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.runtime import infotext
from tightfit.runtime.adapters import adapted, written
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import inspect

SMALL = {"seed": 3, "num_inference_steps": 2, "width": 64, "height": 64, "scheduler": "euler"}


@pytest.fixture(scope="module")
def others(tiny_models, tmp_path_factory) -> dict[str, Path]:
    """Another random U-Net of each family, in a file alone."""
    from diffusers import UNet2DConditionModel

    folder, made = tmp_path_factory.mktemp("unets"), {}
    for family, model in tiny_models.items():
        torch.manual_seed(7)
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet"))
        made[family] = folder / f"{family}.safetensors"
        save_file(unet.state_dict(), made[family])
    return made


def unet(path) -> tuple:
    return written({"unet": [str(path)]})


def by_diffusers(folder: Path, file: Path) -> np.ndarray:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    others = {} if "sdxl" in folder.name else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **others)
    pipe.unet.load_state_dict(load_file(file))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    draw = torch.Generator().manual_seed(3)
    image = pipe(
        "a cat", num_inference_steps=2, guidance_scale=5.0, width=64, height=64, generator=draw,
        output_type="np",
    ).images[0]  # fmt: skip
    return (image * 255).round().astype(int)


# Calls of a changed network are followed anew by each pipeline, once for each way.
ONE_WAY = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}


def painted(folder: Path, file: Path, **wishes) -> tightfit.Result:
    with tightfit.load(str(folder), device="cpu", **{**ONE_WAY, **wishes}) as pipeline:
        request = tightfit.Request("a cat", guidance_scale=5.0, adapters=unet(file), **SMALL)
        return pipeline.generate(request)


def differs(result: tightfit.Result, picture: np.ndarray) -> int:
    """Largest difference of two values."""
    return np.abs(np.asarray(result.images[0], int) - picture).max()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_are_diffusers_with_it(family, tiny_models, others):
    result = painted(tiny_models[family], others[family], residency="staged")
    assert differs(result, by_diffusers(tiny_models[family], others[family])) <= 1
    for stage, predicted in result.plan.predicted.stages.items():
        assert abs(result.stages[stage].peak_bytes - predicted) <= 0.05 * predicted, stage


def test_a_folder_and_a_picture_that_remembers_it(sd1, others, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    shutil.copy(others["sd1"], folder / "diffusion_pytorch_model.safetensors")
    result = painted(sd1, folder)
    assert differs(result, by_diffusers(sd1, others["sd1"])) <= 1
    carried = infotext.parse(infotext.write(result.request, str(sd1), "fp32"), "a picture")
    assert carried.request["adapters"] == unet(folder)


def test_what_is_trained_to_predict_v(sd1, others, tmp_path):
    save_file(load_file(others["sd1"]) | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    spec = adapted(inspect(str(sd1)), unet(tmp_path / "v.safetensors"))
    assert spec.scheduler["prediction_type"] == "v_prediction"
    assert "v.safetensors has prediction_type v_prediction" in spec.notes


def test_what_does_not_fit_is_refused(tiny_models, others, sd1, tmp_path):
    spec = inspect(str(sd1))
    state = load_file(others["sd1"])
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    save_file(state | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, tmp_path / "inpaint.safetensors")
    del state["conv_out.bias"]
    save_file(state, tmp_path / "less.safetensors")
    for path, said in {
        others["sdxl"]: "is a U-Net of texts 64 wide",
        tmp_path / "none.safetensors": "take one of the same family",
        tmp_path / "inpaint.safetensors": r"conv_in.weight of shape \[32, 9, 3, 3\]",
        tmp_path / "less.safetensors": "conv_out.bias nowhere",
    }.items():
        with pytest.raises(TightfitError, match=said) as error:
            adapted(spec, unet(path))
        assert str(path) in str(error.value)
    with pytest.raises(TightfitError, match="No such file"):
        unet(tmp_path / "missing.gguf")
    with pytest.raises(TightfitError, match="tightfit convert"):
        unet(tmp_path / "x.ckpt")
