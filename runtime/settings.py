"""A1111's names for the fields of a request, both ways: the line below the prompt in a picture's text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fields import described
from .kept import Hashes
from .models.samplers.names import of_a1111
from .request import PLAIN, Request

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


_ZERO_SNR = "Zero Terminal SNR"
# From A1111's `infotext` options (its modules/shared_options.py, processing.py).
SETTINGS = (
    Setting("Steps", "num_inference_steps", whole),
    Setting("CFG scale", "guidance_scale", float),
    Setting("Seed", "seed", whole),
    Setting("Clip skip", "clip_skip", whole),
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
)
_ABOUT = described(Request)
_FIELDS = {field.name: field for field in dataclasses.fields(Request) if field.name in PLAIN}
_ALWAYS = ("Steps", "CFG scale", "Seed")
RNG = "RNG"
"""Where the noise is drawn: A1111 says nothing for the GPU."""


def said(job: Request) -> dict[str, str]:
    """A request in A1111's words, but for its texts, sampler, size and model. What has its default is left
    out."""
    other = "Eta" if job.scheduler and job.scheduler.startswith("ddim") else "Eta DDIM"
    named: dict[str, str] = {}
    for setting in SETTINGS:
        value, default = getattr(job, setting.field), _FIELDS[setting.field].default
        if setting.name != other and (setting.name in _ALWAYS or value not in (None, default)):
            named[setting.name] = setting.write(value)
    return {**named, RNG: job.noise_source.upper()} if job.noise_source != "gpu" else _without(named, RNG)


def _without(named: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in named.items() if key != name}


def understood(settings: Mapping[str, str], of_a1111s: bool) -> dict[str, Any]:
    """Fields of Request that these say. Where they are A1111's own, a schedule that is not said is the one
    that A1111 takes; elsewhere it is the sampler's. Raises KeyError or ValueError for what says none."""
    fields = {
        setting.field: setting.read(settings[setting.name])
        for setting in SETTINGS
        if setting.name in settings and setting.means(settings[setting.name])
    }
    if "Size" in settings:
        width, height = settings["Size"].split("x")
        fields |= {"width": whole(width), "height": whole(height)}
    if sampler := settings.get("Sampler"):  # one that tightfit does not have is refused later
        fields["scheduler"] = of_a1111(sampler, settings.get("Schedule type", "Automatic"), of_a1111s)
    return fields


def honoured(settings: Mapping[str, str]) -> set[str]:
    """The names that `understood` makes fields of."""
    named = {known.name for known in SETTINGS if known.means(settings.get(known.name, ""))}
    return {"Size", "Sampler", "Schedule type"} | named


def model_hash(model: str) -> str:
    """The first digits of the SHA-256 of the file that a model is, '' where it is none, or where that would
    take seconds: `tightfit models --hash` computes each once."""
    path = Path(model)
    try:
        status = path.stat() if path.is_absolute() else None
    except (OSError, ValueError):
        status = None
    if status is None or not path.is_file():
        return ""
    hashes = Hashes()
    return (hashes.compute(path) if status.st_size <= _CHEAP_BYTES else hashes.get(path))[:DIGITS]
