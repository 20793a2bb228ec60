"""ControlNet's extension of A1111: its units in a request, and its own endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body
from PIL import Image

from ...conditions.controlnet import DEFAULT, MODES, MODULES, RESIZE_MODES, titled
from ...conditions.preprocess import PREPROCESSORS
from ...errors import TightfitError
from ...files import shortened
from ...models.families.controlnet import MOST
from ...models.layouts.library import Kind
from ..served import base64_of
from .desk import At, Desk
from .lists import Shelf, without_hash
from .route import LOG, Answer, Route, Texts

router = APIRouter(prefix="/controlnet", tags=["A1111"], route_class=Route, default_response_class=Answer)
SCRIPT = "controlnet"
_VERSION = 3  # of the extension's API
# Its names of kinds of control, for which a preprocessor is meant.
_TYPES = {
    "none": ("InstructP2P",),
    "canny": ("Canny",),
    "soft": ("SoftEdge",),
    "invert": ("Canny", "Lineart", "MLSD", "Scribble"),
    "tile": ("Tile",),
    "luminance": ("Recolor",),
}
_NO_MODEL = ("None", "none", "", None, DEFAULT)
_ALSO = {"guidance": "guidance_end", "input_image": "image", "mask_image": "mask", "lowvram": "low_vram"}
"""Older names of fields."""
_INNER, _OUTER = "crop", "fill"
_FITS = {
    **{name.lower(): ours for ours, name in RESIZE_MODES.items()},
    "inner fit (scale to fit)": _INNER,
    "scale to fit (inner fit)": _INNER,
    "outer fit (shrink to fit)": _OUTER,
    "envelope (outer fit)": _OUTER,
}
_MODES = {mode.a1111.lower(): ours for ours, mode in [*MODES.items()][::-1]}  # the first of a name counts
_NUMBERED = {"resize_mode": ("resize", "crop", "fill"), "control_mode": ("balanced", "prompt", "control")}
# What no network here reads: refused unless empty.
_UNKNOWN = ("mask", "advanced_weighting", "effective_region_mask", "ipadapter_input", "batch_images")
_UNHEARD = {"processor_res": -1, "threshold_a": -1, "threshold_b": -1}


def controls(units: Any, begins_with: Image.Image | None, is_hires: bool, desk: Desk) -> dict[str, Any]:
    """Our options for a list of units. `begins_with`: the picture of a unit without one. Raises
    TightfitError."""
    if not isinstance(units, list):
        raise TightfitError("alwayson_scripts.controlnet.args must be a list of units")
    on = [unit for one in units if (unit := _on(one))]
    if len(on) > MOST:
        raise TightfitError(f"{len(on)} units of ControlNet are on, and {MOST} are taken: turn some off")
    asked = [_asked(unit, begins_with, is_hires, desk) for unit in on]
    options = {name: [unit[name] for unit in asked] for name in (asked[0] if asked else ())}
    return {name: values for name, values in options.items() if any(value is not None for value in values)}


def _on(given: Any) -> dict[Any, Any]:
    """A unit by the names of its fields today, nothing of one that is off."""
    if not isinstance(given, Mapping):
        raise TightfitError(f"a unit of ControlNet is an object, not {shortened(given)}")
    unit = {_ALSO.get(name, name): value for name, value in given.items() if value is not None}
    return unit if unit.get("enabled", bool(unit.get("image"))) else {}


def _asked(
    unit: Mapping[Any, Any], begins_with: Image.Image | None, is_hires: bool, desk: Desk
) -> dict[str, Any]:
    """Our options for one that is on."""
    image, mask = _picture(unit.get("image"))
    for name in _UNKNOWN:
        if mask or unit.get(name):
            raise TightfitError(f"{name} of a unit of ControlNet is not taken here: leave it out")
    if is_hires and unit.get("hr_option", "Both") not in ("Both", "HiResFixOption.BOTH"):
        raise TightfitError("hr_option of a unit of ControlNet is Both here: leave it out")
    if unheard := [name for name, default in _UNHEARD.items() if unit.get(name, default) != default]:
        LOG.info("not honoured of a unit of ControlNet: %s", ", ".join(unheard))
    if image is None and begins_with is None:
        raise TightfitError("a unit of ControlNet has no image: give one in base64, or turn the unit off")
    guesses = unit.get("guessmode", unit.get("guess_mode"))
    return {
        "control_image": begins_with if image is None else desk.picture(image, "image of a unit"),
        "controlnet": _model(unit.get("model")),
        "controlnet_conditioning_scale": unit.get("weight", 1.0),
        "control_guidance_start": unit.get("guidance_start", 0.0),
        "control_guidance_end": unit.get("guidance_end", 1.0),
        "control_mode": _word("control_mode", unit.get("control_mode", 2 if guesses else 0), _MODES),
        "control_preprocess": preprocessor(unit.get("module")),
        "control_resize": _word("resize_mode", unit.get("resize_mode", 1), _FITS),
    }


def _picture(image: Any) -> tuple[Any, Any]:
    """Base64 of a unit's picture and mask: alone, as a pair, or as an object of both."""
    if isinstance(image, list) and len(image) == 2 and not isinstance(image[0], Mapping):
        return image[0], image[1]
    if isinstance(image, list) and image:
        if len(image) > 1:
            raise TightfitError("a unit of ControlNet takes one image: give a unit for each")
        image = image[0]
    if isinstance(image, Mapping):
        return image.get("image") or None, image.get("mask")
    return image or None, None


def _model(name: Any) -> str | None:
    if not isinstance(name, str | None):
        raise TightfitError(f"model of a unit of ControlNet is a name, not {shortened(name)}")
    return None if name in _NO_MODEL else without_hash(name or "")


def _word(name: str, value: Any, known: Mapping[str, str]) -> str:
    """Ours for A1111's, by its name or number."""
    numbered = _NUMBERED[name]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(numbered):
        return numbered[value]
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    raise TightfitError(f"{name} of a unit of ControlNet must be one of {', '.join(known)}")


def preprocessor(module: Any) -> str:
    """Ours for a module. Raises TightfitError for one that there is not."""
    if module is None:
        return "none"
    for ours in PREPROCESSORS:
        if isinstance(module, str) and module.lower() in (ours, _module(ours), _label(ours).lower()):
            return ours
    names = ", ".join(map(_module, PREPROCESSORS))
    raise TightfitError(f"module {shortened(module)} is not available: choose {names}")


def _label(ours: str) -> str:
    return MODULES.get(ours, ours)


def _module(ours: str) -> str:
    """The name, of which the label says more in parentheses."""
    return _label(ours).split(" (")[0]


def models(shelf: Shelf) -> list[str]:
    """ControlNets by their titles, and the model's own."""
    return [DEFAULT, *(titled(item.path) for item in shelf.items(Kind.CONTROLNET))]


@router.get("/version")
def version() -> dict[str, int]:
    return {"version": _VERSION}


@router.get("/model_list")
def model_list(at: At, update: bool = True) -> dict[str, list[str]]:
    if update:
        at.shelf.refresh()
    return {"model_list": models(at.shelf)}


@router.get("/module_list")
def module_list(alias_names: bool = False) -> dict[str, Any]:
    names = [*map(_label if alias_names else _module, PREPROCESSORS)]
    return {
        "module_list": names,
        "module_detail": {name: {"model_free": False, "sliders": []} for name in names},
    }


@router.get("/control_types")
def control_types(at: At) -> dict[str, Any]:
    every, kinds = models(at.shelf), sorted({kind for named in _TYPES.values() for kind in named})
    types = {"All": ([*PREPROCESSORS], every)}
    for kind in kinds:
        modules = [ours for ours in PREPROCESSORS if ours == "none" or kind in _TYPES.get(ours, ())]
        types[kind] = modules, [name for name in every if name == DEFAULT or kind.lower() in name.lower()]
    return {
        "control_types": {
            kind: {
                "module_list": [*map(_label, modules)],
                "model_list": ["None", *named],
                "default_option": _label(modules[min(1, len(modules) - 1)] if kind != "All" else "none"),
                "default_model": named[-1] if kind != "All" and len(named) > 1 else "None",
            }
            for kind, (modules, named) in types.items()
        }
    }


@router.get("/settings")
def settings() -> dict[str, int]:
    return {"control_net_unit_count": MOST}


@router.post("/detect")
def detect(
    at: At,
    controlnet_module: Annotated[str, Body()] = "none",
    controlnet_input_images: Annotated[Texts | None, Body()] = None,
    controlnet_images: Annotated[Texts | None, Body()] = None,
) -> dict[str, Any]:
    """`controlnet_images` is what webuiapi calls the pictures. Thresholds and the resolution are not
    honoured: maps are of the picture's size."""
    ours = preprocessor(controlnet_module)
    given = controlnet_input_images or controlnet_images
    if not given:
        raise TightfitError("No image selected: give controlnet_input_images, a list of pictures in base64")
    at.service.limits.check_counts(images=len(given))
    return {"images": [_detected(text, ours, at) for text in given], "info": "Success"}


def _detected(text: str, ours: str, desk: Desk) -> str:
    import numpy as np

    image = desk.picture(text, "controlnet_input_images").convert("RGB")
    return base64_of(Image.fromarray(np.ascontiguousarray(PREPROCESSORS[ours](np.asarray(image)))))
