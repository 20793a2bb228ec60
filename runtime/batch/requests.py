"""Rows become pictures: each with one request, whose options are plain data. Pure: no model is opened."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from ..adapters import ADAPTERS
from ..adapters.prompt import WORD
from ..asking import request_of, seeded
from ..errors import TightfitError
from ..files import shortened
from ..models.spec import ModelSpec
from ..open_models import ASKABLE
from ..pictures import FORMATS
from ..planner.wishes import Wishes
from ..request import RANDOM_SEED
from ..wildcards import variants
from .columns import MODEL, NAME, as_typed, choices
from .table import Row, RowError

MOST_OF_A_ROW = 10_000_000
_APART = "prompt", "seed", "subseed"  # in which pictures differ that a plan, and a batch, have in common
_SIZE = "height", "width"
_MOST_KEPT = 1000  # texts of groups
_NAME_BYTES = 200  # of a file or folder, before its number and ending


@dataclass(frozen=True)
class Picture:
    """One picture that a table asks for.

    row: which asks. group: JSON of all that it has in common with pictures of one plan, in the order in which
    changing it costs most. options: prompt and seeds, which it has of its own; without a seed as long as that
    is open. key: the same for the same request of an equal table, 16 bytes. twin: the key of an equal one
    before it, whose picture this is too. name: of its file, a template, or "" for the usual one.
    """

    row: int
    group: str
    options: Mapping[str, Any]
    key: bytes
    twin: bytes | None = None
    name: str = ""


@dataclass
class Reading:
    """How rows are read. defaults: options of every row, by their columns. repeat: how often each is painted,
    with the next seeds. wildcards: a folder for __name__. models_dirs: where names are looked for. opened:
    what reads a model by its name, where they are here."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 1
    wildcards: Path | None = None
    models_dirs: Sequence[Path] = ()
    opened: Callable[[str], ModelSpec] | None = None
    _checked: dict[Any, None] = field(default_factory=dict)
    _groups: dict[bytes, str] = field(default_factory=dict)
    _counts: dict[bytes, int] = field(default_factory=dict)
    _named: dict[int, int] = field(default_factory=dict)

    def pictures(self, rows: Iterator[Row]) -> Iterator[Picture | RowError]:
        """Those of each row, or what is wrong with it, which ends the row."""
        for number, row in rows:
            if isinstance(row, RowError):
                yield row
                continue
            try:
                yield from self._of_row(number, row)
            except TightfitError as error:
                yield RowError(number, as_typed(error, getattr(row, "typed", {})))

    def _of_row(self, number: int, row: Mapping[str, Any]) -> Iterator[Picture]:
        values = {name: choices(name, value) for name, value in {**self.defaults, **row}.items()}
        if "prompt" not in values:
            raise TightfitError("it has no prompt: add a column prompt, which says what to paint")
        count = math.prod(map(len, values.values()))
        images = [one for one in values.get("num_images", ()) if type(one) is int]
        if (whole := count * self.repeat * max(images, default=1)) > MOST_OF_A_ROW:
            said = shortened(whole) if whole < 10**30 else "too many"
            raise TightfitError(f"it asks for {said} pictures, and {MOST_OF_A_ROW} are the most: split it")
        differ = {name for name, each in values.items() if len(each) > 1}
        places = itertools.count(1)
        for combination in itertools.product(*values.values()):
            yield from self._of_request(number, dict(zip(values, combination, strict=True)), differ, places)

    def _of_request(
        self, number: int, options: dict[str, Any], differ: Set[str], places: Iterator[int]
    ) -> Iterator[Picture]:
        model, name = options.pop(MODEL, None) or "emoji", options.pop(NAME, None) or ""
        wishes = {wish: options.pop(wish) for wish in ASKABLE if options.get(wish) is not None}
        images = options.pop("num_images", 1)
        if type(images) is not int or images < 1:
            raise TightfitError(f"num_images must be a whole number from 1, not {shortened(images)}")
        own = {key: options.pop(key) for key in _APART if key in options}
        own |= {key: None for key in ("seed", "subseed") if own.get(key) == RANDOM_SEED}
        if not isinstance(model, str):
            raise TightfitError(f"model must be a name, not {shortened(model)}")
        common = _digest([model, wishes, options])
        self._check(common, model, wishes, {**options, **own, "num_images": images * self.repeat})
        place = place_of(name, differ | {"seed"} if images * self.repeat > 1 else differ)
        for index in range(images * self.repeat):
            whole, open_seed = self._alone(options, own, index)
            key, twin = self._key(common, [own["prompt"], index], whole, open_seed)
            yield Picture(
                number,
                self._group(common, model, wishes, whole),
                {key: whole[key] for key in _APART if whole.get(key) is not None},
                key,
                twin,
                self._unlike(place.format(next(places)) if place else "", number),
            )

    def _check(self, common: bytes, model: str, wishes: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """Raise TightfitError for what no model could do, or not this one, where it is here. What differs in
        prompt and seed alone is looked at once: of a million rows that takes seconds."""
        prompt, seeds, count = (
            asked.get("prompt"),
            [asked.get("seed"), asked.get("subseed")],
            asked["num_images"],
        )
        plain = isinstance(prompt, str) and "<" not in prompt and "\\ud" not in ascii(prompt)
        usual = all(seed is None or (type(seed) is int and 0 <= seed < 2**62) for seed in seeds)
        mark = common, *(key in asked for key in _APART), count, plain and usual
        if plain and usual and mark in self._checked:
            return
        Wishes(**wishes)
        read = partial(self.opened, model) if self.opened else None
        few = {**asked, "num_images": min(count, 10_000)}
        request_of(few, models_dirs=self.models_dirs, model=read)
        self._checked[mark] = None

    def _alone(
        self, options: Mapping[str, Any], own: Mapping[str, Any], index: int
    ) -> tuple[dict[str, Any], bool]:
        """The options of one picture, and whether its seed is drawn."""
        whole: dict[str, Any] = {**options, **own}
        moved = "subseed" if whole.get("subseed_strength") else "seed"
        is_open = whole.get("seed") is None or whole.get(moved) is None
        if whole.get(moved) is not None:
            whole[moved] += index
        whole = seeded(whole)
        if not self._may_vary(whole):
            return whole, is_open
        drawn, *_ = variants(request_of(whole, models_dirs=self.models_dirs), self.wildcards)
        return {**whole, **_words(whole, drawn)}, is_open

    def _may_vary(self, options: Mapping[str, Any]) -> bool:
        texts = (str(options.get(name) or "") for name in ("prompt", "negative_prompt"))
        return any("{" in text or (self.wildcards and "__" in text) for text in texts)

    def _group(self, common: bytes, model: str, wishes: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
        """The same text for the same: of a million rows few are made."""
        is_usual = "<" not in whole["prompt"] and not self._may_vary(whole)
        if is_usual and common in self._groups:
            return self._groups[common]
        options = {name: value for name, value in whole.items() if name not in _APART}
        group = _group(model, wishes, options, whole["prompt"])
        if is_usual:
            if len(self._groups) >= _MOST_KEPT:
                self._groups.clear()
            self._groups[common] = group
        return group

    def _key(
        self, common: bytes, asked: list[Any], whole: Mapping[str, Any], is_open: bool
    ) -> tuple[bytes, bytes | None]:
        """Of two that ask the same the second has a key of its own, and is the first one's twin if that is
        sure to be the same picture."""
        seeds = [None, None] if is_open else [whole.get("seed"), whole.get("subseed")]
        asked = asked if is_open else asked[:-1]
        first = _digest([*asked, *seeds], common)
        count = self._counts[first] = self._counts.get(first, -1) + 1
        if not count:
            return first, None
        return _digest([*asked, *seeds, f"again {count}"], common), None if is_open else first

    def _unlike(self, place: str, number: int) -> str:
        """The name. Raises TightfitError for one that another row has, as far as that is known."""
        if place and "[" not in place:
            before = self._named.setdefault(hash(place.lower()), number)
            if before != number:
                raise TightfitError(
                    f"the name {shortened(place)} is that of row {before} too: name it otherwise"
                )
        return place


def _words(options: Mapping[str, Any], drawn: Any) -> dict[str, Any]:
    """The prompts with what was drawn for their variants. `<lora:…>` stays in them."""
    texts = {name: getattr(drawn, name) for name in ("prompt", "negative_prompt") if options.get(name)}
    loras = "".join(match[0] for match in WORD.finditer(str(options["prompt"])))
    return {**texts, "prompt": texts.get("prompt", "") + loras}


def place_of(name: Any, differ: Set[str] = frozenset()) -> str:
    """What a picture is called. Where its row asks for others that `differ` in columns of which no field of
    the name tells, {} is for its number among them. Raises TightfitError for a place outside of the
    folder."""
    if not isinstance(name, str):
        raise TightfitError(f"name must be text, not {shortened(name)}")
    if not name:
        return ""
    path = PurePath(name)
    if path.anchor or ".." in path.parts or "\0" in name or not path.name:
        raise TightfitError(f"name {shortened(name)} is no name inside the folder: leave out / and ..")
    if "\\ud" in ascii(name) or any(
        len(part.encode("utf-8", "replace")) > _NAME_BYTES for part in path.parts
    ):
        raise TightfitError(f"name {shortened(name)} is no name of a file: {_NAME_BYTES} bytes are the most")
    stem, ending = (str(path.with_suffix("")), path.suffix) if path.suffix.lower() in FORMATS else (name, "")
    text = stem.replace("{", "{{").replace("}", "}}")
    return text + ("-{}" if differ and not _tells(name, differ) else "") + ending


_FIELD = re.compile(r"(?<!\[)\[(\w+)")
_TELLING = {"num_images": "seed"}  # it paints with the next seeds
_TOLD = {
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "sampler": "scheduler",
    **dict.fromkeys(("prompt_spaces", "prompt_words", "prompt_hash"), "prompt"),
    **dict.fromkeys(("model_name", "model_hash"), MODEL),
}


def _tells(name: str, differ: Set[str]) -> bool:
    """Whether fields of a name tell apart pictures that differ in these columns."""
    fields = {field.lower() for field in _FIELD.findall(name)}
    if fields & {"number", "generation_number"}:
        return True
    apart = {_TELLING.get(column, column) for column in differ - {NAME}}
    return bool(fields) and apart <= {_TOLD.get(field, field) for field in fields}


def _digest(values: Any, before: bytes = b"") -> bytes:
    return hashlib.blake2b(before + _json(values).encode("utf-8", "replace"), digest_size=16).digest()


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    except (ValueError, RecursionError):
        raise TightfitError("a value is nested too deep: write texts, numbers and lists") from None


_ADAPTING = {kind.option for kind in ADAPTERS}


def _group(model: str, wishes: Mapping[str, Any], options: Mapping[str, Any], prompt: str) -> str:
    """What costs most to change comes first, so that groups are painted in the order of these texts."""
    adapting = {name: value for name, value in options.items() if name in _ADAPTING}
    named = sorted({match[0] for match in WORD.finditer(prompt)}) if "<" in prompt else []
    size = {name: options[name] for name in _SIZE if name in options}
    others = {name: value for name, value in options.items() if name not in adapting and name not in size}
    return _json([model, wishes, adapting, named, size, others])


def options_of(group: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Of a group: the model, the wishes, and the options of its requests."""
    model, wishes, adapting, _, size, others = json.loads(group)
    return model, wishes, {**adapting, **size, **others}
