"""The same picture as diffusers makes, and the same again however the plan runs it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tightfit
from tightfit.benchmarks.parity import SCHEDULERS, psnr, reference
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.families.stable_diffusion import guidance_embedding
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.run import Run


@pytest.fixture(scope="module")
def references(tiny_models):
    """diffusers' own pipelines on the same folders."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    made = {}
    for family, folder in tiny_models.items():
        kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        made[family] = kind.from_pretrained(folder, dtype=torch.float32)
        made[family].set_progress_bar_config(disable=True)
    return made


ONE_WAY = {"residency": "staged", "attention": "sdpa", "tiling": "whole", "cfg": "batched"}


@pytest.fixture(scope="module")
def pipes(tiny_models):
    made = {
        family: tightfit.load(str(folder), precision="fp32", device="cpu")
        for family, folder in tiny_models.items()
    }
    yield made
    for pipe in made.values():
        pipe.close()


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [*(("sd1", each) for each in SCHEDULERS), ("sd2", "ddim"), ("sdxl", "euler_a"), ("sdxl", "unipc")],
)
def test_as_diffusers(references, pipes, family, scheduler):
    options = {"num_inference_steps": 4, "guidance_scale": 6.0}
    theirs = reference(references[family], scheduler, "a red heart", 7, **options)
    ours = pipes[family]("a red heart", scheduler=scheduler, seed=7, **options)
    assert psnr(ours, theirs) > 75


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_as_diffusers_in_other_sizes_with_a_negative_prompt_and_without_guidance(references, pipes, family):
    options = {"num_inference_steps": 3, "width": 72, "height": 104}
    for more in ({"guidance_scale": 4.0, "negative_prompt": "blue"}, {"guidance_scale": 1.0}):
        theirs = reference(references[family], "euler", "a heart", 3, **options, **more)
        ours = pipes[family]("a heart", scheduler="euler", seed=3, **options, **more)
        assert ours.size == (72, 104)
        assert psnr(ours, theirs) > 75


def test_a_negative_prompt_that_is_empty(references, pipes):
    """SDXL takes none as zeros and an empty one as text, as diffusers does."""
    options = {"num_inference_steps": 3, "guidance_scale": 6.0}
    theirs = reference(references["sdxl"], "euler", "a heart", 3, negative_prompt="", **options)
    assert psnr(pipes["sdxl"]("a heart", seed=3, negative_prompt="", **options), theirs) > 75
    assert psnr(pipes["sdxl"]("a heart", seed=3, negative_prompt=None, **options), theirs) < 55


@pytest.fixture
def changed(tiny_models, tmp_path):
    """Called with a family, a component and fields of its config: a copy of the tiny model with them; those
    of None left out."""

    def change(family, component, fields):
        folder = shutil.copytree(tiny_models[family], tmp_path / "changed", dirs_exist_ok=True)
        file = folder / component / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return folder

    return change


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_vaes_with_a_mean_and_a_deviation_for_each_channel(changed, references, pipes, family):
    """Playground 2.5 and its kind: read by diffusers' pipeline of SDXL, and not by that of SD 1.x."""
    import diffusers
    import torch

    fields = {
        "latents_mean": [-1.65, 0.13, -0.66, 1.3],
        "latents_std": [8.47, 5.98, 7.98, 4.21],
        "scaling_factor": 0.5,
    }
    folder = changed(family, "vae", fields)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    image = theirs("a heart", generator=torch.Generator().manual_seed(3), **options).images[0]
    with tightfit.load(str(folder), precision="fp32", device="cpu", **ONE_WAY) as pipe:
        assert psnr(pipe("a heart", seed=3, **options), image) > 75
    plain = reference(references[family], "euler", "a heart", 3, **options)
    assert psnr(plain, image) < 60


def test_a_text_encoder_whose_class_the_index_alone_tells(changed, pipes):
    folder = changed("sdxl", "text_encoder_2", {"architectures": None})
    with tightfit.load(str(folder), precision="fp32", device="cpu") as pipe:
        options = {"seed": 3, "num_inference_steps": 2}
        assert pipe("a heart", **options).tobytes() == pipes["sdxl"]("a heart", **options).tobytes()


def test_the_width_of_texts_as_a_list(changed, pipes):
    unet = pipes["sd1"].spec.unet
    widths = [unet["cross_attention_dim"]] * len(unet["down_block_types"])
    folder = changed("sd1", "unet", {"cross_attention_dim": widths, "sample_size": None, "in_channels": None})
    with tightfit.load(str(folder), precision="fp32", device="cpu") as pipe:
        options = {"seed": 3, "num_inference_steps": 2, "width": 64, "height": 64}
        assert pipe("a heart", **options).tobytes() == pipes["sd1"]("a heart", **options).tobytes()


@pytest.mark.parametrize(
    "config", [{}, {"steps_offset": 0, "clip_sample": True}, {"prediction_type": "v_prediction"}]
)
def test_schedulers_as_old_models_publish_them(sd1_copy, config):
    """StableDiffusionPipeline corrects steps_offset and clip_sample; so do we."""
    import torch
    from diffusers import StableDiffusionPipeline

    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (sd1_copy / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", **beta, **config})
    )
    index = json.loads((sd1_copy / "model_index.json").read_text())
    (sd1_copy / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]})
    )
    theirs = StableDiffusionPipeline.from_pretrained(sd1_copy, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    image = theirs("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(2)).images[0]
    with tightfit.load(str(sd1_copy), precision="fp32", device="cpu", **ONE_WAY) as pipe:
        assert psnr(pipe("a cat", num_inference_steps=4, seed=2), image) > 75


def test_a_schedulers_name_means_one_algorithm(sd1, sd1_copy):
    """Whatever a model's config says of its own solver."""
    file = sd1_copy / "scheduler/scheduler_config.json"
    sde = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "use_karras_sigmas": True,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | sde))
    images = []
    for folder in (sd1, sd1_copy):
        with tightfit.load(str(folder), precision="fp32", device="cpu", residency="resident") as pipe:
            options = {"seed": 2, "num_inference_steps": 6}
            images.append([pipe("a cat", scheduler=each, **options).tobytes() for each in SCHEDULERS])
    assert images[0] == images[1]


def test_the_comparison_can_fail(pipes):
    """Every input matters in these tiny models: change one and the 60 dB are missed by far."""
    base = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 6.0, "scheduler": "euler"}
    for pipe in pipes.values():
        image = pipe("a red heart", **base)
        assert psnr(image, pipe("a green cat on a mat", **base)) < 55
        for change in (
            {"seed": 8},
            {"num_inference_steps": 5},
            {"guidance_scale": 7.5},
            {"scheduler": "euler_a"},
            {"negative_prompt": "red"},
        ):
            assert psnr(image, pipe("a red heart", **base | change)) < 55, change


def test_same_request_same_bytes(pipes, tiny_models):
    options = {"seed": 7, "num_inference_steps": 3, "scheduler": "euler_a"}
    first = pipes["sd1"]("a red heart", **options)
    assert first.tobytes() == pipes["sd1"]("a red heart", **options).tobytes()
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu", residency="staged") as staged:
        assert first.tobytes() == staged("a red heart", **options).tobytes()


def test_sequential_guidance_is_batched_guidance(pipes):
    for pipe in pipes.values():
        with Pipeline(pipe.spec, pipe.hardware, Wishes(precision="fp32", cfg="sequential")) as other:
            options = {"seed": 1, "num_inference_steps": 3}
            assert psnr(pipe("a cat", **options), other("a cat", **options)) > 75


def test_several_pictures_are_those_of_the_following_seeds(pipes):
    images = pipes["sd1"]("a cat", seed=5, num_images=2, num_inference_steps=2)
    for seed, image in zip((5, 6), images, strict=True):
        assert image.tobytes() == pipes["sd1"]("a cat", seed=seed, num_inference_steps=2).tobytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_half_precisions_stay_close(pipes, tiny_models, family, precision):
    with tightfit.load(str(tiny_models[family]), precision=precision, device="cpu", **ONE_WAY) as pipe:
        options = {"seed": 1, "num_inference_steps": 3, "scheduler": "euler"}
        assert psnr(pipe("a cat", **options), pipes[family]("a cat", **options)) > (
            30 if precision == "bf16" else 40
        )


def test_events(pipes):
    request = tightfit.Request("a cat", seed=1, num_inference_steps=3, num_images=2, scheduler="ddim")
    events = list(pipes["sd1"].run(request, preview_every=2))
    assert [(e.stage, e.step, e.steps, e.image) for e in events] == [
        ("encode", 1, 1, 0),
        *(("denoise", i, 6, 0) for i in (1, 2, 3)),
        ("decode", 1, 2, 0),  # at once, as all parts stay loaded
        *(("denoise", i, 6, 1) for i in (4, 5, 6)),
        ("decode", 2, 2, 1),
        ("done", 2, 2, 0),
    ]
    assert [e.preview is not None for e in events if e.stage == "denoise"] == [False, True, False] * 2
    result = events[-1].result
    assert result.request == request.resolve(pipes["sd1"].spec).request
    assert list(result.stages) == ["prepare", "encode", "denoise", "decode"]
    assert all(
        stage.seconds > 0 and (stage.peak_bytes > 0 or name == "prepare")
        for name, stage in result.stages.items()
    )


@pytest.mark.parametrize(("residency", "most"), [("staged", 1), ("streamed", 1), ("resident", 3)])
def test_stages_are_freed(tiny_models, monkeypatch, residency, most):
    """Staged and streamed: when a component is loaded, the weights of the one before are gone. Resident: all
    stay until close."""
    import gc
    import weakref

    from tightfit.runtime.backends.torch.backend import TorchBackend

    alive, counts, load = [], [], TorchBackend.load

    def counted(*args):
        session = load(*args)
        held = session.streamer._buffer if session.streamer else next(session.module.parameters())
        alive.append(weakref.ref(held.untyped_storage()))
        counts.append(sum(each() is not None for each in alive))
        return session

    monkeypatch.setattr(TorchBackend, "load", counted)
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu", residency=residency) as pipe:
        gc.disable()  # what is freed must not wait for the collector
        try:
            pipe("a cat", num_inference_steps=1)
        finally:
            gc.enable()
        assert max(counts) == most
    assert not [each for each in alive if each() is not None]


@pytest.mark.parametrize("residency", ["staged", "resident"])
def test_a_run_can_be_abandoned(tiny_models, residency):
    options = {"seed": 1, "num_inference_steps": 3}
    with tightfit.load(str(tiny_models["sd1"]), precision="fp32", device="cpu", residency=residency) as pipe:
        whole = pipe("a cat", **options)
        running = pipe.run(tightfit.Request("a cat", **options))
        next(running), next(running)
        with pytest.raises(TightfitError, match="painting already"):
            pipe("a cat", **options)
        running.close()
        assert pipe("a cat", **options).tobytes() == whole.tobytes()
        left = pipe.run(tightfit.Request("a cat", **options))
        next(left), next(left)
    left.close()  # after the pipeline was


def test_closed_while_painting(sd1):
    with tightfit.load(str(sd1), precision="fp32", device="cpu", residency="resident") as pipe:
        running = pipe.run(tightfit.Request("a cat", num_inference_steps=3))
        next(running), next(running)
        pipe.close()
        with pytest.raises(TightfitError, match="closed while it was painting"):
            next(running)
        assert pipe("a cat", num_inference_steps=1)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "MPS backend out of memory"])
@pytest.mark.parametrize("place", ["torch.loading.read_into", "torch.dryrun.run"])
def test_out_of_memory_on_every_rung_is_one_line(sd1, monkeypatch, place, text):
    def fail(*_, **__):
        raise RuntimeError(f"{text}\nmore")

    with tightfit.load(str(sd1), device="cpu", precision="fp32") as pipe:
        pipe.plans(tightfit.Request("a cat", num_inference_steps=1))  # which runs on meta
        monkeypatch.setattr(f"tightfit.runtime.backends.{place}", fail)
        with pytest.raises(
            TightfitError, match=r"out of memory to encode .*and no plan takes less"
        ) as caught:
            pipe("a cat", num_inference_steps=1)
    assert "\n" not in str(caught.value)


def test_what_was_cut_is_said(pipes):
    long = " ".join(["heart"] * 20) + " and a cat"
    plain = {"num_inference_steps": 1, "prompt_syntax": "plain"}
    first = next(pipes["sdxl"].run(tightfit.Request(long, **plain)))
    assert len(first.notices) == 1
    assert pipes["sd1"].generate(tightfit.Request("a cat", num_inference_steps=1)).notices == ()
    (notice,) = pipes["sdxl"].generate(tightfit.Request(long, **plain)).notices
    assert notice.startswith("the prompt is too long")
    assert notice.endswith("heart and a cat")


def test_guidance_distilled_models(sd1_copy):
    """LCM's U-Nets take the scale as an input; the embedding is diffusers'."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_copy / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(dict(unet.config) | {"time_cond_proj_dim": 16}).save_pretrained(
        sd1_copy / "unet"
    )
    assert json.loads((sd1_copy / "unet/config.json").read_text())["time_cond_proj_dim"] == 16
    theirs = StableDiffusionPipeline.from_pretrained(sd1_copy, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs.get_guidance_scale_embedding(torch.tensor([7.0]), 16)
    assert np.allclose(guidance_embedding(8.0, 16), expected.numpy(), atol=1e-4)
    with tightfit.load(str(sd1_copy), precision="fp32", device="cpu", **ONE_WAY) as pipe:
        options = {"num_inference_steps": 3, "guidance_scale": 8.0}
        ours = pipe("a cat", seed=2, scheduler="lcm", **options)
        assert psnr(ours, reference(theirs, "lcm", "a cat", 2, **options)) > 75


def test_unknown_options(pipes):
    with pytest.raises(TightfitError, match="unknown option 'stepz'"):
        pipes["sd1"]("a cat", stepz=3)
    with pytest.raises(TightfitError, match="lcm cannot take 200 steps"):
        pipes["sd1"]("a cat", scheduler="lcm", num_inference_steps=200)
    with pytest.raises(TightfitError, match="ddim cannot take 1000 steps"):
        pipes["sd1"]("a cat", scheduler="ddim", num_inference_steps=1000)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "decibels"), [("fp32", 50), ("bf16", 25), ("fp16", 35)])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_cuda_paints_the_same(pipes, tiny_models, family, precision, decibels):
    options = {"seed": 1, "num_inference_steps": 3, "scheduler": "euler_a"}
    with tightfit.load(
        str(tiny_models[family]), precision=precision, device="cuda", residency="staged"
    ) as pipe:
        result = pipe.generate(tightfit.Request("a cat", **options))
    assert psnr(result.images[0], pipes[family]("a cat", **options)) > decibels
    assert 0 < result.peak_bytes < 2**30


@pytest.mark.parametrize("residency", ["resident", "staged"])
@pytest.mark.parametrize("thrown", [False, True], ids=["raised", "thrown in"])
def test_an_interrupt_while_decoding_keeps_the_pictures_that_are_painted(sd1, monkeypatch, residency, thrown):
    """The second of four is being decoded, or has been handed over. With the U-Net loaded beside, no other is
    painted yet."""
    request = tightfit.Request(
        "a", num_images=4, seed=3, num_inference_steps=1, width=64, height=64, scheduler="euler"
    )
    decoded, calls = Run._decoded, []

    def interrupted(self, latents):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decoded(self, latents)

    with tightfit.load(str(sd1), device="cpu", residency=residency) as pipeline:
        whole = [np.asarray(image) for image in pipeline.generate(request).images]
        if not thrown:
            monkeypatch.setattr(Run, "_decoded", interrupted)
        events, found = pipeline.run(request), []
        with pytest.raises(KeyboardInterrupt):
            for event in events:
                if event.picture is not None:
                    found.append(np.asarray(event.picture))
                if thrown and len(found) == 2:
                    thrown = False
                    assert events.throw(KeyboardInterrupt()).picture is None
    painted = 2 if residency == "resident" else 4
    assert len(found) == painted
    assert all(np.array_equal(*pair) for pair in zip(whole, found, strict=False))
