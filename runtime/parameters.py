"""The request inside a PNG: A1111's `parameters` text, which the field's tools read, and the way back."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TightfitError, first_line
from .files import replacing
from .request import Request
from .schedulers import SCHEDULERS

if TYPE_CHECKING:
    from PIL import Image

_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NAMES = tuple(field.name for field in dataclasses.fields(Request))
_UNDERSTOOD = {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash", "Version"}


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a picture says of how it was made: fields of Request, model and precision where it names them, and notices."""

    request: Mapping[str, Any]
    model: str | None = None
    precision: str | None = None
    notices: tuple[str, ...] = ()


def write(request: Request, model: str, precision: str) -> str:
    """A resolved request as A1111 would write it. A last field holds it once more as JSON, exact whatever the prompt."""
    exact = {"model": model, "precision": precision, **dataclasses.asdict(request)}
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    fields = {
        "Steps": request.num_inference_steps,
        "Sampler": SCHEDULERS[str(request.scheduler)].a1111,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": json.dumps(model) if re.search(r'[,:"\n]', model) else model,
        "Precision": precision,
        "tightfit": json.dumps(json.dumps(exact)),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def read(picture: Path) -> Carried:
    """What `picture` carries. Raises TightfitError if it is no picture or says nothing that can be repeated."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture) as image:
                text = image.info.get("parameters")
    except FileNotFoundError:
        raise TightfitError(f"{picture} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise TightfitError(f"{picture} is not a picture that can be read ({first_line(error)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TightfitError(f"{picture} is too large to be a picture made by tightfit or A1111") from None
    if not isinstance(text, str) or not text:
        raise TightfitError(f"{picture} carries no 'parameters' text: only pictures made by tightfit or A1111 can be repeated")
    return parse(text, str(picture))


def parse(text: str, source: str) -> Carried:
    """What `write` wrote, or what A1111 wrote: prompt, negative prompt, and the fields of the last line."""
    *prompt, last = text.rstrip().split("\n")
    fields = {name: _unquoted(value.strip()) for name, value in _PAIR.findall(last)}
    if "tightfit" in fields:
        try:
            exact = json.loads(fields["tightfit"])
            carried = Carried({name: exact[name] for name in _NAMES}, exact["model"], exact["precision"])
        except (ValueError, KeyError, TypeError):
            carried = Carried({})
        if not isinstance(carried.model, str) or not isinstance(carried.precision, str):
            raise TightfitError(f"the request inside {source} is damaged: it cannot be repeated")
        return carried
    if "Steps" not in fields:
        raise TightfitError(f"the 'parameters' text of {source} has no line of settings: it cannot be repeated")
    positive, _, negative = "\n".join(["", *prompt]).partition("\nNegative prompt:")
    request = {"prompt": positive.strip(), "negative_prompt": negative.strip(), **_a1111(fields, source)}
    return Carried(request, notices=_differences(positive + negative, fields))


def _a1111(fields: Mapping[str, str], source: str) -> dict[str, Any]:
    """A1111's settings as Request fields. A sampler tightfit has not stays as it is called there, and is refused later."""
    sampler, kind = fields.get("Sampler", ""), fields.get("Schedule type", "Automatic")
    if kind == "Automatic":  # as A1111 resolves it
        kind = "Karras" if sampler == "DPM++ 2M" else ""
    shown = f"{sampler} {kind}".strip()
    names = {scheduler.a1111: name for name, scheduler in SCHEDULERS.items()}
    try:
        width, height = fields["Size"].split("x")
        return {
            "num_inference_steps": int(fields["Steps"]),
            "scheduler": names.get(shown, shown),
            "guidance_scale": float(fields["CFG scale"]),
            "seed": int(fields["Seed"]),
            "width": int(width),
            "height": int(height),
        }
    except (KeyError, ValueError):
        raise TightfitError(f"the settings inside {source} are damaged: give the request by options instead") from None


def _differences(prompt: str, fields: Mapping[str, str]) -> tuple[str, ...]:
    """What of an A1111 picture is not honoured here, in one notice; and that the noise differs."""
    left = [f"{name} {value}" for name, value in fields.items() if name not in _UNDERSTOOD]
    if re.search(r"<\w+:|\([^()]*:[\d.]+\)", prompt):
        left.append("weights and adapters in the prompt")
    honoured = f"; not honoured: {', '.join(left)}" if left else ""
    return (f"A1111 draws its noise on the GPU unless told otherwise, so the picture may differ{honoured}",)


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

    if not hasattr(image, "save"):
        raise TightfitError(f"save takes one picture, not a {type(image).__name__}: call it for each")
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise TightfitError(f"{path} does not end in .png: pictures are written as PNG, which carries their request")
    text = PngInfo()
    if "parameters" in image.info:
        text.add_text("parameters", image.info["parameters"])
    try:
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=text)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise TightfitError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return path
