"""Where a picture goes by a template such as out/[date]/[seed]-[prompt_words].png: A1111's fields, and those
of a request."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import TightfitError
from ..infotext import Carried, stem
from ..models.samplers.names import a1111_fields
from ..request import PLAIN, Request
from ..settings import model_hash

_FIELD = re.compile(r"\[\[(?P<plain>[^\[\]]*)\]\]|\[(?P<name>[a-zA-Z]\w*)(?:<(?P<format>[^<>]*)>)?\]")
NUMBERS = ("number", "generation_number")
_ALIASES = {"steps": "num_inference_steps", "cfg": "guidance_scale"}
_KNOWN = (
    "seed", "steps", "cfg", "width", "height", "sampler", "date", "datetime", "model_name", "model_hash",
    "precision", "prompt", "prompt_spaces", "prompt_words", "prompt_hash", *NUMBERS,
)  # fmt: skip
"""As --help and errors list them. The other fields of Request are known, too."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}
_WORDS, _VALUE_BYTES, _NAME_BYTES = 8, 120, 200  # of a prompt; of a value; of a name, so that a number fits
_UNSAFE = re.compile(r'[<>:"/\\|?*]')
# Names of devices on Windows, whatever follows a dot.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)


def _unknown(name: str) -> str:
    close = get_close_matches(name, (*_KNOWN, *PLAIN), 1)
    meant = f" (did you mean [{close[0]}]?)" if close else ""
    known = ", ".join(_KNOWN)
    return f"[{name}] in --output is no field{meant}: choose {known}, or write [[{name}]] for the word"


@dataclass(frozen=True)
class Template:
    """A path with fields in brackets, each of which stands for a value of the picture; [[word]] is [word]."""

    path: Path

    def __post_init__(self) -> None:
        for match in self._fields:
            name = match["name"].lower()
            if name not in _KNOWN and name not in PLAIN:
                raise TightfitError(_unknown(name[:40]))
            try:
                datetime.now().strftime(match["format"] or "")
            except ValueError as error:  # on Windows
                raise TightfitError(f"{match[0][:40]} in --output is no format of a time ({error})") from None

    @property
    def _fields(self) -> list[re.Match[str]]:
        return [match for match in _FIELD.finditer(str(self.path)) if match["name"]]

    @property
    def names(self) -> set[str]:
        """Its fields."""
        return {match["name"].lower() for match in self._fields}

    @property
    def start(self) -> Path:
        """The folders before the first field."""
        parts = self.path.parent.parts
        count = next((number for number, part in enumerate(parts) if _FIELD.search(part)), len(parts))
        return Path(*parts[:count])

    def filled(self, values: Mapping[str, str], more: str = "") -> Path:
        """The path with these values for its fields, and `more` before its ending. No value makes a
        folder."""
        *folders, _ = self.path.parts
        name = _part(self.path.stem, values, _NAME_BYTES) + more + self.path.suffix
        return Path(*(_part(folder, values, _NAME_BYTES) for folder in folders), name)


def _part(text: str, values: Mapping[str, str], most_bytes: int) -> str:
    """One folder, or a name without its ending. One without a field stays as it was typed."""
    filled = _FIELD.sub(lambda match: _value(match, values), text)
    if not any(match["name"] for match in _FIELD.finditer(text)):
        return filled
    short = filled.encode()[:most_bytes].decode(errors="ignore").rstrip(" .")
    return f"_{short}" if not short or _RESERVED.match(short) else short


def _value(match: re.Match[str], values: Mapping[str, str]) -> str:
    if match["name"] is None:
        return f"[{match['plain']}]"
    name = match["name"].lower()
    if match["format"] and name == "datetime":
        return safe(datetime.fromisoformat(values[name]).strftime(match["format"]))
    return safe(_compact(values[name]) if name == "datetime" else values[name])


def _compact(moment: str) -> str:
    return datetime.fromisoformat(moment).strftime("%Y%m%d%H%M%S")


def safe(text: str) -> str:
    """A value as a part of a name that every system takes."""
    printable = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return _UNSAFE.sub("_", printable).encode()[:_VALUE_BYTES].decode(errors="ignore").strip(" .")


def values(carried: Carried, number: str, moment: datetime) -> dict[str, str]:
    """What the fields stand for, of a picture that carries this."""
    fields: dict[str, Any] = {name: carried.request.get(name, _DEFAULTS[name]) for name in PLAIN}
    fields |= {name: fields[field] for name, field in _ALIASES.items()}
    prompt, model = fields["prompt"], carried.model or ""
    words = re.split(rf"[\s{re.escape(string.punctuation)}]+", prompt)
    shown = {name: f"{value:g}" if type(value) is float else str(value) for name, value in fields.items()}
    return shown | {
        "sampler": a1111_fields(fields["scheduler"])["Sampler"],
        "date": f"{moment:%Y-%m-%d}",
        "datetime": moment.isoformat(),
        "model_name": stem(model),
        "model_hash": model_hash(model) or "unknown",
        "precision": carried.precision or "",
        "prompt": "_".join(prompt.split(" ")),
        "prompt_spaces": prompt,
        "prompt_words": " ".join([word for word in words if word][:_WORDS]) or "empty",
        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest()[:8],
        **dict.fromkeys(NUMBERS, number),
    }
