"""An exported model is whole or not there, is what its manifest says, and paints what the original paints."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tightfit.export import calibrate
from tightfit.export import torch_model as quantised
from tightfit.export.safetensors_file import SafetensorsFile
from tightfit.kernels.formats import FORMATS, dequantise
from tightfit.kernels.quantise import quantise
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.layouts.safetensors import all_tensors
from tightfit.runtime.planner.choose import checked
from tightfit.runtime.planner.wishes import Wishes

OPTIONS = {"seed": 3, "num_inference_steps": 3, "scheduler": "euler"}
ONE_WAY = {
    "device": "cpu",
    "residency": "staged",
    "attention": "sdpa",
    "tiling": "whole",
}  # little is planned
SILENT = lambda _: None  # noqa: E731


def sources(spec):
    return {component.folder.name: all_tensors(component.folder) for component in spec.components.values()}


def recipes(spec, tensors, precision):
    return {
        component.folder.name: quantised.default_scheme(
            component.network, tensors[component.folder.name], precision
        )
        for component in spec.components.values()
    }


def export(model, target, precision, schemes=None):
    spec = tightfit.inspect(model)
    tensors = sources(spec)
    schemes = schemes or recipes(spec, tensors, precision)
    manifest = {"source": spec.name, "precision": precision, "defaults": dict(spec.defaults)}
    return quantised.write(spec, target, tensors, schemes, manifest, SILENT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for precision in ("int8", "int4"):
        export("emoji", folder / precision, precision)
    return folder


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_manifest_says_what_is_in_the_files(exported, precision):
    """Read by the safetensors library: each layer has the parts of its format, and nothing of the original is
    missing."""
    folder = exported / precision
    components = json.loads((folder / "tightfit.json").read_text())["components"]
    for name, original in sources(tightfit.inspect("emoji")).items():
        ((file, digest),) = components[name]["sha256"].items()
        assert hashlib.sha256((folder / name / file).read_bytes()).hexdigest() == digest
        with safe_open(folder / name / file, "pt") as stored:
            left = set(stored.keys())
            for key, tensor in original.items():
                layer = key.removesuffix(".weight")
                if key == layer or layer not in components[name]["formats"]:
                    assert stored.get_slice(key).get_shape() == list(tensor.shape)
                    assert tensor.count < 4096 or not key.endswith(".weight") or len(tensor.shape) == 1
                    left.remove(key)
                    continue
                form = FORMATS[components[name]["formats"][layer]]
                for part, (dtype, shape) in form.parts(tensor.shape).items():
                    value = stored.get_tensor(f"{layer}.{part}")
                    assert (value.dtype, tuple(value.shape)) == (dtype, shape)
                    left.remove(f"{layer}.{part}")
        assert not left
        size = (folder / name / file).stat().st_size
        assert components[name]["bits"] == pytest.approx(
            8 * size / sum(t.count for t in original.values()), rel=0.02
        )


@functools.cache
def painted(model: str, precision: str) -> np.ndarray:
    compute = {} if precision == "fp32" else {"compute": "fp32"}
    with tightfit.load(model, precision=precision, **compute, **ONE_WAY) as pipe:
        return np.array(pipe("a red heart", **OPTIONS), np.float64)


@pytest.mark.parametrize(
    ("stored", "precision", "least"),
    [("int8", "int8", 42), ("int8", "int8-dynamic", 40), ("int4", "int4", 27)],
)
def test_it_paints_what_the_original_paints(exported, stored, precision, least):
    """And what the original paints when it is quantised while it is loaded."""
    if precision == "int8-dynamic" and "int8" not in tightfit.Hardware.detect("cpu").rates:
        pytest.skip("this processor has no fast products of 8-bit whole numbers")
    read, made, exact = (
        painted(*one)
        for one in ((str(exported / stored), precision), ("emoji", precision), ("emoji", "fp32"))
    )
    np.testing.assert_array_equal(read, made)
    assert 10 * np.log10(255**2 / ((read - exact) ** 2).mean()) > least


def test_streamed_paints_the_same(exported):
    model = str(exported / "int4")
    with tightfit.load(model, compute="fp32", **ONE_WAY) as pipe:
        staged = pipe("a cat", **OPTIONS).tobytes()
    with tightfit.load(model, compute="fp32", **ONE_WAY | {"residency": "streamed"}) as pipe:
        assert pipe("a cat", **OPTIONS).tobytes() == staged
        with pytest.raises(TightfitError, match=r"export the model first"):
            asked = ONE_WAY | {"residency": "streamed", "precision": "int4"}
            tightfit.load("emoji", **asked).plans(tightfit.Request("a"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family(tiny_models, tmp_path, family):
    export(tiny_models[family], tmp_path / "out", "int4")
    with tightfit.load(str(tmp_path / "out"), compute="fp32", **ONE_WAY) as pipe:
        assert pipe.plans(tightfit.Request("a"))[0].precision == "int4"
        ours = np.array(pipe("a cat", **OPTIONS), np.float64)
    with tightfit.load(str(tiny_models[family]), precision="fp32", **ONE_WAY) as pipe:
        exact = np.array(pipe("a cat", **OPTIONS), np.float64)
    # Of noise with these weights; another seed gives 9.
    assert 10 * np.log10(255**2 / ((ours - exact) ** 2).mean()) > 15


def test_weights_in_bf16_and_fp32_and_old_names(sd1_copy, tmp_path):
    def older(name):
        return name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn.")

    file = sd1_copy / "vae" / "diffusion_pytorch_model.safetensors"
    torch_weights = {older(name): value.bfloat16() for name, value in load_file(file).items()}
    from safetensors.torch import save_file

    save_file(torch_weights, file)
    export(sd1_copy, tmp_path / "out", "int8")
    with tightfit.load(str(tmp_path / "out"), **ONE_WAY) as pipe:
        pipe("a cat", **OPTIONS)


def test_nothing_half_written(sd1_copy, tmp_path, monkeypatch):
    """Out of disk, interrupted, or with a weight that is not a number: no folder, and no trace."""
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(SafetensorsFile, "write", fail)
        with pytest.raises(type(error)):
            export(sd1_copy, tmp_path / "out" / "model", "int8")
        assert not list((tmp_path / "out").iterdir())
        monkeypatch.undo()
    file = sd1_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    from safetensors.torch import save_file

    save_file(weights, file)
    with pytest.raises(ValueError, match="finite"):
        export(sd1_copy, tmp_path / "out" / "model", "int8")
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_manifest(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported / "int8", folder)
    text = json.loads((folder / "tightfit.json").read_text())

    def fails(change, words):
        (folder / "tightfit.json").write_text(json.dumps(text | change))
        with pytest.raises(TightfitError, match=words), tightfit.load(str(folder), device="cpu") as pipe:
            pipe("a", **OPTIONS)

    fails({"precision": "int2"}, "cannot be understood")
    fails({"components": []}, "cannot be understood")
    fails({"components": {"unet": {"formats": {"conv_in": 3}}}}, "cannot be understood")
    fails({"components": {}}, "lack")
    formats = text["components"]["unet"]["formats"] | {"conv_in": "int5"}
    fails({"components": text["components"] | {"unet": {"formats": formats}}}, "conv_in as int5")


def test_a_stored_precision_is_kept(exported):
    spec = tightfit.inspect(exported / "int8")
    assert spec.precision == "int8"
    with pytest.raises(TightfitError, match="stored in int8"):
        tightfit.plan(tightfit.profile("rtx-2060"), spec, wishes=Wishes(precision="fp16"))


def test_a_plan_of_another_precision(exported):
    spec, machine = tightfit.inspect(exported / "int8"), tightfit.profile("rtx-2060")
    request = tightfit.Request("a").resolve(spec)
    best = tightfit.plan(machine, spec, request)[0]
    unet = replace(best.placements["unet"], precision="int4")
    other = replace(best, placements={**best.placements, "unet": unet})
    assert checked(best, machine, request, Wishes()).precision == "int8"
    with pytest.raises(TightfitError, match="is stored in int8"):
        checked(other, machine, request, Wishes())


def test_a_newer_manifest(exported, tmp_path):
    folder = tmp_path / "newer"
    shutil.copytree(exported / "int8", folder)
    manifest = json.loads((folder / "tightfit.json").read_text())
    (folder / "tightfit.json").write_text(json.dumps(manifest | {"version": manifest["version"] + 1}))
    with pytest.raises(TightfitError, match="newer tightfit"):
        tightfit.inspect(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stopped_by_the_system_leaves_nothing(sd1_copy, tmp_path):
    """As Ctrl-C does: told to end while it writes."""
    program = (
        "import os, signal, sys; from tightfit.export import torch_model as quantised; "
        "from tightfit.__main__ import main\n"
        "quantised.copy_the_rest = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv[1:] = ['export', {str(sd1_copy)!r}, '--precision', 'int8', "
        f"'-o', {str(tmp_path / 'in' / 'out')!r}]; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode
        == 128 + signal.SIGTERM
    )
    assert list((tmp_path / "in").iterdir()) == []


def test_the_writer_keeps_its_promises(tmp_path):
    a, b = torch.arange(6, dtype=torch.float16).view(2, 3), torch.tensor([1, 2, 3], dtype=torch.int8)
    promised = {"a": (torch.float16, (2, 3)), "b": (torch.int8, (3,))}
    with SafetensorsFile(tmp_path / "x", promised) as file:
        file.write("a", a)
        file.write("b", b)
    read = load_file(tmp_path / "x")
    assert torch.equal(read["a"], a)
    assert torch.equal(read["b"], b)
    with pytest.raises(ValueError, match="was promised"), SafetensorsFile(tmp_path / "y", promised) as file:
        file.write("b", b)
    with pytest.raises(ValueError, match="was promised"), SafetensorsFile(tmp_path / "y", promised) as file:
        file.write("a", torch.cat([a, a]))  # more rows, over what comes next
    with pytest.raises(ValueError, match="not written"), SafetensorsFile(tmp_path / "y", promised) as file:
        file.write("a", a)


def test_bits_go_where_they_mend_most():
    shapes = {"delicate": (64, 64), "sturdy": (64, 64), "large": (640, 640)}
    damage = {
        name: {"int4-g64": harm, "int8": harm / 100, None: 0.0}
        for name, harm in (("delicate", 1.0), ("sturdy", 1e-6), ("large", 1.5))
    }
    ladder = ("int4-g64", "int8", None)
    least = sum(FORMATS["int4-g64"].bytes(shape) for shape in shapes.values())
    assert set(calibrate.allocate(damage, shapes, ladder, least).values()) == {"int4-g64"}
    some = calibrate.allocate(damage, shapes, ladder, least + 7000)
    assert some == {"delicate": None, "sturdy": "int4-g64", "large": "int4-g64"}
    assert set(calibrate.allocate(damage, shapes, ladder, 10**7).values()) == {None}


class Stack(torch.nn.Module):
    """A network whose first layer's errors reach the answer a hundred times as strong as its second's."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet = torch.nn.Linear(80, 80), torch.nn.Conv2d(80, 80, 1)

    def forward(self, x):
        return (100 * self.loud(x) + self.quiet(x[:, :, None, None])[:, :, 0, 0],)


@torch.inference_mode()
def test_a_calibration_finds_what_hurts():
    torch.manual_seed(0)
    network = Stack().requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawn = torch.Generator().manual_seed(1)
    found = calibrate.Calibration(network, lambda module, x: module(x), SILENT)
    for _ in range(16):
        found.watched(network, x=torch.randn(200, 80, generator=drawn))
    found.stop()
    assert len(found.states) == len(found.held_out) == 8
    torch.testing.assert_close(found.moments["quiet"], torch.eye(80), rtol=0, atol=0.2)
    scheme = found.scheme("int4", 6.6)
    assert scheme.formats == {"loud": "int8", "quiet": "int4-g64"} or scheme.formats == {
        "loud": "int8-g64",
        "quiet": "int4-g64",
    }
    assert scheme.measured["snr"]["calibrated"] > scheme.measured["snr"]["recipe"] + 10
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    weight = network.loud.weight
    exact = dequantise(
        quantise(weight, FORMATS["int4-g64"], found.moments["loud"]), FORMATS["int4-g64"], weight.shape
    )
    assert torch.equal(found.rounded("loud", "int4-g64"), exact)


def test_a_scheme_of_its_own(tmp_path):
    """What a calibration would choose is what is written, NF4 too."""
    spec = tightfit.inspect("emoji")
    schemes = recipes(spec, sources(spec), "int4")
    formats = dict.fromkeys(schemes["unet"].formats, "nf4-g64")
    export("emoji", tmp_path / "out", "int4", schemes | {"unet": replace(schemes["unet"], formats=formats)})
    with tightfit.load(str(tmp_path / "out"), compute="fp32", **ONE_WAY) as pipe:
        pipe("a cat", **OPTIONS)
