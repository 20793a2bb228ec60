"""Weights find their places under old and new names; wrong ones are refused before anything runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tightfit
from safetensors.torch import load_file, save_file
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine.hardware import Hardware, half_is_broken
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement

OPTIONS = {"seed": 1, "num_inference_steps": 1, "scheduler": "euler"}
# Of one step every way would be costed.
ONE_WAY = {"device": "cpu", "residency": "staged", "attention": "sdpa", "tiling": "whole", "cfg": "batched"}
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def paint(folder) -> bytes:
    with tightfit.load(str(folder), precision="fp32", **ONE_WAY) as pipe:
        return pipe("a cat", **OPTIONS).tobytes()


def rewrite(file, change) -> None:
    save_file(change(load_file(file)), file)


def test_old_names(sd1, sd1_copy):
    """SD 1.5 as published: VAE attention called query, key, value, proj_attn, and position ids among the text
    weights."""
    import torch

    def older(name):
        for new, old in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(new, old)
        return name

    rewrite(sd1_copy / VAE, lambda weights: {older(n): w for n, w in weights.items()})
    rewrite(
        sd1_copy / TEXT,
        lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    )
    assert paint(sd1_copy) == paint(sd1)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("text_encoder", {"num_hidden_layers": 1}, ("encoder.layers.1.", "num_hidden_layers")),
        ("unet", {"mid_block_type": None}, ("mid_block.", "mid_block_type")),
        ("vae", {"use_post_quant_conv": False}, ("post_quant_conv.", "use_post_quant_conv")),
        (
            "vae",
            {"mid_block_add_attention": False},
            ("decoder.mid_block.attentions.0", "mid_block_add_attention"),
        ),
        ("vae", {"layers_per_block": 1}, ("decoder.up_blocks.0.resnets.2", "layers_per_block")),
    ],
)
def test_weights_that_the_config_leaves_out(deep_models, tmp_path, part, changes, words):
    """Painting without them gives another picture without a word."""
    folder = Path(shutil.copytree(deep_models["sd1"], tmp_path / "model"))
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TightfitError, match=r"which their config.json leaves out") as caught:
        paint(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_of_no_network_is_ignored(sd1, sd1_copy):
    import torch

    extra = {
        UNET: ("model_ema.decay", "ema.down_blocks.0.x", "steps"),
        VAE: ("encoder.more", "loss.logvar"),
        TEXT: ("text_projection.weight", "logit_scale", "vision_model.encoder.layers.0.x"),
    }
    for file, names in extra.items():
        rewrite(
            sd1_copy / file, lambda weights, names=names: weights | {name: torch.zeros(2) for name in names}
        )
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
    (sd1_copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places})
    )
    assert paint(sd1_copy) == paint(sd1)


def fails(folder, *words) -> None:
    with pytest.raises(TightfitError) as caught:
        paint(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_missing_and_foreign_tensors(sd1_copy):
    rewrite(
        sd1_copy / UNET,
        lambda w: {("conv_first.weight" if n == "conv_in.weight" else n): t for n, t in w.items()},
    )
    fails(sd1_copy, "unet", "lack 1, such as conv_in.weight", "conv_first.weight", "renamed")
    rewrite(sd1_copy / VAE, lambda w: {n: t for n, t in w.items() if n != "decoder.conv_in.weight"})
    rewrite(
        sd1_copy / UNET,
        lambda w: {("conv_in.weight" if n == "conv_first.weight" else n): t for n, t in w.items()},
    )
    fails(sd1_copy, "vae", "lack 1, such as decoder.conv_in.weight", "renamed")


def test_tensors_nobody_knows_are_left_alone(sd1, sd1_copy):
    """As diffusers and transformers do: published folders hold some."""
    rewrite(sd1_copy / UNET, lambda w: w | {"ema.decay": w["conv_in.bias"].clone()})
    assert paint(sd1_copy) == paint(sd1)


def test_other_shapes(sd1_copy):
    rewrite(sd1_copy / UNET, lambda w: w | {"conv_in.weight": w["conv_in.weight"][:16].contiguous()})
    fails(sd1_copy, "conv_in.weight", "[16, 4, 3, 3]", "[32, 4, 3, 3]")
    rewrite(
        sd1_copy / UNET,
        lambda w: w | {"conv_in.weight": w["time_embedding.linear_1.weight"].new_zeros(4, 32, 3, 3)},
    )
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
    from tightfit.runtime.backends.torch import loading as weights

    monkeypatch.setattr(weights, "read_into", lambda *_: pytest.fail("a weight was read"))
    rewrite(sd1_copy / VAE, lambda w: {n: t for n, t in w.items() if n != "decoder.conv_in.weight"})
    fails(sd1_copy, "decoder.conv_in.weight")


def test_config_that_cannot_be_built(sd1_copy):
    config = json.loads((sd1_copy / "unet/config.json").read_text())
    (sd1_copy / "unet/config.json").write_text(
        json.dumps(config | {"down_block_types": ["NoSuchBlock2D"] * 4})
    )
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
        tightfit.load(str(sd1_copy), precision="bf16", **ONE_WAY) as pipe,
        pytest.raises(TightfitError, match="try --precision"),
    ):
        pipe("a cat", **OPTIONS)


MEASURE = """
import sys, torch
from pathlib import Path
from tightfit.runtime.backends.torch.loading import read_into
from tightfit.runtime.machine.process import ProcessPeak
from tightfit.runtime.models.layouts.safetensors import read_header

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
    """fp16 on disk, bf16 in memory: the peak is the converted weights and little more; in a process of its
    own."""
    import torch

    save_file(
        {f"t{i}": torch.full((4 * 2**20,), i, dtype=torch.float16) for i in range(16)},
        tmp_path / "x.safetensors",
    )
    grown = int(subprocess.check_output([sys.executable, "-c", MEASURE, str(tmp_path / "x.safetensors")]))
    if grown < 0:
        pytest.skip("this system cannot reset the peak")
    assert 15 * 8 * 2**20 < grown < 1.2 * 16 * 8 * 2**20


TEXTS = (
    "GET was unable to find an engine to execute this computation",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_may_mean_out_of_memory(monkeypatch, text):
    """Only if torch's allocator found no room meanwhile, or hardly anything of the card is free; else it is a
    kernel that lacks."""
    import torch
    from tightfit.runtime.backends.torch.backend import _memory_errors_explained

    card = SimpleNamespace(ooms=3, free=2**30)
    fake = SimpleNamespace(
        memory_stats=lambda: {"num_ooms": card.ooms}, mem_get_info=lambda: (card.free, 2**32)
    )
    monkeypatch.setattr(torch, "cuda", fake)

    def raised(full: bool = False, device: str = "cuda") -> TightfitError:
        with pytest.raises(TightfitError) as caught, _memory_errors_explained(torch.device(device)):
            card.ooms += full
            raise RuntimeError(f"{text}\nException raised from somewhere")
        assert "\n" not in str(caught.value)
        return caught.value

    for device in ("cuda", "cpu"):
        error = raised(device=device)
        assert not isinstance(error, OutOfMemoryError)
        assert "--precision, or fp32" in str(error)
    assert isinstance(raised(full=True), OutOfMemoryError)
    assert not isinstance(raised(), OutOfMemoryError)  # that was the call before
    card.free = 30 * 2**20
    assert isinstance(raised(), OutOfMemoryError)


def test_what_says_out_of_memory(monkeypatch):
    import torch
    from tightfit.runtime.backends.torch.backend import _memory_errors_explained

    # Before the first allocation.
    cuda = SimpleNamespace(memory_stats=dict, mem_get_info=lambda: (2**30, 2**32))
    monkeypatch.setattr(torch, "cuda", cuda)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(OutOfMemoryError), _memory_errors_explained(torch.device("cuda")):
            raise error
    with (
        pytest.raises(RuntimeError, match="an illegal memory access"),
        _memory_errors_explained(torch.device("cuda")),
    ):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("name", "capability", "precision", "compute", "words"),
    [
        (
            "NVIDIA GeForce RTX 2060",
            (7, 5),
            "bf16",
            "bf16",
            "below compute capability 8.0: choose fp16, or int8",
        ),
        (
            "NVIDIA GeForce GTX 1060 6GB",
            (6, 1),
            "int8",
            "bf16",
            "below compute capability 8.0: choose fp16, or int8",
        ),
        ("NVIDIA GeForce RTX 3060", (8, 6), "bf16", "bf16", None),
        ("AMD Radeon RX 6600", None, "bf16", "bf16", None),
        ("NVIDIA GeForce RTX 2060", (7, 5), "fp16", "fp16", None),
        (
            "NVIDIA T600 Laptop GPU",
            (7, 5),
            "fp16",
            "fp16",
            "return NaN on NVIDIA T600 Laptop GPU: choose fp32, or int8 or int4",
        ),
        (
            "NVIDIA GeForce GTX 1650",
            (7, 5),
            "int4",
            "fp16",
            "return NaN on NVIDIA GeForce GTX 1650: choose fp32, or int8 or int4",
        ),
        ("NVIDIA GeForce GTX 1650", (7, 5), "int4", "fp32", None),
    ],
)
def test_what_a_card_cannot_compute(sd1, name, capability, precision, compute, words):
    from tightfit.runtime.backends.torch.backend import TorchBackend

    spec = inspect(str(sd1))
    halves = () if half_is_broken(name, capability) else ("fp16",)
    card = Hardware("cuda", name, 2**33, 2**33, (*halves, "fp32"), capability)
    placement = Placement("torch", precision, compute, "staged", "sdpa", "whole")
    why = TorchBackend.refuses(spec, spec.components["unet"], placement, card, Extent(1, 64, 64))
    assert why is None if words is None else words in str(why)


def test_nothing_is_set_for_a_card_that_answers_nan(monkeypatch):
    """cudnn.benchmark would try workspaces of whatever is free."""
    import torch
    from tightfit.runtime.backends.torch import backend as engine

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce GTX 1650")
    monkeypatch.setattr(engine, "meter", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    engine.TorchBackend("cuda")
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("capability", "width", "fp32_answer"),
    [
        ((7, 5), 128, False),
        ((7, 5), 160, True),
        ((8, 6), 160, False),
        ((8, 6), 512, True),
        ((7, 5), 512, True),
    ],
)
@pytest.mark.parametrize("side", [64, 128])
def test_wide_heads_keep_an_fp32_answer(capability, width, fp32_answer, side):
    """The VAE's head of 512 at 512x512 and 1024x1024 pixels: 8 and 32 MiB; of fp32 it is the answer
    itself."""
    import torch
    from tightfit.runtime.backends.torch.dryrun import attention_bytes

    shape, flash = (1, 1, side * side, side * side, width), capability >= (8, 0)
    log_sum = 4 * side * side
    taken = attention_bytes("sdpa", shape, torch.float16, "cuda", True, flash)
    assert taken - log_sum == (side * side * width * 4 if fp32_answer else 0)
    if width == 512:
        assert taken - log_sum == {64: 8, 128: 32}[side] * 2**20
    assert attention_bytes("sdpa", shape, torch.float32, "cuda", True, flash) == log_sum


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_without_triton_a_notice_and_torchs_path(sd1, monkeypatch, precision):
    """On a GPU: weights stay stored in so many bits."""
    import torch
    from tightfit.runtime.backends.torch import backend as engine
    from tightfit.runtime.backends.torch import quantised

    backend = engine.TorchBackend("cpu")
    backend.device = torch.device("cuda")
    monkeypatch.setattr(
        engine, "triton_problem", lambda _: "RuntimeError: Failed to find C compiler; install one"
    )
    monkeypatch.setattr(engine.TorchSession, "load", lambda *_: None)
    spec = inspect(str(sd1))
    session = backend.load(
        spec.components["unet"], Placement("torch", precision, "fp16", "staged", "sdpa", "whole")
    )
    assert session.module is not None
    layers = quantised.quantised_layers(session.module).values()
    if precision == "fp16":
        assert (session.notices, len(layers)) == ((), 0)
        return
    assert len(layers) > 0
    (notice,) = session.notices
    assert "\n" not in notice
    assert "(RuntimeError: Failed to find C compiler; install one)" in notice


def test_whole_numbers_are_refused_where_triton_does_not_run(sd1, monkeypatch):
    """Of the card that is here; a card that is planned for is taken to have it."""
    import torch
    from tightfit.kernels import dequantise
    from tightfit.runtime.backends.torch.engine import TorchEngine

    monkeypatch.setattr(
        dequantise, "triton_problem", lambda _: "RuntimeError: Failed to find C compiler; install one"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec, placement = inspect(str(sd1)), Placement("torch", "int8-dynamic", "fp16", "staged", "sdpa", "whole")
    rates = {"fp32": 1e13, "fp16": 2e13, "int8": 4e13}
    card = Hardware("cuda", "NVIDIA GeForce RTX 3060", 2**33, 2**33, ("fp16", "fp32"), (8, 6), rates)
    for providers, words in ((None, "Failed to find C compiler; install one): choose int8"), ((), None)):
        there = replace(card, providers=providers)
        why = TorchEngine.refuses(spec, spec.components["unet"], placement, there, Extent(1, 64, 64))
        assert why is None if words is None else words in str(why)
