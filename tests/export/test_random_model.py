"""Full-size random models have the published sizes, and CLIP's vocabulary is CLIP's."""

from __future__ import annotations

import json

import pytest
from tightfit.export import random_model
from tightfit.runtime.models import vocabulary


@pytest.mark.parametrize(
    ("family", "name", "parameters"),
    [
        ("sd1", "unet", 859_520_964),
        ("sd1", "vae", 83_653_863),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "unet", 865_910_724),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "unet", 2_567_463_684),
        ("sdxl", "text_encoder_2", 694_659_840),
        ("flux2-klein", "transformer", 3_875_544_576),
        ("flux2-klein", "text_encoder", 4_022_468_096),
        ("z-image", "transformer", 6_154_908_736),
        ("sd3", "transformer", 2_243_171_520),
        ("sd3", "text_encoder_3", 4_762_310_656),
        ("flux1-dev", "transformer", 11_901_408_320),
        ("flux1-schnell", "transformer", 11_891_178_560),
    ],
)
def test_published_sizes(family, name, parameters):
    """As Hugging Face's model pages and the papers count them."""
    model = random_model.MODELS[family]
    module = random_model.build((random_model.CLASSES | model.get("classes", {}))[name], model[name])
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_vocabulary_has_clips_order():
    """Ids that OpenAI's simple_tokenizer gives: bytes in printable order, then the same ending a word, then
    merges."""
    ids = vocabulary.vocabulary([("t", "h"), ("th", "e</w>")])
    assert [
        ids[token] for token in ("!", "~", "¡", "!</w>", "th", "the</w>", vocabulary.START, vocabulary.END)
    ] == [
        0, 93, 94, 256, 512, 513, 514, 515,
    ]  # fmt: skip


def test_any_text_can_be_encoded(tmp_path):
    from transformers import CLIPTokenizer

    vocabulary.write(tmp_path, [("h", "e")], 77)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    ids = loaded("he 心 Ünï!").input_ids
    assert ids[0] == loaded.bos_token_id
    assert ids.count(loaded.eos_token_id) == 1
    assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == "he心ünï!"


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError):
        random_model.write("sd1", tmp_path, tiny=True)


def test_half_a_folder_is_never_seen(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tightfit.export.folder.SafetensorsFile.write", fail)
    with pytest.raises(OSError, match="No space"):
        random_model.write("sd1", tmp_path / "model", tiny=True)
    assert not (tmp_path / "model").exists()


def test_reads_in_diffusers(tiny_models):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_models["sdxl"])
    assert pipe.unet.config.addition_embed_type == "text_time"
    index = json.loads((tiny_models["sdxl"] / "model_index.json").read_text())
    assert index["tokenizer_2"] == ["transformers", "CLIPTokenizer"]
