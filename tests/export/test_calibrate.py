"""What a calibration sees of each family, beside diffusers' pipelines; and that no code of a folder runs."""

from __future__ import annotations

import json
import pickle
from typing import Any

import diffusers
import pytest
import tightfit
import torch
from tightfit.__main__ import app
from tightfit.export import calibrate
from typer.testing import CliRunner

GUIDED = {"sd3": {"guidance_scale": 4.5}}  # as here by default


def theirs(family: str, model, prompt: str) -> dict[str, torch.Tensor]:
    """The mean of x xᵀ over the inputs of each layer of the denoiser, as diffusers' own pipeline paints."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    network = getattr(pipe, "unet", None) or pipe.transformer
    sums, counts = {}, {}

    def watch(name):
        def add(layer, args):
            x = args[0].movedim(1, -1) if isinstance(layer, torch.nn.Conv2d) else args[0]
            x = x.flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            part.register_forward_pre_hook(watch(name))
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    with torch.inference_mode():
        pipe(
            prompt=prompt,
            **options,
            **GUIDED.get(family, {}),
            generator=torch.Generator().manual_seed(len(prompt)),
        )
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("family", ["sdxl", "flux2-klein", "sd3", "flux1-dev"])
def test_layers_see_what_diffusers_show_them(tiny_models, tiny_model, family, monkeypatch):
    """Of every layer of a denoiser. Inputs are taken by 96 channels."""
    model = tiny_models[family] if family in tiny_models else tiny_model(family)
    monkeypatch.setattr(calibrate, "_WIDEST", 96)
    monkeypatch.setattr(calibrate.Calibration, "scheme", lambda found, *_: found)
    told = []
    found: Any = calibrate.calibrated(
        tightfit.inspect(model), "int4", calibrate.Effort(1, 2, 64, 5.0), told.append
    )
    expected = theirs(family, model, calibrate.PROMPTS[0])
    assert told == [f"calibrating: painted '{calibrate.PROMPTS[0]}'"]
    assert {*found.moments} == {*found.layers} <= {*expected}
    for name, moment in found.moments.items():
        parts = [part.split(96, 1)[n] for n, part in enumerate(expected[name].split(96))]
        whole = torch.block_diag(*parts).float()
        assert (moment - whole).norm() <= 1e-3 * whole.norm(), name


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_nothing_of_the_folder_runs(sd1_copy, tmp_path, monkeypatch):
    """Modules beside every config, a safety checker of a pickle that is listed: a calibration writes its
    model, and none ran."""
    ran = tmp_path / "ran"
    checker = sd1_copy / "safety_checker"
    checker.mkdir()
    (checker / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran)))
    (checker / "config.json").write_text("{}")
    for place in (sd1_copy, *(each for each in sd1_copy.iterdir() if each.is_dir())):
        for name in (
            "evil",
            "pipeline",
            "StableDiffusionPipeline",
            "UNet2DConditionModel",
            "diffusers",
            "modeling",
        ):
            (place / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    for name in ("unet", "vae", "text_encoder"):
        config = sd1_copy / name / "config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}})
        )
    index = sd1_copy / "model_index.json"
    listed = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | listed))
    monkeypatch.setattr(calibrate, "LEAST", 30_000)  # only a few layers are measured, as each takes its time
    arguments = [
        "export",
        str(sd1_copy),
        "--precision",
        "int8",
        "--calibrate",
        "1",
        "--steps",
        "2",
        "--size",
        "64",
        "--bits",
        "12",
    ]
    done = CliRunner().invoke(app(), [*arguments, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "tightfit.json").read_text())
    assert manifest["components"]["unet"]["measured"]["snr"]["calibrated"] > 0
    assert not (tmp_path / "out" / "safety_checker").exists()
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["evil", "EvilPipeline"]},
        {"unet": ["evil", "EvilUNet"]},
        {"safety_checker": ["evil.py", "Evil", "x"]},
    ],
)
def test_classes_of_the_folder_are_refused(sd1_copy, tmp_path, changes):
    ran = tmp_path / "ran"
    for place in (sd1_copy, sd1_copy / "unet"):
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    index = sd1_copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    arguments = [
        "export",
        str(sd1_copy),
        "--precision",
        "int4",
        "--calibrate",
        "1",
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app(), arguments)
    assert "code" in f"{done.exception} {done.output}"
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_a_transformer_is_written_with_what_its_layers_need(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST", 4_097)  # only a few layers are measured, as each takes its time
    model, out = tiny_model("flux2-klein"), tmp_path / "out"
    options = {"calibrate": 2, "steps": 1, "size": 64, "bits": 8.0}
    tightfit.export_model(str(model), out, "int4", **options)
    measured = json.loads((out / "tightfit.json").read_text())["components"]["transformer"]["measured"]
    assert measured["snr"]["calibrated"] > measured["snr"]["recipe"]
    with tightfit.load(str(out), device="cpu") as pipe:
        pipe("a cat", width=64, height=64, seed=1)


def test_what_a_calibration_has_no_room_for(tiny_model, monkeypatch):
    monkeypatch.setattr(calibrate, "_moment_bytes", lambda _: 2**60)
    spec, effort = tightfit.inspect(tiny_model("flux1-dev")), calibrate.Effort(1, 1, 64, 5.0)
    with pytest.raises(
        tightfit.TightfitError, match=r"--calibrate needs 1073741824.00 GiB .* are free: leave it out"
    ):
        calibrate.calibrated(spec, "int4", effort, print)
