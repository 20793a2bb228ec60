"""ControlNets against diffusers' own pipelines, in the plan, from files of any form, and what they are asked
by."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tightfit.benchmarks import random_parts
from tightfit.runtime.adapters.header import contents, stamp
from tightfit.runtime.adapters.ip_adapter import IPAdapter
from tightfit.runtime.adapters.lora import Lora
from tightfit.runtime.backends.torch.backend import TorchSession
from tightfit.runtime.conditions import asked
from tightfit.runtime.conditions.controlnet import CONTROL, Control, ControlNets, again, typed
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.mask import Inpainting
from tightfit.runtime.conditions.preprocess import canny, invert, luminance, soft, tile
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.infotext import parse, write
from tightfit.runtime.models.layouts.single_file import vae_config
from tightfit.runtime.passes import passes

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (64, 64), 3
    )
    for seed in (1, 2)
]
WAYS = {"attention": "sdpa", "tiling": "whole"}  # fewer to plan
SAME = {**WAYS, "residency": "resident", "cfg": "batched", "precision": "fp32"}
BETWEEN = {"control_guidance_start": [0.2, 0.0], "control_guidance_end": [0.7, 1.0]}
OPTIONS = {"num_inference_steps": 4, "width": 64, "height": 64, "seed": 3, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def nets(tiny_models, made_once):
    """Called with a family: the folders of two ControlNets that change pictures, which training would do."""

    def write(family):
        def written(folder):
            for number in (0, 1):
                random_parts.controlnet(tiny_models[family], number, folder / str(number))

        return written

    def made(family):
        return [made_once(f"controlnets/{family}", write(family)) / str(number) for number in (0, 1)]

    return made


def by_diffusers(model, folders, scheduler, image=None, **given) -> np.ndarray:
    import diffusers

    xl, what = "XL" if (model / "text_encoder_2").exists() else "", "Img2Img" if image else ""
    own = diffusers.DiffusionPipeline.from_pretrained(model, safety_checker=None).components
    none = {} if xl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    read = [diffusers.ControlNetModel.from_pretrained(folder) for folder in folders]
    one = lambda values: values[0] if len(folders) == 1 else values  # noqa: E731
    pipe = getattr(diffusers, f"StableDiffusion{xl}ControlNet{what}Pipeline")(
        **{**own, **none, "controlnet": one(read)}
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pictures = one(PICTURES[: len(folders)])
    size = {"width": 64, "height": 64}
    shown = (
        {"image": image, "control_image": pictures, "strength": 0.7} if image else {"image": pictures, **size}
    )
    answer = pipe(
        "a cat", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3),
        output_type="np", **shown, **given,
    )  # fmt: skip
    return (answer.images[0] * 255).round().astype(int)


def decibels(picture, other) -> float:
    error = ((np.asarray(picture, int) - np.asarray(other, int)) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else 99.0


@pytest.mark.parametrize(
    ("family", "count", "scheduler", "over_a_picture", "given"),
    [
        ("sd1", 2, "heun", True, {**BETWEEN, "controlnet_conditioning_scale": [0.6, 1.2]}),
        ("sdxl", 1, "euler", False, {"guess_mode": True}),
    ],
)
def test_pictures_are_followed_as_by_diffusers(
    family, count, scheduler, over_a_picture, given, tiny_models, nets
):
    kind = {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler"}[scheduler]
    folders, image = nets(family)[:count], PICTURES[1] if over_a_picture else None
    theirs = by_diffusers(tiny_models[family], folders, kind, image, **given)
    shown = {"image": image, "strength": 0.7} if image else {}
    with tightfit.load(str(tiny_models[family]), device="cpu", **SAME) as pipe:
        options = {**OPTIONS, **shown, "scheduler": scheduler}
        plain = pipe("a cat", **options)
        ours = pipe("a cat", controlnet=[*folders], control_image=PICTURES[:count], **options, **given)
    assert decibels(ours, theirs) >= 75
    assert decibels(plain, theirs) < 60


@pytest.mark.parametrize(
    ("precision", "residency", "count", "cfg"),
    [
        ("fp32", "streamed", 2, "sequential"), ("bf16", "resident", 1, "batched"),
        ("int4", "staged", 2, "batched"),
    ],
)  # fmt: skip
def test_they_are_in_the_plan(precision, residency, count, cfg, tiny_models, nets):
    wishes = {"precision": precision, "residency": residency, "cfg": cfg}
    folders = list(map(str, nets("sd1")[:count]))
    conditions = asked(
        {"control_image": PICTURES[:count], "controlnet": folders, "control_guidance_end": 0.7}
    )
    size = {"width": 96, "height": 128, "num_inference_steps": 3, "seed": 3}
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **WAYS, **wishes) as pipe:
        request = tightfit.Request("a cat", **size, conditions=conditions)
        for _ in range(1 + (residency == "resident")):  # after which all is there that stays
            result = pipe.generate(request)
        assert pipe.loaded.held() == 0 or residency == "resident"
    names = ["controlnet", "controlnet_2"][:count]
    assert [*result.plan.placements] == ["text_encoder", *names, "unet", "vae_decoder"]
    assert all(result.plan.placements[name].precision == precision for name in names)
    denoise = result.plan.predicted.stages["denoise"]
    assert result.stages["denoise"].peak_bytes == pytest.approx(denoise, rel=0.01)  # 5 % is promised


@pytest.fixture(scope="module")
def t2i(deep_models, made_once):
    """A T2I-Adapter of SDXL, which adds to the middle, too."""
    return made_once("t2i/sdxl", functools.partial(random_parts.t2i_adapter, deep_models["sdxl"]))


def test_t2i_adapters_are_diffusers(deep_models, t2i):
    import diffusers

    own = diffusers.DiffusionPipeline.from_pretrained(deep_models["sdxl"]).components
    own.pop("image_encoder", None)
    adapter = diffusers.T2IAdapter.from_pretrained(t2i)
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**own, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        "a cat", image=PICTURES[0], num_inference_steps=4, guidance_scale=5.0, width=64, height=64,
        adapter_conditioning_scale=0.7, adapter_conditioning_factor=0.5, output_type="np",
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    controls = [
        Control(open_picture(PICTURES[0]), str(t2i), weight=0.7, end=0.5),
        Control(open_picture(PICTURES[1]), str(t2i), weight=0.0, end=0.5),
    ]
    fields = {**OPTIONS, "scheduler": "euler"}
    request = tightfit.Request("a cat", **fields, conditions=(ControlNets(tuple(controls)),))
    staged = {**SAME, "residency": "staged"}
    with tightfit.load(str(deep_models["sdxl"]), device="cpu", **staged) as ours:
        result = ours.generate(request)
    assert decibels(result.images[0], (theirs.images[0] * 255).round()) >= 75
    for stage in ("encode", "denoise"):  # one after the other
        predicted = result.plan.predicted.stages[stage]
        assert result.stages[stage].peak_bytes == pytest.approx(predicted, rel=0.01)


def test_calls_are_counted(tiny_models, nets):
    """Within start and end, and of one row where guidance has ended."""
    spec, card = tightfit.inspect(str(tiny_models["sd1"])), tightfit.profile("gtx-1650")
    folder, seconds = str(nets("sd1")[0]), {}
    for end in (0.25, 0.5, 1.0):
        conditions = asked({"control_image": PICTURES[0], "controlnet": folder, "control_guidance_end": end})
        request = tightfit.Request(
            "a", num_inference_steps=8, scheduler="euler", guidance_end=0.5, conditions=conditions
        )
        job = request.resolve(spec)
        assert job.calls_with("controlnet") == {0.25: (2, 2), 0.5: (4, 4), 1.0: (8, 4)}[end]
        assert job.calls_with("unet") == (8, 4)
        seconds[end] = tightfit.plan(card, spec, job, tightfit.Wishes(**SAME))[0].predicted.seconds
    assert seconds[0.25] < seconds[0.5] < seconds[1.0]


def test_a_refiner_leaves_start_and_end_where_they_are(tiny_models, nets):
    """They are shares of all steps, though the last are another model's: by diffusers' rule, call by call."""
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    options = {"control_image": PICTURES[0], "controlnet": str(nets("sd1")[0])}
    wanted = {"num_inference_steps": 8, "scheduler": "euler", "refiner": str(tiny_models["sd1"])}
    acting, steering = {}, {}
    for start, end in ((0.0, 0.5), (0.25, 1.0), (0.5, 1.0)):
        conditions = asked({**options, "control_guidance_start": start, "control_guidance_end": end})
        request = tightfit.Request("a", refiner_start=0.5, conditions=conditions, **wanted)
        first, _ = passes(request.resolve(spec))
        acting[start, end] = [n for n in range(4) if n / 8 >= start and (n + 1) / 8 <= end]
        if start == first.calls / 8:
            with pytest.raises(TightfitError, match="all of which the refiner takes: let it act earlier"):
                first.calls_with("controlnet")
            continue
        assert first.calls_with("controlnet")[0] == len(acting[start, end])
        (net,) = first.conditions[0].prepare(first, lambda *_, **__: ())._nets
        steering[start, end] = [*net.acting]
    assert steering == {key: calls for key, calls in acting.items() if calls}
    assert len(steering) == 2


def test_what_a_row_without_the_prompt_gets(tiny_models, nets):
    """Batched or not, a mode is the same; without guidance all that differs are its weights."""
    options = {**OPTIONS, "controlnet": str(nets("sd1")[0]), "control_image": PICTURES[0]}
    options["num_inference_steps"], pictures = 2, {}
    for cfg in ("batched", "sequential"):
        with tightfit.load(str(tiny_models["sd1"]), device="cpu", **{**SAME, "cfg": cfg}) as pipe:
            for mode in ("prompt", "control"):
                pictures[mode, cfg] = pipe("a cat", **options, control_mode=mode)
    for mode in ("prompt", "control"):
        assert decibels(pictures[mode, "batched"], pictures[mode, "sequential"]) >= 75
    assert decibels(pictures["prompt", "batched"], pictures["control", "batched"]) < 60


def test_the_same_picture_after_memory_ran_out(tiny_models, nets, monkeypatch):
    """In the ControlNet, in the second step: the plan that takes less paints on from there."""
    options = {**OPTIONS, "controlnet": str(nets("sd1")[0]), "control_image": PICTURES[0]}
    call, calls = TorchSession.__call__, []

    def failing(self, **arrays):
        calls.append("picture" in arrays)
        if sum(calls) == 2 and calls[-1]:
            raise OutOfMemoryError("not enough")
        return call(self, **arrays)

    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **WAYS, precision="fp32") as pipe:
        wanted = pipe("a cat", **options)
        monkeypatch.setattr(TorchSession, "__call__", failing)
        picture = pipe("a cat", **options)
        assert pipe.loaded.backends["torch"].meter.held() == sum(
            session._held for *_, session in pipe.loaded.sessions.values()
        )
    assert sum(calls) > 4
    assert decibels(picture, wanted) >= 75


ORIGINAL = {
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    **{f"controlnet_cond_embedding.blocks.{n}.": f"input_hint_block.{2 * n + 2}." for n in range(6)},
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
    "controlnet_mid_block.": "middle_block_out.0.",
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip


def original(name: str) -> str:
    """The name that lllyasviel's files have."""
    for new, old in ORIGINAL.items():
        if name.startswith(new):
            name = old + name.removeprefix(new)
    parts = name.split(".")
    if parts[0] == "controlnet_down_blocks":
        return ".".join(["zero_convs", parts[1], "0", *parts[2:]])
    if parts[0] == "down_blocks":
        block, what, layer = int(parts[1]), parts[2], int(parts[3])
        place = 1 + 3 * block + (2 if what == "downsamplers" else layer)
        rest = ".".join(parts[5:] if what == "downsamplers" else parts[4:])
        inner = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[what]
        name = f"input_blocks.{place}.{inner}{rest}"
    for new, old in RESNET.items() if ".transformer_blocks." not in name else ():
        name = name.replace(f".0.{new}", f".0.{old}").replace(f".2.{new}", f".2.{old}")
    return name


def test_files_of_either_naming_are_the_folder(tiny_models, nets, tmp_path, monkeypatch):
    """In one file as diffusers names it, as the original code does, or by a name in a folder of models."""
    (tmp_path / "models/ControlNet").mkdir(parents=True)
    weights = load_file(nets("sd1")[0] / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    renamed = {f"control_model.{original(name)}": tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "models/ControlNet/canny.safetensors")
    monkeypatch.setenv("TIGHTFIT_MODELS", str(tmp_path))
    options = {**OPTIONS, "num_inference_steps": 2, "control_image": PICTURES[0]}
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **SAME) as pipe:
        wanted = pipe("a cat", controlnet=nets("sd1")[0], **options)
        for given in (tmp_path / "plain.safetensors", "canny", None):  # the only one that is there
            assert (np.asarray(pipe("a cat", controlnet=given, **options)) == np.asarray(wanted)).all(), given


def refusal(folder, control) -> str:
    with pytest.raises(TightfitError) as error:
        tightfit.Request("a", conditions=asked(control)).resolve(tightfit.inspect(str(folder)))
    return str(error.value)


def test_a_model_that_was_exported_in_int8_takes_them_too(tiny_models, nets, tmp_path):
    exported = tightfit.export_model(tiny_models["sd1"], tmp_path / "int8", "int8")
    painted = []
    for model, precision in ((tiny_models["sd1"], "int8"), (exported, "auto")):
        with tightfit.load(str(model), device="cpu", **{**SAME, "precision": precision}) as pipe:
            painted.append(pipe("a cat", controlnet=nets("sd1")[0], control_image=PICTURES[0], **OPTIONS))
    assert decibels(*painted) > 40  # its other networks are in the plan's own precision


def test_what_is_no_controlnet_of_the_model(tiny_models, nets, tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_MODELS", "")
    picture = {"control_image": PICTURES[0]}
    wrong = refusal(tiny_models["sdxl"], {**picture, "controlnet": nets("sd1")[0]})
    assert "is a ControlNet of texts 32 wide" in wrong
    assert "is of texts 64 wide: take one of the same family" in wrong
    assert "give one by --control PICTURE:model=FILE" in refusal(tiny_models["sd1"], picture)
    weights = load_file(nets("sd1")[0] / "diffusion_pytorch_model.safetensors")
    for name, word in (
        ("control_add_embedding.linear_1.weight", "a union of ControlNets"),
        ("lllite_unet_input_blocks_4.down.0.weight", "a ControlNet-LLLite"),
        ("controlnet_x_embedder.weight", "a ControlNet of Flux"),
        ("some.weight", "no ControlNet"),
    ):
        base = weights if "union" in word else {}
        save_file({**base, name: torch.ones(4, 4)}, file := tmp_path / "other.safetensors")
        assert word in refusal(tiny_models["sd1"], {**picture, "controlnet": file})
    config = json.loads((nets("sd1")[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "FluxControlNetModel"}))
    assert "a ControlNet of Flux" in refusal(tiny_models["sd1"], {**picture, "controlnet": tmp_path})


def test_by_its_options(tiny_models, nets, tmp_path):
    """What is typed, and diffusers' names in Python, mean the same; a picture carries all but pictures."""
    place = tmp_path / "a:b.png"
    PICTURES[0].save(place)
    text = f"{place}:model={nets('sd1')[0]}:weight=0.8:end=0.6:mode=prompt:preprocess=canny"
    (condition,) = asked({CONTROL: [text]})
    (other,) = asked(
        {"control_image": PICTURES[0], "controlnet": nets("sd1")[0], "controlnet_conditioning_scale": 0.8,
         "control_guidance_end": 0.6, "control_mode": "prompt", "control_preprocess": "canny"}
    )  # fmt: skip
    assert condition == other
    assert condition.controls[0].preprocess == "canny"
    request = tightfit.Request("a cat", num_inference_steps=2, conditions=(condition,))
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **SAME) as pipe:
        written = pipe.generate(request).images[0].info["parameters"]
    assert (
        'ControlNet 0: "Module: canny, Model: 0, Weight: 0.8, Resize Mode: Just Resize, Guidance Start: 0, '
        'Guidance End: 0.6, Pixel Perfect: True, Control Mode: My prompt is more important"' in written
    )
    carried = parse(written, "x")
    assert carried.notices == ()
    with pytest.raises(TightfitError, match="painted after a picture it does not carry: give each by"):
        again(carried.asking[CONTROL], [], "x.png")
    assert asked({CONTROL: again(carried.asking[CONTROL], [str(place)], "x")}) == (condition,)
    (heavier,) = asked({CONTROL: again(carried.asking[CONTROL], [f"{place}:weight=1"], "x")})
    assert heavier.controls == (replace(condition.controls[0], weight=1.0),)
    for given, word in (
        (f"{place}:weight=x", "weight of --control must be a number"),
        (f"{place}:strength=1", "--control has no strength: it takes a picture, then model, weight"),
        (f"{place}:0.5", "takes keys after colons, as :weight=0.8, not ':0.5'"),
        ("nowhere.png", "nowhere.png does not exist: name a picture"),
        (f"{place}:weight=11", "weight of a control must be a number from -10 to 10"),
        (f"{place}:start=0.5:end=0.5", r"start 0.5 of a control must be below end 0.5"),
        (f"{place}:mode=x", "mode of a control must be one of balanced, prompt, control, guess"),
        (f"{tmp_path / 'none.png'}", "does not exist: name a picture"),
    ):
        with pytest.raises(TightfitError, match=word):
            typed(given)
    with pytest.raises(TightfitError, match="controlnet is of a picture to follow"):
        asked({"controlnet": "x"})
    with pytest.raises(TightfitError, match="acts in none of 2 calls"):
        Control(condition.controls[0].picture, start=0.9).acting(2)


def test_numbers_are_carried_in_all_their_digits(tmp_path):
    """Two thirds with six digits would be later, and act in none of three calls."""
    PICTURES[0].save(place := tmp_path / "a.png")
    (condition,) = asked({CONTROL: [f"{place}:weight={1 / 3}:start={2 / 3}"]})
    assert condition.controls[0].acting(3) == range(2, 3)
    (repeated,) = asked({CONTROL: again(condition.said()[CONTROL], [str(place)], "x")})
    assert repeated == condition
    scale = 2 / 3
    assert float(IPAdapter(place, (0, 0), scale).name.rpartition(":")[2]) == scale


def test_a_file_that_vanishes_takes_no_picture_with_it(tiny_models, nets, tmp_path):
    """It is looked for once, before anything is painted; numpy's numbers and one folder are taken, too."""
    (tmp_path / "ControlNet").mkdir()
    file = tmp_path / "ControlNet/canny.safetensors"
    file.write_bytes((nets("sd1")[0] / "diffusion_pytorch_model.safetensors").read_bytes())
    asking = {"control_image": PICTURES[0], "controlnet": "canny", "models_dirs": tmp_path}
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", **SAME) as pipe:
        picture = pipe("a", **{**OPTIONS, "num_inference_steps": 1}, **asking)
        conditions = asked({**asking, "controlnet_conditioning_scale": np.float32(0.5)})
        job = tightfit.Request("a", conditions=conditions).resolve(pipe.spec)
    lora = Lora(tmp_path / "none.safetensors", 1.0, 1.0, (0, 0))
    file.unlink()
    hashed = r"Model: canny \[[0-9a-f]{8}\], Weight: "
    assert re.search(f"{hashed}1,", picture.info["parameters"])
    written = write(replace(job, adapters=(lora,)), "sd1", "fp32")
    assert re.search(f"{hashed}0.5,", written)
    assert "Lora hashes" not in written


def test_damaged_files_are_refused_and_passed_over(tiny_models, nets, tmp_path, monkeypatch):
    (tmp_path / "ControlNet").mkdir()
    weights = load_file(nets("sd1")[0] / "diffusion_pytorch_model.safetensors")
    wide = {**weights, "conv_in.weight": torch.cat([weights["conv_in.weight"]] * 2, 1)}
    halved = {name: tensor for name, tensor in weights.items() if not name.startswith("down_blocks.")}
    for name, tensors in {"good": weights, "wide": wide, "halved": halved}.items():
        save_file(tensors, tmp_path / f"ControlNet/{name}.safetensors")
    monkeypatch.setenv("TIGHTFIT_MODELS", str(tmp_path))
    picture = {"control_image": PICTURES[0]}
    for name, word in (
        ("wide", "of latents of 8 channels, and those of "),
        ("halved", "has no down_blocks.0.resnets.0.conv1.weight"),
    ):
        assert word in refusal(tiny_models["sd1"], {**picture, "controlnet": name})
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    job = tightfit.Request("a", conditions=asked(picture)).resolve(spec)
    assert job.spec.components["controlnet"].folder.stem == "good"
    tensors, _ = contents(file := tmp_path / "ControlNet/good.safetensors", stamp(file))
    with pytest.raises(TightfitError, match=r"has no decoder.up_blocks.0.resnets.0.conv1.weight"):
        vae_config(tensors)


@pytest.mark.parametrize("mode", ["control", "guess"])
def test_of_models_that_edit_no_row_without_the_prompt_follows(mode, with_channels, nets):
    """Their third branch lacks the text as the first does."""
    options = {"image": PICTURES[1], "control_image": PICTURES[0], "controlnet": nets("sd1")[0]}
    conditions = asked({**options, "control_mode": mode})
    request = tightfit.Request("a", guidance_scale=5.0, num_inference_steps=1, conditions=conditions)
    job = request.resolve(tightfit.inspect(str(with_channels("sd1", 8))))
    controls = next(each for each in job.conditions if isinstance(each, ControlNets))
    calls = []
    controls.prepare(job, lambda _, **arrays: calls.append(arrays) or ()).beside({}, range(3))
    assert [bool(row.any()) for row in calls[0]["scales"]] == [False, True, False]


def test_options_that_would_change_nothing_are_refused(tiny_models, nets):
    picture, spec = {"control_image": PICTURES[0]}, tightfit.inspect(str(tiny_models["sd1"]))
    for given, word in (
        ({"guess_mode": True}, "guess_mode is of a picture to follow: give it by control_image"),
        ({"control_image": [], "controlnet": "x"}, "controlnet is of a picture to follow"),
        ({**picture, "guess_mode": True, "control_mode": "prompt"}, "guess_mode and control_mode both say"),
        ({**picture, "controlnet": object()}, "not object: name its folder or file"),
        ({**picture, "models_dirs": 5}, "models_dirs are folders of models, not 5"),
    ):
        with pytest.raises(TightfitError, match=word):
            asked(given)
    assert asked({"guess_mode": False, "control_image": []}) == ()
    twice = asked({**picture, "controlnet": nets("sd1")[0]}) * 2
    with pytest.raises(TightfitError, match="ControlNets and ControlNets, call the network controlnet"):
        tightfit.Request("a", conditions=twice).resolve(spec)
    (over,) = asked({"image": PICTURES[0], "strength": np.float32(0.5)})
    assert json.dumps(over.said())


def test_of_a_part_that_is_painted_alone_that_part(tiny_models, nets):
    """The picture to follow lies over the whole of the other."""
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    part = Inpainting(
        open_picture(PICTURES[0]), mask=open_picture(Image.fromarray(mask)), padding=0, strength=0.5
    )
    control = Control(open_picture(PICTURES[1]), str(nets("sd1")[0]))
    request = tightfit.Request("a", width=32, height=32, conditions=(part, ControlNets((control,))))
    job = request.resolve(tightfit.inspect(str(tiny_models["sd1"])))
    pixels = control.pixels(job, job.spec.components["controlnet"])
    wanted = np.asarray(PICTURES[1], np.float32)[16:48, 8:40].transpose(2, 0, 1) / 255
    assert np.abs(pixels[0] - wanted).max() == 0


def slow_canny(grey) -> set[tuple[int, int]]:
    """Canny's definition, pixel by pixel, in plain Python."""
    height, width = len(grey), len(grey[0])
    at = lambda rows, y, x: rows[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]  # noqa: E731
    bell = [np.exp(-(n * n) / 2) for n in range(-3, 4)]
    blur = [
        [
            sum(bell[i] * bell[j] * at(grey, y + i - 3, x + j - 3) for i in range(7) for j in range(7))
            / sum(bell) ** 2
            for x in range(width)
        ]
        for y in range(height)
    ]
    strength, direction = {}, {}
    for y in range(height):
        for x in range(width):
            dx = sum(
                k * (at(blur, y + i, x + 1) - at(blur, y + i, x - 1)) for i, k in ((-1, 1), (0, 2), (1, 1))
            )
            dy = sum(
                k * (at(blur, y + 1, x + i) - at(blur, y - 1, x + i)) for i, k in ((-1, 1), (0, 2), (1, 1))
            )
            strength[y, x] = abs(dx) + abs(dy)
            direction[y, x] = round(np.degrees(np.arctan2(dy, dx)) / 45) % 4
    steps = {0: (0, 1), 1: (1, 1), 2: (1, 0), 3: (1, -1)}
    thin = {}
    for (y, x), value in strength.items():
        down, right = steps[direction[y, x]]
        sides = strength.get((y - down, x - right), 0), strength.get((y + down, x + right), 0)
        if value >= sides[0] and value > sides[1]:
            thin[y, x] = value
    edges, ends = set(), [place for place, value in thin.items() if value > 200]
    while ends:
        y, x = ends.pop()
        edges.add((y, x))
        near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} - edges
        ends += [place for place in near if thin.get(place, 0) > 100]
    return edges


def test_pictures_made_from_others():
    noise = np.random.default_rng(5).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((40, 32), 3))
    grey = (picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)).astype(float)
    edges = {(int(y), int(x)) for y, x in np.argwhere(canny(picture)[..., 0] == 255)}
    wanted = slow_canny(grey.tolist())
    assert len(wanted) > 50
    assert len(edges ^ wanted) <= 0.02 * len(wanted)  # where two neighbours differ by rounding
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 255
    assert (soft(step)[..., 0] == [[0, 0, 0, 255, 255, 0, 0, 0]] * 8).all()
    assert (invert(picture) == 255 - picture).all()
    assert np.abs(luminance(picture)[..., 1] - grey).max() <= 0.5
    assert tile(picture).std() < 0.8 * picture.std()
    assert tile(picture).shape == picture.shape
