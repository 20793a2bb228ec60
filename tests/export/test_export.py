"""The export in Python: what it may be, said before anything is read, and what it answers. The engines are
tested beside this."""

from __future__ import annotations

import pytest
import tightfit
from tightfit.export.export import Listener
from tightfit.runtime.errors import TightfitError


def test_a_model_is_exported_and_runs(sd1, tmp_path):
    lines = []
    folder = tightfit.export_model(sd1, tmp_path / "small", "int8", listener=Listener(line=lines.append))
    assert folder == tmp_path / "small"
    assert [line.split(":")[0] for line in lines] == ["text_encoder", "unet", "vae"]
    assert tightfit.inspect(str(folder)).precision == "int8"
    with tightfit.load(str(folder), device="cpu", residency="staged", attention="sdpa") as pipe:
        assert pipe("a", num_inference_steps=1, seed=1).size == (64, 64)
    with pytest.raises(TightfitError, match="stored in int8 already"):
        tightfit.export_model(folder, tmp_path / "again", "int8")
    with pytest.raises(TightfitError, match="is there already"):
        tightfit.export_model(sd1, folder, "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("int8-dynamic", {}, "is a way to run weights in int8"),
        ("int8-dynamic", {"to": "onnx"}, "leave out --to onnx"),
        ("fp16", {}, "this version exports .*not --to torch in fp16"),
        ("fp16", {"to": "tensorrt"}, "not --to tensorrt in fp16"),
        ("int8", {"compute": "fp16"}, "--compute is"),
        ("fp32", {"to": "onnx", "compute": "fp32"}, "--compute is"),
        ("int8", {"to": "onnx", "compute": "bf16"}, "--compute is"),
        ("fp32", {"to": "onnx", "calibrate": 1}, "leave out --calibrate"),
        ("int8", {"bits": 8.0}, "add --calibrate"),
        ("int8", {"calibrate": -1}, "must be 0 or more, not -1"),
        ("int8", {"calibrate": 1, "steps": 0}, "--steps must be from 1 to 1000, not 0"),
        ("int8", {"calibrate": "1"}, "calibrate must be a whole number"),
        ("int8", {"calibrate": 1, "steps": 2.5}, "steps must be a whole number"),
        ("int8", {"calibrate": 1, "bits": "8"}, "bits must be a number"),
        ("int8", {"rounds": 1}, "unknown option 'rounds': choose compute, calibrate"),
    ],
)
def test_refused_before_anything_is_read(tmp_path, precision, options, words):
    with pytest.raises(TightfitError, match=words):
        tightfit.export_model(tmp_path / "nothing", tmp_path / "out", precision, **options)
    assert not list(tmp_path.iterdir())


def test_only_networks_on_a_gpu_compute_in_fp16(monkeypatch):
    from tightfit.export import export

    for there, compute in (
        (["CPUExecutionProvider"], "fp32"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "fp16"),
    ):
        monkeypatch.setattr(export, "providers", lambda there=there: there)
        assert export._computes("int8", "auto") == compute
        assert export._computes("int8", "fp16") == "fp16"
        assert export._computes("fp32", "auto") == "fp32"
