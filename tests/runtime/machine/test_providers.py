"""ONNX Runtime lists the providers that it was built with; those that do not run are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tightfit.runtime.machine import hardware, providers


class FakeRuntime:
    """Built with CUDA, DirectML and OpenVINO, of which `runs` can be loaded."""

    SessionOptions = SimpleNamespace

    def __init__(self, runs: set[str]) -> None:
        self.runs, self.preloaded, self.tried = runs, 0, []

    def get_available_providers(self) -> list[str]:
        names = ("Cuda", "Dml", "OpenVINO", "Azure", "CPU")
        return [f"{'CUDA' if name == 'Cuda' else name}ExecutionProvider" for name in names]

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load libcudnn.so.9")  # noqa: T201  as onnxruntime does

    def InferenceSession(self, model, _, providers, enable_fallback):  # noqa: N802
        assert (type(model), enable_fallback, self.preloaded) == (bytes, 0, 1)
        self.tried += providers
        if "Dml" in providers[0]:
            raise RuntimeError("no adapter\nat line 7")
        there = [each for each in providers if each in self.runs]
        return SimpleNamespace(get_providers=lambda: [*there, "CPUExecutionProvider"])


@pytest.fixture(autouse=True)
def asked_anew():
    def forget() -> None:
        hardware.providers.cache_clear()
        providers.provider_problems.cache_clear()

    yield forget()
    forget()


def test_those_that_cannot_be_loaded_are_left_out(monkeypatch, capsys):
    fake = FakeRuntime({"OpenVINOExecutionProvider"})
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    for _ in range(2):
        assert hardware.providers() == (
            "OpenVINOExecutionProvider",
            "AzureExecutionProvider",
            "CPUExecutionProvider",
        )
    assert fake.tried == ["CUDAExecutionProvider", "DmlExecutionProvider", "OpenVINOExecutionProvider"]
    assert providers.provider_problems()["CUDAExecutionProvider"] == "its libraries cannot be loaded"
    assert providers.provider_problems()["DmlExecutionProvider"] == "no adapter"
    assert capsys.readouterr().out == ""


def test_one_that_can_be_loaded_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeRuntime({"CUDAExecutionProvider"}))
    assert hardware.providers()[0] == "CUDAExecutionProvider"


def test_the_graph_that_is_tried_is_one():
    onnxruntime, numpy = pytest.importorskip("onnxruntime"), pytest.importorskip("numpy")
    session = onnxruntime.InferenceSession(providers._IDENTITY, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": numpy.full(1, 7, "f")})[0] == [7]


def test_without_onnx_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert hardware.providers() == ()


def test_nothing_is_sent_or_kept_by_its_maker(tmp_path):
    """ONNX Runtime 1.32 keeps an id and events in the cache folder, unless it is told not to."""
    code = "from tightfit.runtime.machine.providers import providers; assert providers()"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [*tmp_path.rglob("*onnxruntime*")]
