"""The pipeline that a calibration runs: diffusers' own, of classes by name, that runs no code of the folder
and opens no pickle."""

from __future__ import annotations

import json
import pickle

import diffusers
import pytest
import tightfit
import torch
from tightfit.__main__ import app
from tightfit.export import calibrate
from typer.testing import CliRunner

PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


@pytest.mark.parametrize("family", PIPELINES)
def test_it_is_diffusers_own(tiny_models, family):
    """Latents as those of the pipeline that diffusers reads from the folder."""
    theirs = PIPELINES[family].from_pretrained(tiny_models[family], dtype=torch.float32)
    ours = calibrate.pipeline(tightfit.inspect(tiny_models[family]), 2)
    latents = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        options = {
            "height": 64,
            "width": 64,
            "num_inference_steps": 2,
            "output_type": "latent",
            "generator": generator,
        }
        latents.append(pipe("a red heart", **options).images)
    torch.testing.assert_close(latents[1], latents[0], rtol=0, atol=1e-4)  # another seed is 1 off, and more


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
