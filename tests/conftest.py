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


@pytest.fixture
def sd1(tiny_models) -> Path:
    return tiny_models["sd1"]


@pytest.fixture
def sd1_copy(tiny_models, tmp_path) -> Path:
    """A copy of the tiny SD 1.x folder that a test may break."""
    return Path(shutil.copytree(tiny_models["sd1"], tmp_path / "model"))
