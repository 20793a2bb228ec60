"""Where a model lies, and what would be fetched; the hub itself is never asked here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import hub

SD15 = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_wanted_of_a_full_repository():
    weights = [f for f in hub.wanted(SD15) if f.endswith((".safetensors", ".bin", ".ckpt"))]
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {"model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(
        hub.wanted(SD15)
    )


def test_wanted_shards_and_variants():
    files = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    files += [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert set(hub.wanted(files)) == set(files)


def test_wanted_of_onnx_repositories():
    """Optimum's layout where there is nothing else; not the graphs that SDXL is published with beside its
    weights."""
    folders = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    files = [
        "model_index.json",
        *(f"{folder}/{name}" for folder in folders for name in ("config.json", "model.onnx")),
    ]
    files += ["unet/model.onnx_data"]
    graphs = {"text_encoder/model.onnx", "unet/model.onnx", "unet/model.onnx_data", "vae_decoder/model.onnx"}
    assert {file for file in hub.wanted(files) if not file.endswith(".json")} == graphs
    both = [*files, "unet/diffusion_pytorch_model.safetensors"]
    assert "unet/model.onnx" not in hub.wanted(both)


def test_places(sd1, monkeypatch):
    assert hub.inspect(sd1).folder == sd1
    monkeypatch.chdir(sd1.parent)
    assert hub.inspect("sd1").name == str(sd1)  # absolute, so that a picture can be repeated from anywhere
    for model in ("some/where/else", "models/old.ckpt", "x" * 300, "~no-such-user/x", "a\0b"):
        with pytest.raises(TightfitError):
            hub.inspect(model)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty hub cache; `fill` puts a model there in the hub's own layout:
    models--owner--name/snapshots/<commit>."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def fill(folder: Path) -> Path:
        snapshot = tmp_path / "models--someone--model" / "snapshots" / COMMIT
        shutil.copytree(folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
        return snapshot

    return fill


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_offline_and_not_cached(cache, offline):
    with pytest.raises(TightfitError) as caught:
        hub.inspect("someone/model")
    for word in ("someone/model", "not in the hub's cache", "offline", "check the name and the connection"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_and_cached(cache, offline, sd1):
    snapshot = cache(sd1)
    spec = hub.inspect("someone/model")
    assert (spec.name, spec.folder) == ("someone/model", snapshot)


def test_half_a_download_is_not_taken_for_a_model(cache, sd1, monkeypatch):
    """The disk was full: that is what the error says, not that a file is missing."""
    (cache(sd1) / "unet/diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(TightfitError, match="No space left on device"):
        hub.inspect("someone/model")


def test_fetching(cache, sd1, monkeypatch):
    """What is asked of the hub: the list of files, then those that are wanted, and nothing with
    local_files_only."""
    asked = []
    files = [SimpleNamespace(rfilename=name) for name in SD15]

    def download(repository, *, allow_patterns=None, local_files_only=False):
        asked.append((repository, allow_patterns, local_files_only))
        return str(sd1)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.inspect("someone/model").name == "someone/model"
    assert hub.inspect("someone/model", local_files_only=True).name == "someone/model"
    assert asked == [("someone/model", hub.wanted(SD15), False), ("someone/model", None, True)]
