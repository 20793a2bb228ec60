"""The request inside a PNG: A1111's `parameters` text, which the field's tools read, and the way back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import png
from .adapters import ADAPTERS, Adapter, written
from .adapters.lora import Lora
from .errors import TightfitError
from .fields import kinds
from .files import shortened
from .models.prompt_syntax import matters
from .models.samplers.names import a1111_fields, of_a1111
from .request import PLAIN, Job, Request

# How Windows names shares and devices: to look at a share sends its host the user's credentials.
_REMOTE = re.compile(r"[\\/](?:[\\/]|\?\?)")
_NAME = re.compile(r"\w[\w \-/]*")
_QUOTED = re.compile(r'\s*("[^\\"]*(?:\\.[^\\"]*)*")\s*(?:,|$)')
_SETTINGS = re.compile(r"\s*Steps:\s*\d")
_TOLD = 10, 40  # settings that are not honoured: so many are named, and so many characters of each
_EMPHASES = {"no-norm": "No norm", "ignore": "Ignore"}  # as A1111 names them; "Original" it leaves out
_KINDS = kinds(Request)
_FIELDS = {field.name: field for field in dataclasses.fields(Request) if field.name in PLAIN}
_UNDERSTOOD = {
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Clip skip",
    "Emphasis",
    "Model",
    "Model hash",
    "Version",
}


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a picture says of how it was made: fields of Request, model and precision where it names them, and
    notices."""

    request: Mapping[str, Any]
    model: str | None = None
    precision: str | None = None
    notices: tuple[str, ...] = ()


def write(job: Job, model: str, precision: str) -> str:
    """A job as A1111 would write it. A last field holds it once more as JSON, exact whatever the prompt."""
    exact = {"model": model, "precision": precision, **_told(job)}
    loras = [adapter.a1111() for adapter in job.adapters if isinstance(adapter, Lora)]
    lines = [" ".join([job.prompt, *(words for words, _ in loras)])]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    fields = {
        "Steps": job.num_inference_steps,
        **a1111_fields(job.scheduler),
        "CFG scale": job.guidance_scale,
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        **_asked(job),
        "Model": json.dumps(model) if re.search(r'[,:"\n]', model) else model,
        **({"Lora hashes": json.dumps(", ".join(digest for _, digest in loras))} if loras else {}),
        "Precision": precision,
        "tightfit": json.dumps(json.dumps(exact)),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _told(job: Request) -> dict[str, Any]:
    """Its fields, without that of words that are as they are anyway."""
    fields = job.to_json()
    if not _of_syntax(fields) and job.prompt_syntax == _FIELDS["prompt_syntax"].default:
        del fields["prompt_syntax"]
    return fields


def _of_syntax(fields: Mapping[str, Any]) -> bool:
    texts = (fields.get(name) for name in ("prompt", "negative_prompt"))
    return any(isinstance(text, str) and matters(text) for text in texts)


# A1111's names of options, which it writes, too, only where they are not the default.
_OPTIONS = {
    "noise_source": "RNG",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
    "seed_resize": "Seed resize from",
    "ensd": "ENSD",
    "eta": "Eta",
    "s_churn": "Sigma churn",
    "s_noise": "Sigma noise",
    "clip_skip": "Clip skip",
    "guidance_rescale": "CFG Rescale",
    "guidance_start": "CFG start",
    "guidance_end": "CFG end",
}


def _asked(job: Job) -> dict[str, Any]:
    """What of a job's options is not the default, in A1111's words."""
    options = {name: getattr(job, field) for field, name in _OPTIONS.items() if job.is_written(field)}
    if job.noise_source != "cpu":
        options["RNG"] = job.noise_source.upper()
    if job.eta is not None and job.scheduler.startswith("ddim"):
        options["Eta DDIM"] = options.pop("Eta")
    if job.zero_snr:
        options["Noise Schedule"] = "Zero Terminal SNR"
    if job.emphasis in _EMPHASES:
        options["Emphasis"] = _EMPHASES[job.emphasis]
    return options


def read(picture: Path, given: Collection[str] = ()) -> Carried:
    """What `picture` carries. Raises TightfitError if it is no PNG or says nothing that can be repeated."""
    if not (text := png.read_text(picture, "parameters")):
        raise TightfitError(
            f"{picture} carries no 'parameters' text: only pictures made by tightfit or A1111 can be repeated"
        )
    return parse(text, str(picture), given)


def parse(text: str, source: str, given: Collection[str] = ()) -> Carried:
    """What `write` wrote, or what A1111 wrote: prompt, negative prompt, and a line of settings, the last that
    looks like one.

    Extensions of A1111 write below it: Dynamic Prompts a template. Takes time in proportion to the text.
    """
    if len(text) > png.MAX_TEXT_BYTES:
        raise TightfitError(
            f"the 'parameters' text of {source} has {len(text)} characters, too many to be a request"
        )
    lines = text.rstrip().split("\n")
    place = next((i for i in reversed(range(len(lines))) if _SETTINGS.match(lines[i])), len(lines) - 1)
    prompt, fields = lines[:place], {name: _unquoted(value) for name, value in _pairs(lines[place])}
    if "tightfit" in fields:
        return _exact(fields["tightfit"], source, given)
    if "Steps" not in fields:
        raise TightfitError(
            f"the 'parameters' text of {source} has no line of settings: it cannot be repeated"
        )
    positive, _, negative = "\n".join(["", *prompt]).partition("\nNegative prompt:")
    # A1111 writes no empty negative prompt, and zeroes SDXL's conditioning for it (its
    # modules/sd_models_xl.py): here that is None.
    request = {
        "prompt": positive.strip(),
        "negative_prompt": negative.strip() or None,
        **_a1111(fields, source),
    }
    return Carried(request, notices=_differences(fields))


def _exact(text: str, source: str, given: Collection[str]) -> Carried:
    """The JSON that some version of tightfit wrote. A field that is not in it has its default, as Request
    says.

    A field that Request does not have is noted. Null is not: nothing was asked.
    """
    try:
        exact = json.loads(text)
    except (ValueError, RecursionError):
        exact = None
    if not isinstance(exact, dict) or not all(
        isinstance(exact.get(name), str) for name in ("model", "precision", "prompt")
    ):
        raise TightfitError(f"the request inside {source} is damaged: it cannot be repeated")
    model, precision = exact.pop("model"), exact.pop("precision")
    request = {name: value for name, value in exact.items() if name in _FIELDS}
    if "prompt_syntax" not in request and _of_syntax(request):
        request["prompt_syntax"] = "plain"  # as tightfit 0.1.0 painted it
    if wrong := [name for name, value in request.items() if not _fits(name, value)]:
        raise TightfitError(
            f"the request inside {source} is damaged, in its {wrong[0]}: it cannot be repeated"
        )
    named = exact.pop("adapters", None) or {}
    if not isinstance(named, dict) or not all(map(_texts, named.values())):
        raise TightfitError(f"the request inside {source} is damaged, in its adapters: it cannot be repeated")
    if adapters := _adapters({key: named[key] for key in named if key not in given}, source):
        request["adapters"] = adapters
    options = {kind.option for kind in ADAPTERS}
    exact |= {option: ", ".join(names) for option, names in named.items() if option not in options}
    unknown = {name: value for name, value in exact.items() if name not in _FIELDS and value is not None}
    if not unknown:
        return Carried(request, model, precision)
    notice = (
        f"another version of tightfit painted {source}, so the picture may differ; not honoured: "
        f"{_named(unknown)}"
    )
    return Carried(request, model, precision, (notice,))


def _texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _adapters(named: Mapping[str, list[str]], source: str) -> tuple[Adapter, ...]:
    """Those that a picture names. Raises TightfitError for one that is not there any more, or that a stranger
    might have put there for us to look at."""
    try:
        if remote := next((name for names in named.values() for name in names if _REMOTE.match(name)), None):
            raise TightfitError(f"{shortened(remote)} is on another machine, or a device")
        return written(named)
    except TightfitError as error:
        said = " and ".join(f"--{option}" for option in named)
        raise TightfitError(
            f"{source} was painted with an adapter that is not where it was ({error}): "
            f"give all of that kind anew, by {said}"
        ) from None


def _fits(name: str, value: Any) -> bool:
    """Whether JSON has `value` for a field of that name; a whole number is also a float."""
    if value is None:
        return _FIELDS[name].default is None
    kind = _KINDS[name]
    return isinstance(value, (float, int) if kind is float else kind) and isinstance(value, bool) is (
        kind is bool
    )


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values of "name: value, name: "quoted, value"", as A1111's regular expression finds them, but
    in one pass."""
    place = 0
    while (colon := line.find(":", place)) >= 0:
        comma = line.rfind(",", place, colon)
        name = line[max(place, comma + 1) : colon].strip()
        if quoted := _QUOTED.match(line, colon + 1):
            value, place = quoted[1], quoted.end()
        else:
            end = line.find(",", colon + 1)
            end = len(line) if end < 0 else end
            value, place = line[colon + 1 : end].strip(), end + 1
        if _NAME.fullmatch(name):
            yield name, value


def _a1111(fields: Mapping[str, str], source: str) -> dict[str, Any]:
    """A1111's settings as Request fields. A sampler tightfit has not stays as it is called there, and is
    refused later."""
    emphases = {theirs: name for name, theirs in _EMPHASES.items()}
    try:
        width, height = fields["Size"].split("x")
        return {
            "num_inference_steps": int(fields["Steps"]),
            "scheduler": of_a1111(fields.get("Sampler", ""), fields.get("Schedule type", "Automatic")),
            "guidance_scale": float(fields["CFG scale"]),
            "seed": int(fields["Seed"]),
            "width": int(width),
            "height": int(height),
            **({"clip_skip": int(fields["Clip skip"])} if "Clip skip" in fields else {}),
            **({"emphasis": ours} if (ours := emphases.get(fields.get("Emphasis", ""))) else {}),
        }
    except (KeyError, ValueError):
        raise TightfitError(
            f"the settings inside {source} are damaged: give the request by options instead"
        ) from None


def _differences(fields: Mapping[str, str]) -> tuple[str, ...]:
    """What of an A1111 picture's settings is not honoured here, in one notice; and that the noise differs."""
    left = {name: value for name, value in fields.items() if name not in _UNDERSTOOD}
    honoured = f"; not honoured: {_named(left)}" if left else ""
    return (f"A1111 draws its noise on the GPU unless told otherwise, so the picture may differ{honoured}",)


def _named(settings: Mapping[str, Any]) -> str:
    """The first settings of a text that somebody else wrote, each cut, and how many are left."""
    most, letters = _TOLD
    names = [f"{name} {value}"[:letters] for name, value in settings.items()]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
