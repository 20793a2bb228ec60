"""Where a model lies, and what would be fetched; the hub itself is never asked here."""

from __future__ import annotations

from pathlib import Path

import pytest
from tightfit.runtime import hub
from tightfit.runtime.errors import TightfitError

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
    assert {"model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(hub.wanted(SD15))


def test_wanted_shards_and_variants():
    files = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model-00002-of-00002.safetensors"]
    files += ["unet/diffusion_pytorch_model.safetensors.index.json", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert set(hub.wanted(files)) == set(files)


def test_places(tmp_path):
    assert hub.locate("emoji") == hub.BUILT_IN["emoji"]
    assert hub.locate(str(tmp_path)) == tmp_path
    assert hub.locate("some/where/else") == Path("some/where/else")
    assert hub.locate("models/old.ckpt") == Path("models/old.ckpt")


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TightfitError) as caught:
        hub.locate("someone/no-such-model")
    assert "someone/no-such-model" in str(caught.value)
    assert "connection" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cached_models_run_offline(monkeypatch, tmp_path):
    """The cache's own layout: models--owner--name/snapshots/<commit>, named by refs/main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert hub.locate("someone/model") == snapshot
