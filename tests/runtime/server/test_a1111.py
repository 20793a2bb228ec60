"""A1111's API by real clients: webuiapi, and the requests that Open WebUI and SillyTavern make. Pictures are
those that a pipeline in Python paints."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tightfit
import torch
from PIL import Image
from safetensors.torch import save_file
from tightfit.benchmarks import clients
from tightfit.runtime import infotext
from tightfit.runtime.asking import Shelves
from tightfit.runtime.conditions.handed import interpolated
from tightfit.runtime.conditions.preprocess import canny
from tightfit.runtime.jobs import Order
from tightfit.runtime.models.hub import BESIDE
from tightfit.runtime.models.samplers.names import SAMPLERS
from tightfit.runtime.request import Request
from tightfit.runtime.server.a1111 import control, facts
from tightfit.runtime.server.a1111.desk import Desk
from tightfit.runtime.server.a1111.words import FIELDS, Asked, TextToImage, order_of
from tightfit.runtime.service import Limits, Service

WISHES = {"precision": "fp32", "residency": "resident", "tiling": "whole"}
SIZE = {"width": 64, "height": 64}
SMALL = {**SIZE, "steps": 2}
OURS = {**SIZE, "num_inference_steps": 2}
STYLES = (
    'name,prompt,negative_prompt\nflat,"{prompt}, flat <lora:flat:0.8>",blurry\ntwice,{prompt}{prompt},\n'
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the module's server, as own_cache is of tests."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(base / "config"))
        patch.delenv("TIGHTFIT_MODELS", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A1111's: an upscaler of random weights, and styles."""
    models = tmp_path_factory.mktemp("webui") / "models"
    (models / "ESRGAN").mkdir(parents=True)
    save_file(rrdbnet(), models / "ESRGAN" / "RealESRGAN_x2plus.safetensors")
    (models / "Stable-diffusion").mkdir()
    (models.parent / "styles.csv").write_text(STYLES, encoding="utf-8")
    (models.parent / "embeddings").mkdir()
    shutil.copy(BESIDE["pizza"], models.parent / "embeddings" / "slice.safetensors")
    return models


@pytest.fixture(scope="module")
def server(environment, folder):
    limits = Limits(pixels=512 * 512, seconds=60)
    service = Service(device="cpu", shelves=Shelves([folder]), limits=limits, **WISHES)
    with service, clients.serving(service) as url:
        yield SimpleNamespace(url=url, service=service)


@pytest.fixture(scope="module")
def api(server):
    return clients.webuiapi(server.url)


@pytest.fixture(scope="module")
def pipe(environment):
    with tightfit.load("emoji", device="cpu", **WISHES) as pipe:
        yield pipe


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def rrdbnet() -> dict[str, torch.Tensor]:
    """Twice as large, one block."""
    torch.manual_seed(0)
    layers = {"conv_first": (8, 3), "conv_body": (8, 8), "conv_up1": (8, 8), "conv_hr": (8, 8)}
    layers |= {"conv_last": (3, 8)}
    for part in (1, 2, 3):
        for number in range(1, 6):
            layers[f"body.0.rdb{part}.conv{number}"] = (8 if number == 5 else 4, 8 + 4 * (number - 1))
    weights = {f"{name}.weight": 0.1 * torch.randn(*sides, 3, 3) for name, sides in layers.items()}
    return weights | {f"{name}.bias": torch.zeros(sides[0]) for name, sides in layers.items()}


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and image.convert("RGB").tobytes() == other.convert("RGB").tobytes()


def asked_of(server, **fields) -> Order:
    """The order that a request becomes."""
    desk = Desk.made(server.service, "emoji")
    return order_of(Asked.read("txt2img", TextToImage(**fields)), desk, "")


def encoded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


# ------------------------------------------------------------------------------------------------- webuiapi


@pytest.mark.parametrize("row", clients.CLIENTS["webuiapi"][1], ids=lambda row: row.method)
def test_each_method_of_webuiapi(row, server):
    if row.needs:
        pytest.importorskip(row.needs)
    said = clients.outcome(row, clients.webuiapi(server.url))
    assert bool(said) == bool(row.refused) and row.refused in said, said or "it works"


def test_all_methods_of_webuiapi_have_a_row_and_the_page_has_the_rows():
    import webuiapi

    methods = {name for name in vars(webuiapi.WebUIApi) if not name.startswith(("_", "has_"))}
    rows = {row.method.split("(")[0] for row in clients.CLIENTS["webuiapi"][1]}
    assert not methods - rows
    assert clients.PAGE.read_text(encoding="utf-8") == clients.page()


def test_pictures_are_those_of_python_and_say_how_they_were_made(api, pipe, tmp_path):
    words = {"prompt": "a red (heart:1.2)", "negative_prompt": "blue", "seed": 11}
    answer = api.txt2img(
        **words, **SIZE, steps=3, cfg_scale=4, sampler_name="DPM++ 2M", scheduler="Karras", batch_size=2,
        override_settings={"CLIP_stop_at_last_layers": 2, "randn_source": "NV"},
    )  # fmt: skip
    asked = {**words, **SIZE, "num_inference_steps": 3, "guidance_scale": 4.0, "num_images": 2}
    asked |= {"scheduler": "dpmpp_2m_karras", "clip_skip": 2, "noise_source": "nv"}
    painted = pipe.generate(Request(**asked)).images
    assert len(answer.images) == 2 and all(map(same, answer.images, painted))
    info = answer.info
    assert (info["all_seeds"], info["sampler_name"], info["clip_skip"]) == ([11, 12], "DPM++ 2M", 2)
    assert info["infotexts"] == [image.info["parameters"] for image in painted]
    file = tmp_path / "second.png"
    answer.images[1].save(file, pnginfo=_info(answer.images[1]))
    carried = infotext.read(file)
    wanted = Request(**asked | {"seed": 12, "num_images": 1}).to_json()
    assert (carried.model, carried.request) == ("emoji", wanted | {"width": 64})
    # A1111's own words alone say the same.
    text = info["infotexts"][1].split(", tightfit: ")[0]
    again = infotext.parse(text, "a text").request
    assert {name: again[name] for name in wanted if name in again} == {
        name: value for name, value in wanted.items() if name in again
    }
    assert again["scheduler"] == "dpmpp_2m_karras" and again["noise_source"] == "nv"


def _info(image):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", image.info["parameters"])
    return info


def test_hires_and_a_second_seed_are_those_of_python(api, pipe):
    larger = {"hr_scale": 1.5, "hr_upscaler": "Latent (nearest)", "hr_second_pass_steps": 2}
    answer = api.txt2img(
        prompt="a cat", seed=3, subseed=5, subseed_strength=0.3, **SMALL, sampler_name="Euler",
        enable_hr=True, denoising_strength=0.6, hr_sampler_name="DDIM", hr_prompt="a dog", **larger,
    )  # fmt: skip
    painted = pipe(
        "a cat", seed=3, subseed=5, subseed_strength=0.3, **OURS, guidance_scale=7, scheduler="euler_uniform",
        hires=1.5, hires_strength=0.6, hires_upscaler="latent-nearest", hires_steps=2, hires_scheduler="ddim",
        hires_prompt="a dog",
    )  # fmt: skip
    assert answer.image.size == (96, 96) and same(answer.image, painted)
    assert (answer.info["all_subseeds"], answer.info["denoising_strength"]) == ([5], 0.6)
    sized = api.txt2img(prompt="a cat", seed=3, **SMALL, enable_hr=True, hr_resize_x=80, hr_upscaler="None")
    assert sized.image.size == (80, 80)
    cut = {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 64, "hr_upscaler": "Latent (nearest)"}
    answer = api.txt2img(prompt="a cat", width=64, height=96, steps=1, n_iter=2, **cut)
    assert [image.size for image in answer.images] == [(128, 64)] * 2
    with pytest.raises(tightfit.TightfitError, match="is cut of 1073741824 pixels"):
        pipe("a cat", width=64, height=1024, num_inference_steps=1, hires_size="8192x64")
    first, second = answer.info["all_subseeds"]
    assert (answer.info["subseed"], second) == (first, first + 1) and first >= 0
    assert api.txt2img(steps=1, **SIZE, subseed=5, batch_size=2).info["all_subseeds"] == [5, 6]
    latents = np.arange(12 * 8, dtype=np.float32).reshape(1, 1, 12, 8)
    covering = latents.repeat(2, axis=2).repeat(2, axis=3)
    assert np.array_equal(interpolated(latents, (8, 16), "latent-nearest"), covering[..., 8:16, :])


def test_pictures_from_pictures_are_those_of_python(api, pipe):
    picture = clients.picture(96, 64)
    answer = api.img2img(
        [picture], prompt="a cat", seed=1, **SMALL, denoising_strength=0.9, resize_mode=1, cfg_scale=3
    )
    others = {"seed": 1, **OURS, "guidance_scale": 3, "scheduler": "euler_a_uniform"}
    assert same(answer.image, pipe("a cat", image=picture, strength=0.9, resize="crop", **others))
    assert answer.parameters["init_images"] is None
    painting = {"mask_image": clients.mask(), "mask_blur": 2, "inpainting_fill": 2}
    masked = {"image": clients.picture(), "mask_image": clients.mask(), "mask_blur": 2}
    for whole, padding in ((False, None), (True, 8)):
        answer = api.img2img(
            [clients.picture()], prompt="a cat", seed=1, **SMALL, denoising_strength=0.9, cfg_scale=3,
            inpaint_full_res=whole, inpaint_full_res_padding=8, **painting,
        )  # fmt: skip
        asked = masked | {"mask_content": "noise", "strength": 0.9, "mask_padding": padding}
        assert same(answer.image, pipe("a cat", **asked, **others)), whole


def test_a_mask_may_be_what_is_opaque_and_turned_round(http):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (0, 0, 32, 64))
    body = {"init_images": [encoded(clients.picture())], "mask": encoded(mask), **SMALL, "seed": 1}
    body |= {"denoising_strength": 0.9, "inpaint_full_res": False, "mask_blur": 0, "inpainting_fill": 1}
    for turned, kept in ((0, (32, 0, 64, 64)), (1, (0, 0, 32, 64))):
        answer = http.post("/sdapi/v1/img2img", json=body | {"inpainting_mask_invert": turned}).json()
        assert same(opened(answer["images"][0]).crop(kept), clients.picture().crop(kept)), turned


def test_controlnet_is_that_of_python(api, pipe):
    from webuiapi import ControlNetUnit

    unit = {"module": "canny", "weight": 0.7, "guidance_end": 0.5, "control_mode": 2}
    answer = api.txt2img(
        prompt="a cat", seed=1, **SMALL, alwayson_scripts={},
        controlnet_units=[ControlNetUnit(image=clients.picture(), resize_mode="Just Resize", **unit)],
    )  # fmt: skip
    controlled = {
        "control_preprocess": "canny",
        "controlnet_conditioning_scale": 0.7,
        "control_mode": "control",
    }
    others = {"seed": 1, **OURS, "guidance_scale": 7, "scheduler": "euler_a_uniform"}
    painted = pipe("a cat", control_image=clients.picture(), control_guidance_end=0.5, **controlled, **others)
    assert same(answer.image, painted)
    assert "ControlNet 0" in answer.info["infotexts"][0] and "Module: canny" in answer.info["infotexts"][0]
    # Older names, a picture with a data URL, and two units.
    units = [
        {
            "input_image": f"data:image/png;base64,{encoded(clients.picture())}",
            "guidance": 0.5,
            "module": "canny",
        }
        | {"weight": 0.7, "resize_mode": 0, "guessmode": True, "model": "None", "lowvram": True},
        {"enabled": False, "image": "no picture"},
    ]
    older = api.txt2img(
        prompt="a cat", seed=1, **SMALL, alwayson_scripts={"controlnet": {"args": units}, "ADetailer": {}}
    )
    assert same(older.image, painted)
    found = api.controlnet_detect([clients.picture()], module="canny").image
    assert np.array_equal(np.asarray(found), canny(np.asarray(clients.picture())))


def test_loras_of_prompts_and_styles(api, pipe, server):
    words = {"seed": 1, **OURS, "guidance_scale": 7, "scheduler": "euler_a_uniform"}
    painted = pipe("a cat, flat", negative_prompt="blurry", lora="flat:0.8", **words)
    styled = api.txt2img(prompt="a cat", styles=["flat"], seed=1, **SMALL)
    assert same(styled.image, painted)
    named = {"prompt": "a cat, flat <lora:flat34:0.8>", "negative_prompt": "blurry"}
    assert asked_of(server, **named).options == asked_of(server, prompt="a cat", styles=["flat"]).options
    with pytest.raises(tightfit.TightfitError, match="101 LoRAs"):
        asked_of(server, prompt="<lora:flat:0.1>" * 101)
    with pytest.raises(tightfit.TightfitError, match="characters"):
        asked_of(server, prompt="a", styles=["twice"] * 20)
    assert asked_of(server, prompt="<lyco:flat:0.5:0.8>").options["lora"] == ["flat:0.8:0.5"]
    assert styled.info["prompt"] == "a cat, flat <lora:flat:0.8>"
    assert api.get_prompt_styles()[0]["name"] == "flat"
    larger = {"prompt": "a <lora:flat:0.8>", "enable_hr": True}
    again = asked_of(server, **larger, hr_prompt="a (dog) <lora:flat34:0.8>, slice").options
    assert (again["prompt"], again["hires_prompt"]) == ("a", "a (dog), slice")
    assert again["lora"] == ["flat:0.8"] and again["embedding"]
    with pytest.raises(tightfit.TightfitError, match="hr_prompt names the LoRA 'flat:1'"):
        asked_of(server, **larger, hr_prompt="a <lora:flat:1>")


def test_a_word_that_an_embedding_teaches_and_a_refiner(api, pipe, folder, server):
    embeddings = api.get_embeddings()
    assert embeddings == {"loaded": {"slice": embeddings["loaded"]["slice"]}, "skipped": {}}
    assert (embeddings["loaded"]["slice"]["vectors"], embeddings["loaded"]["slice"]["shape"]) == (4, 160)
    file = folder.parent / "embeddings" / "slice.safetensors"
    asked = {"prompt": "a (Slice:1.2)", "seed": 1, "sampler_name": "DDIM", "refiner_checkpoint": "emoji"}
    answer = api.custom_post("txt2img", {**asked, **SMALL, "refiner_switch_at": 0.5}, baseurl=True)
    ours = {"embedding": str(file), "refiner": "emoji", "refiner_start": 0.5, "scheduler": "ddim"}
    assert same(answer.image, pipe("a (Slice:1.2)", seed=1, **OURS, **ours))
    assert "embedding" not in asked_of(server, prompt="a slicer").options
    ours = asked_of(server, prompt="a", step_cache=3, guidance_rescale=0.5, no_such=1).options
    assert (ours["step_cache"], ours["guidance_rescale"]) == (3, 0.5)  # for which A1111 has no word


def test_extras_are_the_upscaler_s(api, folder, server):
    from webuiapi import WebUIApi

    assert isinstance(api, WebUIApi)
    names = [upscaler["name"] for upscaler in api.get_upscalers()]
    assert names == ["None", "Lanczos", "Nearest", "R-ESRGAN 2x+"]
    assert api.get_realesrgan_models() == [
        {"name": "R-ESRGAN 2x+", "path": "RealESRGAN_x2plus.safetensors", "scale": 2}
    ]
    file, picture = folder / "ESRGAN" / "RealESRGAN_x2plus.safetensors", clients.picture(32, 24)
    larger = tightfit.upscale(picture, file, 3, device="cpu", precision="fp32")
    assert same(api.extra_single_image(picture, upscaler_1="R-ESRGAN 2x+", upscaling_resize=3).image, larger)
    untouched = api.extra_single_image(picture, upscaler_1="None", resize_mode=1, upscaling_resize_w=48)
    assert same(untouched.image, picture)
    answer = api.extra_batch_images(
        [picture, picture],
        resize_mode=1,
        upscaling_resize_w=48,
        upscaling_resize_h=48,
        upscaler_1="RealESRGAN_x2plus",
    )
    twice = tightfit.upscale(picture, file, 2, device="cpu", precision="fp32")
    assert len(answer.images) == 2
    assert all(same(image, twice.crop((8, 0, 56, 48))) for image in answer.images)
    assert "Postprocess upscale to: 48x48" in answer.info
    larger = {"enable_hr": True, "hr_upscaler": "R-ESRGAN 2x+"}
    assert asked_of(server, **larger).options["hires_upscaler"] == "RealESRGAN_x2plus"
    said = r"R-ESRGAN 4x\+ is RealESRGAN_x4plus.safetensors, which is in no folder"
    with pytest.raises(tightfit.TightfitError, match=said):
        asked_of(server, enable_hr=True, hr_upscaler="R-ESRGAN  4x+")
    with pytest.raises(RuntimeError, match=said):
        api.extra_single_image(picture, upscaler_1="R-ESRGAN 4x+")


def test_what_a_picture_says(api):
    painted = api.txt2img(prompt="a cat", negative_prompt="a dog", seed=1, **SMALL).image
    answer = api.png_info(painted)
    said = answer.parameters
    assert (said["Prompt"], said["Negative prompt"]) == ("a cat", "a dog")
    assert (said["Seed"], said["Size-1"], said["Size-2"]) == ("1", "64", "64") and "tightfit" not in said
    assert answer.info == painted.info["parameters"]
    nothing = api.png_info(clients.picture())
    assert (nothing.info, nothing.parameters) == ("", {})
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fish"}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 1}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 4, "steps": 5, "cfg": 6, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1, "positive": ["1", 0], "negative": ["1", 0], "latent_image": ["2", 0],
            },
        },
    }  # fmt: skip
    other = clients.picture()
    other.info["prompt"] = json.dumps(graph)
    answer = api.png_info(other)
    assert answer.parameters["Prompt"] == "a fish" and answer.parameters["Steps"] == "5"


# ------------------------------------------------------------------------------------------------- options


def test_options_are_kept_and_one_request_may_have_others(folder, tmp_path, environment):
    def made() -> Desk:
        service.shelves.refresh()
        return Desk.made(service, "emoji")

    with Service(device="cpu", shelves=Shelves([folder]), folder=tmp_path, **WISHES) as service:
        desk = made()
        desk.options.change({"CLIP_stop_at_last_layers": 2, "sd_vae": "tiny", "sd_checkpoint_hash": "of old"})
        again = made().options
        assert again.all()["CLIP_stop_at_last_layers"] == 2 and again.all()["sd_vae"] == "tiny"
        assert again.values({"CLIP_stop_at_last_layers": 3.0})["CLIP_stop_at_last_layers"] == 3
        assert again.all()["CLIP_stop_at_last_layers"] == 2
        for bad, said in (
            ({"no_such": 1}, "no option"),
            ({"CLIP_stop_at_last_layers": 0}, "clip_skip"),
            ({"CLIP_stop_at_last_layers": "2"}, "whole number"),
            ({"sd_model_checkpoint": "../emoji"}, "is called"),
            ({"sd_vae": "/etc/passwd"}, "is called"),
            ({"tiling": True}, "tile"),
            ({"randn_source": "dice"}, "noise_source"),
        ):
            with pytest.raises(tightfit.TightfitError, match=said):
                again.change(bad)
        assert again.all() == desk.options.all()
        assert Desk.made(service, "named").options.all()["sd_model_checkpoint"] == "named"
        (tmp_path / "a1111.json").write_text("[")
        assert made().options.all()["CLIP_stop_at_last_layers"] == 1


def test_a_request_s_options_stay_where_it_says_so(api, http):
    body = {"prompt": "a cat", "seed": 1, **SMALL, "override_settings": {"CLIP_stop_at_last_layers": 2}}
    assert json.loads(http.post("/sdapi/v1/txt2img", json=body).json()["info"])["clip_skip"] == 2
    assert api.get_options()["CLIP_stop_at_last_layers"] == 1
    body["override_settings_restore_afterwards"] = False
    http.post("/sdapi/v1/txt2img", json=body)
    assert api.get_options()["CLIP_stop_at_last_layers"] == 2
    assert (
        json.loads(http.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL}).json()["info"])["clip_skip"]
        == 2
    )
    assert api.set_options({"CLIP_stop_at_last_layers": 1}) is None


# ---------------------------------------------------------------------------------- two clients, written anew


def test_open_webui(http):
    """It asks for the options, sends all of them back with its model, and paints."""
    options = http.get("/sdapi/v1/options").json()
    models = http.get("/sdapi/v1/sd-models").json()
    assert [model["title"] for model in models] == [options["sd_model_checkpoint"]] == ["emoji"]
    options["sd_model_checkpoint"] = models[0]["title"]
    assert http.post("/sdapi/v1/options", json=options).status_code == 200
    body = {"prompt": "a cat", "batch_size": 2, **SIZE, "steps": 2, "negative_prompt": "a dog"}
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    assert [opened(text).size for text in answer["images"]] == [(64, 64)] * 2 and "info" in answer
    options["sd_model_checkpoint"] = "sd-v1-5.safetensors [abcdef0123]"
    refused = http.post("/sdapi/v1/options", json=options)
    assert refused.status_code == 404 and "is called" in refused.json()["detail"]


def test_sillytavern(http):
    assert http.get("/sdapi/v1/options", headers={"Authorization": "Basic Og=="}).is_success
    upscalers = [one["name"] for one in http.get("/sdapi/v1/upscalers").json()]
    latent = [one["name"] for one in http.get("/sdapi/v1/latent-upscale-modes").json()]
    assert upscalers[0] == "None" and "Latent" in latent
    vaes = [one["model_name"] for one in http.get("/sdapi/v1/sd-vae").json()]
    assert vaes == ["tiny"] and http.get("/sdapi/v1/sd-modules").status_code == 404
    samplers = [one["name"] for one in http.get("/sdapi/v1/samplers").json()]
    schedulers = [one["name"] for one in http.get("/sdapi/v1/schedulers").json()]
    assert len(samplers) == len(SAMPLERS) and "karras" in schedulers
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "emoji"}).is_success
    progress = http.get("/sdapi/v1/progress").json()
    assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
    body = {
        "prompt": "a cat", "negative_prompt": "a dog", "sampler_name": "DDIM", "scheduler": "karras",
        "steps": 2, "cfg_scale": 7, **SIZE, "restore_faces": False, "enable_hr": False,
        "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [], "denoising_strength": 0.7,
        "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "tiny"},
        "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True,
        "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
    }  # fmt: skip
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    assert len(answer["images"]) == 1 and "VAE: tiny_vae" in json.loads(answer["info"])["infotexts"][0]
    assert http.post("/sdapi/v1/interrupt").json() == {}


# ---------------------------------------------------------------------------------------- files of all kinds


@pytest.fixture
def desk(environment, tmp_path):
    """Of models among which nothing can be read, as downloads leave them."""
    models = tmp_path / "models"
    for number, place in enumerate(("Lora", "ControlNet", "VAE", "ESRGAN", "embeddings", "Stable-diffusion")):
        (models / place).mkdir(parents=True)
        (models / place / "broken.safetensors").write_bytes((b"<html>404</html>", b"")[number % 2])
        (models / place / "cut.safetensors").write_bytes((2**20).to_bytes(8, "little") + b"{")
    (models / "styles.csv").write_bytes(b"name,prompt\n\xff\xfe")
    with Service(
        device="cpu", shelves=Shelves([models]), limits=Limits(characters=10_000), **WISHES
    ) as service:
        yield Desk.made(service, "emoji")


def test_a_file_that_cannot_be_read_is_in_no_list_and_refused_where_it_is_named(desk):
    def ordered(**fields) -> Order:
        return order_of(Asked.read("txt2img", TextToImage(**fields)), desk, "")

    assert ordered(prompt="a <lora:flat:1>").options["lora"] == ["flat:1"]
    assert [lora["name"] for lora in facts.loras(desk)] == ["flat"]
    assert facts.prompt_styles(desk) == facts.realesrgan_models(desk) == facts.sd_vae(desk)[1:] == []
    assert len(control.model_list(desk)["model_list"]) == 1 and set(control.control_types(desk))
    assert [model["title"] for model in facts.sd_models(desk)] == ["emoji"]
    assert facts.embeddings(desk)["loaded"] == {}
    with pytest.raises(tightfit.TightfitError, match=r"broken\.safetensors"):
        desk.service.queue(ordered(prompt="a <lora:broken:1>"))
    with pytest.raises(tightfit.TightfitError, match=r"styles.csv cannot be read"):
        ordered(styles=["flat"])
    with pytest.raises(tightfit.TightfitError, match="12000 characters"):  # before anything is read
        ordered(prompt="a" * 6000, negative_prompt="b" * 6000, override_settings={"nothing": 1})


# ------------------------------------------------------------------------------------------- while it runs


def long_job(server, answers: list, **others) -> threading.Thread:
    body = {"prompt": "a cat", "seed": 1, **SIZE, "steps": 16, "batch_size": 20, **others}
    body["override_settings"] = {"show_progress_every_n_steps": 4}

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def until(holds, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return value


def test_a_job_is_followed_and_interrupted(server, http, api):
    answers: list = []
    thread = long_job(server, answers)
    followed = until(lambda: (said := http.get("/sdapi/v1/progress").json())["current_image"] and said)
    state = followed["state"]
    assert 0 < followed["progress"] < 1 and followed["eta_relative"] >= 0
    assert (state["job"], state["job_count"], state["sampling_steps"]) == ("scripts_txt2img", 20, 16)
    assert opened(followed["current_image"]).size == (64, 64)
    brief = http.get("/sdapi/v1/progress", params={"skip_current_image": True}).json()
    assert brief["current_image"] is None
    until(lambda: http.get("/sdapi/v1/progress").json()["state"]["job_no"] >= 1)
    api.interrupt()
    thread.join()
    answer = answers[0].json()
    assert 1 <= len(answer["images"]) < 20
    assert len(json.loads(answer["info"])["infotexts"]) == len(answer["images"])


def test_another_client_s_job_is_not_interrupted(server, http):
    ticket = server.service.queue(
        Order("emoji", {"prompt": "a", **SIZE, "num_inference_steps": 12}, client="else")
    )
    until(lambda: server.service.running is ticket)
    assert http.post("/sdapi/v1/skip").json() is None
    ticket.wait(60)
    assert ticket.state.value == "done"


def test_a_client_that_goes_away_has_its_job_cancelled(server):
    body = json.dumps({"steps": 900, "seed": 77, **SIZE})
    address = httpx.URL(server.url)
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: {address.netloc.decode()}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def ours() -> list:
        return [one for one in server.service.active if one.record.order.options["seed"] == 77]

    with socket.create_connection((address.host, address.port)) as client:
        client.sendall((head + body).encode())
        (ticket,) = until(ours)
    assert ticket.wait(60).value == "cancelled"


def test_requests_at_once_wait_for_one_another(server):
    def seed(number: int) -> int:
        body = {"prompt": "a cat", "seed": number, **SMALL}
        answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=60).json()
        return json.loads(answer["info"])["seed"]

    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(seed, range(6))] == [*range(6)]


# ------------------------------------------------------------------------------------------------ bad input


HUGE = {"resize_mode": 1, "upscaling_resize_w": 10**400}
BAD = [
    ("txt2img", {"sampler_name": "No Such"}, 404),
    ("txt2img", {"scheduler": "No Such", "sampler_name": "Euler"}, 422),
    ("txt2img", {"steps": "many"}, 422),
    ("txt2img", {"steps": 10**9}, 422),
    ("txt2img", {"steps": -1}, 422),
    ("txt2img", {"step_cache": True}, 422),
    ("txt2img", {"step_cache": 99}, 422),
    ("txt2img", {"width": 10**30}, 422),
    ("txt2img", {"width": 63}, 422),
    ("txt2img", {"width": 4096, "height": 4096}, 422),
    ("txt2img", {"batch_size": 10**6, "n_iter": 10**6}, 422),
    ("txt2img", {"n_iter": 0}, 422),
    ("txt2img", {"cfg_scale": 1e300}, 422),
    ("txt2img", {"prompt": ["a"]}, 422),
    ("txt2img", {"prompt": "\ud800"}, 422),
    ("txt2img", {"prompt": "<lora:nothing:1>"}, 422),
    ("txt2img", {"prompt": "<lora:flat:x>"}, 422),
    ("txt2img", {"styles": ["none such"]}, 422),
    ("txt2img", {"styles": [""]}, 422),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, 404),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, 404),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "emoji\0"}}, 404),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "e" * 5000}}, 404),
    ("txt2img", {"override_settings": {"sd_vae": "../vae"}}, 422),
    ("txt2img", {"override_settings": {"nothing": 1}}, 422),
    ("txt2img", {"refiner_checkpoint": "\ud800"}, 404),
    ("txt2img", {"enable_hr": True, "hr_upscaler": "../x"}, 422),
    ("txt2img", {"enable_hr": True, "hr_scale": 1e9}, 422),
    ("txt2img", {"enable_hr": True, "hr_resize_x": -8}, 422),
    ("txt2img", {"enable_hr": True, "height": 512, "hr_resize_x": 4096, "hr_resize_y": 64}, 422),
    ("txt2img", {"enable_hr": True, "hr_negative_prompt": "other"}, 422),
    ("txt2img", {"restore_faces": True}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": 3}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [3]}}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": "x", "module": "depth"}]}}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": "a" * 99}]}}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"enabled": True}]}}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": [[["a"]]]}]}}}, 422),
    (
        "txt2img",
        {"alwayson_scripts": {"controlnet": {"args": [{"image": "PICTURE", "weight": "heavy"}]}}},
        422,
    ),
    (
        "txt2img",
        {"alwayson_scripts": {"controlnet": {"args": [{"image": "PICTURE", "control_mode": 9}]}}},
        422,
    ),
    ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 422),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": {"image": None}}]}}}, 422),
    ("img2img", {}, 404),
    ("img2img", {"init_images": ["not base64!"]}, 422),
    ("img2img", {"init_images": ["https://127.0.0.1/a.png"]}, 422),
    ("img2img", {"init_images": ["/etc/passwd"]}, 422),
    ("img2img", {"init_images": ["PICTURE"], "mask": "PICTURE", "inpainting_fill": 9}, 422),
    ("img2img", {"init_images": ["PICTURE"], "denoising_strength": 0}, 422),
    ("img2img", {"init_images": ["PICTURE"], "resize_mode": 3}, 422),
    ("extra-single-image", {"image": "PICTURE", "upscaler_1": "../tiny"}, 422),
    ("extra-single-image", {"image": "PICTURE", "upscaler_1": "R-ESRGAN 2x+", "upscaling_resize": 1e9}, 422),
    ("extra-single-image", {"image": "PICTURE", "upscaler_1": "Lanczos", "upscaling_resize": 1e308}, 422),
    ("extra-single-image", {"image": "PICTURE", "upscaler_1": "Lanczos", **HUGE}, 422),
    ("extra-single-image", {"image": "PICTURE", "gfpgan_visibility": 1}, 422),
    ("extra-single-image", {"image": "PICTURE", "resize_mode": 2}, 422),
    ("extra-batch-images", {"imageList": "x"}, 422),
    ("png-info", {"image": "AAAA"}, 422),
    ("interrogate", {"image": "PICTURE"}, 404),
    ("options", {"sd_model_checkpoint": 3}, 422),
    ("options", {"CLIP_stop_at_last_layers": 1e300}, 422),
]


@pytest.mark.parametrize(("place", "body", "status"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(place, body, status, http):
    text = json.dumps({**(SMALL if place in FIELDS else {}), **body}).replace(
        "PICTURE", encoded(clients.picture())
    )
    answer = http.post(f"/sdapi/v1/{place}", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    if isinstance(detail, list):
        assert all({"loc", "msg", "type"} == set(one) for one in detail)
    else:
        assert detail and "\n" not in detail and answer.json()["errors"] == detail
        assert set(answer.json()) == {"error", "detail", "body", "errors"}


def _units(count: int, picture: str) -> dict:
    return {"alwayson_scripts": {"controlnet": {"args": [{"image": picture}] * count}}}


def test_pictures_are_counted_and_measured_before_they_are_decoded(http, monkeypatch):
    def refused(path: str, **body) -> str:
        answer = http.post(path, json=body)
        assert answer.status_code == 422, answer.text
        return answer.json()["detail"]

    small, large = encoded(Image.new("L", (8, 8))), encoded(Image.new("L", (513, 512)))
    monkeypatch.delattr("tightfit.runtime.conditions.input_pictures._upright")  # which decodes
    assert "9 units" in refused("/sdapi/v1/txt2img", **_units(9, small))
    for path, body in (
        ("/sdapi/v1/txt2img", _units(1, large)),
        ("/sdapi/v1/img2img", {"init_images": [large]}),
        ("/sdapi/v1/extra-single-image", {"image": large}),
        ("/sdapi/v1/extra-batch-images", {"imageList": [{"data": large, "name": "a"}]}),
        ("/controlnet/detect", {"controlnet_input_images": [large]}),
    ):
        assert "262656 pixels" in refused(path, **body), path


LISTS = [
    ("/sdapi/v1/txt2img", "styles"),
    ("/sdapi/v1/txt2img", "script_args"),
    ("/sdapi/v1/img2img", "init_images"),
    ("/sdapi/v1/extra-batch-images", "imageList"),
    ("/controlnet/detect", "controlnet_input_images"),
    ("/controlnet/detect", "controlnet_images"),
]


@pytest.mark.parametrize(("path", "name"), LISTS)
def test_a_long_list_is_refused_at_once_and_its_items_are_not_told(path, name, http):
    answers = [
        http.post(path, json={"script_name": "x", name: [number] * count})
        for number, count in ((1, 100), ([], 20_000))
    ]
    assert all(answer.status_code == 422 and len(answer.content) < 5000 for answer in answers)
    (detail,) = answers[1].json()["detail"]
    assert detail["type"] == "too_long" and detail["loc"] == ["body", name]


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, '{"steps": NaN}', '{"steps": 1' + "0" * 5000 + "}"])
def test_what_is_no_json_is_refused(text, http):
    answer = http.post("/sdapi/v1/txt2img", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def test_what_is_nested_deep_is_not_answered_whole(http):
    deep: list = []
    for _ in range(400):
        deep = [deep]
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL, "comments": {"deep": deep}})
    assert answer.status_code == 200 and answer.json()["parameters"]["comments"]


def test_what_is_loaded_is_freed_when_nothing_runs(http, server):
    assert http.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL}).is_success
    assert server.service.loaded()["emoji"]
    assert http.post("/sdapi/v1/unload-checkpoint").json() == {}
    until(lambda: not server.service.loaded()["emoji"])
    assert http.post("/sdapi/v1/reload-checkpoint").json() == {}
    assert http.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL}).is_success


def test_what_breaks_here_is_told_to_the_log_alone(server, http, monkeypatch, caplog):
    def broken(order):
        raise RuntimeError("a secret")

    monkeypatch.setattr(server.service, "queue", broken)
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a"})
    assert answer.status_code == 500 and answer.json()["error"] == "RuntimeError"
    assert "secret" not in answer.text and "a secret" in caplog.text


def test_a_full_queue_says_when_to_come_again(environment):
    limits = Limits(waiting=0)
    with (
        Service(device="cpu", shelves=Shelves([]), limits=limits) as service,
        clients.serving(service) as url,
    ):
        answer = httpx.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "a"})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "try again" in answer.json()["detail"]
