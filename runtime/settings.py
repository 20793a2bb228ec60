"""A1111's names for the fields of a request, both ways: the line below the prompt in a picture's text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conditions.handed import WAYS, way_of
from .errors import TightfitError
from .fields import described
from .kept import Hashes
from .models.samplers.names import OWN, a1111_fields, of_a1111, schedule_of, split
from .models.schedulers import Tuning, draws
from .models.upscalers import a1111_name
from .request import PLAIN, SKIPPING, Request

_CHEAP_BYTES = 2**26  # hashed in a tenth of a second, where the hash of a model is not known
DIGITS = 10  # of a model's hash, as A1111 shows it


def whole(text: str) -> int:
    """A whole number, also as JSON of other programs has it: 20.0. Raises ValueError."""
    try:
        number = int(text)
    except ValueError:
        if not float(text).is_integer():
            raise ValueError(f"{text[:20]} is no whole number") from None
        number = int(float(text))
    if abs(number) >= 2**64:
        raise ValueError("a number of more than 64 bits")
    return number


@dataclass(frozen=True)
class Setting:
    """A field of Request by A1111's name, and the way from its text and back."""

    name: str
    field: str
    read: Callable[[str], Any]
    write: Callable[[Any], str] = str

    def means(self, text: str) -> bool:
        """Whether the text is a value of the field. Without these there is no request, so they are read
        anyway: _ALWAYS."""
        words = _ABOUT[self.field].choices
        try:
            return self.name in _ALWAYS or self.read(text) in words or not words
        except ValueError:
            return False


def _emphasis(name: str) -> str:
    return name.replace("-", " ").capitalize()


def _size(text: str) -> str:
    """As A1111 has it, without a side of 0, which would follow from the other."""
    width, height = map(whole, text.split("x"))
    if min(width, height) < 1:
        raise ValueError(f"{text[:20]} is no size")
    return f"{width}x{height}"


def _layers(text: str) -> str:
    """Of stable-diffusion.cpp's "[7, 8, 9, ]" there is "[7" here, and its scale is that of all guidance."""
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text):
        raise ValueError(f"{text[:20]} are no layers")
    return text


def _strength(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise ValueError(f"{text[:20]} is no strength")
    return number


def _way(text: str) -> str:
    if (way := way_of(text)) is None:  # a network's name, which is looked for in folders of models
        raise ValueError(f"{text[:20]} is no way to enlarge")
    return way


def _network(file: str) -> str:
    return a1111_name(Path(file).stem)


_ZERO_SNR = "Zero Terminal SNR"
UPSCALER = "Hires upscaler"
# From A1111's `infotext` options (its modules/shared_options.py, processing.py).
SETTINGS = (
    Setting("Steps", "num_inference_steps", whole),
    Setting("CFG scale", "guidance_scale", float),
    Setting("Seed", "seed", whole),
    Setting("Clip skip", "clip_skip", lambda text: max(1, whole(text))),
    Setting("Prompt syntax", "prompt_syntax", str),
    Setting("RNG", "noise_source", str.lower, str.upper),
    Setting("ENSD", "ensd", whole),
    Setting("Variation seed", "subseed", whole),
    Setting("Variation seed strength", "subseed_strength", float),
    Setting("Seed resize from", "seed_resize", str),
    Setting("Eta", "eta", float),
    Setting("Eta DDIM", "eta", float),
    Setting("Sigma churn", "s_churn", float),
    Setting("Sigma noise", "s_noise", float),
    Setting("Emphasis", "emphasis", lambda text: text.lower().replace(" ", "-"), _emphasis),
    Setting("Noise Schedule", "zero_snr", _ZERO_SNR.__eq__, lambda zero: _ZERO_SNR if zero else "Default"),
    Setting("Skip Early CFG", "guidance_start", float),
    Setting("CFG end", "guidance_end", float),
    Setting("CFG rescale", "guidance_rescale", float),
    Setting("Skip layers", "skip_guidance_layers", _layers),
    Setting("Skip layer scale", "skip_layer_guidance_scale", float),
    Setting("Skip layer start", "skip_layer_guidance_start", float),
    Setting("Skip layer end", "skip_layer_guidance_stop", float),
    Setting("Step cache", "step_cache", whole),
    Setting("Hires upscale", "hires", float, "{:g}".format),
    Setting("Hires resize", "hires_size", _size),
    Setting("Hires steps", "hires_steps", whole),
    Setting(UPSCALER, "hires_upscaler", _way, lambda way: WAYS[way].a1111 if way in WAYS else _network(way)),
    Setting("Denoising strength", "hires_strength", _strength, "{:g}".format),
    Setting("Hires prompt", "hires_prompt", str),
    Setting("Refiner switch at", "refiner_start", float, "{:g}".format),
)
_HIRES_SIZES = ("Hires upscale", "Hires resize")  # one of which is in every picture of two such passes
_SAMPLER = {"Sampler": "Hires sampler", "Schedule type": "Hires schedule type"}
_ABOUT = described(Request)
_FIELDS = {field.name: field for field in dataclasses.fields(Request) if field.name in PLAIN}
_TUNING = "eta", "s_churn", "s_noise"
_MAY_BE_IDLE = (
    *_TUNING, "ensd", "subseed", "guidance_start", "guidance_end", "guidance_rescale", "refiner_start",
    "skip_guidance_layers", *SKIPPING,
)  # fmt: skip
_ALWAYS = ("Steps", "CFG scale", "Seed")
_OF_PASSES = {"hires_upscaler": "hires", "hires_strength": "hires", "refiner_start": "refiner"}
"""What is said wherever there is a second pass, whatever it is."""
RNG = "RNG"
"""Where the noise is drawn: A1111 says nothing for the GPU."""


def said(job: Request) -> dict[str, str]:
    """A request in A1111's words, but for its texts, sampler, size and model. What has its default is left
    out, and what A1111 says by saying nothing is empty."""
    other = _other_eta(job.scheduler)
    named: dict[str, str] = {}
    second = {"hires": job.hires or job.hires_size, "refiner": job.refiner}
    for setting in SETTINGS:
        value, default = getattr(job, setting.field), _FIELDS[setting.field].default
        always = setting.name in _ALWAYS or second.get(_OF_PASSES.get(setting.field, ""))
        if setting.name != other and (always or value not in (None, default)):
            named[setting.name] = setting.write(value)
    if job.hires_scheduler:
        named |= {_SAMPLER[name]: value for name, value in a1111_fields(job.hires_scheduler).items()}
    named[RNG] = "" if job.noise_source == "gpu" else job.noise_source.upper()
    return named


def understood(settings: Mapping[str, str], of_a1111s: bool) -> dict[str, Any]:
    """Fields of Request that these say. Where they are A1111's own, a schedule that is not said is the one
    that A1111 takes; elsewhere it is the sampler's. Raises KeyError or ValueError for what says none."""
    sampler, fields = settings.get("Sampler"), {}
    if sampler:  # one that tightfit does not have is refused later
        fields["scheduler"] = of_a1111(sampler, _schedule(settings), of_a1111s)
    other = _other_eta(fields.get("scheduler"))
    fields |= {
        setting.field: setting.read(settings[setting.name])
        for setting in _read(settings)
        if setting.name != other and setting.means(settings[setting.name])
    }
    fields |= _of_second_pass(settings, of_a1111s)
    if "Size" in settings:
        width, height = settings["Size"].split("x")
        fields |= {"width": whole(width), "height": whole(height)}
    if "seed_resize" in fields:  # A1111 rounds it so
        sides = (whole(side) // 8 * 8 for side in fields["seed_resize"].split("x"))
        fields["seed_resize"] = "x".join(map(str, sides))
    return fields


def is_second_pass(settings: Mapping[str, str]) -> bool:
    """Whether they say how much larger a picture is painted again."""
    return any(name in settings for name in _HIRES_SIZES)


def _read(settings: Mapping[str, str]) -> list[Setting]:
    """Those of SETTINGS that are said. A strength without a larger size is of a picture painted over."""
    larger = is_second_pass(settings)
    named = [setting for setting in SETTINGS if setting.name in settings]
    return [setting for setting in named if larger or not setting.field.startswith("hires")]


def _of_second_pass(settings: Mapping[str, str], of_a1111s: bool) -> dict[str, str]:
    """What is no single setting of it. In place of an upscaler that is not here pixels are resized."""
    if not is_second_pass(settings):
        return {}
    upscaler = next(setting for setting in SETTINGS if setting.field == "hires_upscaler")
    fields = {} if upscaler.means(settings.get(upscaler.name, "Latent")) else {upscaler.field: "lanczos"}
    if sampler := settings.get(_SAMPLER["Sampler"]):
        schedule = settings.get(_SAMPLER["Schedule type"], "Automatic")
        fields["hires_scheduler"] = of_a1111(sampler, schedule, of_a1111s)
    return fields


def _other_eta(scheduler: str | None) -> str:
    """A1111 has one for DDIM, and one for all other samplers: the name that does not count."""
    return "Eta" if scheduler and scheduler.startswith("ddim") else "Eta DDIM"


def idle(fields: Mapping[str, Any]) -> list[str]:
    """Fields of a request that would change nothing beside the others, for which `resolve` would refuse it.
    Those that other programs write into every picture are left out by this; what a person typed is not."""
    asked = [name for name in _MAY_BE_IDLE if fields.get(name) not in (None, _FIELDS[name].default)]
    share, scale = fields.get("subseed_strength"), fields.get("guidance_scale")
    begin, end = (fields.get(name, _FIELDS[name].default) for name in ("guidance_start", "guidance_end"))
    unguided = (scale is not None and scale <= 1) or begin >= end
    found = [name for name in asked if name == "subseed" and not share]
    found += [name for name in asked if name.startswith("guidance_") and unguided]
    skips = not unguided and fields.get("skip_guidance_layers")
    found += [name for name in asked if name.startswith("skip_") and not skips]
    found += [name for name in asked if name == "refiner_start" and not fields.get("refiner")]
    try:
        sampler, _ = split(fields.get("scheduler") or OWN)
    except TightfitError:  # which `resolve` says
        return found
    if sampler.name == OWN:
        return found
    taken = {name: fields[name] for name in _TUNING if name in asked and name in sampler.takes}
    if "s_churn" in sampler.takes and "s_churn" not in taken:  # whose strength it is
        taken.pop("s_noise", None)
    found += [name for name in asked if name in _TUNING and name not in taken]
    return found + [name for name in asked if name == "ensd" and not draws(sampler, Tuning(**taken))]


def honoured(settings: Mapping[str, str]) -> set[str]:
    """The names that `understood` makes fields of."""
    named = {known.name for known in _read(settings) if known.means(settings[known.name])}
    named |= set(_SAMPLER.values()) if is_second_pass(settings) else set()
    schedule = {"Schedule type"} if settings.get("Schedule type") in (None, _schedule(settings)) else set()
    return {"Size", "Sampler", *schedule, *named}


def _schedule(settings: Mapping[str, str]) -> str:
    """The schedule that is named, "Automatic" for one that the sampler does not take. Beside a sampler that
    tightfit does not have it stays."""
    named = settings.get("Schedule type", "Automatic")
    try:
        sampler, _ = split(settings.get("Sampler", ""))
    except TightfitError:
        return named
    with suppress(TightfitError):
        if sampler.name == OWN or schedule_of(named) in sampler.schedules:
            return named
    return "Automatic"


def model_hash(model: str) -> str:
    """The first digits of `file_hash`, as A1111 shows them."""
    return file_hash(model)[:DIGITS]


def file_hash(model: str) -> str:
    """The SHA-256 of the file that a model is, '' where it is none, or where that would take seconds:
    `tightfit models --hash` computes each once."""
    path = Path(model)
    try:
        status = path.stat() if path.is_absolute() else None
    except (OSError, ValueError):
        status = None
    if status is None or not path.is_file():
        return ""
    hashes = Hashes()
    return hashes.compute(path) if status.st_size <= _CHEAP_BYTES else hashes.get(path)
