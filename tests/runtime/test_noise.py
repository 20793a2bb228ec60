"""Noise: CUDA's numbers against published ones; second seeds, other sizes and steps' own seed as A1111 has
them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tightfit
import torch
from tightfit import Request
from tightfit.benchmarks import samplers as table
from tightfit.benchmarks.metrics import psnr
from tightfit.runtime import infotext, sampling
from tightfit.runtime.conditions import Steering
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import schedulers
from tightfit.runtime.noise import Noise, Philox, philox

WORDS = [  # of Random123's known answers (kat_vectors, philox4x32 of 10 rounds): counter, key, answer
    ("00000000" * 4, "00000000" * 2, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe0994fdcceb5001e42024126ea1"),
]
# torch.manual_seed(0); torch.randn(3, 4, device="cuda"): as A1111's modules/rng_philox.py documents it.
CUDA = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def words(text: str) -> list[int]:
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(("counter", "key", "answer"), WORDS)
def test_philox_by_random123s_known_answers(counter, key, answer):
    first, second = words(key)
    counters = np.array(words(counter), np.uint32)[:, None].repeat(3, axis=1)
    assert philox(counters, (first, second)).T.tolist() == [words(answer)] * 3


def test_normal_numbers_are_those_of_cuda():
    assert np.abs(Philox(0).normal((3, 4)) - np.array(CUDA)).max() < 1.5e-7
    many = Philox(1234).normal((4, 128, 128))
    assert many.dtype == np.float32
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    first, second = itertools.islice(map(Philox(2**40 + 3).normal, [(2, 3)] * 2), 2)
    assert not np.isclose(first, second).any()  # goes on
    assert not np.isclose(first, Philox(3).normal((2, 3))).any()  # the key has 64 bits


def shaped(**options) -> Noise:
    return Noise((1, 4, 8, 6), 5, **options)


def test_the_cpus_noise_is_torchs():
    generator = torch.Generator().manual_seed(5)
    noise, own = shaped().first()
    assert np.array_equal(noise, torch.randn(1, 4, 8, 6, generator=generator).numpy())
    assert np.array_equal(own.normal((1, 2)), torch.randn(1, 2, generator=generator).numpy())
    delta = shaped(ensd=31337).first()[1]
    generator = torch.Generator().manual_seed(5 + 31337)
    assert np.array_equal(delta.normal((1, 2)), torch.randn(1, 2, generator=generator).numpy())


@pytest.mark.parametrize("source", ["cpu", "nv"])
def test_a_second_noise_is_on_the_arc(source):
    first, second = shaped(source=source).first()[0], Noise((1, 4, 8, 6), 9, source).first()[0]
    mixed = shaped(source=source, subseed=9, strength=0.25).first()[0].astype(np.float64)
    # Each column of a picture by itself, as A1111: by the angle between unit vectors.
    for c, x in itertools.product(range(4), range(6)):
        a, b = (noise[0, c, :, x].astype(np.float64) for noise in (first, second))
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        exact = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
        assert np.allclose(mixed[0, c, :, x], exact, atol=1e-5)
    assert np.allclose(shaped(source=source, subseed=9, strength=1.0).first()[0], second, atol=1e-5)
    same = shaped(source=source, subseed=5, strength=0.5).first()[0]
    assert np.allclose(same, first, atol=1e-5)  # no arc between equal ones


def test_noise_of_another_size_is_in_the_middle():
    plain, small, large = (Noise((1, 4, *sides), 5).first()[0] for sides in ((8, 6), (4, 4), (12, 10)))
    within = shaped(resize=(4, 4)).first()[0]
    assert np.array_equal(within[:, :, 2:6, 1:5], small)
    edge = np.ones((8, 6), bool)
    edge[2:6, 1:5] = False
    assert np.array_equal(within[:, :, edge], plain[:, :, edge])
    assert np.array_equal(shaped(resize=(12, 10)).first()[0], large[:, :, 2:10, 2:8])
    odd = shaped(resize=(5, 9)).first()[0]  # one side smaller, one larger
    other = Noise((1, 4, 5, 9), 5).first()[0]
    assert np.array_equal(odd[:, :, 1:6, 0:5], other[:, :, :, 2:7])


@pytest.mark.parametrize(
    "name", ["euler_a", "dpm2_a_karras", "dpmpp_2m_sde", "dpmpp_2s_a_karras", "dpmpp_3m_sde_simple"]
)
def test_steps_draw_from_the_source_too(sd1, name):
    """By diffusers' own classes, and by ours: against the formulas, with the numbers drawn one by one."""
    config = {"_class_name": "DDIMScheduler", **table.BETAS}
    spec = dataclasses.replace(tightfit.inspect(str(sd1)), scheduler=config)
    sampler, schedule = schedulers.split(name)
    case, made = table.Case(sampler.name, schedule, "epsilon"), schedulers.make(name, spec, table.STEPS)
    noise = Noise(table.SHAPE, 7, "nv")

    def predict(samples, timestep, step):
        return [table.predicted(made, samples[0].astype(np.float64), timestep).astype(np.float32)]

    picture = sampling.picture(sampling.Sampling(made, table.STEPS), noise, Steering())
    steps = sampling.denoise([picture], predict)
    *_, (last,) = steps
    numbers = Philox(7)
    exact = table.by_formula(case, made, spec, lambda: numbers.normal(table.SHAPE).astype(np.float64))
    assert np.abs(last.latents - exact).max() < 1e-3 * np.abs(exact).max()


def test_pictures_by_cudas_noise(sd1):
    """Beside diffusers' pipeline, which is given the noise; and what it says of it is repeated."""
    import diffusers

    theirs = diffusers.DiffusionPipeline.from_pretrained(sd1, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    latents = torch.from_numpy(Philox(7).normal((1, 4, 8, 8)))
    exact = theirs("a red heart", latents=latents, **options).images[0]
    with tightfit.load(str(sd1), precision="fp32", device="cpu") as pipe:
        picture = pipe("a red heart", seed=7, noise_source="GPU", **options)
        assert psnr(picture, exact) > 75
        assert psnr(pipe("a red heart", seed=7, **options), exact) < 60
        asked = Request(
            "a", seed=3, num_images=2, noise_source="nv", subseed=-1, subseed_strength=0.3,
            seed_resize="32X48", ensd=11, scheduler="euler_a", num_inference_steps=2,
        )  # fmt: skip
        first, second = pipe.generate(asked).images
        carried = infotext.parse(second.info["parameters"], "x.png")
        again = pipe.generate(Request(**carried.request)).images[0]
    assert again.tobytes() == second.tobytes() != first.tobytes()
    exact_request = json.loads(json.loads(second.info["parameters"].rpartition("tightfit: ")[2]))
    assert (exact_request["seed"], exact_request["noise_source"], exact_request["seed_resize"]) == (
        3,
        "nv",
        "32x48",
    )
    assert carried.request["subseed"] > 0
    for words_of_a1111 in ("RNG: NV", "Variation seed strength: 0.3", "Seed resize from: 32x48", "ENSD: 11"):
        assert words_of_a1111 in second.info["parameters"]


@pytest.mark.parametrize(
    ("options", "words_said"),
    [
        ({"noise_source": "amd"}, ["unknown noise_source 'amd'", "choose cpu, gpu, nv"]),
        ({"subseed": 3}, ["subseed", "--subseed-strength"]),
        ({"subseed_strength": 1.1}, ["from 0 to 1"]),
        ({"subseed": -2, "subseed_strength": 0.5}, ["subseed must be a whole number", "-1"]),
        ({"seed_resize": "64"}, ["seed_resize must be a size such as 512x512"]),
        ({"seed_resize": "60x64"}, ["seed_resize's width 60", "56 or 64"]),
        ({"ensd": 7, "scheduler": "heun"}, ["heun draws no noise", "euler_a"]),
        ({"ensd": 7, "scheduler": "euler_a", "eta": 0}, ["euler_a draws no noise"]),
        ({"ensd": 0.5}, ["ensd must be a whole number"]),
    ],
)
def test_seeds_that_cannot_be(sd1, options, words_said):
    with pytest.raises(TightfitError) as caught:
        Request("a", **options).resolve(tightfit.inspect(str(sd1)))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words_said), str(caught.value)
