"""The request inside a PNG: A1111's `parameters` text, which the field's tools read, and the way back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import TightfitError
from .request import Request

if TYPE_CHECKING:
    from PIL import Image

SAMPLERS = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "lcm": "LCM",
}
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write(request: Request, model: str, precision: str) -> str:
    """A resolved request as A1111 would write it. A last field holds it once more as JSON, exact whatever the prompt."""
    exact = {"model": model, "precision": precision, **dataclasses.asdict(request)}
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    fields = {
        "Steps": request.num_inference_steps,
        "Sampler": SAMPLERS[str(request.scheduler)],
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": _quoted(model),
        "Precision": precision,
        "tightfit": json.dumps(json.dumps(exact)),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def read(picture: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The request fields, `model` and `precision` that made `picture`; those A1111 wrote where tightfit did not.

    A sampler that tightfit has not is no error if `given` names another scheduler.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            image.load()  # text may follow the pixels
            text = image.info.get("parameters")
    except FileNotFoundError:
        raise TightfitError(f"{picture} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise TightfitError(f"{picture} is not a picture that can be read") from None
    if not text:
        raise TightfitError(f"{picture} carries no 'parameters' text: only pictures made by tightfit or A1111 can be repeated")
    return parse(text, str(picture), given)


def parse(text: str, source: str, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What `write` wrote, or what A1111 wrote: prompt, negative prompt, and the fields of the last line."""
    *prompt, last = text.strip().split("\n")
    fields = {name: _unquoted(value.strip()) for name, value in _PAIR.findall(last)}
    if "tightfit" in fields:
        try:
            exact = json.loads(fields["tightfit"])
            return {name: exact[name] for name in ("model", "precision", *_NAMES)}
        except (ValueError, KeyError, TypeError):
            raise TightfitError(f"the request inside {source} is damaged: it cannot be repeated") from None
    if "Steps" not in fields:
        raise TightfitError(f"the 'parameters' text of {source} has no line of settings: it cannot be repeated")
    positive, _, negative = "\n".join(prompt).partition("\nNegative prompt:")
    return {"prompt": positive.strip(), "negative_prompt": negative.strip(), **_a1111(fields, source, given)}


_NAMES = tuple(field.name for field in dataclasses.fields(Request))


def _a1111(fields: Mapping[str, str], source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    sampler = fields.get("Sampler", "")
    if fields.get("Schedule type", "Automatic") not in ("Automatic", ""):
        sampler = f"{sampler} {fields['Schedule type']}"
    names = {shown: name for name, shown in SAMPLERS.items()}
    if sampler not in names and "scheduler" not in given:
        raise TightfitError(f"{source} was made with sampler '{sampler}', which tightfit has not: name one with --scheduler")
    try:
        width, height = fields["Size"].split("x")
        return {
            "num_inference_steps": int(fields["Steps"]),
            "scheduler": names.get(sampler),
            "guidance_scale": float(fields["CFG scale"]),
            "seed": int(fields["Seed"]),
            "width": int(width),
            "height": int(height),
            "model": None,
        }
    except (KeyError, ValueError):
        raise TightfitError(f"the settings inside {source} are damaged: give the request by options instead") from None


def _quoted(value: str) -> str:
    return json.dumps(value) if re.search(r'[,:"\n]', value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def save(image: Image.Image, path: str | Path) -> Path:
    """Write `image` as a PNG with its `parameters`, through a temporary sibling, so that no half picture is ever seen.

    Raises TightfitError if `path` does not end in .png or cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise TightfitError(f"{path} does not end in .png: pictures are written as PNG, which carries their request")
    text = PngInfo()
    if "parameters" in image.info:
        text.add_text("parameters", image.info["parameters"])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=text)
        partial.replace(path)
    except OSError as error:
        raise TightfitError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path
