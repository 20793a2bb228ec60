"""ControlNets as ONNX: pictures are torch's, weights are stored once, and what cannot be followed is said."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import tightfit
from PIL import Image
from tightfit.benchmarks import random_parts
from tightfit.runtime.conditions import asked
from tightfit.runtime.errors import TightfitError

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for seed in (1, 2)
]
SIZE = {"width": 64, "height": 48, "guidance_scale": 3.0}
WAYS = {"precision": "int4", "residency": "resident"}
ON_TORCH = {
    "device": "cpu",
    **WAYS,
    "compute": "fp32",
    "attention": "sdpa",
    "tiling": "whole",
    "cfg": "batched",
}
# The second acts in the last steps alone, so that first none does.
BOTH = {"control_image": PICTURES, "controlnet_conditioning_scale": [0.7, 1.2], "control_guidance_start": 0.4}
REQUESTS = [{"control_image": [PICTURES[0]], "control_mode": "control"}, BOTH]


def psnr(a, b) -> float:
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def folder(onnx_models):
    return onnx_models("sd1", "int4")


def test_pictures_are_torchs(folder, shallow_models, shallow_control):
    """One and two, at another size than they were traced with; and without any, by the plain graph."""

    def painted(model, net, **wishes) -> list:
        def by_net(request) -> dict:
            return {**request, "controlnet": [str(net)] * len(request["control_image"])}

        same = {"seed": 3, "num_inference_steps": 3, **SIZE}
        with tightfit.load(str(model), **wishes) as pipe:
            return [pipe("a red heart", **same, **given) for given in ({}, *map(by_net, REQUESTS))]

    expected = painted(shallow_models["sd1"], shallow_control, **ON_TORCH)
    ours = painted(folder, folder / "controlnet", device="cpu", residency="resident")
    assert all(psnr(a, b) > 60 for a, b in zip(ours, expected, strict=True))
    assert all(psnr(a, ours[0]) < 40 for a in ours[1:])  # it is followed


def test_both_run_on_onnx_runtime_and_are_in_the_plan(folder):
    with tightfit.load(str(folder), device="cpu", residency="resident") as pipe:
        plain, plan = (
            pipe.plans(tightfit.Request("a cat", **SIZE, num_inference_steps=1, conditions=asked(given)))[0]
            for given in ({}, {"control_image": [PICTURES[0]]})  # by the folder's own ControlNet
        )
    assert {plan.placements[name].backend for name in ("unet", "controlnet")} == {"onnx"}
    assert plan.placements["controlnet"].precision == "int4"
    weights = (folder / "controlnet" / "model.onnx_data").stat().st_size
    assert plan.predicted.stages["denoise"] > plain.predicted.stages["denoise"] + weights


def test_weights_are_stored_once(folder):
    """By the names of both graphs for them, in a file of which all is the plain graph's."""
    plain, controlled = (
        onnx.load(folder / "unet" / name, load_external_data=False)
        for name in ("model.onnx", "model_controlled.onnx")
    )
    places = [
        {w.name: [(entry.key, entry.value) for entry in w.external_data] for w in model.graph.initializer}
        for model in (plain, controlled)
    ]
    stored = {name: place for name, place in places[0].items() if place}
    assert stored == {name: place for name, place in places[1].items() if place}
    added = [value.name for value in controlled.graph.input[len(plain.graph.input) :]]
    assert added == [
        *(f"down_block_additional_residual_{n}" for n in range(4)),
        "mid_block_additional_residual",
    ]
    assert sorted(file.name for file in (folder / "unet").glob("*.onnx*")) == [
        "model.onnx", "model.onnx_data", "model_controlled.onnx",
    ]  # fmt: skip


def test_answers_are_named_as_diffusers_names_them(folder):
    graph = onnx.load(folder / "controlnet" / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == [
        *(f"down_block_res_sample_{n}" for n in range(4)), "mid_block_res_sample",
    ]  # fmt: skip
    assert {"sample", "timestep", "encoder_hidden_states", "controlnet_cond", "conditioning_scale"} < {
        value.name for value in graph.input
    }


def asks(model, net=None):
    controls = asked({"control_image": [PICTURES[0]], "controlnet": net and [str(net)]})
    with tightfit.load(str(model), device="cpu") as pipe:
        pipe.plans(tightfit.Request("a cat", **SIZE, conditions=controls))


def test_what_is_not_followed(folder, onnx_models, shallow_models, shallow_control, tmp_path):
    with pytest.raises(TightfitError, match="follows no picture: export the model again with --control"):
        asks(onnx_models("sd1", "fp32"), shallow_control)
    adapter = random_parts.t2i_adapter(shallow_models["sd1"], tmp_path / "adapter")
    with pytest.raises(TightfitError, match=r"is a T2I-Adapter, .* ONNX alone, which follows ControlNets"):
        asks(folder, adapter)
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(mixed / "unet" / "model.onnx", mixed / "unet" / "model_controlled.onnx")
    with pytest.raises(TightfitError, match="is not the one that was exported into this folder"):
        asks(mixed)
    (mixed / "tightfit.json").unlink()
    with pytest.raises(TightfitError, match=r"has the inputs .* a unet has down_block_additional_residual_0"):
        asks(mixed)


@pytest.mark.parametrize(
    ("net", "to", "cure"),
    [("control", "torch", "--control is of --to onnx"), ("adapter", "onnx", "export a ControlNet"),
     ("onnx", "onnx", "export the ControlNet that it was made from")],
)  # fmt: skip
def test_what_is_not_exported(net, to, cure, folder, shallow_models, shallow_control, tmp_path):
    nets = {"control": shallow_control, "onnx": folder / "controlnet"}
    if net == "adapter":
        nets[net] = random_parts.t2i_adapter(shallow_models["sd1"], tmp_path / "adapter")
    with pytest.raises(TightfitError, match=cure):
        tightfit.export_model(shallow_models["sd1"], tmp_path / "out", "int8", to, control=[nets[net]])
    assert not (tmp_path / "out").exists()
