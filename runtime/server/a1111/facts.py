"""What A1111 tells of itself: options, and lists of what is there."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Body

from ...adapters.header import contents, stamp
from ...adapters.textual_inversion import read as read_embedding
from ...conditions.handed import LATENTS, PIXELS
from ...errors import TightfitError
from ...machine.process import cpu_memory, resident
from ...models.hub import BESIDE
from ...models.layouts.library import Kind
from ...models.samplers.names import AUTOMATIC, SAMPLERS, SCHEDULES
from ...models.upscalers import a1111_name, read_upscaler
from ..served import Served
from .control import SCRIPT
from .desk import At, Desk
from .lists import Item
from .options import MODEL
from .route import Answer, Route

router = APIRouter(tags=["A1111"], route_class=Route, default_response_class=Answer)


@router.get("/options")
def get_options(at: At) -> dict[str, Any]:
    return at.options.all()


@router.post("/options")
def set_options(given: Annotated[dict[str, Any], Body()], at: At) -> None:
    at.options.change(given)


@router.get("/cmd-flags")
def cmd_flags(at: At) -> dict[str, Any]:
    on_cpu = at.service.hardware.device == "cpu"
    return {
        "api": True,
        "api_log": False,
        "nowebui": False,
        "lowvram": False,
        "medvram": False,
        "no_half": False,
        "use_cpu": ["all"] if on_cpu else [],
        "device_id": None,
        "data_dir": None,
        "ckpt": None,
        "ckpt_dir": None,
        "vae_dir": None,
        "lora_dir": None,
        "embeddings_dir": None,
    }


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    return [
        {
            "name": sampler.a1111,
            "aliases": [sampler.name, *sampler.also],
            "options": ({"scheduler": sampler.automatic} if sampler.automatic != AUTOMATIC else {})
            | ({"uses_ensd": "True"} if sampler.noisy else {}),
        }
        for sampler in SAMPLERS.values()
    ]


@router.get("/schedulers")
def schedulers() -> list[dict[str, Any]]:
    return [
        {
            "name": schedule.name,
            "label": schedule.a1111,
            "aliases": None,
            "default_rho": -1.0,
            "need_inner_model": False,
        }
        for schedule in SCHEDULES.values()
    ]


@router.get("/upscalers")
def upscalers(at: At) -> list[dict[str, Any]]:
    plain = [("None", 4.0), *((way.a1111, 4.0) for way in PIXELS.values())]
    known = [*plain, *((a1111_name(item.bare), _scale(item)) for item in at.shelf.items(Kind.UPSCALER))]
    nothing = {"model_name": None, "model_path": None, "model_url": None}
    return [{"name": name, **nothing, "scale": scale} for name, scale in known]


@router.get("/realesrgan-models")
def realesrgan_models(at: At) -> list[dict[str, Any]]:
    items = at.shelf.items(Kind.UPSCALER)
    return [{"name": a1111_name(item.bare), "path": item.name, "scale": int(_scale(item))} for item in items]


def _scale(item: Item) -> float:
    with suppress(TightfitError):  # of one that was changed meanwhile
        return float(read_upscaler(item.path).config["scale"])
    return 1.0


@router.get("/latent-upscale-modes")
def latent_upscale_modes() -> list[dict[str, str]]:
    return [{"name": way.a1111} for way in LATENTS.values()]


@router.get("/sd-models")
def sd_models(at: At) -> list[dict[str, Any]]:
    """hash and sha256 are null where nobody has computed them: that would take seconds for each file."""
    return [
        {
            "title": item.title,
            "model_name": item.model_name,
            "hash": item.short_digest or None,
            "sha256": item.digest or None,
            "filename": item.name,
            "config": None,
        }
        for item in at.shelf.items(Kind.MODEL)
    ]


@router.get("/sd-vae")
def sd_vae(at: At) -> list[dict[str, str]]:
    return [{"model_name": item.name, "filename": item.name} for item in at.shelf.items(Kind.VAE)]


@router.get("/loras")
def loras(at: At) -> list[dict[str, Any]]:
    return [_lora(item) for item in at.shelf.items(Kind.LORA)]


def _lora(item: Item) -> dict[str, Any]:
    """Values of the metadata that are JSON objects are answered as such, as A1111 does."""
    said: dict[str, Any] = {}
    with suppress(TightfitError):
        said = dict(contents(item.path, stamp(item.path))[1])
    for name, value in said.items():
        if value.startswith("{"):
            with suppress(ValueError, RecursionError):
                said[name] = json.loads(value)
    return {"name": item.bare, "alias": item.alias or item.bare, "path": item.name, "metadata": said}


@router.get("/embeddings")
def embeddings(at: At) -> dict[str, Any]:
    """Those for the model that is chosen, and the others."""
    model = _chosen(at)
    sorted_: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for item in at.shelf.items(Kind.EMBEDDING):
        if item.path in BESIDE.values():  # whose words would change prompts that never asked for them
            continue
        with suppress(TightfitError):
            known = read_embedding(item.path)
            tensor = known.tensors[0]
            shape = tensor.shape[-1]
            place = "loaded" if model is None or item.fits(model) else "skipped"
            sorted_[place][known.token] = {
                "step": None,
                "sd_checkpoint": None,
                "sd_checkpoint_name": None,
                "shape": shape,
                "vectors": tensor.count // shape,
            }
    return sorted_


def _chosen(desk: Desk) -> Item | None:
    with suppress(TightfitError):
        return desk.shelf.checkpoint(desk.options.values({})[MODEL])
    return None


@router.get("/prompt-styles")
def prompt_styles(at: At) -> list[dict[str, str]]:
    return [
        {"name": style.name, "prompt": style.prompt, "negative_prompt": style.negative_prompt}
        for style in at.shelf.styles().values()
    ]


@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/extensions")
def none() -> list[Any]:
    """What tightfit has none of."""
    return []


@router.get("/scripts")
def scripts() -> dict[str, list[str]]:
    return {"txt2img": [SCRIPT], "img2img": [SCRIPT]}


@router.get("/script-info")
def script_info() -> list[dict[str, Any]]:
    return [
        {"name": SCRIPT, "is_alwayson": True, "is_img2img": is_img2img, "args": []}
        for is_img2img in (False, True)
    ]


@router.get("/memory")
def memory(service: Served) -> dict[str, Any]:
    total, _ = cpu_memory()
    used = resident()
    return {"ram": {"free": total - used, "used": used, "total": total}, "cuda": _cuda(service)}


def _cuda(service: Any) -> dict[str, Any]:
    if service.hardware.device != "cuda":
        return {"error": "unavailable"}
    import torch

    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()

    def of(kind: str) -> dict[str, int]:
        return {when: stats.get(f"{kind}.all.{when}", 0) for when in ("current", "peak")}

    return {
        "system": {"free": free, "used": total - free, "total": total},
        "active": of("active_bytes"),
        "allocated": of("allocated_bytes"),
        "reserved": of("reserved_bytes"),
        "inactive": of("inactive_split_bytes"),
        "events": {"retries": stats.get("num_alloc_retries", 0), "oom": stats.get("num_ooms", 0)},
    }


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
def refresh(at: At) -> None:
    at.shelf.refresh()


@router.post("/unload-checkpoint")
def unload_checkpoint(service: Served) -> dict[str, Any]:
    """Free what models hold, but for the one that paints now. It is loaded again when it is needed."""
    service.unload()
    return {}


@router.post("/reload-checkpoint")
def reload_checkpoint() -> dict[str, Any]:
    """A model is loaded when a request needs it."""
    return {}
