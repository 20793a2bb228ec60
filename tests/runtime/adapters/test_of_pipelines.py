"""What a pipeline does with adapters from one request to the next: files that change, fail or go."""

from __future__ import annotations

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import save_file
from tightfit.runtime.adapters import textual_inversion
from tightfit.runtime.adapters.lora import Lora
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import inspect

REQUEST = {"seed": 3, "num_inference_steps": 2, "width": 64, "height": 64, "scheduler": "euler"}
LAYER = "down_blocks.0.resnets.0.conv1.weight"


def difference(folder, sd1, value: float):
    """A LoRA file that adds `value` to a whole weight."""
    shape = inspect(str(sd1)).denoiser.tensors[LAYER].shape
    save_file(
        {f"unet.{LAYER.removesuffix('.weight')}.diff": torch.full(shape, value)}, folder / "a.safetensors"
    )
    return folder / "a.safetensors"


def painted(pipeline, *adapters, prompt="a cat") -> bytes:
    return pipeline.generate(tightfit.Request(prompt, adapters=adapters, **REQUEST)).images[0].tobytes()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_adapter_that_fails_leaves_the_pipeline_as_it_was(sd1, tmp_path, precision):
    with tightfit.load(str(sd1), device="cpu", precision=precision, residency="resident") as pipeline:
        plain = painted(pipeline)
        with pytest.raises(TightfitError):
            painted(pipeline, Lora.read(difference(tmp_path, sd1, float("nan"))))
        assert painted(pipeline) == plain


@pytest.mark.parametrize("residency", ["resident", "staged"])
def test_a_file_that_is_written_again_is_another_adapter(sd1, tmp_path, residency):
    with tightfit.load(str(sd1), device="cpu", precision="fp32", residency=residency) as pipeline:
        plain = painted(pipeline)
        first = Lora.read(difference(tmp_path, sd1, 0.2))
        pictures = [painted(pipeline, first)]
        second = Lora.read(difference(tmp_path, sd1, -0.3))
        pictures.append(painted(pipeline, second))
        with tightfit.load(str(sd1), device="cpu", precision="fp32", adapters=[second]) as fresh:
            assert painted(fresh) == pictures[1]
        assert len({plain, *pictures}) == 3


def test_an_embedding_that_is_written_again_is_another(sd1, tmp_path):
    file, pictures = tmp_path / "toy.safetensors", []
    with tightfit.load(str(sd1), device="cpu", precision="fp32", residency="resident") as pipeline:
        for seed in (1, 2, 1):
            save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))}, file)
            pictures.append(painted(pipeline, textual_inversion.read(file), prompt="a toy"))
    assert pictures[0] == pictures[2] != pictures[1]


def test_adapters_of_a_pipeline_are_in_its_pictures(sd1, tmp_path):
    lora = Lora.read(difference(tmp_path, sd1, 0.2))
    with tightfit.load(str(sd1), device="cpu", precision="fp32", adapters=[lora]) as pipeline:
        result = pipeline.generate(tightfit.Request("a cat", **REQUEST))
    assert result.request.adapters == (lora,)
    assert "a.safetensors" in result.images[0].info["parameters"]


def test_a_job_of_another_pipeline_is_painted_by_this_ones_model(sd1, tiny_models, tmp_path):
    lora = Lora.read(difference(tmp_path, sd1, 0.2))
    request = tightfit.Request("a cat", **REQUEST)
    foreign = request.resolve(inspect(str(tiny_models["sd2"])))
    with tightfit.load(str(sd1), device="cpu", precision="fp32", adapters=[lora]) as pipeline:
        expected = pipeline.generate(
            tightfit.Request("a cat", guidance_scale=foreign.guidance_scale, **REQUEST)
        )
        for job in (foreign, request.resolve(pipeline.spec)):
            result = pipeline.generate(job)
            assert result.images[0].tobytes() == expected.images[0].tobytes()
            assert result.request.adapters == (lora,)


def test_a_file_that_goes_while_it_paints_loses_no_picture(sd1, tmp_path):
    file = difference(tmp_path, sd1, 0.2)
    with tightfit.load(str(sd1), device="cpu", precision="fp32") as pipeline:
        request = tightfit.Request("a cat", adapters=(Lora.read(file),), **REQUEST)
        for event in pipeline.run(request):
            if event.stage == "denoise":
                file.unlink(missing_ok=True)
        assert event.result.images
        with pytest.raises(TightfitError, match="cannot be read"):
            tightfit.read_adapter(file)


@pytest.mark.parametrize("adapters", ["a.safetensors", ["a.safetensors"], 3])
def test_what_is_no_adapter_is_one_line(sd1, adapters):
    with pytest.raises(TightfitError, match="read_adapter"):
        tightfit.load(str(sd1), device="cpu", adapters=adapters)
    with pytest.raises(TightfitError, match="read_adapter"):
        tightfit.Request("a", adapters=adapters).checked()


def test_an_embedding_whose_word_is_not_used_is_said(sd1, tmp_path):
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "toy.safetensors")
    with tightfit.load(str(sd1), device="cpu", precision="fp32") as pipeline:
        known = textual_inversion.read(tmp_path / "toy.safetensors", "<toy>")
        result = pipeline.generate(tightfit.Request("a cat", adapters=(known,), **REQUEST))
    assert any("<toy> is in no prompt" in notice for notice in result.notices)
    assert np.asarray(result.images[0]).shape == (64, 64, 3)
