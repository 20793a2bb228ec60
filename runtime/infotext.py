"""The request inside a picture: A1111's `parameters` text, which the field's tools read, and the way back
from that and from other programs' texts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_origin

from .. import __version__
from . import pictures, png, programs, settings
from .adapters import ADAPTERS, MOST, Adapter, written
from .adapters.lora import Lora
from .adapters.prompt import WORD
from .adapters.textual_inversion import TextualInversion
from .adapters.vae import Vae
from .conditions import CONDITIONS, carried
from .conditions.handed import way_of
from .errors import TightfitError
from .fields import kinds
from .files import SINGLE, shortened
from .kept import Hashes
from .models.hub import BUILT_IN
from .models.layouts.library import Kind, Library, called, folders, scan
from .models.prompt_syntax import matters
from .models.samplers.names import a1111_fields
from .models.upscalers import file_of
from .programs import Said, Word, bare_name
from .request import PLAIN, Job, Request

# How Windows names shares and devices: to look at a share sends its host the user's credentials.
_REMOTE = re.compile(r"[\\/](?:[\\/]|\?\?)")
_NAME = re.compile(r"\w[\w \-/]*")
_QUOTED = re.compile(r'\s*("[^\\"]*(?:\\.[^\\"]*)*")\s*(?:,|$)')
_SETTINGS = re.compile(r"\s*Steps:\s*\d")
_TOLD = 10, 40  # settings that are not honoured: so many are named, and so many characters of each
_KINDS = kinds(Request)
_FIELDS = {field.name: field for field in dataclasses.fields(Request) if field.name in PLAIN}
_SHELVES = {kind.option: kind.shelf for kind in ADAPTERS if kind.shelf}
_LOST = "(not found)"
_A1111S = ("A1111", "Forge")
_ON_CPU = ("tightfit", "ComfyUI", "Fooocus")  # draw noise there, whatever the card
_NO_VAE = ("", "Automatic", "Baked VAE")
# What other programs say besides, which is honoured otherwise, or has no effect.
_SILENT = {
    "Model", "Model hash", "Refiner", "Version", "VAE", "VAE hash", "Hashes", "Lora hashes", "TI hashes",
    "Precision", settings.RNG,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a picture says of how it was made: fields of Request, model and precision where it names them, and
    notices."""

    request: Mapping[str, Any]
    model: str | None = None
    precision: str | None = None
    notices: tuple[str, ...] = ()
    model_said: str = ""
    """What another program calls its model."""
    asking: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of options of conditions, without the pictures that these need."""


def write(job: Job, model: str, precision: str) -> str:
    """A job as A1111 would write it. A last field holds it once more as JSON, exact whatever the prompt."""
    exact = {"model": model, "precision": precision, **_told(job)}
    loras = [adapter.a1111() for adapter in job.adapters if isinstance(adapter, Lora)]
    lines = [" ".join([job.prompt, *(words for words, _ in loras)])]
    if job.negative_prompt is not None:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    plain = settings.said(job)
    fields = {
        "Steps": plain.pop("Steps"),
        **a1111_fields(job.scheduler),
        "CFG scale": plain.pop("CFG scale"),
        "Seed": plain.pop("Seed"),
        "Size": f"{job.width}x{job.height}",
        "Model hash": settings.model_hash(model),
        "Model": stem(model),
        "VAE": next((stem(adapter.name) for adapter in job.adapters if isinstance(adapter, Vae)), None),
        "Refiner": _with_hash(job.refiner) if job.refiner else None,
        **plain,
        **{name: value for asked in job.conditions for name, value in asked.a1111().items()},
        "Lora hashes": ", ".join(digest for _, digest in loras if digest),
        "Precision": precision,
        "Version": f"tightfit {__version__}",
    }
    said = [f"{name}: {quoted(str(value))}" for name, value in fields.items() if value not in (None, "")]
    lines.append(", ".join([*said, f"tightfit: {json.dumps(json.dumps(exact))}"]))
    return "\n".join(lines)


def _with_hash(model: str) -> str:
    digest = settings.model_hash(model)
    return f"{stem(model)} [{digest}]" if digest else stem(model)


def _told(job: Request) -> dict[str, Any]:
    """Its fields, without that of words that are as they are anyway."""
    fields = job.to_json()
    if not _of_syntax(fields) and job.prompt_syntax == _FIELDS["prompt_syntax"].default:
        del fields["prompt_syntax"]
    return fields


def _of_syntax(fields: Mapping[str, Any]) -> bool:
    texts = (fields.get(name) for name in ("prompt", "negative_prompt"))
    return any(isinstance(text, str) and matters(text) for text in texts)


def quoted(value: str) -> str:
    """As A1111 quotes. A file's name that is no text is escaped, too."""
    is_text = value.encode(errors="ignore").decode() == value
    return json.dumps(value) if re.search(r'[,:"\n]', value) or not is_text else value


def stem(model: str) -> str:
    """A model's name as A1111 shows it: that of its file or folder, without ending. A hub id stays."""
    path = PurePath(model)
    is_file = path.suffix.lower() in SINGLE
    return (path.stem if is_file else path.name) if is_file or path.is_absolute() else model


def read(picture: Path, given: Collection[str] = (), models_dirs: Sequence[str | Path] = ()) -> Carried:
    """What `picture` carries. Adapters of the kinds that are `given` are left out; models and adapters that
    other programs name are looked for in folders of models. Raises TightfitError if it says nothing that can
    be repeated."""
    return read_texts(pictures.texts(picture), str(picture), given, models_dirs)


def read_texts(
    texts: Mapping[str, str],
    source: str,
    given: Collection[str] = (),
    models_dirs: Sequence[str | Path] = (),
) -> Carried:
    """As `read`, of the texts of a picture, which errors call `source`."""
    text = texts.get(pictures.PARAMETERS, "")
    if text and not is_json(text):
        return parse(text, source, given, models_dirs)
    try:
        said = programs.read(texts)
    except ValueError as error:
        raise TightfitError(f"the text inside {source} is damaged ({error}): it cannot be repeated") from None
    if said is None:
        raise TightfitError(
            f"{source} carries no text that is known: pictures of tightfit, A1111, Forge, ComfyUI, "
            "InvokeAI, NovelAI and Fooocus can be repeated"
        )
    return _carried(said, source, given, models_dirs)


def is_json(text: str) -> bool:
    """Whether a `parameters` text is Fooocus' or another's JSON, not in A1111's form."""
    return text.lstrip().startswith("{") and not any(map(_SETTINGS.match, text.split("\n")))


def place_of_settings(lines: Sequence[str]) -> int:
    """The number of the line of settings, the last that looks like one."""
    return next((i for i in reversed(range(len(lines))) if _SETTINGS.match(lines[i])), len(lines) - 1)


def parse(
    text: str, source: str, given: Collection[str] = (), models_dirs: Sequence[str | Path] = ()
) -> Carried:
    """What `write` wrote, or what A1111 wrote: prompt, negative prompt, and a line of settings.

    Extensions of A1111 write below it: Dynamic Prompts a template. Takes time in proportion to the text.
    """
    said = said_in(text, source)
    fields = said.settings
    if "tightfit" in fields:
        return _exact(fields["tightfit"], source, given)
    if "Steps" not in fields:
        raise TightfitError(
            f"the 'parameters' text of {source} has no line of settings: it cannot be repeated"
        )
    if missing := [name for name in ("CFG scale", "Seed", "Size") if name not in fields]:
        raise _damaged(source, f"no {missing[0]}")
    return _carried(said, source, given, models_dirs)


def said_in(text: str, source: str) -> Said:
    """What a text in A1111's form says, whether it can be repeated or not. Raises TightfitError for one that
    is too long."""
    if len(text) > png.MAX_TEXT_BYTES:
        raise TightfitError(
            f"the 'parameters' text of {source} has {len(text)} characters, too many to be a request"
        )
    lines = text.rstrip().split("\n")
    place = place_of_settings(lines)
    prompt, fields = lines[:place], {name: _unquoted(value) for name, value in _pairs(lines[place])}
    positive, mark, negative = "\n".join(["", *prompt]).partition("\nNegative prompt:")
    program = _program(fields.get("Version", ""))
    # A1111 says nothing of the noise that it draws on the GPU.
    fields = {settings.RNG: "CPU" if program in _ON_CPU else "GPU"} | fields
    return Said(program, positive.strip(), negative.strip() if mark else None, fields)


def _program(version: str) -> str:
    """Which one wrote a text in A1111's form; ComfyUI has nodes for it."""
    others = (program for program in _ON_CPU if version.startswith(program))
    return next(others, "Forge" if version.startswith("f") else "A1111")


def _damaged(source: str, why: str) -> TightfitError:
    return TightfitError(
        f"the settings inside {source} are damaged ({why}): give the request by options instead"
    )


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
    asking = _asking(exact.pop("asking", None), source)
    typed = [kind.__name__ for kind in CONDITIONS if kind.options]
    if asking or exact.get("conditions") in [[name] for name in typed]:  # which may say nothing
        exact.pop("conditions", None)
    named = exact.pop("adapters", None) or {}
    if not isinstance(named, dict) or not all(map(_texts, named.values())):
        raise TightfitError(f"the request inside {source} is damaged, in its adapters: it cannot be repeated")
    if adapters := _adapters({key: named[key] for key in named if key not in given}, source):
        request["adapters"] = adapters
    options = {kind.option for kind in ADAPTERS}
    exact |= {option: ", ".join(names) for option, names in named.items() if option not in options}
    paths = {name: request.get(name) or "" for name in ("refiner", "hires_upscaler")}
    if remote := next((name for name, path in paths.items() if _REMOTE.match(path)), None):
        option = remote.replace("_", "-")
        raise TightfitError(
            f"{source} was painted with a {remote} that is on another machine: name it by --{option}"
        )
    unknown = {name: value for name, value in exact.items() if name not in _FIELDS and value is not None}
    if not unknown:
        return Carried(request, model, precision, asking=asking)
    notice = (
        f"another version of tightfit painted {source}, so the picture may differ; not honoured: "
        f"{_named(unknown)}"
    )
    return Carried(request, model, precision, (notice,), asking=asking)


def _asking(said: Any, source: str) -> dict[str, Any]:
    """Values of the options of conditions."""
    known = carried()
    fits = isinstance(said, dict) and all(
        name in known and (value is None or _is_of(value, known[name])) for name, value in said.items()
    )
    if said is not None and not fits:
        raise TightfitError(f"the request inside {source} is damaged, in its asking: it cannot be repeated")
    return {name: value for name, value in (said or {}).items() if value is not None}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether JSON has a value of an option's type. Texts of a list are key=value:… after an empty path."""
    if get_origin(kind) is list:
        return _texts(value) and all(text[:1] in ("", ":") and not _is_remote(text) for text in value)
    return isinstance(value, (float, int) if kind is float else kind) and not isinstance(value, bool)


def _is_remote(text: str) -> bool:
    """Whether a value in key=value:… is on another machine."""
    return any(map(_REMOTE.match, text.split("=")))


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


def _carried(said: Said, source: str, given: Collection[str], models_dirs: Sequence[str | Path]) -> Carried:
    """What another program says, as a request; and one notice of what is not honoured here."""
    try:
        fields = settings.understood(said.settings, said.program in _A1111S)
    except ValueError as error:
        raise _damaged(source, str(error)[:80]) from None
    files = _Named.among(said, models_dirs)
    if upscaler := files.upscaler():
        fields["hires_upscaler"] = upscaler
        others = {name: value for name, value in said.settings.items() if name != settings.UPSCALER}
        said = dataclasses.replace(said, settings=others)
    if refiner := files.refiner():
        fields["refiner"] = refiner
    for name in settings.idle(fields):  # A1111 writes some of them whatever the sampler
        del fields[name]
    adapters, left = files.adapters(given)
    left |= {"Refiner": f"{said.settings['Refiner']} {_LOST}"} if refiner == "" else {}
    loras = [] if Lora.option in given else said.loras
    words = [str(lora) for lora in loras if files.has(lora)]
    left |= {f"LoRA {lora.name}": _LOST for lora in loras if str(lora) not in words}
    request = {
        "prompt": " ".join([said.prompt, *words]).strip(),
        "negative_prompt": said.negative_prompt or _nothing(said),
        **fields,
        **({"adapters": adapters} if adapters else {}),
    }
    model = None if "model" in given else files.model()
    left |= files.other_hash(model)
    precision = said.settings.get("Precision") if said.program == "tightfit" else None
    return Carried(request, model, precision, _differences(said, source, left), files.model_said)


def _nothing(said: Said) -> str | None:
    """A1111 writes no empty negative prompt, and zeroes SDXL's conditioning for it (its
    modules/sd_models_xl.py): here that is None. Ours writes one that was given."""
    return "" if said.program == "tightfit" and said.negative_prompt is not None else None


@dataclasses.dataclass(frozen=True)
class _Named:
    """What a picture names of files, in the folders of models. Names and hashes are compared: no path of a
    picture is looked at."""

    settings: Mapping[str, str]
    library: Library | None

    @classmethod
    def among(cls, said: Said, models_dirs: Sequence[str | Path]) -> _Named:
        roots = folders(models_dirs, Kind.LORA)
        return cls(said.settings, scan(roots) if roots else None)

    def path(self, name: str, kind: Kind) -> Path | None:
        """Of what is called so, if need be without the folders before its name, which others lay out
        otherwise."""
        return self._called(name, kind) or self._called(PurePath(name).name, kind)

    def _called(self, name: str, kind: Kind) -> Path | None:
        """None where none is called so, or two are."""
        try:
            return called(name, kind, self.library) if self.library and name else None
        except TightfitError:
            return None

    def has(self, lora: Word) -> bool:
        """Whether its word in a prompt will be understood."""
        return bool(WORD.fullmatch(str(lora)) and self._called(lora.name, Kind.LORA))

    def adapters(self, given: Collection[str]) -> tuple[tuple[Adapter, ...], dict[str, str]]:
        """What A1111 takes without a word in the prompt, but for kinds that are `given`; and what is not
        there, or cannot be read."""
        pairs = [pair.partition(":")[0].strip() for pair in self.settings.get("TI hashes", "").split(",")]
        vae = bare_name(self.settings.get("VAE"))
        named = [(TextualInversion.option, name) for name in pairs[:MOST] if name]
        named += [] if vae in _NO_VAE else [(Vae.option, vae)]
        found, left = [], {}
        for option, name in ((option, name) for option, name in named if option not in given):
            path = self.path(name, _SHELVES[option])
            try:
                found += written({option: [str(path)]}) if path else ()
                left |= {} if path else {f"{option} {name}": _LOST}
            except TightfitError:  # such as a pickle
                left[f"{option} {name}"] = "(cannot be read)"
        return tuple(found), left

    def model(self) -> str | None:
        """By its hash, if one there has that, else by its name."""
        name, digest = self.settings.get("Model", ""), self.settings.get("Model hash", "").lower()
        if name in BUILT_IN:
            return name
        hashes = Hashes()
        entries = self.library.entries if self.library and len(digest) >= settings.DIGITS else ()
        same = (entry.path for entry in entries if hashes.get(entry.path).startswith(digest))
        path = next(same, None) or self.path(bare_name(name), Kind.MODEL)
        return str(path) if path else None

    def upscaler(self) -> str:
        """The network of hires fix, "" where it is none, or is not there."""
        name = self.settings.get(settings.UPSCALER, "")
        is_network = bool(name) and settings.is_second_pass(self.settings) and way_of(name) is None
        return str((is_network and self.path(file_of(name), Kind.UPSCALER)) or "")

    def refiner(self) -> str | None:
        """By its name, which has its hash behind it; "" where it is not there, None where there is none."""
        if not (said := self.settings.get("Refiner", "")) or bare_name(said) == "None":
            return None
        name = re.sub(r"\s*\[\w{1,64}\]$", "", said)
        return str(self.path(bare_name(name), Kind.MODEL) or "")

    def other_hash(self, model: str | None) -> dict[str, str]:
        """The picture's hash of its model, where the one of that name is known to have another."""
        digest, here = self.settings.get("Model hash", "").lower(), settings.model_hash(model or "")
        return {"Model hash": f"{digest}, here {here}"} if digest and here and here != digest else {}

    @property
    def model_said(self) -> str:
        """As a person would look for it."""
        name, digest = (self.settings.get(key, "")[:80] for key in ("Model", "Model hash"))
        return f"{name} (hash {digest})".strip() if digest else name


def _differences(said: Said, source: str, left: Mapping[str, str]) -> tuple[str, ...]:
    """What of a picture is not honoured here, in one notice; and that the noise differs."""
    known = settings.honoured(said.settings)
    named = {name: value for name, value in said.settings.items() if name not in known | _SILENT}
    named |= {**said.others, **left, **({} if "Seed" in said.settings else {"a seed": "is not said"})}
    differs = settings.RNG not in known and said.settings.get(settings.RNG, "CPU") != "CPU"
    noise = f"{said.program} draws its noise on the GPU unless told otherwise, so the picture may differ"
    if not named:
        return (noise,) if differs else ()
    begin = noise if differs else f"{source} was painted by {said.program}"
    return (f"{begin}; not honoured: {_named(named)}",)


def _named(left: Mapping[str, Any]) -> str:
    """The first settings of a text that somebody else wrote, each cut, and how many are left."""
    most, letters = _TOLD
    names = [f"{name} {value}"[:letters].strip() for name, value in left.items()]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
