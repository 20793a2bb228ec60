"""Pictures of other programs, as they write them: what is read, what is not honoured, and hostile ones.

Facts of each format are from its program's source: ComfyUI nodes.py and comfy_extras/nodes_custom_sampler.py;
InvokeAI invocations/metadata.py; Fooocus modules/meta_parser.py; NovelAI's Comment as its pictures have it.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tightfit.runtime import exif, infotext, programs
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.kept import Hashes
from tightfit.runtime.models import prompt_syntax
from tightfit.runtime.models.hub import BUILT_IN
from tightfit.runtime.request import Request

COMFY_SEED = 156680208700286
COMFY: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": COMFY_SEED, "steps": 25, "cfg": 6.5, "sampler_name": "dpmpp_2m",
            "scheduler": "karras", "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0],
            "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "SD1\\dreamshaper_8.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lighthouse", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["10", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "ink.safetensors", "strength_model": 0.8, "strength_clip": 0.5,
            "model": ["4", 0], "clip": ["4", 1],
        },
    },
}  # fmt: skip
CUSTOM: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "2": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["2", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["2", 0]}},
    "5": {"class_type": "CFGGuider", "inputs": {"cfg": 4, "model": ["1", 0], "positive": ["6", 0],
                                                "negative": ["6", 1]}},
    "6": {"class_type": "ControlNetApplyAdvanced", "inputs": {"strength": 1.0, "positive": ["3", 0],
          "negative": ["4", 0], "control_net": ["7", 0], "image": ["8", 0]}},
    "7": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny.safetensors"}},
    "8": {"class_type": "LoadImage", "inputs": {"image": "edges.png"}},
    "9": {"class_type": "RandomNoise", "inputs": {"noise_seed": ["13", 0]}},
    "10": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}},
    "11": {"class_type": "BasicScheduler", "inputs": {"scheduler": "sgm_uniform", "steps": 12, "denoise": 1.0,
                                                      "model": ["1", 0]}},
    "12": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a (red:1.2) heart"}},
    "13": {"class_type": "PrimitiveInt", "inputs": {"value": 99}},
    "14": {"class_type": "EmptyLatentImage", "inputs": {"width": 640, "height": 512, "batch_size": 2}},
    "15": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["9", 0], "guider": ["5", 0],
           "sampler": ["10", 0], "sigmas": ["11", 0], "latent_image": ["14", 0]}},
    "16": {"class_type": "LatentUpscale", "inputs": {"width": 1280, "height": 1024, "samples": ["15", 0]}},
    "17": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 5, "cfg": 2, "sampler_name": "ddim",
           "scheduler": "normal", "denoise": 0.5, "model": ["1", 0], "positive": ["3", 0],
           "negative": ["4", 0], "latent_image": ["16", 0]}},
}  # fmt: skip
INVOKE = {
    "app_version": "5.4.2", "generation_mode": "txt2img", "positive_prompt": "a lighthouse",
    "negative_prompt": "blurry", "width": 512, "height": 768, "seed": 1234, "rand_device": "cpu",
    "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 1,
    "model": {"key": "1c", "hash": "blake3:ab", "name": "dreamshaper_8", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"key": "2", "name": "ink", "base": "sd-1", "type": "lora"}, "weight": 0.75}],
    "vae": {"key": "3", "name": "mse", "base": "sd-1", "type": "vae"}, "seamless_x": False,
    "controlnets": [], "strength": None,
}  # fmt: skip
OLD_INVOKE = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6c",
    "image": {"prompt": [{"prompt": "a lighthouse [blurry, grey]", "weight": 1.0}], "steps": 30,
              "cfg_scale": 7.5, "threshold": 0, "perlin": 0, "height": 768, "width": 512, "seed": 1234,
              "type": "txt2img", "sampler": "k_euler_a", "variations": []},
}  # fmt: skip
NOVEL = {
    "prompt": "a {red} [old] lighthouse (sea)", "uc": "blurry", "steps": 28, "scale": 5.0, "seed": 1234,
    "sampler": "k_euler_ancestral", "noise_schedule": "karras", "width": 832, "height": 1216, "sm": True,
    "sm_dyn": False, "cfg_rescale": 0.0, "n_samples": 1, "request_type": "PromptGenerateRequest",
    "signed_hash": "x",
}  # fmt: skip
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8Rundiffusion",
    "base_model_hash": "aeb7e9e689", "created_by": "", "full_negative_prompt": ["blurry"],
    "full_prompt": ["cinematic still a lighthouse"], "guidance_scale": 4.0,
    "loras": [["ink", 0.1, "4852686128"]], "metadata_scheme": "fooocus", "negative_prompt": "blurry",
    "performance": "Speed", "prompt": "a lighthouse", "prompt_expansion": "", "refiner_model": "None",
    "resolution": "(896, 1152)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "seed": "1234",
    "sharpness": 2.0, "steps": 30, "styles": "['Fooocus V2']", "vae": "Default (model)",
    "version": "Fooocus v2.5.5",
}  # fmt: skip
A1111 = (
    "a lighthouse, <lora:ink:0.8>\nNegative prompt: blurry\n"
    "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x768, "
    "Model hash: 879db523c3, Model: dreamshaper_8, VAE hash: 63aeecb90f, VAE: mse.safetensors, RNG: CPU, "
    "Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, "
    'Lora hashes: "ink: 0123456789ab", TI hashes: "easy: c74b4e810b44", Version: v1.10.1'
)
FORGE = A1111.replace("v1.10.1", "f2.0.1v1.10.1-previous-669-gdfdcbab6").replace("RNG: CPU, ", "")

WRITTEN = {
    "a1111": {"parameters": A1111},
    "forge": {"parameters": FORGE},
    "comfy": {"prompt": json.dumps(COMFY), "workflow": json.dumps({"nodes": [], "links": []})},
    "custom": {"prompt": json.dumps(CUSTOM)},
    "invoke": {"invokeai_metadata": json.dumps(INVOKE), "invokeai_graph": "{}"},
    "old invoke": {"sd-metadata": json.dumps(OLD_INVOKE), "Dream": "x"},
    "novel": {
        "Title": "AI generated image", "Description": NOVEL["prompt"], "Software": "NovelAI",
        "Source": "Stable Diffusion XL 7BCCAA2C", "Comment": json.dumps(NOVEL),
    },
    "fooocus": {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"},
}  # fmt: skip


def png(folder: Path, texts: dict[str, str]) -> Path:
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    Image.new("RGB", (8, 8)).save(folder / "theirs.png", pnginfo=info)
    return folder / "theirs.png"


def as_picture(folder: Path, texts: dict[str, str], ending: str) -> Path:
    """As each program writes it into a PNG, a JPEG or a WebP."""
    if ending == ".png":
        return png(folder, texts)
    tags = Image.Exif()
    if "prompt" in texts:
        tags[0x0110], tags[0x010F] = f"prompt:{texts['prompt']}", "workflow:{}"
    elif "fooocus_scheme" in texts:
        tags[0x9286], tags[0x0131] = texts["parameters"], "Fooocus v2.5.5"
    path = folder / f"theirs{ending}"
    data = tags if tags else exif.written(texts["parameters"])
    Image.new("RGB", (8, 8)).save(path, exif=data)
    return path


@pytest.fixture
def models(tmp_path_factory) -> Path:
    """A1111's folders, with files of no content: they are looked for, not read."""
    root = tmp_path_factory.mktemp("webui")
    for name in ("Stable-diffusion/SD1/dreamshaper_8", "Stable-diffusion/x", "Lora/ink"):
        file = root / "models" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return root


WEIGHED = r"a (red:1.05) (old:0.952381) lighthouse \(sea\)"
READ = {
    "a1111": ("a lighthouse, <lora:ink:0.8>", "blurry", 25, "dpmpp_2m_karras", 7.0, 1234, 512, 768),
    "forge": ("a lighthouse, <lora:ink:0.8>", "blurry", 25, "dpmpp_2m_karras", 7.0, 1234, 512, 768),
    "comfy": ("a lighthouse <lora:ink:0.5:0.8>", "blurry", 25, "dpmpp_2m_karras", 6.5, COMFY_SEED, 512, 768),
    "custom": ("a (red:1.2) heart", "ugly", 12, "euler_a", 4.0, 99, 640, 512),
    "invoke": ("a lighthouse <lora:ink:0.75>", "blurry", 30, "dpmpp_2m_karras", 7.5, 1234, 512, 768),
    "old invoke": ("a lighthouse", "blurry, grey", 30, "euler_a", 7.5, 1234, 512, 768),
    "novel": (WEIGHED, "blurry", 28, "euler_a", 5.0, 1234, 832, 1216),
    "fooocus": ("a lighthouse <lora:ink:0.1>", "blurry", 30, None, 4.0, 1234, 896, 1152),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_what_is_read(tmp_path, models, name, ending):
    if ending != ".png" and name in ("invoke", "old invoke", "novel"):
        pytest.skip("is written as PNG alone")
    carried = infotext.read(as_picture(tmp_path, WRITTEN[name], ending), (), [models])
    fields = "prompt negative_prompt num_inference_steps scheduler guidance_scale seed width height"
    values = dict(zip(fields.split(), READ[name], strict=True))
    if values["scheduler"] is None or name in ("custom", "novel"):  # by whatever sampler there is by then
        values.pop("scheduler")
    assert {field: carried.request[field] for field in values} == values
    assert len(carried.notices) == (name not in ("comfy", "old invoke"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "a1111",
            ["vae mse", "embedding easy"],
        ),
        ("forge", ["vae mse"]),
        ("custom", ["as ComfyUI has them", "later samplers KSampler 17", "ControlNet canny", "batch of 2"]),
        ("invoke", ["vae mse"]),
        ("novel", ["sm True"]),
        ("fooocus", ["styles ['Fooocus V2']", "sharpness 2.0", "adm_guidance"]),
    ],
)
def test_what_is_not_honoured_is_named_in_one_notice(tmp_path, models, name, words):
    (notice,) = infotext.read(png(tmp_path, WRITTEN[name]), (), [models]).notices
    for word in words:
        assert word in notice
    assert "\n" not in notice
    assert len(notice) < 700
    assert notice.count("Model") == notice.count("Model hash 879db523c3, here ")
    assert "Lora hashes" not in notice


def test_the_model_by_name_or_by_hash(tmp_path, models):
    """In folders of models alone, and by a hash that is known already."""
    file = models / "models/Stable-diffusion/SD1/dreamshaper_8.safetensors"
    for name in ("a1111", "comfy", "invoke"):
        assert infotext.read(png(tmp_path, WRITTEN[name]), (), [models]).model == str(file)
        alone = infotext.read(png(tmp_path, WRITTEN[name]))
        assert alone.model is None
        assert "dreamshaper_8" in alone.model_said
    other = models / "models/Stable-diffusion/x.safetensors"
    digest = Hashes().compute(other)[:10]
    text = A1111.replace("879db523c3", digest)
    assert infotext.parse(text, "x", (), [models]).model == str(other)
    assert infotext.parse(text, "x", ("model",), [models]).model is None
    assert infotext.parse(A1111.replace("dreamshaper_8", "gone"), "x", (), [models]).model_said == (
        "gone (hash 879db523c3)"
    )
    for hostile in ("/etc/passwd", "../gone", "..", "//host/share", "C:\\gone", "", "a" * 5000):
        text = A1111.replace("Model: dreamshaper_8", f"Model: {hostile}")
        assert infotext.parse(text, "x", (), [models]).model is None
    elsewhere = copy.deepcopy(COMFY)
    elsewhere["4"]["inputs"]["ckpt_name"] = "other\\dreamshaper_8.ckpt"
    assert infotext.read(png(tmp_path, {"prompt": json.dumps(elsewhere)}), (), [models]).model == str(file)
    (models / "models/Stable-diffusion/dreamshaper_8.safetensors").write_bytes(b"another")
    assert infotext.parse(A1111, "x", (), [models]).model is None


def test_what_is_typed_is_not_looked_for(tmp_path, models):
    carried = infotext.read(png(tmp_path, WRITTEN["comfy"]), ("lora",), [models])
    assert carried.request["prompt"] == "a lighthouse"
    assert carried.notices == ()
    without = infotext.read(png(tmp_path, WRITTEN["comfy"]))
    assert without.request["prompt"] == "a lighthouse"
    assert "LoRA ink" in without.notices[0]


def test_other_files_of_a_picture(tmp_path, models):
    """A VAE and an embedding that are there are taken."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(BUILT_IN["emoji"] / "vae", models / "models/VAE/mse")
    (models / "embeddings").mkdir()
    save_file({"emb_params": torch.zeros(1, 768)}, models / "embeddings/easy.safetensors")
    carried = infotext.read(png(tmp_path, WRITTEN["a1111"]), (), [models])
    assert [adapter.option for adapter in carried.request["adapters"]] == ["embedding", "vae"]
    assert "mse" not in carried.notices[0]
    assert "easy" not in carried.notices[0]
    carried = infotext.read(png(tmp_path, WRITTEN["a1111"]), ("vae", "embedding"), [models])
    assert "adapters" not in carried.request
    (models / "embeddings/easy.safetensors").rename(models / "embeddings/easy.pt")
    carried = infotext.read(png(tmp_path, WRITTEN["a1111"]), (), [models])
    assert [adapter.option for adapter in carried.request["adapters"]] == ["vae"]
    assert "embedding easy (cannot be read)" in carried.notices[0]


@pytest.mark.parametrize(
    ("version", "program", "is_on_gpu"),
    [
        ("v1.10.1", "A1111", True),
        ("f2.0.1v1.10.1-previous", "Forge", True),
        ("ComfyUI", "ComfyUI", False),
        ("Fooocus v2.5.5", "Fooocus", False),
        ("tightfit 0.1.0", "tightfit", False),
    ],
)
def test_who_wrote_a1111s_form(version, program, is_on_gpu):
    carried = infotext.parse(FORGE.split(", Version")[0] + f", Version: {version}", "x")
    assert program in carried.notices[0]
    assert carried.request["noise_source"] == ("gpu" if is_on_gpu else "cpu")


def test_fields_that_request_has_are_taken():
    text = A1111.replace(
        "RNG: CPU", "RNG: NV, Clip skip: 2, ENSD: 31337, Variation seed strength: 0.25, Eta: 0.5"
    )
    text = re.sub(r"Sampler: [^,]+", "Sampler: Euler a", text)
    carried = infotext.parse(text, "x")
    said = {"clip_skip": 2, "noise_source": "nv", "ensd": 31337, "subseed_strength": 0.25, "eta": 0.5}
    assert carried.request.items() >= said.items()
    assert "ENSD" not in carried.notices[0]
    assert "noise" not in carried.notices[0]
    assert infotext.parse(FORGE, "x").request["noise_source"] == "gpu"


LINKS = [[1, 4, 0, 10, 0, "MODEL"], [2, 10, 0, 3, 0, "MODEL"], [3, 6, 0, 3, 1, "CONDITIONING"],
         [4, 7, 0, 3, 2, "CONDITIONING"], [5, 5, 0, 3, 3, "LATENT"]]  # fmt: skip


@pytest.mark.parametrize("name", ["comfy", "invoke", "old invoke", "novel", "fooocus"])
def test_beside_sd_parsers(tmp_path, models, name):
    """An independent reader of the same pictures, where it has an answer."""
    sd_parsers = pytest.importorskip("sd_parsers")
    texts = dict(WRITTEN[name])
    if name == "comfy":
        texts["workflow"] = json.dumps({"links": LINKS})
    path = png(tmp_path, texts)
    theirs, ours = sd_parsers.ParserManager().parse(path), infotext.read(path, ("lora",), [models]).request
    (sampler,) = theirs.samplers
    parameters = sampler.parameters
    assert int(parameters["seed"]) == ours["seed"]
    assert float(parameters["cfg_scale"]) == ours["guidance_scale"]
    assert int(parameters.get("steps", ours["num_inference_steps"])) == ours["num_inference_steps"]
    assert [str(prompt) for prompt in sampler.prompts] == [
        NOVEL["prompt"] if name == "novel" else ours["prompt"]
    ]
    negatives = ", ".join(str(prompt) for prompt in sampler.negative_prompts)
    assert negatives == ours["negative_prompt"]


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        ({"prompt": "{"}, "damaged"),
        ({"prompt": json.dumps({"1": {"class_type": "SaveImage", "inputs": {}}})}, "samples latents"),
        ({"prompt": '{"a":' * 50_000}, "damaged"),
        ({"prompt": "words of a person"}, "carries no text"),
        ({"prompt": "{}"}, "carries no text"),
        ({"invokeai_metadata": '{"seed": 1' + "0" * 5000 + "}"}, "damaged"),
        ({"Comment": "Created with GIMP"}, "carries no text"),
        ({"parameters": '{"sui_image_params": {}}'}, "carries no text"),
        ({"parameters": json.dumps(FOOOCUS | {"steps": "many"})}, "damaged"),
        ({"parameters": json.dumps(FOOOCUS | {"seed": "1e300"})}, "damaged"),
        ({"invokeai_metadata": json.dumps(INVOKE | {"width": "nan"})}, "damaged"),
    ],
)
def test_damaged_texts(tmp_path, texts, word):
    with pytest.raises(TightfitError, match=word) as caught:
        infotext.read(png(tmp_path, texts))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_brackets_mean_nothing_to_comfyui():
    said = COMFY["6"]["inputs"]["text"]
    words = json.dumps("[red|blue] embedding:easy hat")
    nodes = json.loads(json.dumps(COMFY).replace(json.dumps(said), words))
    read = programs.read({"prompt": json.dumps(nodes)})
    (branch,) = prompt_syntax.lines(read.prompt, 4)
    assert [prompt_syntax.sections(text) for text in {*branch.texts}] == [[[("[red|blue] easy hat", 1.0)]]]
    nodes["3"]["inputs"]["positive"] = ["99", 0]
    assert programs.read({"prompt": json.dumps(nodes)}).others["prompt"] == "its text is not in the graph"


def test_circles_in_a_graph():
    """Of every link, and of a sampler with itself."""
    graph = copy.deepcopy(COMFY)
    graph["4"]["inputs"]["model"] = ["10", 0]
    graph["5"]["inputs"]["samples"] = ["3", 0]
    graph["6"]["inputs"]["text"] = ["6", 0]
    graph["7"]["inputs"] = {"text": ["7", 0], "clip": ["7", 0]}
    said = programs.read({"prompt": json.dumps(graph)})
    assert said
    assert (said.settings["Steps"], said.settings["Size"], said.negative_prompt) == ("25", "512x768", "")
    for node in graph.values():
        node["inputs"] = {key: ["3", 0] for key in node["inputs"]}
    assert programs.read({"prompt": json.dumps(graph)})


def test_a_large_graph_is_cheap():
    """Each node linked to each: 2000 nodes are followed, and no further."""
    nodes = {str(n): {"class_type": "KSampler", "inputs": {f"i{k}": [str((n * 7 + k) % 5000), 0]
             for k in range(30)} | {"latent_image": [str(n + 1), 0], "text": ["1", 0], "seed": ["2", 0]}}
             for n in range(5000)}  # fmt: skip
    wide = {"0": {"class_type": "KSampler", "inputs": {"latent_image": ["0", 0]} | {
        f"i{k}": ["0", 0] for k in range(100_000)}}}  # fmt: skip
    for graph in (nodes, wide):
        start = time.process_time()
        assert programs.read({"prompt": json.dumps(graph)})
        assert time.process_time() - start < 10  # a tenth of that here; minutes if it were followed whole


VALUES = [None, True, -1, 0, 2**64, 1.5, float("nan"), float("inf"), "", "x" * 5000, "12", "\x1b[31m", [], {},
          "\u202e", ["3", 0], ["9999", 0], [[["3"]]], {"name": {"name": {}}}, "1x", "x",
          "64x64x64", "../../x", "<lora:a:b>"]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """Some field of it, at any depth, of another value, gone, or twice."""
    value = copy.deepcopy(value)
    place = value
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
        return value


@pytest.mark.parametrize("name", ["comfy", "custom", "invoke", "old invoke", "novel", "fooocus", "a1111"])
def test_mutants_are_read_or_one_line(tmp_path, models, name):
    """150 of each: a request, or one line."""
    rng = random.Random(19)
    texts = dict(WRITTEN[name])
    known = ("parameters", "prompt", "invokeai_metadata", "sd-metadata", "Comment")
    keyword = next(keyword for keyword in texts if keyword in known)
    for _ in range(150):
        text = WRITTEN[name][keyword]
        if name != "a1111":
            changed = json.loads(text)
            for _ in range(rng.randrange(1, 4)):
                changed = mutated(changed, rng)
            text = json.dumps(changed)
        place = rng.randrange(len(text))
        if name == "a1111":
            text = text[:place] + str(rng.choice(VALUES)) + text[place + rng.randrange(20) :]
        elif rng.random() < 0.1:
            text = text[:place]
        try:
            carried = infotext.read(png(tmp_path, texts | {keyword: text}), (), [models])
            assert all(len(notice) < 1000 for notice in carried.notices)
            Request(**carried.request).checked()
        except TightfitError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 7000
