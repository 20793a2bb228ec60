"""Weights find their places under old and new names; wrong ones are refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tightfit
from safetensors.torch import load_file, save_file
from tightfit.runtime.errors import TightfitError

OPTIONS = {"seed": 1, "num_inference_steps": 1, "scheduler": "euler"}
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def paint(folder) -> bytes:
    with tightfit.load(str(folder), precision="fp32", device="cpu") as pipe:
        return pipe("a cat", **OPTIONS).tobytes()


def rewrite(file, change) -> None:
    save_file(change(load_file(file)), file)


def test_old_names(sd1, sd1_copy):
    """SD 1.5 as published: VAE attention called query, key, value, proj_attn, and position ids among the text weights."""
    import torch

    def older(name):
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            name = name.replace(new, old)
        return name

    rewrite(sd1_copy / VAE, lambda weights: {older(n): w for n, w in weights.items()})
    rewrite(sd1_copy / TEXT, lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert paint(sd1_copy) == paint(sd1)


def test_names_without_the_text_prefix(sd1, sd1_copy):
    rewrite(sd1_copy / TEXT, lambda weights: {n.removeprefix("text_model."): w for n, w in weights.items()})
    assert paint(sd1_copy) == paint(sd1)


def test_shards(sd1, sd1_copy):
    weights = load_file(sd1_copy / UNET)
    (sd1_copy / UNET).unlink()
    names = sorted(weights)
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, sd1_copy / "unet" / file)
        places |= dict.fromkeys(part, file)
    (sd1_copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert paint(sd1_copy) == paint(sd1)


def fails(folder, *words) -> None:
    with pytest.raises(TightfitError) as caught:
        paint(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_missing_and_foreign_tensors(sd1_copy):
    rewrite(sd1_copy / UNET, lambda w: {("conv_first.weight" if n == "conv_in.weight" else n): t for n, t in w.items()})
    fails(sd1_copy, "unet", "lack 1, such as conv_in.weight", "conv_first.weight", "renamed")
    rewrite(sd1_copy / VAE, lambda w: {n: t for n, t in w.items() if n != "decoder.conv_in.weight"})
    rewrite(sd1_copy / UNET, lambda w: {("conv_in.weight" if n == "conv_first.weight" else n): t for n, t in w.items()})
    fails(sd1_copy, "vae", "lack 1, such as decoder.conv_in.weight", "renamed")


def test_tensors_nobody_knows_are_left_alone(sd1, sd1_copy):
    """As diffusers and transformers do: published folders hold some."""
    rewrite(sd1_copy / UNET, lambda w: w | {"ema.decay": w["conv_in.bias"].clone()})
    assert paint(sd1_copy) == paint(sd1)


def test_other_shapes(sd1_copy):
    rewrite(sd1_copy / UNET, lambda w: w | {"conv_in.weight": w["conv_in.weight"][:16].contiguous()})
    fails(sd1_copy, "conv_in.weight", "[16, 4, 3, 3]", "[32, 4, 3, 3]")
    rewrite(sd1_copy / UNET, lambda w: w | {"conv_in.weight": w["time_embedding.linear_1.weight"].new_zeros(4, 32, 3, 3)})
    fails(sd1_copy, "conv_in.weight", "[4, 32, 3, 3]")


def test_attention_as_1x1_convolutions(sd1, sd1_copy):
    """(C, C, 1, 1), as the first Stable Diffusion files have it, is (C, C)."""
    name = "decoder.mid_block.attentions.0.to_q.weight"
    rewrite(sd1_copy / VAE, lambda w: w | {name: w[name][:, :, None, None].contiguous()})
    assert paint(sd1_copy) == paint(sd1)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"attention_head_dim": "x"}),
        ("unet/config.json", {"class_embed_type": "projection"}),
        ("text_encoder/config.json", {"hidden_size": "x"}),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}),
        ("text_encoder/config.json", {"vocab_size": 300}),
    ],
)
def test_broken_configs_are_named(sd1_copy, file, changes):
    config = json.loads((sd1_copy / file).read_text())
    (sd1_copy / file).write_text(json.dumps(config | changes))
    fails(sd1_copy, file.split("/")[0])


def test_everything_is_checked_before_a_weight_is_read(sd1_copy, monkeypatch):
    """A broken VAE is found at once, not after all steps."""
    from tightfit.runtime.backends import weights

    monkeypatch.setattr(weights, "read_into", lambda *_: pytest.fail("a weight was read"))
    rewrite(sd1_copy / VAE, lambda w: {n: t for n, t in w.items() if n != "decoder.conv_in.weight"})
    fails(sd1_copy, "decoder.conv_in.weight")


def test_config_that_cannot_be_built(sd1_copy):
    config = json.loads((sd1_copy / "unet/config.json").read_text())
    (sd1_copy / "unet/config.json").write_text(json.dumps(config | {"down_block_types": ["NoSuchBlock2D"] * 4}))
    fails(sd1_copy, "unet/config.json", "NoSuchBlock2D")


def test_broken_tokenizers(sd1_copy):
    (sd1_copy / "tokenizer/merges.txt").unlink()
    fails(sd1_copy, "lacks vocab.json and merges.txt")
    (sd1_copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (sd1_copy / "tokenizer/vocab.json").write_text("{")
    fails(sd1_copy, "tokenizer", "cannot be read")


def test_overflow_is_said(sd1_copy):
    import torch

    rewrite(sd1_copy / VAE, lambda w: w | {"decoder.conv_out.bias": torch.full((3,), torch.inf)})
    fails(sd1_copy, "overflowed in fp32: copy or download the model again")
    with (
        tightfit.load(str(sd1_copy), device="cpu", precision="bf16") as pipe,
        pytest.raises(TightfitError, match="try --precision"),
    ):
        pipe("a cat", **OPTIONS)


MEASURE = """
import sys, torch
from pathlib import Path
from tightfit.runtime.backends.weights import read_into
from tightfit.runtime.process import ProcessPeak
from tightfit.runtime.files import read_header

peak = ProcessPeak()
before = peak.bytes()
scratch = torch.empty(8 * 2**20, dtype=torch.uint8)
held = []
for tensor in read_header(Path(sys.argv[1])).values():
    held.append(torch.empty(tensor.shape, dtype=torch.bfloat16))
    read_into(held[-1], tensor, scratch)
assert sorted(float(t[-1]) for t in held) == list(range(16))
print(peak.bytes() - before if peak.resets else -1)
"""


def test_loading_never_holds_the_file_beside_the_weights(tmp_path):
    """fp16 on disk, bf16 in memory: the peak is the converted weights and little more; in a process of its own."""
    import torch

    save_file({f"t{i}": torch.full((4 * 2**20,), i, dtype=torch.float16) for i in range(16)}, tmp_path / "x.safetensors")
    grown = int(subprocess.check_output([sys.executable, "-c", MEASURE, str(tmp_path / "x.safetensors")]))
    if grown < 0:
        pytest.skip("this system cannot reset the peak")
    assert 15 * 8 * 2**20 < grown < 1.2 * 16 * 8 * 2**20
