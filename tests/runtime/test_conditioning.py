"""Prompts to what the denoiser reads: chunks, weights and steps, beside transformers in fp64 and pictures."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import tightfit
from tightfit.runtime.conditioning import emphasised
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.tokens import BACKTRACK, chunked
from tightfit.runtime.request import Request
from tightfit.runtime.run import Run

FAST = {"num_inference_steps": 4, "seed": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipes(tiny_models):
    made = {
        family: tightfit.load(str(folder), precision="fp32", device="cpu")
        for family, folder in tiny_models.items()
    }
    yield made
    for pipe in made.values():
        pipe.close()


@pytest.fixture(scope="module")
def trained(tiny_models, tmp_path_factory):
    """With a last norm that leaves a mean, as in a trained text encoder: else there is none to restore."""
    from safetensors.torch import load_file, save_file

    made = {}
    for family, folder in tiny_models.items():
        copy = shutil.copytree(folder, tmp_path_factory.mktemp("trained") / family)
        for file in copy.glob("text_encoder*/model.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                tensors[name] += 0.3 * name.endswith("final_layer_norm.bias")
            save_file(tensors, file)
        made[family] = tightfit.load(str(copy), precision="fp32", device="cpu")
    yield made
    for pipe in made.values():
        pipe.close()


def rows_of(spec, text, encoder=0):
    return chunked(spec, spec.text_encoders[encoder], [text])[text]


def letters(count: int, commas: tuple[int, ...] = ()) -> str:
    """A text of so many tokens, each a letter, but for commas at these places."""
    return " ".join("," if place in commas else "x" for place in range(count))


# Tokens, places of commas → tokens of each chunk: 75 at most, and what follows a comma that is among the
# last 20 goes into the next.
CHUNKS = [
    (1, (), [1]),
    (74, (), [74]),
    (75, (), [75]),
    (76, (), [75, 1]),
    (150, (), [75, 75]),
    (151, (), [75, 75, 1]),
    (225, (), [75, 75, 75]),
    (300, (), [75, 75, 75, 75]),
    (100, (70,), [71, 29]),
    (100, (55,), [56, 44]),
    (100, (54,), [75, 25]),  # 21 before the end
    (100, (10, 74), [75, 25]),  # it is the last
    (100, (75,), [75, 25]),  # a comma moves nothing
    (76, (74,), [75, 1]),
    (75, (60,), [75]),  # nothing follows
    (160, (70, 140), [71, 70, 19]),
    (90, (60, 65, 70), [71, 19]),
]


@pytest.mark.parametrize(("count", "commas", "wanted"), CHUNKS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_chunks(tiny_models, family, count, commas, wanted):
    spec = inspect(str(tiny_models[family]))
    assert BACKTRACK == 20
    for number in range(len(spec.text_encoders)):
        read = rows_of(spec, letters(count, commas), number)
        begin, end = rows_of(spec, "", number).ids[0][:2]
        assert [list(row).index(end) - 1 for row in read.ids] == wanted
        for row, length in zip(read.ids, wanted, strict=True):
            assert row[0] == begin
            assert {*row[length + 2 :]} <= {tokenizer_of(spec, number).pad_token_id}
        inner = [token for row, length in zip(read.ids, wanted, strict=True) for token in row[1 : length + 1]]
        text = letters(count, commas)
        assert inner == tokenizer_of(spec, number)(text, add_special_tokens=False).input_ids


def tokenizer_of(spec, number):
    return tokenizer_in(spec.folder / spec.text_encoders[number].network.tokenizer)


@functools.cache
def tokenizer_in(folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def test_break_begins_a_chunk(tiny_models):
    spec = inspect(str(tiny_models["sd1"]))
    empty = rows_of(spec, "").ids[0]
    x, y = (rows_of(spec, text).ids[0] for text in "xy")
    assert np.array_equal(rows_of(spec, "x BREAK y").ids, [x, y])
    assert np.array_equal(rows_of(spec, "x BREAK BREAK y").ids, [x, empty, y])
    assert np.array_equal(rows_of(spec, "x BREAK").ids, [x])
    assert np.array_equal(rows_of(spec, "BREAK x").ids, [empty, x])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_unmarked_words_are_read_as_before(tiny_models, family):
    from tightfit.runtime.models.tokens import tokenize

    spec = inspect(str(tiny_models[family]))
    for encoder in spec.text_encoders:
        for text in ("", "a red heart", "un chat: 16:9, {a|b}", "猫 🐈", letters(75)):
            before = tokenize(spec, encoder, {"prompt": text}).ids
            now = chunked(spec, encoder, [text])[text]
            assert np.array_equal(now.ids, before)
            assert (now.weights == 1).all()


def weights_of(spec, text, weights, encoder=0):
    """By hand: the place of each word that counts otherwise."""
    plain = rows_of(spec, text, encoder).ids
    words = np.ones(plain.shape)
    for place, weight in weights.items():
        words[place // 75, place % 75 + 1] = weight
    return plain, words


# Prompt, its words without marks, and the weight of each token (a letter) that counts otherwise.
WEIGHED = [
    ("a (b) c", "a b c", {1: 1.1}),
    ("a ((b)) [c]", "a b c", {1: 1.21, 2: 1 / 1.1}),
    ("(a b:1.5) c", "a b c", {0: 1.5, 1: 1.5}),
    ("a (b:0) c", "a b c", {1: 0}),
    ("a (b:-0.5) c", "a b c", {1: -0.5}),
    (f"{letters(74)} (b c:1.4)", f"{letters(74)} b c", {74: 1.4, 75: 1.4}),
]


@pytest.mark.parametrize("case", range(len(WEIGHED)))
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_embeddings_beside_fp64(trained, family, case):
    """transformers' own encoders in fp64, one chunk after the other, weighed and restored by hand. Any two of
    family, prompt and emphasis meet."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    prompt, words, weights = WEIGHED[case]
    kind = ("original", "no-norm", "ignore")[(case + [*trained].index(family)) % 3]
    pipe, arrays, pooled = trained[family], [], None
    spec = pipe.spec
    for number, encoder in enumerate(spec.text_encoders):
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        made = kinds[encoder.config["architectures"][0]].from_pretrained(encoder.folder, dtype=torch.float64)
        ids, factors = weights_of(spec, words, weights, number)
        with torch.no_grad():
            out = made(torch.tensor(ids), output_hidden_states=True)
        states = out.hidden_states[-2] if family == "sdxl" else out.last_hidden_state
        pooled = out.text_embeds[0] if "text_embeds" in out else pooled
        chunks = []
        for row, factor in zip(np.asarray(states), factors, strict=True):
            weighed = row if kind == "ignore" else row * factor[:, None]
            chunks.append(weighed * (row.mean() / weighed.mean()) if kind == "original" else weighed)
        arrays.append(np.concatenate(chunks))
    inputs = conditioned(pipe, Request(prompt, emphasis=kind, **FAST))
    wanted = np.concatenate(arrays, axis=-1)
    assert inputs["hidden"].shape == (2, *wanted.shape)
    np.testing.assert_allclose(inputs["hidden"][1], wanted, atol=2e-5, rtol=2e-4)
    if pooled is not None:
        np.testing.assert_allclose(inputs["text_embeds"][1], pooled, atol=1e-5)


def conditioned(pipe, request, call=0):
    """The denoiser's inputs of one call."""
    from tightfit.runtime.run import Ways

    job = pipe._job(request)
    run = Run(job, pipe.loaded, Ways(pipe._first, pipe._plans))
    run._take(pipe._first(job))
    return run._encode()[0].of("batched", call)[0]


def test_a_mean_that_is_gone_stays_gone():
    states = np.ones((1, 1, 2, 3), np.float32)
    assert np.isfinite(emphasised(states, np.zeros((1, 1, 2)), np.ones(1), "original")).all()


def test_the_mean_is_of_all_texts_of_a_schedule():
    """As A1111 encodes them together; a text counts as often as the schedule has it."""
    states = np.random.default_rng(0).standard_normal((2, 1, 4, 3)).astype(np.float32) + 1
    weights = np.ones((2, 1, 4), np.float32)
    weights[1, 0, 2] = 3
    weighed = states * weights[..., None]
    rows = np.concatenate([states[[0] * 3], states[[1]]]), np.concatenate([weighed[[0] * 3], weighed[[1]]])
    ratio = rows[0].mean(dtype=np.float64) / rows[1].mean(dtype=np.float64)
    np.testing.assert_allclose(
        emphasised(states, weights, np.array([3, 1]), "original"), weighed * ratio, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_of_schedules_and_weights(pipes, family):
    """What a schedule says is what the same words give when they are there from the start."""
    pipe = pipes[family]

    def painted(prompt, **more):
        return pipe(prompt, **{**FAST, **more}).tobytes()

    cat, dog = painted("a cat"), painted("a dog")
    assert cat != dog
    for same in (
        "[a cat:a dog:1.0]",
        "[a cat:a dog:4]",
        "(a cat:1.0)",
        "((a cat:2):0.5)",
        "[[a cat|a cat]:x:4]",
    ):
        assert painted(same) == cat, same
    for same in ("[a cat:a dog:0]", "[a cat:a dog:0.0]", "[a dog::4]"):
        assert painted(same) == dog, same
    for other in ("[a cat:a dog:0.5]", "[a cat|a dog]", "(a cat:1.5)", "a cat AND a dog", "a BREAK cat"):
        assert painted(other) not in (cat, dog), other
    assert painted("a (cat:1.5)", emphasis="ignore") == cat
    assert len({painted("a (cat:1.5)", emphasis=kind) for kind in ("original", "no-norm", "ignore")}) == 3
    assert painted("a cat", prompt_syntax="plain") == cat
    assert painted("a (cat:1.5)", prompt_syntax="plain") != cat
    assert painted("a cat", negative_prompt="[x|x]") == painted("a cat", negative_prompt="x")
    assert painted("a cat", negative_prompt="(x:1.5)") != painted("a cat", negative_prompt="x")


def test_alternation_by_hand(pipes, monkeypatch):
    """Calls 0 and 1, then 3 …: the first text; the others the second. Each text is encoded once."""
    pipe, one, other = (
        pipes["sd1"],
        *(pipes["sd1"]._job(Request(text, **FAST)) for text in ("a cat", "a dog")),
    )
    seen = []
    predict = Run._predict
    monkeypatch.setattr(
        Run,
        "_predict",
        lambda run, samples, time, indices, how: (
            seen.append(run._conditionings[0].of(run.plan.cfg, how[0]))
            or predict(run, samples, time, indices, how)
        ),
    )
    encodings = []
    encode = Run._encoded
    monkeypatch.setattr(Run, "_encoded", lambda *given: encodings.append(given) or encode(*given))
    pipe("[a cat|a dog]", scheduler="euler", **FAST)
    assert len(encodings) == 3
    assert pipe._job(Request("[a cat|a dog]", **FAST)).prompting.encodings == 3
    hidden = [parts[0]["hidden"] for parts in seen]
    cat, dog = (conditioned(pipe, job)["hidden"] for job in (one, other))
    assert [
        "cat" if np.array_equal(each, cat) else "dog" if np.array_equal(each, dog) else "?" for each in hidden
    ] == ["cat", "cat", "dog", "cat"]
    assert hidden[0] is hidden[1]  # an engine finds it on its device


def test_second_order_samplers_count_both_calls(pipes):
    """As A1111's total steps: heun's 4 steps are 8 calls there, and half of them the fourth."""
    words = {"scheduler": "euler", **FAST}
    assert pipes["sd1"]._job(Request("[a:b:0.5]", **words)).prompting.lines[-1].ends == (2, 4)


def test_branches_by_hand(pipes):
    """uncond + Σ weight · scale · (cond - uncond), however the guidance runs."""
    pipe = pipes["sd1"]
    job = pipe._job(Request("a cat :0.5 AND a dog AND x :-0.3", "y", **FAST))
    assert (job.branches, [line.weight for line in job.prompting.lines]) == (4, [1, 0.5, 1, -0.3])
    single = {
        text: np.asarray(conditioned(pipe, Request(text, **{**FAST, "guidance_scale": 1.0}))["hidden"])
        for text in ("y", "a cat", "a dog", "x")
    }
    assert np.array_equal(conditioned(pipe, job)["hidden"], np.concatenate(list(single.values())))
    given = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1) ** 2
    guided = Run(job, pipe.loaded, None)._guided(given, [line.weight for line in job.prompting.lines[1:]])
    assert guided.item() == pytest.approx(4 * (0.5 * 1 + 4 - 0.3 * 9))


@pytest.mark.parametrize("prompt", ["a AND b :0.7", "[a|b|c] (d:1.3)", letters(230)])
def test_sequential_guidance_paints_the_same(sd1, pipes, prompt):
    batched = pipes["sd1"](prompt, **FAST)
    with tightfit.load(str(sd1), precision="fp32", device="cpu", cfg="sequential") as pipe:
        sequential = pipe(prompt, **FAST)
    difference = np.abs(np.asarray(batched, np.int16) - np.asarray(sequential, np.int16))
    assert difference.max() <= 1


def test_halves_of_other_lengths(sd1, pipes):
    """A shorter text is repeated, which attention does not see: the same as each half by itself."""
    pipe, long = pipes["sd1"], letters(160)
    job = pipe._job(Request(long, letters(80), **FAST))
    assert [job.prompting.counts(line) for line in job.prompting.lines] == [2, 3]
    assert job.prompting.chunks == 6
    hidden = conditioned(pipe, job)["hidden"]
    assert hidden.shape[1] == 6 * 77
    short, alone = (
        conditioned(pipe, Request(text, **{**FAST, "guidance_scale": 1.0}))["hidden"][0]
        for text in (letters(80), long)
    )
    assert np.array_equal(hidden, [np.tile(short, (3, 1)), np.tile(alone, (2, 1))])
    session = pipe.loaded.session(pipe.spec.denoiser, pipe.plans(job)[0].denoiser)
    sample = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    repeated, once = (
        session(
            sample=sample, timestep=np.array(500.0, np.float32), hidden=np.tile(alone[None], (1, count, 1))
        )[0]
        for count in (2, 1)
    )
    np.testing.assert_allclose(repeated, once, atol=1e-5)


def test_a_schedule_is_as_long_as_its_longest_text(pipes):
    pipe = pipes["sd1"]
    spec = pipe.spec
    request = Request(f"[a:{letters(80)}:2]", **{**FAST, "guidance_scale": 1.0})
    short = conditioned(pipe, request)["hidden"]
    assert short.shape[1] == 2 * 77
    job = pipe._job(request)
    assert (job.prompting.chunks, job.prompting.encodings) == (2, 1 + 2 + 1)
    empty = conditioned(pipe, Request("", **{**FAST, "guidance_scale": 1.0}))["hidden"]
    assert np.array_equal(short[:, 77:], empty)
    assert spec.text_length == 77


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("prompt", [letters(225), f"a AND {letters(150)} :0.5", "[x|y]"])
def test_peaks_are_predicted(pipes, family, prompt):
    request = Request(prompt, **FAST)
    result = pipes[family].generate(request)
    result = pipes[family].generate(
        request
    )  # the first has torch's workspace to make, which is planned for all
    predicted = result.plan.predicted
    assert result.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.05)
    assert result.stages["denoise"].peak_bytes == pytest.approx(predicted.stages["denoise"], rel=0.05)
    short, long = (pipes[family].plans(Request(text, **FAST))[0].predicted for text in ("a", letters(4000)))
    assert long.seconds > predicted.seconds > short.seconds
    assert long.stages["denoise"] > short.stages["denoise"]


def test_out_of_memory_goes_on_with_schedules(pipes, monkeypatch):
    """From the call that it was at, by a plan that takes less."""
    pipe, prompt = pipes["sd1"], "[a cat:a dog:0.5] AND x"
    wanted = np.asarray(pipe(prompt, **FAST), np.int16)
    predict, failed = Run._predict, []

    def failing(run, *given):
        if not failed and run.plan.cfg == "batched" and len(pipe.loaded.sessions) and given[1] < 600:
            failed.append(1)
            raise OutOfMemoryError("no room")
        return predict(run, *given)

    monkeypatch.setattr(Run, "_predict", failing)
    result = pipe.generate(Request(prompt, **FAST))
    assert any("went on with" in notice for notice in result.notices)
    assert np.abs(np.asarray(result.images[0], np.int16) - wanted).max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_empty_prompt_is_one(pipes, family):
    pipe = pipes[family]
    empty = pipe("", **FAST)
    assert pipe(" ", **FAST).tobytes() == empty.tobytes() != pipe("x", **FAST).tobytes()
    with pytest.raises(TightfitError, match="no prompt was given"):
        pipe(None, **FAST)


def test_what_is_named_in_a_prompt_but_not_found(pipes):
    pipe = pipes["sd1"]
    result = pipe.generate(Request("a cat <lora:x:0.8>", "bad <lyco:y:1>", **FAST))
    second, first = result.notices
    assert first.startswith("<lora:x:0.8> in the prompt is left out")
    assert second.startswith("<lyco:y:1> in the negative prompt is read as words, as in A1111")

    alone = Request("a cat", "bad <lyco:y:1>", **FAST)
    assert result.images[0].tobytes() == pipe.generate(alone).images[0].tobytes()


def test_a_model_that_takes_one_text(pipes, monkeypatch):
    monkeypatch.setattr(type(pipes["sd1"].spec), "guidance_width", 32)
    with pytest.raises(TightfitError, match="leave AND out"):
        Request("a AND b").resolve(pipes["sd1"].spec)
    assert Request("[a:b:0.5]").resolve(pipes["sd1"].spec).branches == 1


def test_prompts_that_no_encoder_can_read(pipes):
    with pytest.raises(TightfitError, match="at most 64 can be read: shorten it"):
        pipes["sd1"].plans(Request(letters(5000)))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip(trained, family, skip):
    """The states before the last layers, normed, as transformers has them. SDXL as diffusers, which counts
    from 0 there and reads the layer before the last without it: 1 and 2 are the same, as in Forge."""
    import torch

    pipe = trained[family]
    job = pipe._job(Request("a red heart", clip_skip=skip, **{**FAST, "guidance_scale": 1.0}))
    inputs, (first, *_) = conditioned(pipe, job), pipe.spec.text_encoders
    if family == "sdxl":
        from diffusers import DiffusionPipeline

        theirs = DiffusionPipeline.from_pretrained(pipe.spec.folder, dtype=torch.float32)
        options = {"device": torch.device("cpu"), "do_classifier_free_guidance": False}
        hidden, _, pooled, _ = theirs.encode_prompt(
            "a red heart", **options, clip_skip=skip - 2 if skip > 2 else None
        )
        np.testing.assert_allclose(inputs["text_embeds"], pooled.detach().numpy(), atol=1e-5)
    else:
        from transformers import CLIPTextModel

        made = CLIPTextModel.from_pretrained(first.folder, dtype=torch.float32)
        ids = torch.tensor(rows_of(pipe.spec, "a red heart").ids)
        states = made(ids, output_hidden_states=True).hidden_states[-skip]
        hidden = next(part for name, part in made.named_modules() if name.endswith("final_layer_norm"))(
            states
        )
    np.testing.assert_allclose(inputs["hidden"], hidden.detach().numpy(), atol=1e-5)
    trimmed = job.spec.text_encoders[0].stored_bytes < first.stored_bytes
    assert trimmed == (skip > (2 if family == "sdxl" else 1))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip_of_more_layers_than_there_are(pipes, family):
    with pytest.raises(TightfitError, match=r"none of the 3 layers of the text_encoder.*take a smaller one"):
        pipes[family].plans(Request("a", clip_skip=5))


def test_clip_skip_is_planned_and_painted(pipes):
    pipe = pipes["sd1"]
    plain, skipped = (pipe.generate(Request("a cat", clip_skip=skip, **FAST)) for skip in (1, 2))
    assert plain.images[0].tobytes() != skipped.images[0].tobytes()
    assert skipped.plan.predicted.stages["encode"] < plain.plan.predicted.stages["encode"]
    assert skipped.stages["encode"].peak_bytes == pytest.approx(
        skipped.plan.predicted.stages["encode"], rel=0.05
    )
    text = skipped.images[0].info["parameters"]
    assert "Clip skip: 2" in text
    assert "Clip skip" not in plain.images[0].info["parameters"]
    assert pipe("a cat", clip_skip=1, **FAST).tobytes() == plain.images[0].tobytes()
