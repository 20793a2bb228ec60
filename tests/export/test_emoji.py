"""The parts of the emoji training that carry its figures: the optimiser, the schedule, the prompt match, the
data."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tightfit.export.emoji import caption, data, diffusion, optim


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonal_against_svd(shape):
    """Muon's iteration keeps the singular vectors and brings the values near one."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = optim.orthogonal(matrix).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ result @ right.T
    assert torch.linalg.svdvals(result).min() > 0.5
    assert torch.linalg.svdvals(result).max() < 1.4
    assert (values - torch.diag(values.diag())).abs().max() < 0.1


def test_optimizer_covers_every_parameter_once():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.GroupNorm(4, 16)
    )
    optimizer = optim.Optimizer([module], 1e-2, 1e-2)
    held = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, module.parameters()))
    before = [p.clone() for p in module.parameters()]
    module(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step(1.0)
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_average_is_the_mean_of_recent_weights():
    module = torch.nn.Linear(1, 1, bias=False)
    average = optim.Average(module, decay=0.9)
    for value in np.linspace(0, 1, 200):
        module.weight.data.fill_(float(value))
        average.update(module)
    # A ramp lags by decay / (1 - decay) steps.
    assert average.module.weight.item() == pytest.approx(1 - 9 / 199, abs=1e-3)


def test_schedule():
    assert optim.schedule(0.0) < 0.02
    assert optim.schedule(0.3) == 1.0
    assert optim.schedule(0.75) == pytest.approx(0.5)
    assert optim.schedule(1.0) == 0.0


def test_prompt_match_counts_nearest_pictures():
    pictures = torch.stack([torch.full((3, 64, 64), float(v)) for v in (0, 20, 40, 60, 80, 100, 200)])
    drawn = torch.stack([pictures[0] + 3, pictures[6] - 5, pictures[5] + 40, pictures[1]])
    assert diffusion.match(drawn, pictures, [0, 6, 5, 6]) == (0.75, 0.75)
    assert diffusion.match(drawn, pictures, [2, 0, 5, 0]) == (0.25, 0.75)


@pytest.fixture
def folder(tmp_path):
    """A miniature of the two npm packages."""
    text = tmp_path / "emojibase-data/package/en"
    pictures = tmp_path / "lobehub-fluent-emoji-3d/package/assets"
    text.mkdir(parents=True)
    pictures.mkdir(parents=True)
    groups = [{"order": 0, "key": "smileys-emotion"}, {"order": 1, "key": "flags"}]
    subgroups = [{"order": 0, "key": "heart"}, {"order": 1, "key": "country-flag"}]
    (text / "messages.json").write_text(json.dumps({"groups": groups, "subgroups": subgroups}))
    rows = [
        {
            "label": "Red Heart",
            "hexcode": "2764-FE0F",
            "tags": ["Love"],
            "group": 0,
            "subgroup": 0,
            "order": 2,
        },
        {"label": "no picture", "hexcode": "0001", "tags": [], "group": 0, "subgroup": 0, "order": 3},
        {"label": "a flag", "hexcode": "1F1EB", "tags": [], "group": 1, "subgroup": 1, "order": 1},
        {"label": "regional", "hexcode": "1F1EC"},
    ]
    (text / "data.json").write_text(json.dumps(rows))
    Image.new("RGBA", (256, 256), (255, 0, 0, 0)).save(pictures / "2764.webp", lossless=True)
    Image.new("RGBA", (256, 256)).save(pictures / "1f1eb.webp", lossless=True)
    return tmp_path


def test_chosen_emoji(folder):
    (heart,) = data.emoji(folder)
    assert (heart.label, heart.tags, heart.picture.name) == ("red heart", ("love",), "2764.webp")
    assert (data.pixels([heart], 32) == 255).all()  # transparent is white


def test_captions(folder):
    import random

    (heart,) = data.emoji(folder)
    texts = [caption.caption(heart, random.Random(seed)) for seed in range(400)]
    assert 0.05 < texts.count("") / 400 < 0.15
    assert all("red heart" in text for text in texts if text)


def test_tokenizer_is_learned_from_the_labels(folder):
    loaded = caption.tokenizer(data.emoji(folder), folder / "tokenizer", size=540)
    assert loaded.model_max_length == caption.LENGTH
    assert len(loaded("heart").input_ids) == 3  # one token between start and end


def test_a_run_resumes_where_its_checkpoint_was(tmp_path):
    import argparse

    from tightfit.export.emoji.run import Run

    def run():
        module = torch.nn.Linear(16, 16)
        args = argparse.Namespace(work=tmp_path, minutes=1, device="cpu")
        return module, Run(
            "test", args, module, optim.Optimizer([module], 1e-2, 1e-2), optim.Average(module, 0.9)
        )

    module, first = run()
    for _ in range(3):
        first.step(module(torch.ones(2, 16)).square().mean())
    first.report("so far", scaling=2.0)
    again, second = run()
    assert (second.steps, second.average.steps) == (3, 3)
    assert second.spent == first.spent > 0
    assert torch.equal(again.weight, module.weight)
    assert "3 steps, so far" in (tmp_path / "test.log").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.log", "test.pt"]


def test_published_folder_runs_in_diffusers(folder, monkeypatch):
    """From untrained checkpoints, so that publishing is tested without a training."""
    from diffusers import StableDiffusionPipeline
    from tightfit.export.emoji import autoencoder, publish

    tokenizer = caption.tokenizer(data.emoji(folder), folder / "tokenizer", size=540)
    model = diffusion.Conditional(diffusion.build_unet(), diffusion.build_text_encoder(tokenizer))
    torch.save({"average": autoencoder.build().state_dict()}, folder / "autoencoder.pt")
    torch.save({"average": model.state_dict(), "scaling": 0.25}, folder / "diffusion.pt")
    monkeypatch.setattr("sys.argv", ["publish", str(folder), str(folder / "model")])
    publish.main()
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    assert pipe("a heart", num_inference_steps=1).images[0].size == (128, 128)
    assert pipe.vae.config.scaling_factor == 0.25
    assert torch.equal(pipe.unet.conv_in.weight, model.unet.conv_in.weight.half().float())
    monkeypatch.setattr("sys.argv", ["publish", str(folder), str(folder / "emojibase-data")])
    with pytest.raises(SystemExit, match="holds no model"):
        publish.main()


def test_low_ranks_begin_as_no_change_and_are_written_as_kohya_does(tmp_path):
    """What is written, read back and multiplied, is the change of the weights that were trained."""
    from safetensors import safe_open
    from tightfit.export.emoji import built_in, style

    base, _ = built_in.conditional()
    name = "down_blocks.0.resnets.0.conv1"
    layer = base.unet.get_submodule(name)
    before = layer.weight.clone()
    adapter = style.adapt(base)
    assert torch.equal(layer.weight, before)
    assert not any(weight.requires_grad for weight in base.parameters() if weight.shape == before.shape)
    torch.nn.init.normal_(adapter[f"lora_unet_{name.replace('.', '_')}"].up, std=0.1)
    style.write(adapter, tmp_path / "made.safetensors", ["red heart"], 3)
    with safe_open(tmp_path / "made.safetensors", "pt") as file:
        parts = {
            part: file.get_tensor(f"lora_unet_{name.replace('.', '_')}.{part}")
            for part in ("alpha", "lora_down.weight", "lora_up.weight")
        }
        assert json.loads(file.metadata()["ss_tag_frequency"])["1_flat"] == {"flat": 1, "red heart": 1}
    up, down = parts["lora_up.weight"].float(), parts["lora_down.weight"].float()
    assert up.shape[2:] == (1, 1)
    assert parts["alpha"] == len(down)
    change = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    assert torch.allclose(layer.weight - before, change, atol=1e-3)


def test_flat_emoji_need_something_that_draws(folder, monkeypatch):
    from tightfit.export.emoji import flat

    (folder / "lobehub-fluent-emoji-flat").mkdir()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit, match="pip install resvg-py"):
        flat.fetch(folder)
    (folder / "flat").mkdir()
    Image.new("RGB", (256, 256), "red").save(folder / "flat" / "2764.png")
    flat.fetch(folder)  # all are drawn already
    (heart,) = flat.emoji(folder)
    assert (heart.label, tuple(data.pixels([heart], 8)[0, 0, 0])) == ("red heart", (255, 0, 0))
