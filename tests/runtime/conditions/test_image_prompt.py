"""IP-Adapters, plain and plus, against diffusers' own; and that they are in the plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tightfit.benchmarks import random_parts
from tightfit.runtime.adapters import ip_adapter, written
from tightfit.runtime.conditions import asked
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.infotext import parse
from tightfit.runtime.models.families.image_prompt import IMAGE_ENCODER
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
    (96, 72), 3
)
WISH = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def files(tiny_models, made_once):
    """A plain one of SD 1, and one that is plus of SDXL, each beside an image encoder."""
    kinds = {"sd1": False, "sdxl": True}
    return {
        family: made_once(f"ip/{family}", partial(random_parts.ip_adapter, tiny_models[family], plus))
        / "ip.safetensors"
        for family, plus in kinds.items()
    }


def by_diffusers(folder, file, scale) -> np.ndarray:
    vision = CLIPVisionModelWithProjection.from_pretrained(file.parent / "image_encoder")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    parts = {"image_encoder": vision, "feature_extractor": CLIPImageProcessor(**size)}
    none = {} if (folder / "text_encoder_2").exists() else {"safety_checker": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **parts, **none)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    generator = torch.Generator().manual_seed(3)
    answer = pipe("a cat", ip_adapter_image=PICTURE, generator=generator, output_type="np", **WISH)
    return (answer.images[0] * 255).round().astype(int)


@pytest.mark.parametrize(("family", "scale"), [("sd1", 0.6), ("sdxl", 1.0)])
def test_a_picture_as_a_prompt_is_diffusers(family, scale, tiny_models, files):
    theirs = by_diffusers(tiny_models[family], files[family], scale)
    adapters = written({"ip_adapter": [f"{files[family]}:{scale}"]})
    ways = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}
    with tightfit.load(str(tiny_models[family]), device="cpu", adapters=adapters, **ways) as pipeline:
        mine = pipeline("a cat", ip_adapter_image=PICTURE, seed=3, scheduler="euler", **WISH)
    assert np.abs(np.asarray(mine).astype(int) - theirs).max() <= 1  # of 255: 48 dB at the worst pixel
    carried = parse(mine.info["parameters"], "x")
    assert carried.request["adapters"] == adapters
    assert carried.notices == ()


@pytest.mark.parametrize(("precision", "residency"), [("int8", "staged"), ("fp32", "streamed")])
def test_it_is_in_the_plan(precision, residency, tiny_models, files):
    adapters = written({"ip_adapter": [str(files["sd1"])]})
    wishes = {"precision": precision, "residency": residency, "compute": "fp32", "attention": "sliced"}
    request = tightfit.Request("a cat", seed=3, conditions=asked({"ip_adapter_image": PICTURE}), **WISH)
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", adapters=adapters, **wishes) as pipeline:
        result = pipeline.generate(request)
    assert "image_encoder" in result.plan.placements
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage


def test_in_folders_of_models(tiny_models, files, tmp_path, monkeypatch):
    """By its name in A1111's folder and in ComfyUI's, where the encoder is one file in a folder beside."""
    spec, beside = tightfit.inspect(str(tiny_models["sd1"])), files["sd1"].parent / "image_encoder"
    for name, encoder in (
        ("ControlNet/ip", "ControlNet/image_encoder"), ("ipadapter/ip", "clip_vision/ViT.safetensors"),
    ):  # fmt: skip
        models = tmp_path / Path(name).parent.name / "models"
        (models / name).parent.mkdir(parents=True)
        (models / encoder).parent.mkdir(exist_ok=True)
        (models / f"{name}.safetensors").symlink_to(files["sd1"])
        is_file = encoder.endswith(".safetensors")
        (models / encoder).symlink_to(beside / "model.safetensors" if is_file else beside)
        monkeypatch.setitem(ip_adapter._HEADS, random_parts.VISION_WIDTH, 2)
        monkeypatch.setattr(ip_adapter, "_OPENAIS", (random_parts.VISION_WIDTH,))
        (adapter,) = written({"ip_adapter": ["ip:0.6"]}, [models, files["sd1"].parent])
        found, known = (one.apply(spec) for one in (adapter, *written({"ip_adapter": [str(files["sd1"])]})))
        there, wanted = (one.components["image_encoder"] for one in (found, known))
        assert adapter.scale == 0.6
        assert there.folder == models / encoder
        assert {name: there.setting(name) for name in IMAGE_ENCODER.defaults} == {
            name: wanted.setting(name) for name in IMAGE_ENCODER.defaults
        }
        assert there.tensors.keys() == wanted.tensors.keys()


@pytest.mark.parametrize(
    ("width", "inner", "projected", "layers", "side", "act"),
    [
        (1280, 5120, 1024, 32, 224, "gelu"),
        (1664, 8192, 1280, 48, 224, "gelu"),
        (1024, 4096, 768, 24, 336, "quick_gelu"),
    ],
)
def test_published_encoders_in_one_file(width, inner, projected, layers, side, act):
    """ViT-H and bigG of OpenCLIP, ViT-L of OpenAI: what transformers makes is told from its shapes."""
    named = {
        "hidden_size": width, "intermediate_size": inner, "projection_dim": projected,
        "num_hidden_layers": layers, "num_attention_heads": 16, "image_size": side, "patch_size": 14,
        "hidden_act": act,
    }  # fmt: skip
    with torch.device("meta"):
        stored = CLIPVisionModelWithProjection(CLIPVisionConfig(**named)).state_dict()
    assert ip_adapter._config(stored) == named


def test_what_is_refused(tiny_models, files, tmp_path):
    spec, other = (tightfit.inspect(str(tiny_models[family])) for family in ("sd1", "sdxl"))
    own, seen = written({"ip_adapter": [f"{files['sd1']}:0.5"]}), asked({"ip_adapter_image": PICTURE})
    for given, model, words in (
        ({"adapters": own}, spec, "give one by --ip-image"),
        ({"conditions": seen}, spec, "give that by --ip-adapter"),
        ({"conditions": seen, "adapters": (*own, *own)}, spec, "a second IP-Adapter"),
        ({"conditions": seen, "adapters": own}, other, "take an IP-Adapter of the same family"),
    ):
        with pytest.raises(TightfitError, match=words):
            tightfit.Request("a", **given).resolve(model)
    stored = load_file(files["sd1"])
    layers = {name: tensor for name, tensor in stored.items() if name.startswith("ip_adapter.")}
    for name, tensors, words in (
        ("alone", stored, "needs an image encoder with projection_dim 48"),
        ("faces", {**layers, "image_proj.norm.weight": torch.ones(4)}, "of faces, or of another kind"),
        ("flat", {**stored, "ip_adapter.1.to_k_ip.weight": torch.ones(())}, "no IP-Adapter that can be read"),
        ("bare", {**layers, "image_proj.latents": torch.ones(3)}, "no IP-Adapter that can be read"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if name != "alone":
            (folder / "image_encoder").symlink_to(files["sd1"].parent / "image_encoder")
        save_file(tensors, folder / "ip.safetensors")
        adapters = written({"ip_adapter": [str(folder / "ip.safetensors")]})
        with pytest.raises(TightfitError, match=words):
            tightfit.Request("a", adapters=adapters, conditions=seen).resolve(spec)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    for text, words in (
        (f"{files['sd1']}:x", "no number to 10"),
        (f"{tmp_path}/x.safetensors", "is no IP-Adapter"),
    ):
        with pytest.raises(TightfitError, match=words):
            written({"ip_adapter": [text]})
