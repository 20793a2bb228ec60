"""LoRA files: whose layers their keys name, what is refused, and that pictures are diffusers' with weights
merged by hand in fp64."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tightfit.runtime.adapters import adapted, read_adapter
from tightfit.runtime.adapters import written as adapters_of
from tightfit.runtime.adapters.changes import Added, Decomposed, Hadamard, Kronecker, LowRank, Scaled
from tightfit.runtime.adapters.lora import Lora, written
from tightfit.runtime.adapters.names import Places
from tightfit.runtime.adapters.prompt import from_words
from tightfit.runtime.costs.latency import patching_seconds
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.families.family import Extent
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.layouts.transformer_names import Place
from tightfit.runtime.models.tensors import Tensor
from tightfit.runtime.pipeline import Pipeline
from tightfit.runtime.planner import choose as planner
from tightfit.runtime.planner.estimate import ESTIMATOR
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "up_blocks.0.resnets.1.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.v_proj"


@pytest.fixture
def spec(sd1):
    return inspect(str(sd1))


def random_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def shape_of(spec, path):
    role = "text_encoder" if path.startswith("text_model") else "unet"
    return spec.components[role].tensors[f"{path}.weight"].shape


def thin(spec, path, rank=3, draw=None):
    """A random LoRA's up and down for a layer."""
    draw, shape = draw or random_of(), shape_of(spec, path)
    count = math.prod(shape[1:])
    return draw(shape[0], rank, *[1] * len(shape[2:])) * 0.3, draw(rank, *shape[1:]) / math.sqrt(count)


def saved(folder, tensors, name="a.safetensors", said=None):
    file = folder / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=said)
    return file


def patched(spec):
    """The paths of what is patched, and the patches."""
    return {
        f"{component.name}:{name}": tensor.patches
        for component in spec.components.values()
        for name, tensor in component.tensors.items()
        if tensor.patches
    }


SPELLINGS = [
    ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),  # kohya
    ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", False),  # diffusers
    ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", False),  # diffusers with PEFT
    ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", False),  # PEFT
    ("base_model.model.unet.{}.lora_A.weight", "base_model.model.unet.{}.lora_B.weight", False),
    ("{}.lora_A.weight", "{}.lora_B.weight", False),
    ("lora_unet.{}.lora_down.weight", "lora_unet.{}.lora_up.weight", False),  # OneTrainer
]


@pytest.mark.parametrize(("down_key", "up_key", "underscores"), SPELLINGS)
def test_every_spelling_names_the_layer(tmp_path, spec, down_key, up_key, underscores):
    tensors = {}
    for path in (QUERY, KEY, CONV):
        up, down = thin(spec, path)
        name = path.replace(".", "_") if underscores else path
        tensors |= {down_key.format(name): down, up_key.format(name): up}
    made = Lora.read(saved(tmp_path, tensors)).apply(spec)
    assert patched(made).keys() == {f"unet:{path}.weight" for path in (QUERY, KEY, CONV)}
    assert not made.notes
    assert made.components["text_encoder"] is spec.components["text_encoder"]


@pytest.mark.parametrize(
    ("down_key", "up_key"),
    [
        ("lora_te_{}.lora_down.weight", "lora_te_{}.lora_up.weight"),
        ("lora_te1_{}.lora_down.weight", "lora_te1_{}.lora_up.weight"),
        ("text_encoder.{}.lora_linear_layer.down.weight", "text_encoder.{}.lora_linear_layer.up.weight"),
        ("text_encoder.{}.lora_A.weight", "text_encoder.{}.lora_B.weight"),
    ],
)
def test_text_encoders(tmp_path, spec, down_key, up_key):
    up, down = thin(spec, TEXT)
    for name in (TEXT, TEXT.removeprefix("text_model.")):
        name = name.replace(".", "_") if down_key.startswith("lora_te") else name
        file = saved(tmp_path, {down_key.format(name): down, up_key.format(name): up})
        adapter = Lora.read(file, 0.5, 0.25)
        ((place, (patch,)),) = patched(adapter.apply(spec)).items()
        assert place == f"text_encoder:{TEXT}.weight"
        assert patch.scale == 0.25


def test_sdxl_has_two_text_encoders_and_stabilitys_names(tmp_path, deep_models):
    """Stability's names are those that diffusers maps to these layers."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    spec = inspect(str(deep_models["sdxl"]))
    places = Places(spec)
    for number, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        for prefix in (f"lora_te{number}_", f"{name}."):
            layer = "text_model.encoder.layers.0.mlp.fc1"
            assert places.find(f"{prefix}{layer}") == (spec.components[name], Place((layer,)))
    config = type("Config", (), {**spec.unet})()
    stability = [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_5_1_proj_in",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_v",
    ]
    mapped = _maybe_map_sgm_blocks_to_diffusers(
        {f"{name}.lora_down.weight": name for name in stability}, config
    )
    assert len(mapped) == len(stability)
    for key, name in mapped.items():
        component, ((path,), _) = places.find(name) or (None, Place(("",)))
        assert component is spec.denoiser
        blocks = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
        theirs = re.sub(
            "|".join(blocks), lambda match, words=blocks: words[match[0]], key
        )  # they rename these later
        assert f"lora_unet_{path}.lora_down.weight".replace(".", "_") == theirs.replace(".", "_")
    for name, path in (
        ("input_blocks_2_0_in_layers_2", "down_blocks.0.resnets.1.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_4_0_out_layers_3", "up_blocks.1.resnets.1.conv2"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
    ):
        assert places.find(f"lora_unet_{name}") == (spec.denoiser, Place((path,))), name
    assert places.find("lora_unet_middle_block_9_emb_layers_1") is None


def test_every_layer_of_a_unet_is_found_by_both_names(deep_models):
    from tightfit.runtime.adapters import names

    for family in ("sd1", "sd2", "sdxl"):
        spec = inspect(str(deep_models[family]))
        paths = {name.rpartition(".")[0] for name in spec.denoiser.tensors}
        places = Places(spec)
        stability = dict(names._sgm(paths, spec.unet))
        assert len({*stability.values()}) == len(stability) == len(paths)
        for name, path in stability.items():
            for spelled in (f"lora_unet_{name.replace('.', '_')}", f"unet.{path}"):
                assert places.find(spelled) == (spec.denoiser, Place((path,))), spelled


def test_every_form_is_read(tmp_path, spec):
    draw, (out, width) = random_of(), shape_of(spec, QUERY)
    up, down = thin(spec, QUERY)
    number = torch.tensor
    forms = {
        LowRank: {"lora_up.weight": up, "lora_down.weight": down, "alpha": number(6.0)},
        Hadamard: {
            "hada_w1_a": draw(out, 3), "hada_w1_b": draw(3, width), "hada_w2_a": draw(out, 3),
            "hada_w2_b": draw(3, width), "alpha": number(6.0),
        },
        Kronecker: {
            "lokr_w1": draw(4, 4), "lokr_w2_a": draw(out // 4, 3), "lokr_w2_b": draw(3, width // 4),
            "alpha": number(6.0),
        },
        Scaled: {"weight": draw(out), "on_input": number(0)},
        Added: {"diff": draw(out, width)},
        Decomposed: {
            "lora_up.weight": up, "lora_down.weight": down, "alpha": number(6.0),
            "dora_scale": draw(1, width),
        },
    }  # fmt: skip
    for form, parts in forms.items():
        file = saved(
            tmp_path, {f"lora_unet_{QUERY.replace('.', '_')}.{part}": t for part, t in parts.items()}
        )
        ((place, (patch,)),) = patched(Lora.read(file, 0.5).apply(spec)).items()
        assert place == f"unet:{QUERY}.weight"
        assert type(patch) is form
        of = patch.inner if isinstance(patch, Decomposed) else patch
        assert patch.scale == (1.0 if form in (LowRank, Hadamard, Kronecker) else 0.5)  # alpha / rank is 2
        assert of.scale == (2.0 if form is Decomposed else patch.scale)
        os.utime(file, (1, len(form.__name__)))  # written again: another stamp


def test_biases_and_norms(tmp_path, spec):
    norm = "mid_block.attentions.0.norm"
    (count,), (out, *_) = shape_of(spec, norm), shape_of(spec, CONV)
    tensors = {
        f"lora_unet_{CONV.replace('.', '_')}.diff_b": torch.ones(out),
        f"lora_unet_{norm.replace('.', '_')}.w_norm": torch.ones(count),
        f"lora_unet_{norm.replace('.', '_')}.b_norm": torch.ones(count),
        f"lora_unet_{QUERY.replace('.', '_')}.diff_b": torch.ones(5),  # which has no bias
    }
    made = Lora.read(saved(tmp_path, tensors), 0.5).apply(spec)
    assert patched(made).keys() == {f"unet:{CONV}.bias", f"unet:{norm}.weight", f"unet:{norm}.bias"}
    assert "1 of 4 keys fit nothing and do nothing: lora_unet_down_blocks" in made.notes[0]


@pytest.mark.parametrize("rooted", [False, True])
def test_alphas_in_pefts_config(tmp_path, spec, rooted):
    up, down = thin(spec, QUERY, rank=4)
    layer = f"base_model.model.{QUERY}"
    config = {"lora_alpha": 8, "r": 4, "use_rslora": rooted}
    saved(
        tmp_path, {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = Lora.read(tmp_path)
    ((_, (patch,)),) = patched(adapter.apply(spec)).items()
    assert patch.scale == (4.0 if rooted else 2.0)
    assert adapter.title == tmp_path.name
    said = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    file = saved(
        tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, said=said
    )
    ((_, (patch,)),) = patched(Lora.read(file).apply(spec)).items()
    assert patch.scale == (4.0 if rooted else 2.0)


@pytest.mark.parametrize("patterns", [("to_q", "attn1.to_q"), ("attn1.to_q", "to_q"), ("o_q", QUERY)])
def test_an_alpha_of_its_own_is_the_first_whose_pattern_fits(tmp_path, spec, patterns):
    up, down = thin(spec, QUERY, rank=4)
    alphas = {pattern: 8 * 2**place for place, pattern in enumerate(patterns)}
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": alphas})}
    file = saved(
        tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, said=said
    )
    ((_, (patch,)),) = patched(Lora.read(file).apply(spec)).items()
    fitting = [key for key in patterns if re.match(rf"(.*\.)?({key})$", QUERY)]  # as PEFT has it
    assert patch.scale == alphas[fitting[0]] / 4


@pytest.mark.parametrize("alpha", ["Infinity", "NaN", "1e306"])
def test_an_alpha_that_is_not_finite(tmp_path, spec, alpha):
    up, down = thin(spec, QUERY)
    said = {"lora_adapter_metadata": f'{{"lora_alpha": {alpha}}}'}
    file = saved(
        tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, said=said
    )
    with pytest.raises(TightfitError, match="not finite, in the alpha of"):
        Lora.read(file).apply(spec)


def test_an_alpha_of_many_digits_is_not_read(tmp_path, spec):
    up, down = thin(spec, QUERY)
    said = {"lora_adapter_metadata": f'{{"lora_alpha": 1{"0" * 400}}}'}
    file = saved(
        tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, said=said
    )
    ((_, (patch,)),) = patched(Lora.read(file).apply(spec)).items()
    assert patch.scale == 1


NO_SHAPES = {
    "scalar down": (QUERY, {"lora_down.weight": (), "lora_up.weight": (32, 4)}),
    "scalar up": (QUERY, {"lora_down.weight": (4, 32), "lora_up.weight": (), "lora_mid.weight": (4, 4, 1)}),
    "middle alone": (QUERY, {"lora_down.weight": (4, 32), "lora_mid.weight": (4, 4, 1)}),
    "scalar lengths": (
        QUERY,
        {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": ()},
    ),
    "lengths of a norm": (
        "conv_norm_out",
        {"lora_down.weight": (4, 1), "lora_up.weight": (32, 4), "dora_scale": (7,)},
    ),
    "matrices of a norm": ("conv_norm_out", {"lora_down.weight": (4, 1), "lora_up.weight": (32, 4)}),
    "factors of a norm's inputs": ("conv_norm_out", {"weight": (32,), "on_input": ()}),
}


@pytest.mark.parametrize("what", NO_SHAPES)
def test_shapes_that_cannot_be_are_left_out(tmp_path, spec, what):
    """Beside a layer that is whole, which is applied all the same."""
    layer, shapes = NO_SHAPES[what]
    draw = random_of()
    tensors = {f"lora_unet_{layer.replace('.', '_')}.{leaf}": draw(*shape) for leaf, shape in shapes.items()}
    up, down = thin(spec, KEY)
    whole = {f"unet.{KEY}.lora_A.weight": down, f"unet.{KEY}.lora_B.weight": up}
    made = Lora.read(saved(tmp_path, tensors | whole)).apply(spec)
    assert patched(made).keys() == {f"unet:{KEY}.weight"}


def test_keys_that_fit_nothing_are_counted_and_named(tmp_path, spec):
    tensors = {}
    for layer in (QUERY, KEY, CONV):
        up, down = thin(spec, layer)
        tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    others = {f"unet.elsewhere.{n}.lora_A.weight": down.clone() for n in range(3)} | {
        "bundle_emb.x.string_to_param.*": up.clone()
    }
    made = Lora.read(saved(tmp_path, tensors | others)).apply(spec)
    assert made.notes[0].startswith("a: 4 of 10 keys fit nothing and do nothing: bundle_emb.x")
    assert made.notes[0].endswith("and 1 more")


@pytest.mark.parametrize(
    ("name", "words"), [("my_LCM", "lcm --steps 4"), ("Hyper-SD15-8steps", "ddim --steps 8"), ("plain", "")]
)
def test_schedulers_are_suggested_where_the_name_says_so(tmp_path, spec, name, words):
    up, down = thin(spec, QUERY)
    file = saved(
        tmp_path,
        {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up},
        f"{name}.safetensors",
    )
    made = Lora.read(file).apply(spec)
    assert [words in note for note in made.notes] == ([True] if words else [])


def other_family(tmp_path, spec, width):
    key = "lora_unet_" + KEY.replace(".", "_")
    out, _ = shape_of(spec, KEY)
    return saved(
        tmp_path,
        {f"{key}.lora_up.weight": torch.ones(out, 2), f"{key}.lora_down.weight": torch.ones(2, width)},
    )


def test_another_familys_is_refused_with_both_named(tmp_path, spec):
    with pytest.raises(
        TightfitError, match=r"a is for SDXL, with texts 2048 wide; .* is SD 1\.x, with texts 32 wide"
    ):
        Lora.read(other_family(tmp_path, spec, 2048)).apply(spec)


def test_one_of_a_unet_is_refused_by_a_transformer_with_both_named(tmp_path, spec, tiny_model):
    klein = inspect(tiny_model("flux2-klein"))
    with pytest.raises(TightfitError, match=r"a is for SD 1\.x, with texts 768 wide; .* is Flux\.2 klein"):
        Lora.read(other_family(tmp_path, spec, 768)).apply(klein)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, "is no LoRA or the like: a whole model"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(2, 2)},
            r"is for Flux; .* is SD 1\.x",
        ),
        (
            {
                "transformer.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2, 1536),
                "transformer.transformer_blocks.0.attn2.to_k.lora_B.weight": torch.ones(1536, 2),
            },
            r"is for a diffusion transformer; .* is SD 1\.x",
        ),
        ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "fits nothing of the model, such as lora_unet_x"),
        ({"lora_unet_x.alpha": torch.tensor(float("nan"))}, "values that are not finite"),
        ({"lora_unet_x.alpha": torch.ones(3)}, "no single number"),
        ({"lora_unet_x.lora_up.weight": torch.ones(2, 2, dtype=torch.int8)}, "as I8"),
    ],
)
def test_files_that_are_no_adapter_of_this_model(tmp_path, spec, tensors, message):
    file = saved(tmp_path, tensors)
    with pytest.raises(TightfitError, match=message):
        read_adapter(file).apply(spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"<!doctype html><html>", "not a whole safetensors|web page"),
        ("a.safetensors", b"", "not a whole safetensors"),
        ("a.pt", b"PK", "is a pickle"),
        ("a.safetensors", None, "No such file"),
        ("folder", None, "name the file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(TightfitError, match=message):
        read_adapter(tmp_path / name)


def test_weights_are_written_behind_the_file(tmp_path, spec):
    up, down = thin(spec, QUERY)
    file = saved(tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up})
    for text, weights in (("", (1, 1)), (":0.8", (0.8, 0.8)), (":-1:0", (-1, 0))):
        adapter = written(f"{file}{text}")
        assert (adapter.weight, adapter.text_weight) == weights
        assert written(adapter.name) == adapter
    with pytest.raises(TightfitError, match=r"'much' in .* is no number: say FILE:0\.8"):
        written(f"{file}:much")
    with pytest.raises(TightfitError, match=r"nowhere\.safetensors cannot be read"):
        written(f"{tmp_path}/nowhere.safetensors:0.5")


@pytest.mark.parametrize("weight", [float("nan"), 1e6, "much"])
def test_weights_are_numbers(tmp_path, spec, weight):
    with pytest.raises(TightfitError, match="must be a number"):
        Lora.read(other_family(tmp_path, spec, 32), weight)


def test_a_weight_of_nothing_changes_nothing(tmp_path, spec):
    up, down = thin(spec, QUERY)
    file = saved(tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up})
    assert not patched(Lora.read(file, 0).apply(spec))
    assert Lora.read(file, 0.5) == Lora.read(file, 0.5) != Lora.read(file, 0.4)
    assert adapted(spec, [Lora.read(file)]) is adapted(spec, [Lora.read(file)])


def layers_of(spec):
    """Attention, feed-forward and convolutions of the U-Net, and the text encoder's, by kohya's prefix."""
    for component in spec.components.values():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}.get(component.name)
        for name in component.tensors if prefix else ():
            if name.endswith(".weight") and any(
                word in name for word in ("attn", ".ff.", "conv1", "proj_in", ".mlp.")
            ):
                yield component, name.removesuffix(".weight"), prefix


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_models):
    """A LoRA for all of these, as a file, and what it adds to each weight at strength 1, in fp64."""
    spec, draw, tensors, added = inspect(str(tiny_models["sd1"])), random_of(7), {}, {}
    for component, path, prefix in layers_of(spec):
        up, down = thin(spec, path, 4, draw)
        name = prefix + path.replace(".", "_")
        tensors |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(2.0),
        }
        delta = 0.5 * up.flatten(1).double() @ down.flatten(1).double()
        added[component.name, path] = delta.view(shape_of(spec, path))
    return saved(tmp_path_factory.mktemp("lora"), tensors), added


REQUEST = Request("a red heart", num_inference_steps=3, seed=1, width=64, height=64, scheduler="ddim")


# Calls of a changed network are followed anew by each pipeline, once for each way.
ONE_WAY = {"attention": "sdpa", "tiling": "whole", "cfg": "batched"}


def painted(spec, **wishes):
    with Pipeline(spec, Hardware.detect("cpu"), Wishes(**ONE_WAY, **wishes)) as pipeline:
        return pipeline.generate(REQUEST)


def pixels(result):
    return np.asarray(result.images[0], dtype=float)


def psnr(one, other):
    error = np.square(one - other).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def test_the_picture_is_diffusers_with_the_weights_merged_by_hand(tiny_models, trained):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    file, added = trained
    spec, folder = inspect(str(tiny_models["sd1"])), tiny_models["sd1"]
    ours = pixels(painted(adapted(spec, [Lora.read(file, 0.8, 0.6)]), precision="fp32"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for name, strength in (("unet", 0.8), ("text_encoder", 0.6)):
        module = getattr(pipe, name)
        state = {key: value.double() for key, value in module.state_dict().items()}
        for (component, path), delta in added.items():
            key = f"{path}.weight"
            key = key if key in state else key.removeprefix("text_model.")
            if component == name:
                state[key] = state[key] + strength * delta
        module.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    picture = pipe(
        "a red heart", num_inference_steps=3, width=64, height=64, generator=generator,
        guidance_scale=spec.default_guidance,
    ).images[0]  # fmt: skip
    assert psnr(ours, np.asarray(picture, dtype=float)) >= 75
    assert psnr(ours, pixels(painted(spec, precision="fp32"))) < 40


@pytest.fixture(scope="module")
def exact(tiny_models, trained):
    """The picture in fp32, without and with two LoRAs."""
    spec = inspect(str(tiny_models["sd1"]))
    return tuple(pixels(painted(each, precision="fp32")) for each in (spec, adapted(spec, twice(trained))))


def twice(trained):
    return [Lora.read(trained[0], 0.5), Lora.read(trained[0], 0.25)]


@pytest.mark.parametrize(
    ("precision", "residency"), [("bf16", "staged"), ("int8", "staged"), ("int4", "resident")]
)
def test_predicted_and_what_it_changes(tiny_models, trained, exact, precision, residency):
    spec = inspect(str(tiny_models["sd1"]))
    alone, result = (
        painted(each, precision=precision, residency=residency)
        for each in (spec, adapted(spec, twice(trained)))
    )
    assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)
    without, with_them = exact
    assert psnr(pixels(result), with_them) > psnr(pixels(alone), without) - 3  # no coarser than without
    change, right = pixels(result) - pixels(alone), with_them - without
    assert np.corrcoef(change.ravel(), right.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_streamed(tiny_models, trained, made_once, precision):
    folder = tiny_models["sd1"]
    if precision == "int4":
        from tightfit.__main__ import app
        from typer.testing import CliRunner

        def write(target):
            arguments = ["export", str(tiny_models["sd1"]), "--precision", "int4", "-o", str(target)]
            CliRunner().invoke(app(), arguments, catch_exceptions=False)

        folder = made_once("lora/sd1-int4", write)
    spec = adapted(inspect(str(folder)), [Lora.read(trained[0], 0.5)])
    wishes = {} if precision == "int4" else {"precision": precision}
    streamed, staged = (painted(spec, residency=residency, **wishes) for residency in ("streamed", "staged"))
    assert np.array_equal(pixels(streamed), pixels(staged))
    for result in (streamed, staged):
        assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "int4", "int8-dynamic"])
def test_another_weight_reads_no_more_than_it_changes(tiny_models, trained, monkeypatch, precision):
    if precision == "int8-dynamic" and "int8" not in Hardware.detect("cpu").rates:
        pytest.skip("this CPU has no fast products of 8-bit integers")
    spec, file = inspect(str(tiny_models["sd1"])), trained[0]
    ways, bytes_read, read_into = (
        [[Lora.read(file, 0.5)], [Lora.read(file, -0.25, 0)], []],
        [0],
        Tensor.read_into,
    )

    def counted(tensor, buffer):
        bytes_read[0] += tensor.stored_bytes
        read_into(tensor, buffer)

    monkeypatch.setattr(Tensor, "read_into", counted)
    wishes = Wishes(**ONE_WAY, precision=precision, residency="resident")
    with Pipeline(spec, Hardware.detect("cpu"), wishes) as pipeline:
        pictures, counts = [], []
        for adapters in ways:
            bytes_read[0] = 0
            result = pipeline.generate(replace(REQUEST, adapters=tuple(adapters)))
            assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)
            pictures.append(pixels(result))
            counts.append(bytes_read[0])
    changed = sum(
        tensor.stored_bytes
        for component in adapted(spec, ways[0]).components.values()
        for tensor in component.tensors.values()
        if tensor.patches
    )
    if precision == "fp32":
        assert 0.5 * changed < counts[2] < changed  # the text encoder's were plain already
        assert counts[1] < changed + 2 * file.stat().st_size
    else:  # no code is read again, but plain weights beside them, which are small
        assert counts[2] < 0.1 * changed
        assert counts[1] < 0.1 * changed + 3 * file.stat().st_size
    for adapters, picture in zip(ways, pictures, strict=True):
        anew = painted(adapted(spec, adapters), precision=precision, residency="resident")
        assert np.array_equal(picture, pixels(anew))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_values_that_are_not_finite(tmp_path, tiny_models, precision):
    spec = inspect(str(tiny_models["sd1"]))
    up, down = thin(spec, CONV)
    up[1, 1] = math.nan
    file = saved(tmp_path, {f"unet.{CONV}.lora_A.weight": down, f"unet.{CONV}.lora_B.weight": up})
    with pytest.raises(TightfitError, match=r"a\.safetensors holds values that are not finite"):
        painted(adapted(spec, [Lora.read(file)]), precision=precision)


def test_a_picture_says_which_and_is_repeated(tmp_path, sd1, trained):
    from tightfit.__main__ import app
    from tightfit.runtime import pictures
    from typer.testing import CliRunner

    def run(*arguments):
        return CliRunner().invoke(app(), [*map(str, arguments)])

    said = ["--width", 64, "--height", 64, "--steps", 2, "--precision", "fp32"]
    file, first, second = trained[0], tmp_path / "first.png", tmp_path / "second.png"
    done = run(
        "generate", "a cat", "--model", sd1, "--lora", f"{file}:0.5:0.25", *said, "--seed", 3, "-o", first
    )
    assert done.exit_code == 0, done.output
    text = pictures.texts(first)["parameters"]
    assert text.splitlines()[0] == "a cat <lora:a:0.25:0.5>"
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]
    assert f'Lora hashes: "a: {digest}"' in text
    assert run("generate", "--from", first, "-o", second).exit_code == 0
    pictures = [np.asarray(Image.open(path)) for path in (first, second)]
    assert np.array_equal(*pictures)
    plain = run("generate", "a cat", "--model", sd1, *said, "--seed", 3, "-o", tmp_path / "plain.png")
    assert plain.exit_code == 0
    assert not np.array_equal(pictures[0], np.asarray(Image.open(tmp_path / "plain.png")))
    failed = run("plan", "--model", sd1, "--lora", tmp_path / "nowhere")
    assert isinstance(failed.exception, TightfitError)


def test_words_of_a_prompt(tmp_path, monkeypatch, spec):
    up, down = thin(spec, QUERY)
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    (tmp_path / "styles").mkdir()
    red, blue = (
        saved(tmp_path / "styles", tensors, "red ink.safetensors"),
        saved(tmp_path, tensors, "blue.safetensors"),
    )
    text = "a cat <lora:red ink:0.8>, <lora:blue:0.25:0.5> sleeping <lora:blue>"
    assert from_words(text) == (text, ())
    monkeypatch.setenv("TIGHTFIT_LORAS", str(tmp_path))
    assert from_words("a <lora> cat") == ("a <lora> cat", ())
    spaces = " " * 10**6  # which would take hours, if each were a beginning
    assert from_words(f"a{spaces}cat") == (f"a{spaces}cat", ())
    assert from_words("<lyco:blue:0.5>") == from_words("<lora:blue:0.5>")
    job = Request("a cat <lora:blue:0.5>", "<lora:red ink:1>").resolve(spec)  # from Python too
    assert (job.prompt, job.adapters, job.negative_prompt) == (
        "a cat",
        (Lora.read(blue, 0.5),),
        "<lora:red ink:1>",
    )
    prompt, adapters = from_words(text)
    assert prompt == "a cat, sleeping"
    assert adapters == (Lora.read(red, 0.8), Lora.read(blue, 0.5, 0.25), Lora.read(blue))
    assert adapters_of({"lora": ["blue:0.5:0.25", "styles/red ink"]}) == (
        Lora.read(blue, 0.5, 0.25),
        Lora.read(red),
    )  # as --lora names them
    for words, message in (
        ("<lora:blu:1>", r"is called 'blu' \(did you mean blue\?\)"), ("<lora:blue:much>", "no number"),
    ):  # fmt: skip
        with pytest.raises(TightfitError, match=message):
            from_words(words)
    saved(tmp_path / "styles", tensors, "blue.safetensors")
    with pytest.raises(TightfitError, match="have one name: rename one"):
        from_words("<lora:blue:1>")
    monkeypatch.setenv("TIGHTFIT_LORAS", str(blue))
    with pytest.raises(TightfitError, match="which is no folder"):
        from_words("<lora:blue:1>")


def test_a_picture_whose_lora_is_gone(tmp_path):
    from tightfit.runtime import infotext

    exact = {
        "model": "m",
        "precision": "fp32",
        "prompt": "x",
        "adapters": {"lora": [str(tmp_path / "gone.safetensors:0.5")]},
    }
    text = f"x\nSteps: 2, tightfit: {json.dumps(json.dumps(exact))}"
    with pytest.raises(
        TightfitError, match=r"not where it was \(.*gone.safetensors cannot be read.* by --lora"
    ):
        infotext.parse(text, "a.png")
    assert not infotext.parse(text, "a.png", ["lora"]).request.get("adapters")  # it is given anew
    with pytest.raises(TightfitError, match="damaged, in its adapters"):
        infotext.parse(text.replace("[", "").replace("]", ""), "a.png")


def test_graphs_cannot_be_adapted(tmp_path, spec):
    from tightfit.runtime.backends.onnx.backend import OnnxBackend
    from tightfit.runtime.placement import Placement

    up, down = thin(spec, QUERY)
    file = saved(tmp_path, {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up})
    component = replace(adapted(spec, [Lora.read(file)]).denoiser, graph=object())
    placement = Placement("onnx", "fp32", "fp32", "staged", "sdpa", "whole")
    why = OnnxBackend.refuses(spec, component, placement, Hardware.detect("cpu"), Extent(1, 64, 64))
    assert why
    assert "adapters change those of the unet" in why
    alone = {name: replace(each, tensors={}) for name, each in spec.components.items()}
    with pytest.raises(TightfitError, match="here as ONNX only"):
        Lora.read(file).apply(replace(spec, components=alone))


def test_seconds_of_merging_are_predicted(tiny_models, trained):
    """Once where weights stay for the stage, in each call where they stream from files; beside quantised ones
    as operators of the call."""
    spec = inspect(str(tiny_models["sd1"]))
    more = {}
    for precision, residency in (("fp32", "staged"), ("fp32", "streamed"), ("int4", "staged")):
        seconds = []
        for each in (spec, adapted(spec, twice(trained))):
            wishes = Wishes(**ONE_WAY, precision=precision, residency=residency, requests=1)
            with Pipeline(each, Hardware.detect("cpu"), wishes) as pipeline:
                seconds.append(pipeline.plans(REQUEST)[0].predicted.seconds)
        more[precision, residency] = seconds[1] - seconds[0]
    assert min(more.values()) > 0
    once = seconds_of(adapted(spec, twice(trained)), [trained[0]] * 2)
    assert more["fp32", "staged"] == pytest.approx(once)
    assert 1.5 * once < more["fp32", "streamed"] < 8 * once


def seconds_of(spec, files):
    """Of reading the matrices in these files once, and of applying them."""
    matrices = [tensor for file in files for tensor in load_file(file).values() if tensor.ndim]
    applying = sum(patching_seconds(component.tensors.values()) for component in spec.components.values())
    return applying + sum(tensor.nbytes for tensor in matrices) / Hardware.detect("cpu").read


def test_seconds_of_merging_into_what_a_streamed_plan_keeps(tmp_path, spec):
    """Once, not in each step."""
    up, down = thin(spec, CONV)
    file = saved(tmp_path, {f"unet.{CONV}.lora_A.weight": down, f"unet.{CONV}.lora_B.weight": up})
    hardware = replace(Hardware.detect("cpu"), moves={})  # which fills memory in no time
    wishes, seconds = Wishes(**ONE_WAY, precision="fp32", residency="streamed"), []
    changed = adapted(spec, [Lora.read(file)])
    for model in (spec, changed):
        job = REQUEST.resolve(model)
        placements = planner.plan(hardware, model, job, wishes)[0].placements
        kept_bytes = int(0.9 * model.denoiser.stored_bytes)  # of the largest layers, and it is no small one
        placements = {**placements, "unet": replace(placements["unet"], kept_bytes=kept_bytes)}
        plan = ESTIMATOR.estimate(hardware, job, wishes).plan("batched", placements, hardware.free_bytes)
        seconds.append(plan.predicted.seconds)
    assert seconds[1] - seconds[0] == pytest.approx(seconds_of(changed, [file]), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_adapting_what_stays_loaded_takes_what_is_predicted(tmp_path, spec, precision):
    """The largest weight is read through buffers of twice its size."""
    tensors = spec.components["unet"].tensors
    name = max(tensors, key=lambda name: tensors[name].count).removesuffix(".weight")
    difference = random_of()(*shape_of(spec, name)) * 0.01
    lora = Lora.read(saved(tmp_path, {f"unet.{name}.diff": difference}))
    wishes = {"precision": precision, "residency": "resident"}
    with Pipeline(spec, Hardware.detect("cpu"), Wishes(**ONE_WAY, **wishes)) as pipeline:
        for adapters in ((), (lora,), (), (lora,)):
            result = pipeline.generate(replace(REQUEST, adapters=adapters))
            assert result.peak_bytes == pytest.approx(result.plan.predicted.peak_bytes, rel=0.05)
            assert not result.notices
    assert np.array_equal(pixels(result), pixels(painted(adapted(spec, [lora]), **wishes)))
