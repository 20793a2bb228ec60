"""Texts that are known: the same picture without a text encoder, and nothing old, foreign or damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tightfit
from tightfit.export import random_model
from tightfit.runtime import texts
from tightfit.runtime.adapters import adapted, lora
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.loaded import Loaded
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.clip_skip import skipping
from tightfit.runtime.models.hub import BUILT_IN, inspect
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.placement import Placement
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.run import Run
from tightfit.runtime.texts import ENVIRONMENT, Chunk, Texts, arithmetic, machine

STAGED = {
    "precision": "fp32",
    "residency": "staged",
    "attention": "sdpa",
    "tiling": "whole",
    "cfg": "batched",
}
HEART = tightfit.Request(
    "a (red:1.3) heart", "blue", width=64, height=64, seed=1, num_inference_steps=1, guidance_scale=5.0
)
FP32 = Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where texts are kept; they are, from here on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, "1MiB")
    monkeypatch.setattr(texts.TEXTS, "_asked", None)  # whatever command another test ran here
    return tmp_path / "tightfit" / "texts"


@pytest.fixture
def loaded(monkeypatch):
    """The names of the networks that are loaded."""
    names, session = [], Loaded.session

    def called(self, component, placement):
        names.append(component.name)
        return session(self, component, placement)

    monkeypatch.setattr(Loaded, "session", called)
    return names


@pytest.fixture(scope="module")
def encoder():
    return inspect("emoji").components["text_encoder"]


def chunk(encoder, number: int = 0) -> Chunk:
    return Chunk(encoder, machine("cpu", "here"), np.arange(77) + number)


def answers(number: int = 0) -> tuple[np.ndarray, ...]:
    states = np.random.default_rng(number).standard_normal((1, 77, 768), np.float32)
    return states, states[:, 0]


def same(one, other) -> bool:
    return len(one) == len(other) and all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------ pictures


def test_a_repeated_text_needs_no_encoder(folder, loaded, tiny_models, monkeypatch):
    """Two encoders, one with a pooled answer; words with weights."""
    with tightfit.load(str(tiny_models["sdxl"]), device="cpu", **STAGED) as pipeline:
        first = pipeline.generate(HEART)
        assert {"text_encoder", "text_encoder_2"} <= {*loaded}
        loaded.clear()
        again = pipeline.generate(HEART)
        monkeypatch.setenv(ENVIRONMENT, "0")
        without = pipeline.generate(HEART)
    assert (first.plan.texts_known, again.plan.texts_known, without.plan.texts_known) == (False, True, False)
    assert again.images[0].tobytes() == first.images[0].tobytes() == without.images[0].tobytes()
    assert again.images[0].info == first.images[0].info
    assert "encode" in first.stages and "encode" not in again.stages
    assert again.plan.summary() == f"{first.plan.summary()}, texts from the cache"
    assert again.plan.predicted.seconds < first.plan.predicted.seconds
    for stage, measured in again.stages.items():
        if stage != "prepare":
            assert measured.peak_bytes == pytest.approx(again.plan.predicted.stages[stage], rel=0.05)


def test_only_what_is_known_in_full_and_what_does_not_stay_loaded_goes_without(folder, loaded):
    with tightfit.load("emoji", device="cpu", **STAGED) as pipeline:
        pipeline.generate(HEART)
        assert pipeline.plans(HEART)[0].texts_known
        assert not pipeline.plans(replace(HEART, negative_prompt="green"))[0].texts_known
        assert not pipeline.plans(replace(HEART, clip_skip=2))[0].texts_known
    wanted = {**STAGED, "residency": "resident"}
    with tightfit.load("emoji", device="cpu", **wanted) as pipeline:
        plan, *_ = pipeline.plans(HEART)
        known = next(p for p in plan_without_room(pipeline, plan) if p.fits)
    assert not plan.texts_known
    assert known.texts_known
    assert known.predicted.peak_bytes < plan.predicted.peak_bytes


def plan_without_room(pipeline, plan):
    """The plans in a little less memory than `plan` takes."""
    budget = plan.predicted.context_bytes + plan.predicted.peak_bytes - 1
    wishes = replace(pipeline.wishes, budget=budget)
    return tightfit.plan(pipeline.hardware, pipeline.spec, HEART, wishes)


def test_what_is_chosen_does_not_depend_on_what_is_known(folder, monkeypatch):
    """So that what comes again is painted alike to the last bit."""
    wishes = Wishes(**{**STAGED, "residency": "auto"})
    with tightfit.load("emoji", device="cpu", **STAGED) as pipeline:
        pipeline.generate(HEART)
    known, *others = tightfit.plan(pipeline.hardware, pipeline.spec, HEART, wishes)
    monkeypatch.setenv(ENVIRONMENT, "0")
    plans = tightfit.plan(pipeline.hardware, pipeline.spec, HEART, wishes)
    assert known.texts_known
    assert (known.placements, known.cfg) == (plans[0].placements, plans[0].cfg)
    assert [other.placements for other in others] == [plan.placements for plan in plans]


def test_a_text_that_is_gone_is_encoded(folder, monkeypatch):
    with tightfit.load("emoji", device="cpu", **STAGED) as pipeline:
        first = pipeline.generate(HEART)
        assert pipeline.plans(HEART)[0].texts_known
        prepare = Run._prepare

        def prepared(run: Run) -> None:
            """After the plan is made, and before it is taken."""
            next(folder.iterdir()).write_bytes(b"\x80\x04.")
            prepare(run)

        monkeypatch.setattr(Run, "_prepare", prepared)
        again = pipeline.generate(HEART)
        monkeypatch.undo()
    assert not again.plan.texts_known
    assert again.images[0].tobytes() == first.images[0].tobytes()


@pytest.fixture(scope="module")
def wordy(made_once) -> Path:
    """A tiny model whose text encoder is the largest of its networks."""
    tiny = random_model.TINY["sd1"]
    tiny = tiny | {"text_encoder": tiny["text_encoder"] | {"intermediate_size": 2**15}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_model.TINY, "sd1", tiny)
        return made_once("wordy", partial(random_model.write, "sd1", tiny=True, precision="fp32"))


def test_a_budget_that_only_a_known_text_fits(folder, wordy):
    hardware, spec = Hardware.detect("cpu"), inspect(str(wordy))
    with Pipeline(spec, hardware, Wishes(**STAGED)) as roomy:
        plan = roomy.plans(HEART)[0].predicted
        assert plan.stages["encode"] == plan.peak_bytes
        budget = plan.context_bytes + max(plan.stages["denoise"], plan.stages["decode"])
        with Pipeline(spec, hardware, Wishes(**STAGED, budget=budget)) as tight:
            with pytest.raises(
                TightfitError, match=r"; after .* its texts are in the text cache, and it fits"
            ):
                tight.plans(HEART)
            first = roomy.generate(HEART)
            roomy.close()
            again = tight.generate(HEART)
    assert again.plan.texts_known
    assert again.peak_bytes <= budget - plan.context_bytes < first.peak_bytes
    assert again.images[0].tobytes() == first.images[0].tobytes()


def test_hires_fix_goes_without_in_both_passes(folder, loaded):
    larger = replace(HEART, hires_size="96x96")
    with tightfit.load("emoji", device="cpu", **STAGED) as pipeline:
        first = pipeline.generate(larger)
        loaded.clear()
        again = pipeline.generate(larger)
    assert "text_encoder" not in loaded
    assert [one.plan.texts_known for one in again.passes] == [True, True]
    assert again.images[0].tobytes() == first.images[0].tobytes()


def test_a_saved_plan_knows_texts_or_not(folder):
    with tightfit.load("emoji", device="cpu", **STAGED) as pipeline:
        plan = pipeline.generate(HEART).plan
    with tightfit.load("emoji", device="cpu", plan=plan) as pipeline:
        again = pipeline.generate(HEART)
        assert again.plan.texts_known
        other = pipeline.generate(replace(HEART, prompt="a tree"))
    assert not other.plan.texts_known


def test_nothing_is_kept_unless_it_is_asked_for(folder, monkeypatch, encoder):
    monkeypatch.delenv(ENVIRONMENT)
    kept = Texts()
    kept.put(chunk(encoder), FP32, answers())
    assert not folder.exists()
    kept.keep()
    kept.put(chunk(encoder), FP32, answers())
    assert kept.get(chunk(encoder), FP32)
    for off in (lambda: kept.keep(False), lambda: kept.keep() or monkeypatch.setenv(ENVIRONMENT, "0")):
        off()
        assert kept.get(chunk(encoder), FP32) is None
    monkeypatch.setenv(ENVIRONMENT, "some")
    with pytest.raises(TightfitError, match=f"{ENVIRONMENT} must be an amount"):
        kept.keep()


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_answers_are_kept_to_the_last_bit_in_as_few_bits_as_they_have(folder, encoder, kind):
    kept, whole = Texts(), answers()
    if kind == "bf16":
        whole = tuple((array.view(np.uint32) & 0xFFFF0000).view(np.float32) for array in whole)
    if kind == "fp16":
        whole = tuple(array.astype(np.float16).astype(np.float32) for array in whole)
    kept.put(chunk(encoder), FP32, whole)
    assert same(kept.get(chunk(encoder), FP32), whole)
    (file,) = folder.iterdir()
    assert file.stat().st_size == pytest.approx(78 * 768 * (4 if kind == "fp32" else 2), rel=0.01)
    if os.name == "posix":
        assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"",
        lambda content: b"\x80\x04.",
    ],
)
def test_what_is_damaged_is_as_if_it_were_not_there(folder, encoder, damage):
    kept = Texts()
    kept.put(chunk(encoder), FP32, answers())
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert kept.get(chunk(encoder), FP32) is None
    kept.put(chunk(encoder), FP32, answers())
    assert same(kept.get(chunk(encoder), FP32), answers())


@pytest.mark.skipif(os.name != "posix", reason="a link may take rights")
def test_a_link_to_nowhere_is_removed(folder, encoder):
    """Else the text would be known each time that it is planned, and never be there."""
    kept = Texts()
    kept.put(chunk(encoder), FP32, answers())
    (file,) = folder.iterdir()
    file.unlink()
    file.symlink_to(folder / "nowhere")
    assert kept.get(chunk(encoder), FP32) is None
    assert not list(folder.iterdir())


def test_a_file_of_another_text_is_no_answer(folder, encoder):
    kept = Texts()
    for number in range(2):
        kept.put(chunk(encoder, number), FP32, answers(number))
    first, second = folder.iterdir()
    first.write_bytes(second.read_bytes())
    known = [kept.get(chunk(encoder, number), FP32) for number in range(2)]
    assert known.count(None) == 1


def test_what_was_used_longest_ago_gives_way(folder, encoder):
    """Each takes 234 KiB of 1 MiB."""
    kept = Texts()
    for number in range(4):
        kept.put(chunk(encoder, number), FP32, answers(number))
        for age, file in enumerate(sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)):
            os.utime(file, (age, age))
    assert kept.get(chunk(encoder, 0), FP32)
    kept.put(chunk(encoder, 4), FP32, answers(4))
    there = [number for number in range(5) if kept.get(chunk(encoder, number), FP32)]
    assert there == [0, 2, 3, 4]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2**20


def test_two_processes_at_once(folder):
    """Each writes, reads and removes what the other does."""
    command = [sys.executable, "-c", _BUSY]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert all(file.name.endswith(".torch-fp32-fp32") for file in folder.iterdir())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2**20


_BUSY = """
import numpy as np
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.placement import Placement
from tightfit.runtime.texts import Chunk, Texts, machine
encoder, kept = inspect("emoji").components["text_encoder"], Texts()
fp32 = Placement("torch", "fp32", "fp32", "staged", "sdpa", "whole")
chunk = lambda number: Chunk(encoder, machine("cpu", "here"), np.full(77, number))
for turn in range(60):
    number = turn * 7 % 9
    kept.put(chunk(number), fp32, (np.full((1, 77, 768), number + 0.1, np.float32),))
    answers = kept.get(chunk(turn % 9), fp32)
    assert answers is None or (answers[0] == np.float32(turn % 9 + 0.1)).all()
"""


# ------------------------------------------------------------------------------------------------ keys


def test_whatever_changes_an_answer_changes_its_key(folder, monkeypatch, sd1_copy):
    kept, spec = Texts(), inspect(str(sd1_copy))
    plain = chunk(spec.components["text_encoder"])
    kept.put(plain, FP32, answers())
    again = chunk(inspect(str(sd1_copy)).components["text_encoder"])
    assert kept.get(again, FP32)
    assert kept.get(plain, replace(FP32, residency="streamed"))
    skipped = skipping(spec, 2).components["text_encoder"]
    taught = replace(plain.encoder, words={"<toy>": next(iter(plain.encoder.tensors.values()))})
    others = [
        plain._replace(ids=plain.ids[::-1].copy()),
        plain._replace(machine=machine("cpu", "there")),
        plain._replace(encoder=skipped),
        plain._replace(encoder=taught),
    ]
    assert not any(kept.get(other, FP32) for other in others)
    assert kept.get(plain, replace(FP32, compute="bf16", precision="int8")) is None
    monkeypatch.setattr(texts, "_computed_by", lambda: "another torch")
    assert kept.get(plain, FP32) is None
    monkeypatch.undo()


def test_files_that_are_written_again_are_of_another_encoder(folder, sd1_copy):
    kept, plain = Texts(), chunk(inspect(str(sd1_copy)).components["text_encoder"])
    kept.put(plain, FP32, answers())
    file = next(iter(plain.encoder.tensors.values())).file
    os.utime(file, (1, 1))
    assert kept.get(plain, FP32) is None
    file.unlink()
    assert kept.get(plain, FP32) is None


def test_a_lora_and_its_strength_are_part_of_the_encoder(folder):
    """The emoji's own changes its text encoder."""
    kept, spec = Texts(), inspect("emoji")
    flat = BUILT_IN["emoji"] / "lora" / "flat.safetensors"
    made = [
        adapted(spec, (lora.written(f"{flat}:{scale}"),)).components["text_encoder"] for scale in (1, 0.5)
    ]
    for number, encoder in enumerate((spec.components["text_encoder"], *made)):
        assert kept.get(chunk(encoder), FP32) is None
        kept.put(chunk(encoder), FP32, answers(number))
    again = adapted(inspect("emoji"), (lora.written(f"{flat}:0.5"),)).components["text_encoder"]
    assert same(kept.get(chunk(again), FP32), answers(2))


def test_arithmetics_are_told_apart():
    placements = [
        FP32,
        replace(FP32, precision="int8"),
        replace(FP32, precision="int8", compute="bf16"),
        replace(FP32, backend="onnx", provider="CPUExecutionProvider"),
    ]
    assert len({arithmetic(placement) for placement in placements}) == 4
