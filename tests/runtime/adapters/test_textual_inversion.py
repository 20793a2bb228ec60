"""Learned words against diffusers' load_textual_inversion, in every format and precision."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import save_file
from tightfit.runtime.adapters import adapted, textual_inversion
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.tokens import tokenize
from tightfit.runtime.planner.wishes import Wishes

REQUEST = {"seed": 3, "num_inference_steps": 2, "width": 64, "height": 64, "scheduler": "euler"}
PROMPT, NEGATIVE = "a photo of <toy>, red", "<toy>"


def widths(spec):
    return [encoder.setting("hidden_size") for encoder in spec.text_encoders]


def vectors(width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width + count))


@pytest.fixture
def word(tmp_path, sd1):
    save_file({"emb_params": vectors(*widths(inspect(str(sd1))))}, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def by_diffusers(folder, load) -> np.ndarray:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    load(pipe)
    made = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=2, guidance_scale=5.0, width=64, height=64,
        generator=torch.Generator().manual_seed(3), output_type="np",
    )  # fmt: skip
    return made.images[0]


# Calls of a changed network are followed anew by each pipeline, once for each way.
ONE_WAY = {"precision": "fp32", "attention": "sdpa", "tiling": "whole"}


def painted(folder, adapters=(), **wishes) -> tightfit.Result:
    with tightfit.load(str(folder), device="cpu", **{**ONE_WAY, **wishes}) as pipeline:
        return pipeline.generate(
            tightfit.Request(PROMPT, NEGATIVE, guidance_scale=5.0, adapters=tuple(adapters), **REQUEST)
        )


def decibels(picture, other) -> float:
    error = np.mean((np.asarray(picture, float) - np.asarray(other, float)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def test_sd1_is_diffusers_own_picture(sd1, word):
    ours = painted(sd1, [textual_inversion.read(word, "<toy>")]).images[0]
    theirs = by_diffusers(sd1, lambda pipe: pipe.load_textual_inversion(str(word), token="<toy>"))
    assert decibels(ours, (theirs * 255).round()) > 60
    assert decibels(ours, painted(sd1).images[0]) < 40  # the word matters


def test_sdxl_teaches_both_text_encoders(tiny_models, tmp_path):
    from safetensors.torch import load_file

    folder = tiny_models["sdxl"]
    first, second = widths(inspect(str(folder)))
    file = tmp_path / "toy.safetensors"
    save_file({"clip_l": vectors(first, 3), "clip_g": vectors(second, 3) * 2}, file)

    def load(pipe):
        stored = load_file(file)
        pipe.load_textual_inversion(stored["clip_l"], "<toy>", pipe.tokenizer, pipe.text_encoder)
        pipe.load_textual_inversion(stored["clip_g"], "<toy>", pipe.tokenizer_2, pipe.text_encoder_2)

    ours = painted(folder, [textual_inversion.read(file, "<toy>")]).images[0]
    assert decibels(ours, (by_diffusers(folder, load) * 255).round()) > 60


@pytest.mark.parametrize("wishes", [{"residency": "streamed"}, {"precision": "int8"}, {"precision": "int4"},
                                    {"precision": "bf16", "residency": "resident"}])  # fmt: skip
def test_on_every_precision_and_residency_and_predicted(sd1, word, wishes):
    known = textual_inversion.read(word, "<toy>")
    result = painted(sd1, [known], **wishes)
    assert decibels(result.images[0], painted(sd1, [known]).images[0]) > 25
    assert decibels(result.images[0], painted(sd1, [], **wishes).images[0]) < 40
    predicted = result.plan.predicted.peak_bytes
    assert abs(result.peak_bytes - predicted) <= 0.05 * predicted


@pytest.mark.parametrize(("residency", "times"), [("staged", 1), ("streamed", 2)])
def test_reading_is_in_the_predicted_seconds(tmp_path, sd1, residency, times):
    """Each time that the text encoder's weights are read: once, or for both texts. On a machine that converts
    and fills memory in no time."""
    machine, wishes = replace(Hardware.detect("cpu"), moves={}), Wishes(precision="fp32", residency=residency)
    values, seconds = vectors(*widths(inspect(str(sd1)))), []
    for number, stored in enumerate((values.half(), values)):
        save_file({"emb_params": stored}, file := tmp_path / f"{number}.safetensors")
        word = textual_inversion.read(file, "<toy>")
        request = tightfit.Request(PROMPT, NEGATIVE, guidance_scale=5.0, adapters=(word,), **REQUEST)
        seconds.append(tightfit.plan(machine, inspect(str(sd1)), request, wishes)[0].predicted.seconds)
    assert seconds[1] - seconds[0] == pytest.approx(times * values.nbytes / 2 / machine.read)


def test_a_words_vectors_are_cut_and_padded_as_others(sd1, word):
    spec = adapted(inspect(str(sd1)), [textual_inversion.read(word, "<toy>")])
    (encoder,) = spec.text_encoders
    known, length = encoder.setting("vocab_size"), encoder.setting("max_position_embeddings")
    one = tokenize(spec, encoder, {"prompt": "a <toy>"}).ids[0]
    assert [*one[2:4]] == [known, known + 1]
    many = tokenize(spec, encoder, {"prompt": " ".join(["<toy>"] * 50) + " tail"})
    assert [row.shape for row in many.ids] == [(length,)]
    assert [*many.ids[0][1:5]] == [known, known + 1] * 2
    assert (
        many.ids[0][-1] == tokenize(spec, encoder, {"prompt": "a " * 200}).ids[0][-1]
    )  # the mark of the end
    assert many.cut["prompt"].endswith("tail")


def test_files_and_names_that_cannot_be(sd1, tiny_models, word, tmp_path):
    spec = inspect(str(sd1))
    assert textual_inversion.read(word).token == "toy"
    save_file({"<style>": vectors(*widths(spec), 1)[0]}, named := tmp_path / "named.safetensors")
    assert textual_inversion.read(named).token == "<style>"
    adapted(spec, [textual_inversion.read(named)])
    cases = {
        "another family": lambda: adapted(inspect(str(tiny_models["sdxl"])), [textual_inversion.read(word)]),
        "comes twice": lambda: adapted(spec, [textual_inversion.read(word)] * 2),
        "has spaces": lambda: textual_inversion.read(word, "two words"),
    }
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(3)}, tmp_path / "weights.safetensors")
    cases["no embedding"] = lambda: textual_inversion.read(tmp_path / "weights.safetensors")
    save_file({"emb_params": torch.zeros(500, 32)}, tmp_path / "long.safetensors")
    cases["1 to 75 vectors"] = lambda: textual_inversion.read(tmp_path / "long.safetensors")
    for shape in ((), (0,), (2, 0), (0, 32)):
        save_file({"emb_params": torch.zeros(shape)}, file := tmp_path / f"{len(cases)}.safetensors")
        cases[f"of shape {re.escape(str(list(shape)))} in F32"] = partial(textual_inversion.read, file)
    for said, act in cases.items():
        with pytest.raises(TightfitError, match=said):
            act()
    taught = adapted(spec, [textual_inversion.read(word, "!")])
    with pytest.raises(TightfitError, match="a word of the model already"):
        tokenize(taught, taught.text_encoders[0], {"prompt": "a cat"})
