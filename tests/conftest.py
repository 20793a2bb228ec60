"""Tiny random models of each family, and the skip for tests that need a GPU."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, so that a failure is of the change at hand. `--hypothesis-profile default`
# looks for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Before torch is imported: workers that have two threads each wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FAMILIES = ("sd1", "sd2", "sdxl")
# Begun first, as the file that ends last has the other workers wait.
LONGEST = (
    "test_fuzz.py",
    "test_onnx_model.py",
    "test_app.py",
    "test_bench.py",
    "test_single_file.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order begins with the files of most tests


def pytest_collection_finish():
    """What the libraries hold stays to the end: looking through it, for garbage, takes 0.25 s a time."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Measurements, settings and models of whoever runs the tests are not looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
    monkeypatch.setenv("TIGHTFIT_TEXT_CACHE", "0")
    monkeypatch.setattr("tightfit.runtime.texts.TEXTS._asked", None)  # whatever a command before has said
    monkeypatch.delenv("TIGHTFIT_MODELS", raising=False)
    monkeypatch.delenv("TIGHTFIT_LORAS", raising=False)


@pytest.fixture(scope="module", autouse=True)
def dry_runs_once():
    """Tests of a file follow a network and size once, as commands do from one process to the next. Those of
    another file, which may have changed what computes it, follow it again."""
    from tightfit.runtime.backends.torch import dryrun
    from tightfit.runtime.costs import known

    dryrun._traces.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "_MOST_OPEN", 10**6)
        patch.setattr(known.KNOWN, "_files", {})
        patch.setattr(known.KNOWN, "_folder", Path(os.devnull))
        yield


# Tracing, planning and painting all take their time from the number of operators, so the models of most tests
# are half as deep as `tightfit.export.random_model --tiny`.
_SHALLOW_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def shallow(family: str, vae: dict, unet: dict | None = None) -> dict:
    """The configs of a tiny model with a U-Net half as deep, and with `vae` in its VAE's, `unet` in its."""
    from tightfit.export import random_model

    tiny = random_model.TINY[family]
    whole = {**random_model.MODELS[family]["unet"], **tiny["unet"]}
    per_level = {
        field: whole[field][:2]
        for field in ("attention_head_dim", "transformer_layers_per_block")
        if isinstance(whole.get(field), tuple)
    }
    half = tiny["unet"] | _SHALLOW_UNET | per_level | (unet or {})
    return tiny | {"unet": half, "vae": tiny["vae"] | vae}


@pytest.fixture(scope="session")
def tiny_models(made_once) -> dict[str, Path]:
    """A diffusers folder per family, fp32, written once; tests must not change them."""
    return _written(made_once, "models", {"layers_per_block": 1})


@pytest.fixture(scope="session")
def tiny_model(made_once) -> Callable[[str], Path]:
    """Called with a family beside FAMILIES: its folder as `random_model --tiny` makes it, fp32, written once;
    tests must not change it."""
    from tightfit.export import random_model

    def written(family: str) -> Path:
        write = functools.partial(random_model.write, family, tiny=True, precision="fp32")
        return made_once(f"models/{family}", write)

    return written


@pytest.fixture(scope="session")
def deep_models(made_once) -> dict[str, Path]:
    """As `tiny_models`, with as many blocks and layers as published models have."""
    from tightfit.export import random_model

    write = functools.partial(random_model.write, tiny=True, precision="fp32")
    return {family: made_once(f"deep/{family}", functools.partial(write, family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def shallow_models(made_once) -> dict[str, Path]:
    """As `tiny_models`, quickly exported to ONNX: with a VAE of two levels, and no attention on the U-Net's
    way up, which is its way down's. That U-Net is traced in 0.7 of the time."""
    plain = {"up_block_types": ("UpBlock2D", "UpBlock2D")}
    return _written(made_once, "shallow", {"block_out_channels": (16, 32), "layers_per_block": 1}, plain)


def _written(made_once, name: str, vae: dict, unet: dict | None = None) -> dict[str, Path]:
    from tightfit.export import random_model

    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            patch.setitem(random_model.TINY, family, shallow(family, vae, unet))
            write = functools.partial(random_model.write, family, tiny=True, precision="fp32")
            made[family] = made_once(f"{name}/{family}", write)
    return made


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Called with a name and what writes a folder, whole or not at all: the folder, which all processes of a
    run share."""
    from filelock import FileLock  # huggingface_hub's

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = shared / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                write(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def shallow_control(shallow_models, made_once) -> Path:
    """A ControlNet of the shallow SD 1.x that changes pictures, which training would do."""
    from tightfit.benchmarks import random_parts

    def write(folder: Path) -> None:  # two levels, as its VAE has
        random_parts.controlnet(
            shallow_models["sd1"], 0, folder, conditioning_embedding_out_channels=(16, 32)
        )

    return made_once("shallow-control", write)


# Of a config, what no operator depends on: the VAEs of SD 1.x and SDXL are one graph.
_NOT_TRACED = {"scaling_factor", "force_upcast", "sample_size"}


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """A process traces networks of one config once, which takes 98 % of an export to ONNX."""
    from tightfit.export import onnx_networks

    trace, traced = onnx_networks.trace, {}

    def once(subject, dtype):
        config = {k: v for k, v in sorted(subject.component.config.items()) if k not in _NOT_TRACED}
        parts = config, subject.inputs, subject.outputs, subject.size, type(subject.module)
        key = repr((subject.name, dtype, parts))
        if key not in traced:
            traced[key] = trace(subject, dtype)
        model, program = traced[key]
        return model.clone(), program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_networks, "trace", once)
        yield


@pytest.fixture(scope="session")
def onnx_models(shallow_models, shallow_control, made_once, traced_once):
    """Called with a family and a precision: the shallow model exported to ONNX, once, SD 1.x in int4 with a
    ControlNet; tests must not change it."""
    from tightfit.__main__ import app
    from typer.testing import CliRunner

    def exported(family: str, precision: str) -> Path:
        arguments = ["export", str(shallow_models[family]), "--to", "onnx", "--precision", precision]
        arguments += ["--compute", "fp32"] if precision.startswith("int") else []
        arguments += ["--control", str(shallow_control)] if (family, precision) == ("sd1", "int4") else []

        def write(folder: Path) -> None:
            CliRunner().invoke(app(), [*arguments, "-o", str(folder)], catch_exceptions=False)

        return made_once(f"onnx/{family}-{precision}", write)

    return exported


@pytest.fixture
def sd1(tiny_models) -> Path:
    return tiny_models["sd1"]


@pytest.fixture
def sd1_copy(tiny_models, tmp_path) -> Path:
    """A copy of the tiny SD 1.x folder that a test may break."""
    return Path(shutil.copytree(tiny_models["sd1"], tmp_path / "model"))
