"""docs/clients.md: each method of real clients, called against a server of the emoji model:

    python -m tightfit.benchmarks.clients            # call all, and write the page
    python -m tightfit.benchmarks.clients --check    # exit code 1 if the page is stale

Needs the extras `serve` and `test`. A method is refused where the answer is one line that says why, or where
there is no such endpoint, as A1111 has none without an extension.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..runtime.asking import Shelves
from ..runtime.cli.output import write
from ..runtime.service import Service
from .readme import table

PAGE = Path(__file__).parents[1] / "docs" / "clients.md"
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 7}
_COLUMNS = "| client | method | outcome |"


@dataclass(frozen=True)
class Row:
    """One call of a client. `call` takes the client; `refused` is part of what is answered, or "" where it
    works. needs: a package that the call imports."""

    method: str
    call: Callable[[Any], object]
    refused: str = ""
    needs: str = ""


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of a server of this service, until the context is left."""
    import uvicorn

    from ..runtime.server.app import create

    config = uvicorn.Config(create(service), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def picture(width: int = 64, height: int = 64) -> Any:
    """A red square on white."""
    from PIL import Image

    image = Image.new("RGB", (width, height), "white")
    image.paste((200, 30, 30), (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return image


def mask() -> Any:
    from PIL import Image

    image = Image.new("L", (64, 64))
    image.paste(255, (8, 8, 40, 40))
    return image


def webuiapi(url: str) -> Any:
    import webuiapi

    return webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", steps=2)


def _painted(client: Any, **others: Any) -> Any:
    # Without scripts of its own webuiapi sends those of the call before once more.
    return client.txt2img(prompt="a red heart", **SMALL | {"alwayson_scripts": {}} | others).image


def _over(client: Any, **others: Any) -> Any:
    return client.img2img(
        [picture()], prompt="a red heart", **SMALL | {"alwayson_scripts": {}} | others
    ).image


def _unit() -> Any:
    from webuiapi import ControlNetUnit

    return ControlNetUnit(image=picture(), module="canny")


def _of(name: str, *arguments: Any) -> Callable[[Any], object]:
    """Calls a class or function of webuiapi that takes the client, and the method of that."""
    kind, method = name.split(".")

    def call(client: Any) -> object:
        import webuiapi

        return getattr(getattr(webuiapi, kind)(client), method)(*arguments)

    return call


def _extension(name: str) -> Callable[[], Any]:
    def made() -> Any:
        import webuiapi

        return (
            getattr(webuiapi, name)(picture()) if name in ("Roop", "ReActor") else getattr(webuiapi, name)()
        )

    return made


_ADETAILER, _ANIMATED, _SAG, _ROOP, _REACTOR = map(
    _extension, ("ADetailer", "AnimateDiff", "Sag", "Roop", "ReActor")
)
_NO_SCRIPT = "always on script"
_NO_ENDPOINT = "Not Found"
_SAID = {"": "works", _NO_ENDPOINT: "not there: of an extension, or of an old version"}
_WEBUIAPI = (
    Row("txt2img", _painted),
    Row("txt2img(enable_hr)", lambda c: _painted(c, enable_hr=True, hr_scale=1.5)),
    Row("txt2img(controlnet_units)", lambda c: _painted(c, controlnet_units=[_unit()])),
    Row("txt2img(batch_size, n_iter)", lambda c: _painted(c, batch_size=2, n_iter=1)),
    Row("txt2img(subseed, seed_resize)", lambda c: _painted(c, subseed=3, subseed_strength=0.2)),
    Row(
        "txt2img(override_settings)", lambda c: _painted(c, override_settings={"CLIP_stop_at_last_layers": 2})
    ),
    Row("img2img", _over),
    Row("img2img(mask_image)", lambda c: _over(c, mask_image=mask(), inpainting_fill=1)),
    Row("img2img(controlnet_units)", lambda c: _over(c, controlnet_units=[_unit()])),
    Row("extra_single_image", lambda c: c.extra_single_image(picture(), upscaler_1="Lanczos").image),
    Row("extra_batch_images", lambda c: c.extra_batch_images([picture()] * 2, upscaler_1="Nearest").images),
    Row("png_info", lambda c: c.png_info(_painted(c)).parameters["Prompt"]),
    Row("interrogate", lambda c: c.interrogate(picture()), "Model not found"),
    Row("interrupt", lambda c: c.interrupt()),
    Row("skip", lambda c: c.skip()),
    Row("get_options", lambda c: c.get_options()["sd_model_checkpoint"]),
    Row("set_options", lambda c: c.set_options(c.get_options())),
    Row("get_cmd_flags", lambda c: c.get_cmd_flags()["api"]),
    Row("get_progress", lambda c: c.get_progress()["state"]),
    Row("get_samplers", lambda c: c.get_samplers()[0]["name"]),
    Row("get_schedulers", lambda c: c.get_schedulers()[0]["label"]),
    Row("get_upscalers", lambda c: c.get_upscalers()[0]["name"]),
    Row("get_latent_upscale_modes", lambda c: c.get_latent_upscale_modes()[0]["name"]),
    Row("get_sd_models", lambda c: c.get_sd_models()[0]["title"]),
    Row("get_sd_vae", lambda c: c.get_sd_vae()[0]["model_name"]),
    Row("get_loras", lambda c: c.get_loras()[0]["metadata"]),
    Row("get_embeddings", lambda c: c.get_embeddings()["loaded"]),
    Row("get_hypernetworks", lambda c: c.get_hypernetworks()),
    Row("get_face_restorers", lambda c: c.get_face_restorers()),
    Row("get_realesrgan_models", lambda c: c.get_realesrgan_models()),
    Row("get_prompt_styles", lambda c: c.get_prompt_styles()),
    Row("get_scripts", lambda c: c.get_scripts()["txt2img"]),
    Row("get_memory", lambda c: c.get_memory()["ram"]["total"]),
    Row("refresh_checkpoints", lambda c: c.refresh_checkpoints()),
    Row("util_get_model_names", lambda c: c.util_get_model_names()[0]),
    Row("util_get_sampler_names", lambda c: c.util_get_sampler_names()[0]),
    Row("util_get_scheduler_names", lambda c: c.util_get_scheduler_names()[0]),
    Row("util_get_current_model", lambda c: c.util_get_current_model()),
    Row("util_set_model", lambda c: c.util_set_model("emoji")),
    Row("util_wait_for_ready", lambda c: c.util_wait_for_ready(check_interval=0.1)),
    Row("controlnet_version", lambda c: c.controlnet_version()),
    Row("controlnet_model_list", lambda c: c.controlnet_model_list()[0]),
    Row("controlnet_module_list", lambda c: c.controlnet_module_list()[0]),
    Row("controlnet_detect", lambda c: c.controlnet_detect([picture()], module="canny").image),
    Row("custom_get", lambda c: c.custom_get("sdapi/v1/samplers")[0]["name"]),
    Row("custom_post", lambda c: c.custom_post("png-info", {"image": _encoded()}, baseurl=True).parameters),
    Row("get_endpoint", lambda c: c.custom_get("samplers", baseurl=True)[0]["name"]),
    Row("post_and_get_api_result", lambda c: c.post_and_get_api_result(f"{c.baseurl}/txt2img", SMALL, False)),
    Row("async_post", lambda c: asyncio.run(_awaited(c)), needs="aiohttp"),
    Row("set_auth", lambda c: c.set_auth("name", "word")),
    Row("check_extensions", lambda c: c.check_extensions()),
    Row("txt2img(restore_faces)", lambda c: _painted(c, restore_faces=True), "restore_faces"),
    Row("txt2img(tiling)", lambda c: _painted(c, tiling=True), "tiling"),
    Row("txt2img(script_name)", lambda c: _painted(c, script_name="X/Y/Z plot"), "Script"),
    Row("txt2img(adetailer)", lambda c: _painted(c, adetailer=[_ADETAILER()]), _NO_SCRIPT),
    Row(
        "txt2img(animatediff)",
        lambda c: _painted(c, animatediff=_ANIMATED()),
        _NO_SCRIPT,
    ),
    Row("txt2img(roop)", lambda c: _painted(c, roop=_ROOP()), _NO_SCRIPT),
    Row("txt2img(reactor)", lambda c: _painted(c, reactor=_REACTOR()), _NO_SCRIPT),
    Row("txt2img(sag)", lambda c: _painted(c, sag=_SAG()), _NO_SCRIPT),
    Row("get_artists", lambda c: c.get_artists(), _NO_ENDPOINT),
    Row("get_artist_categories", lambda c: c.get_artist_categories(), _NO_ENDPOINT),
    Row("list_prompt_gen_models", lambda c: c.custom_get("promptgen/list_models"), _NO_ENDPOINT),
    Row("prompt_gen", lambda c: c.prompt_gen(), _NO_ENDPOINT),
    Row("ControlNetInterface.txt2img", _of("ControlNetInterface.txt2img"), _NO_ENDPOINT),
    Row("ControlNetInterface.img2img", _of("ControlNetInterface.img2img"), _NO_ENDPOINT),
    Row("InstructPix2PixInterface.img2img", _of("InstructPix2PixInterface.img2img"), _NO_ENDPOINT),
    Row("RemBGInterface.rembg", _of("RemBGInterface.rembg", picture()), _NO_ENDPOINT),
    Row("ModelKeywordInterface", lambda c: c.custom_get("model_keyword/get_keywords"), _NO_ENDPOINT),
)


def openai(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


_SOME: dict[str, Any] = {"prompt": "a red heart", "size": "64x64"}
_TWO_STEPS: dict[str, Any] = {"extra_body": {"num_inference_steps": 2}}


def _generated(client: Any, **others: Any) -> Any:
    return client.images.generate(**_SOME, **_TWO_STEPS, **others)


def _edited(client: Any, **others: Any) -> Any:
    return client.images.edit(image=_file(picture()), **_SOME, **_TWO_STEPS, **others)


def _hole() -> Any:
    """A mask as OpenAI has it: transparent where to paint."""
    image = picture().convert("RGBA")
    image.putalpha(mask().point(lambda value: 255 - value))
    return image


def _file(image: Any) -> bytes:
    from ..runtime.server.served import encoded

    return encoded(image)


_OPENAI = (
    Row("images.generate", lambda c: _generated(c).data[0].b64_json),
    Row(
        "images.generate(n, quality)",
        lambda c: c.images.generate(**_SOME, n=2, quality="low").data[1].b64_json,
    ),
    Row("images.generate(response_format=url)", lambda c: _generated(c, response_format="url").data[0].url),
    Row(
        "images.generate(output_format, output_compression)",
        lambda c: _generated(c, output_format="webp", output_compression=50).data[0].b64_json,
    ),
    Row(
        "images.generate(stream, partial_images)",
        lambda c: [*_generated(c, stream=True, partial_images=1)][-1],
    ),
    Row(
        "images.generate(model=gpt-image-1)", lambda c: _generated(c, model="gpt-image-1").usage.total_tokens
    ),
    Row("images.edit", lambda c: _edited(c).data[0].b64_json),
    Row("images.edit(mask)", lambda c: _edited(c, mask=_file(_hole())).data[0].b64_json),
    Row("images.edit(stream)", lambda c: [*_edited(c, stream=True)][-1].usage),
    Row(
        "images.create_variation",
        lambda c: c.images.create_variation(image=_file(picture()), size="64x64", **_TWO_STEPS).data[0],
    ),
    Row("models.list", lambda c: next(iter(c.models.list())).id),
    Row("models.retrieve", lambda c: c.models.retrieve("emoji").id),
    Row("images.generate(model=nothing)", lambda c: _generated(c, model="nothing"), "does not exist"),
    Row(
        "images.generate(background=transparent)",
        lambda c: _generated(c, background="transparent"),
        "background",
    ),
    Row("images.generate(output_format=svg)", lambda c: _generated(c, output_format="svg"), "output_format"),
    Row(
        "images.edit(several images)",
        lambda c: c.images.edit(image=[_file(picture())] * 2, **_SOME),
        "one picture is edited here",
    ),
    Row("models.delete", lambda c: c.models.delete("emoji"), "Method Not Allowed"),
    Row(
        "chat.completions.create",
        lambda c: c.chat.completions.create(model="emoji", messages=[]),
        _NO_ENDPOINT,
    ),
)


def connected(url: str) -> Any:
    from ..runtime.client import connect

    return connect(url)


_REMOTE = (
    Row(
        "connect(url)(prompt, …)", lambda c: c("a red heart", num_inference_steps=2, width=64, height=64).size
    ),
    Row("generate", lambda c: c.generate("a", num_inference_steps=2, width=64, height=64).summary["seconds"]),
    Row("run", lambda c: [*c.run("a", 1, num_inference_steps=2, width=64, height=64)][-1].stage),
    Row("plans", lambda c: c.plans("a", hardware="rtx-2060")[0].summary()),
    Row("models", lambda c: c.models()[0]["name"]),
    Row("info", lambda c: c.info()["machine"]),
)
CLIENTS: Mapping[str, tuple[Callable[[str], Any], tuple[Row, ...]]] = {
    "webuiapi": (webuiapi, _WEBUIAPI),
    "openai": (openai, _OPENAI),
    "tightfit": (connected, _REMOTE),
}
"""Of each client what makes it of a server's address, and its calls."""


def _encoded() -> str:
    from ..runtime.server.served import base64_of

    return base64_of(picture())


async def _awaited(client: Any) -> object:
    return await client.txt2img(prompt="a red heart", **SMALL, use_async=True)


def outcome(row: Row, client: Any) -> str:
    """ "" where the call works, else what was answered."""
    try:
        value = row.call(client)
    except Exception as error:  # whatever a client makes of an answer
        return f"{type(error).__name__}: {error}"
    return str(value) if isinstance(value, dict) and "detail" in value else ""


def page() -> str:
    """What is written on it, and below that the table."""
    rows = [
        f"| {name} | `{row.method}` | {_SAID.get(row.refused, f'refused: {row.refused}')} |"
        for name, (_, calls) in CLIENTS.items()
        for row in calls
    ]
    written = PAGE.read_text(encoding="utf-8").partition(_COLUMNS)[0]
    return written + table(_COLUMNS, rows)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true")
    if parse.parse_args().check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else f"{PAGE} is stale: make it again")
    with (
        TemporaryDirectory() as folder,
        Service(device="cpu", folder=folder, shelves=Shelves([]), precision="fp32") as service,
        serving(service) as url,
    ):
        wrong = [
            f"{name}.{row.method}: {said or 'works'}"
            for name, (make, calls) in CLIENTS.items()
            for row in calls
            if bool(said := outcome(row, make(url))) != bool(row.refused) or row.refused not in said
        ]
    if wrong:
        sys.exit("\n".join(wrong))
    write(PAGE, page().removesuffix("\n"))


if __name__ == "__main__":
    main()
