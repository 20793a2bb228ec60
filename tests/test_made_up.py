"""A family and a layout that nobody has: one file and one registration each, and the model is planned,
painted and repeated."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import tightfit
import torch
from safetensors.torch import save_file
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import families, reading
from tightfit.runtime.models.checks import is_count
from tightfit.runtime.models.families.family import GraphNames, Network, Role
from tightfit.runtime.models.layouts.safetensors import read_header
from tightfit.runtime.models.spec import Component
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
    nothing = GraphNames(frozenset(), answers=lambda outputs: [*outputs])
    common = {
        "listed": "",
        "fields": {"latent_channels": is_count},
        "layers": lambda config: {},
        "decided_by": {},
        "graph": nothing,
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
        inputs=lambda spec, extent: {"latents": (1, *spec.latent_shape(extent))},
        call=lambda module, latents: (module["grow"](latents).tanh(),),
    ),
)  # fmt: skip


class Toy:
    name, networks, first_step_is_known = "toy", NETWORKS, False

    def claims(self, source):
        return source.pipeline == "ToyPipeline"

    def check(self, spec):
        if spec.text_width != spec.unet["cross_attention_dim"]:
            raise TightfitError(f"{spec.folder} is mixed")

    def default_guidance(self, spec):
        return 3.0

    def corrects_configs(self, spec):
        return False

    def latent_affine(self, spec):
        return (1.0,) * 4, 1.0, (0.0,) * 4

    def overflows_in_half(self, spec):
        return frozenset()

    def condition(self, spec, encoded, request, guided):
        (hidden, *_), *_ = encoded
        return {"hidden": hidden}


# --------------------------------------------------------------------------------------- the layout: one file


@dataclass(frozen=True)
class ToyFile:
    folder: Path
    tensors: Any
    pipeline: str = "ToyPipeline"
    zeroed: bool = False

    listed = manifest = MappingProxyType({})

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


def by_hand(file: Path, steps: int, guidance: float) -> np.ndarray:
    """The same with diffusers' scheduler and the modules themselves."""
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
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        hidden = modules["speller"]["words"](ids)
        for time in scheduler.timesteps:
            without, given = denoise(
                modules["mixer"], torch.cat([latents] * 2), torch.tensor(float(time)), hidden
            )[0].split(1)
            latents = scheduler.step(without + guidance * (given - without), time, latents).prev_sample
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
    with pytest.raises(TightfitError, match="transformer is a network of no family"):
        families.role_of("transformer")


def test_without_its_registration_it_is_refused(toy, monkeypatch):
    monkeypatch.setattr(reading, "LAYOUTS", reading.LAYOUTS[1:])
    with pytest.raises(TightfitError, match="single file"):
        tightfit.inspect(str(toy))
    index = {"_class_name": "ToyPipeline", "mixer": ["toys", "Mixer"]}
    (toy.parent / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TightfitError):
        tightfit.inspect(str(toy.parent))
