"""Tiny random models of each family, and the skip for tests that need a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

FAMILIES = ("sd1", "sd2", "sdxl")


def pytest_collection_modifyitems(items):
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """What `tightfit calibrate` measured for whoever runs the tests is not looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """A diffusers folder per family, fp32, written once; tests must not change them."""
    from tightfit.export import random_model

    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        random_model.write(family, root / family, tiny=True, precision="fp32")
    return {family: root / family for family in FAMILIES}


# Half as deep as the tiny ones, as tracing takes its time from the number of operators.
_SHALLOW = {
    "unet": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {"block_out_channels": (16, 32)},
}


@pytest.fixture(scope="session")
def shallow_models(tmp_path_factory) -> dict[str, Path]:
    """A diffusers folder per family, fp32, that is quickly exported to ONNX; tests must not change them."""
    from tightfit.export import random_model

    root = tmp_path_factory.mktemp("shallow")
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            tiny = {name: dict(each) for name, each in random_model.TINY[family].items()}
            for name, each in _SHALLOW.items():
                tiny[name] |= each
            for field in ("attention_head_dim", "transformer_layers_per_block"):
                if isinstance(value := {**random_model.MODELS[family]["unet"], **tiny["unet"]}.get(field), tuple | list):
                    tiny["unet"][field] = value[:2]
            patch.setitem(random_model.TINY, family, tiny)
            random_model.write(family, root / family, tiny=True, precision="fp32")
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def onnx_models(shallow_models, tmp_path_factory):
    """Called with a family and a precision: the shallow model exported to ONNX, once; tests must not change it."""
    from tightfit.runtime.cli import app
    from typer.testing import CliRunner

    root, known = tmp_path_factory.mktemp("onnx"), {}

    def exported(family: str, precision: str) -> Path:
        if (family, precision) not in known:
            folder = root / f"{family}-{precision}"
            arguments = [str(shallow_models[family]), "--to", "onnx", "--precision", precision, "-o", str(folder)]
            arguments += ["--compute", "fp32"] if precision.startswith("int") else []
            CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False)
            known[family, precision] = folder
        return known[family, precision]

    return exported


@pytest.fixture
def sd1(tiny_models) -> Path:
    return tiny_models["sd1"]


@pytest.fixture
def sd1_copy(tiny_models, tmp_path) -> Path:
    """A copy of the tiny SD 1.x folder that a test may break."""
    return Path(shutil.copytree(tiny_models["sd1"], tmp_path / "model"))
