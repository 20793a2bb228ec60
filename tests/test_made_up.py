"""A family, a layout, an adapter and a condition that nobody has: one file and one registration each, and
they are planned, predicted within 5 % and painted with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import load_file, save_file
from tightfit.runtime import conditions
from tightfit.runtime.conditions import Condition, Steering
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import families, reading
from tightfit.runtime.models.checks import is_count
from tightfit.runtime.models.families.family import Family, Network, Role
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.models.spec import Component
from tightfit.runtime.models.tensors import Patch
from tightfit.runtime.recent import Recent
from torch import nn

# --------------------------------------------------------------------------------------- the family: one file


def build_text(component):
    return nn.ModuleDict(
        {"words": nn.Embedding(component.config["vocab_size"], component.config["hidden_size"])}
    )


def build_denoiser(component):
    width, channels = component.config["cross_attention_dim"], component.config["in_channels"]
    return nn.ModuleDict(
        {"mix": nn.Conv2d(channels, channels, 3, padding=1), "read": nn.Linear(width, channels)}
    )


def build_decoder(component):
    return nn.ModuleDict({"grow": nn.ConvTranspose2d(component.config["latent_channels"], 3, 2, stride=2)})


def denoise(module, sample, timestep, hidden):
    return (module["mix"](sample) + module["read"](hidden.mean(1))[:, :, None, None] + timestep / 1000,)


def network(name: str, role: Role, **given: Any) -> Network:
    common = {
        "listed": "",
        "fields": {"latent_channels": is_count},
        "layers": lambda config: {},
        "decided_by": {},
    }
    return Network(name=name, folder=name, role=role, **common, **given)


CONFIGS = {
    "speller": {"vocab_size": 514, "hidden_size": 8, "max_position_embeddings": 77},
    "mixer": {"in_channels": 4, "cross_attention_dim": 8, "sample_size": 16, "block_out_channels": [4]},
    "grower": {"latent_channels": 4, "block_out_channels": [4, 4], "scaling_factor": 1.0},
}
NETWORKS = (
    network(
        "speller", Role.TEXT, defaults=CONFIGS["speller"], build=build_text, tokenizer="tokenizer",
        inputs=lambda spec, extent: {"tokens": (1, spec.text_length)},
        call=lambda module, tokens: (module["words"](tokens),),
    ),
    network(
        "mixer", Role.DENOISER, defaults=CONFIGS["mixer"], build=build_denoiser, call=denoise,
        inputs=lambda spec, extent: {
            "sample": (extent.batch, *spec.latent_shape(extent)), "timestep": (),
            "hidden": (extent.batch, spec.text_length, spec.text_width),
        },
    ),
    network(
        "grower", Role.DECODER, defaults=CONFIGS["grower"], build=build_decoder,
        inputs=lambda spec, extent: {"latents": (extent.batch, *spec.latent_shape(extent))},
        call=lambda module, latents: (module["grow"](latents).tanh(),),
    ),
)  # fmt: skip


class Toy(Family):
    name, networks = "toy", NETWORKS

    def claims(self, source):
        return source.pipeline == "ToyPipeline"

    def check(self, spec):
        if spec.text_width != spec.unet["cross_attention_dim"]:
            raise TightfitError(f"{spec.folder} is mixed")

    def default_guidance(self, spec):
        return 3.0

    def condition(self, job, encoded):
        (hidden, *_), *_ = encoded
        return {"hidden": hidden}


# --------------------------------------------------------------------------------------- the layout: one file


@dataclass(frozen=True)
class ToyFile:
    folder: Path
    tensors: Any
    pipeline: str = "ToyPipeline"

    listed = manifest = sides = settings = MappingProxyType({})
    notes = ()

    def config(self, network):
        return network.defaults

    def component(self, network):
        prefix = f"{network.name}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        return Component(network, self.folder, {**network.defaults}, own)

    def scheduler(self):
        return {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}


class ToyLayout:
    def claims(self, path):
        return path.suffix == ".safetensors" and path.stem == "toy"

    def read(self, path):
        return ToyFile(path.parent, read_header(path))


@pytest.fixture
def toy(tmp_path, sd1, monkeypatch):
    """A single file of random weights, and SD's tokenizer beside it; family and layout are registered by one
    line each."""
    monkeypatch.setattr(families, "FAMILIES", (Toy(), *families.FAMILIES))
    monkeypatch.setattr(reading, "LAYOUTS", (ToyLayout(), *reading.LAYOUTS))
    torch.manual_seed(0)
    weights = {}
    for each in NETWORKS:
        module = each.build(Component(each, tmp_path, CONFIGS[each.name], {}))
        weights |= {f"{each.name}.{name}": tensor for name, tensor in module.state_dict().items()}
    save_file(weights, tmp_path / "toy.safetensors")
    shutil.copytree(sd1 / "tokenizer", tmp_path / "tokenizer")
    return tmp_path / "toy.safetensors"


def by_hand(
    file: Path,
    steps: int,
    guidance: float,
    start: Callable[..., Any] = lambda noise: noise,
    reading: float = 1.0,
    after: Callable[..., Any] = lambda latents, number: latents,
) -> np.ndarray:
    """The same with diffusers' scheduler and the modules themselves, begun, read and corrected so."""
    from diffusers import DDIMScheduler
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    weights, modules = load_file(file), {}
    for each in NETWORKS:
        modules[each.name] = each.build(Component(each, file.parent, CONFIGS[each.name], {}))
        modules[each.name].load_state_dict(
            {n.removeprefix(f"{each.name}."): w for n, w in weights.items() if n.startswith(f"{each.name}.")}
        )
    tokenizer = CLIPTokenizer.from_pretrained(file.parent / "tokenizer")
    ids = tokenizer(
        ["", "a cat"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    latents = start(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)))
    with torch.inference_mode():
        hidden = modules["speller"]["words"](ids) * reading
        for number, time in enumerate(scheduler.timesteps, 1):
            without, given = denoise(
                modules["mixer"], torch.cat([latents] * 2), torch.tensor(float(time)), hidden
            )[0].split(1)
            latents = scheduler.step(without + guidance * (given - without), time, latents).prev_sample
            latents = after(latents, number)
        values = modules["grower"]["grow"](latents).tanh()[0].permute(1, 2, 0).numpy()
    return ((values / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)


def test_a_family_and_a_layout_are_one_file_and_one_line(toy):
    spec = tightfit.inspect(str(toy))
    assert (spec.family, spec.native_size, [*spec.components]) == (
        "toy",
        (32, 32),
        ["speller", "mixer", "grower"],
    )
    with tightfit.load(str(toy), precision="fp32", device="cpu") as pipeline:
        result = pipeline.generate(tightfit.Request("a cat", seed=5, num_inference_steps=3))
    assert np.abs(np.asarray(result.images[0], int) - by_hand(toy, 3, 3.0)).max() <= 1
    assert [*result.plan.predicted.stages] == ["encode", "denoise", "decode"]
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage


def test_each_network_is_costed_in_its_own_stage(toy):
    """By its role: a name that is not known is no text encoder."""
    spec = tightfit.inspect(str(toy))
    plans = {
        steps: tightfit.plan(
            tightfit.profile("rtx-2060"), spec, tightfit.Request("a", num_inference_steps=steps)
        )
        for steps in (5, 50)
    }
    assert plans[50][0].predicted.seconds > plans[5][0].predicted.seconds
    with pytest.raises(TightfitError, match="mixer_2 is a network of no family"):
        families.role_of("mixer_2")


def test_without_its_registration_it_is_refused(toy, monkeypatch):
    monkeypatch.setattr(reading, "LAYOUTS", reading.LAYOUTS[1:])
    with pytest.raises(TightfitError, match="single file"):
        tightfit.inspect(str(toy))
    index = {"_class_name": "ToyPipeline", "mixer": ["toys", "Mixer"]}
    (toy.parent / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TightfitError):
        tightfit.inspect(str(toy.parent))


# ------------------------------------------------------------------------------------ the adapter: one file


@dataclass(frozen=True)
class Outer(Patch):
    """A tensor plus `strength` times the outer product of two vectors."""

    tensors: tuple
    strength: float

    def apply(self, rows, start, parts):
        across, along = parts
        rows += self.strength * torch.outer(across[start : start + len(rows)], along).view(rows.shape)


@dataclass(frozen=True)
class OuterProducts:
    """Changes each of the denoiser's weights that its file has two vectors for."""

    option: ClassVar = "outer"

    file: Path
    strength: float

    @property
    def name(self):
        return f"{self.file.stem}:{self.strength:g}"

    def apply(self, spec):
        stored, denoiser = read_header(self.file), spec.denoiser
        changed = {
            name: replace(tensor, patches=(*tensor.patches, self.patch(stored, name)))
            for name, tensor in denoiser.tensors.items()
            if f"{name}.across" in stored
        }
        denoiser = replace(denoiser, tensors={**denoiser.tensors, **changed})
        return replace(spec, components={**spec.components, denoiser.name: denoiser})

    def patch(self, stored, name):
        return Outer((stored[f"{name}.across"], stored[f"{name}.along"]), self.strength)


@pytest.fixture
def outer(toy):
    torch.manual_seed(1)
    vectors = {
        "mix.weight.across": torch.randn(4), "mix.weight.along": torch.randn(36) / 6,
        "read.weight.across": torch.randn(4).half(), "read.weight.along": torch.randn(8).half(),
    }  # fmt: skip
    save_file(vectors, toy.parent / "outer.safetensors")
    return OuterProducts(toy.parent / "outer.safetensors", 0.5)


def test_an_adapter_changes_the_weights_and_nothing_else_is_loaded_again(toy, outer):
    vectors, weights = load_file(outer.file), load_file(toy)
    plain = by_hand(toy, 3, 3.0)
    request = tightfit.Request("a cat", seed=5, num_inference_steps=3, adapters=(outer,))
    with tightfit.load(str(toy), precision="fp32", device="cpu", residency="resident") as pipeline:
        without = pipeline.generate(replace(request, adapters=()))
        text = pipeline.loaded.sessions[NETWORKS[0].name][-1]
        result = pipeline.generate(request)
        assert pipeline.loaded.sessions[NETWORKS[0].name][-1] is text
        again = pipeline.generate(replace(request, adapters=()))
    for name in ("mix.weight", "read.weight"):
        change = torch.outer(vectors[f"{name}.across"].float(), vectors[f"{name}.along"].float())
        weights[f"{NETWORKS[1].name}.{name}"] += 0.5 * change.view(
            weights[f"{NETWORKS[1].name}.{name}"].shape
        )
    save_file(weights, toy)
    assert np.abs(np.asarray(result.images[0], int) - by_hand(toy, 3, 3.0)).max() <= 1
    for other in (without, again):
        assert np.abs(np.asarray(other.images[0], int) - plain).max() <= 1
    assert np.abs(np.asarray(result.images[0], int) - plain).max() > 10
    assert '\\"adapters\\": {\\"outer\\": [\\"outer:0.5\\"]}' in result.images[0].info["parameters"]


@pytest.mark.parametrize("residency", ["staged", "streamed"])
def test_an_adapter_is_the_same_however_it_is_loaded_and_predicted(toy, outer, residency):
    pictures = {}
    for way in ("resident", residency):
        with tightfit.load(str(toy), precision="fp32", residency=way, adapters=[outer]) as pipeline:
            result = pipeline.generate(tightfit.Request("a cat", seed=5, num_inference_steps=2))
        pictures[way] = result.images[0].tobytes()
        for stage, measured in result.stages.items():
            if predicted := result.plan.predicted.stages.get(stage):
                assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, (way, stage)
    assert pictures["resident"] == pictures[residency]


# ---------------------------------------------------------------------------------- the condition: one file

SHRINKER = network(
    "shrinker", Role.ENCODER, defaults={},
    build=lambda component: nn.ModuleDict({"shrink": nn.Conv2d(3, 4, 2, stride=2)}),
    inputs=lambda spec, extent: {"picture": (1, 3, extent.height, extent.width)},
    call=lambda module, picture: (module["shrink"](picture),),
)  # fmt: skip
_SHRINKERS: Recent[Component] = Recent(4)


@dataclass(frozen=True)
class Like(Condition):
    """Begins halfway between noise and a grey picture, and keeps the latents' first channel as it was."""

    file: Path
    grey: float

    networks: ClassVar = (SHRINKER,)

    def components(self, spec):
        def read():
            return Component(SHRINKER, self.file.parent, {}, read_header(self.file))

        return (_SHRINKERS.get(self.file, read, spec),)

    def prepare(self, job, call):
        (latents,) = call("shrinker", picture=np.full((1, 3, job.height, job.width), self.grey, np.float32))
        return Halfway(latents)


class Halfway(Steering):
    def __init__(self, latents):
        self.latents = latents

    def start(self, latents, noise, scheduler, call):
        return (latents + self.latents) / 2

    def inputs(self, arrays, rows):
        return {**arrays, "hidden": arrays["hidden"] * np.float32(0.5)}

    def after(self, latents, call):
        return np.concatenate([self.latents[:, :1] * (call + 1), latents[:, 1:]], axis=1)


@pytest.fixture
def like(toy, monkeypatch):
    """A condition, registered by one line."""
    monkeypatch.setattr(conditions, "CONDITIONS", (Like, *conditions.CONDITIONS))
    torch.manual_seed(2)
    save_file(
        nn.ModuleDict({"shrink": nn.Conv2d(3, 4, 2, stride=2)}).state_dict(), toy.parent / "like.safetensors"
    )
    return Like(toy.parent / "like.safetensors", 0.25)


def steered_by_hand(toy, like) -> np.ndarray:
    weights = load_file(like.file)
    picture = torch.full((1, 3, 32, 32), like.grey)
    latents = nn.functional.conv2d(picture, weights["shrink.weight"], weights["shrink.bias"], stride=2)

    def after(steps, number):
        return torch.cat([latents[:, :1] * number, steps[:, 1:]], dim=1)

    return by_hand(toy, 3, 3.0, start=lambda noise: (noise + latents) / 2, reading=0.5, after=after)


@pytest.mark.parametrize("cfg", ["batched", "sequential"])
def test_a_condition_has_a_network_of_its_own_and_steers_the_steps(toy, like, cfg):
    request = tightfit.Request("a cat", seed=5, num_inference_steps=3, conditions=(like,))
    with tightfit.load(str(toy), precision="fp32", device="cpu", cfg=cfg) as pipeline:
        result = pipeline.generate(request)
        plain = pipeline.generate(replace(request, conditions=()))
    assert [*result.plan.placements] == ["speller", "shrinker", "mixer", "grower"]
    assert [*plain.plan.placements] == ["speller", "mixer", "grower"]
    assert np.abs(np.asarray(result.images[0], int) - steered_by_hand(toy, like)).max() <= 1
    assert np.abs(np.asarray(plain.images[0], int) - by_hand(toy, 3, 3.0)).max() <= 1
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage
    assert '\\"conditions\\": [\\"Like\\"]' in result.images[0].info["parameters"]


def test_a_conditions_network_is_in_the_plan_and_in_a_saved_one(toy, like):
    spec, card = tightfit.inspect(str(toy)), tightfit.profile("rtx-2060")
    large = {"width": 1024, "height": 1024}
    plain, conditioned = (
        tightfit.plan(card, spec, tightfit.Request("a", **large, conditions=asked))[0]
        for asked in ((), (like,))
    )
    assert conditioned.predicted.stages["encode"] > plain.predicted.stages["encode"]
    assert tightfit.Plan.from_json(json.dumps(conditioned.to_json())) == conditioned
