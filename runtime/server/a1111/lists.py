"""What a service may name, as A1111 lists it: checkpoints with their titles, VAEs, LoRAs, styles …"""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...adapters.header import Stamp, contents, stamp
from ...adapters.textual_inversion import read as read_embedding
from ...asking import Shelves
from ...catalogue import described
from ...conditions.image import edits
from ...errors import TightfitError
from ...files import read_bytes
from ...models.hub import BESIDE
from ...models.layouts.library import Entry, Kind
from ...models.upscalers import a1111_name, file_of
from ...settings import DIGITS, file_hash
from .route import NotFoundError

_HASH = re.compile(r" \[[0-9a-f]{8,64}\]$")  # as A1111 has it behind a name
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGITS}}}|[0-9a-f]{{64}}")
_LONGEST = 200  # letters of an alias
_STYLES, _STYLES_BYTES = "styles.csv", 2**20


@dataclass(frozen=True)
class Item:
    """A file or folder. name: by which it is asked for, with its ending. is_model: a whole one, of which
    `edits` says whether it edits pictures. alias: what a LoRA's trainer called it."""

    name: str
    path: Path
    kind: str
    family: str = ""
    is_model: bool = False
    edits: bool = False
    alias: str = ""

    @property
    def bare(self) -> str:
        """Its name without ending."""
        return self.name.removesuffix(self.path.suffix) if self.path.is_file() else self.name

    @property
    def digest(self) -> str:
        """SHA-256 of its file, '' where that is not known and would take seconds."""
        return file_hash(str(self.path))

    @property
    def short_digest(self) -> str:
        """The part of it that A1111 shows."""
        return self.digest[:DIGITS]

    @property
    def title(self) -> str:
        """As A1111's list of checkpoints has it."""
        digest = self.short_digest
        return f"{self.name} [{digest}]" if digest else self.name

    @property
    def model_name(self) -> str:
        return self.bare.replace("/", "_")

    def fits(self, model: Item) -> bool:
        """Whether it is for that model, as far as is known."""
        return not self.family or self.family == model.family

    def is_called(self, name: str) -> bool:
        if name in (self.name, self.bare, self.model_name):
            return True
        if self.alias and name == self.alias:
            return True
        return bool(_DIGEST.fullmatch(name)) and name in (self.digest, self.short_digest)


@dataclass(frozen=True)
class Style:
    """Texts that are put around a prompt by the style's name."""

    name: str
    prompt: str
    negative_prompt: str


class Shelf:
    """Looked through once, and again by `refresh`. Safe to use from threads."""

    def __init__(self, shelves: Shelves) -> None:
        self.shelves = shelves
        self._known: dict[tuple[Path, Stamp], Item] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        self.shelves.refresh()

    def items(self, kind: Kind) -> list[Item]:
        """Those of a kind, what ships first. Whole models are such by what is inside."""
        own = [self._read(name, entry) for name, entry in self.shelves.named()]
        entries = [entry for entry in self.shelves.library.entries if not entry.is_pickle]
        every = own + [self._read(entry.path.relative_to(entry.home).as_posix(), entry) for entry in entries]
        return [item for item in every if (item.is_model if kind is Kind.MODEL else item.kind == kind.value)]

    def _read(self, name: str, entry: Entry) -> Item:
        """What is inside. A file is read again once it has changed."""
        with suppress(OSError, TightfitError):  # of one that is being changed
            status = entry.path.stat()
            key = entry.path, (status.st_size, status.st_mtime_ns)
            with self._lock:
                if key not in self._known:
                    self._known[key] = _item(name, entry)
                return self._known[key]
        return Item(name, entry.path, "")

    def lora(self, said: str) -> str:
        """The name of the LoRA that a prompt calls so: it, or what its trainer called it."""
        items = self.items(Kind.LORA)
        return next((item.name for item in items if item.is_called(said)), said)

    def upscaler(self, said: str) -> str:
        """The name of the upscaler that is called so, also by A1111: "R-ESRGAN 4x+". Raises TightfitError for
        one that there is not."""
        file = file_of(said)
        if item := next((item for item in self.items(Kind.UPSCALER) if item.is_called(file)), None):
            return item.bare
        try:
            self.shelves.path(file, Kind.UPSCALER)
        except TightfitError:
            if file == said:
                raise
            raise TightfitError(
                f"{a1111_name(file)} is {file}.safetensors, which is in no folder of models: put it there "
                "(tightfit convert makes it of the .pth)"
            ) from None
        return file

    def words(self, model: Item) -> dict[str, str]:
        """What embeddings for that model teach, and the name of each."""
        words = {}
        for item in self.items(Kind.EMBEDDING):
            if item.path not in BESIDE.values() and item.fits(model):
                with suppress(TightfitError):  # of one that is broken
                    words[read_embedding(item.path).token] = item.name
        return words

    def checkpoint(self, said: str) -> Item:
        """By title, name or hash. Raises NotFoundError."""
        for name in (said, _HASH.sub("", said)):
            if item := next((item for item in self.items(Kind.MODEL) if item.is_called(name)), None):
                return item
        try:
            path = self.shelves.path(_HASH.sub("", said), Kind.MODEL)
        except TightfitError as error:
            raise NotFoundError(str(error)) from None
        found = (item for item in self.items(Kind.MODEL) if str(item.path) == path)
        if item := next(found, None):
            return item
        raise NotFoundError(f"{_HASH.sub('', said)} is no model that can be painted with: choose another")

    def styles(self, named: Collection[str] = ()) -> dict[str, Style]:
        """Of the styles.csv in each folder of models, or beside one that is called models, as A1111's is.
        Raises TightfitError for a broken one, if a style is named that no other has."""
        folders = [
            place for root in self.shelves.roots for place in (root, root.parent)[: 1 + _is_models(root)]
        ]
        known: dict[str, Style] = {}
        broken = None
        for folder in folders:
            try:
                known |= {style.name: style for style in _styles(folder / _STYLES)}
            except TightfitError as error:
                broken = error
        if broken and not known.keys() >= {*named}:
            raise broken
        return known


def without_hash(name: str) -> str:
    return _HASH.sub("", name)


def _item(name: str, entry: Entry) -> Item:
    model = described(entry)
    spec = model.spec
    try:
        can_edit = spec is not None and edits(spec)
    except (TightfitError, KeyError):
        can_edit = False
    if model.problem:  # in no list, so that only who names it is told
        return Item(name, entry.path, "")
    alias = _alias(entry.path) if model.kind == Kind.LORA.value else ""
    return Item(name, entry.path, model.kind, model.family, spec is not None, can_edit, alias)


def _alias(file: Path) -> str:
    return contents(file, stamp(file))[1].get("ss_output_name", "")[:_LONGEST]


def _is_models(root: Path) -> bool:
    return root.name.lower() == "models"


def _styles(file: Path) -> list[Style]:
    """Raises TightfitError for a file that is broken."""
    try:
        text = read_bytes(file, _STYLES_BYTES).decode("utf-8-sig")
        rows = [*csv.DictReader(io.StringIO(text), skipinitialspace=True)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise TightfitError(f"{file.name} cannot be read ({error}): save it again as UTF-8") from None
    return [
        # A1111's oldest files call the prompt text.
        Style(row["name"], row.get("prompt") or row.get("text") or "", row.get("negative_prompt") or "")
        for row in rows
        if row.get("name")
    ]
