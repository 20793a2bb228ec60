"""Folders of models as people have them: A1111's, ComfyUI's, or files side by side. What is there, and which
file a name means."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from ...errors import TightfitError
from ...files import PICKLES, SINGLE, config_folder, inside, read_bytes, readable, shortened

ENVIRONMENT = "TIGHTFIT_MODELS"
LORAS = "TIGHTFIT_LORAS"  # a folder of LoRAs beside those
CONFIG = "config.toml"
_PICKLES = tuple(pattern[1:] for pattern in PICKLES)
# Of two files that differ in their ending alone, the first is meant: who converts a file may keep both.
_ENDINGS = (*SINGLE, *_PICKLES)
_MOST_NAMED = 2  # folders in a message
_MOST_FILES, _MOST_DEPTH = 50_000, 8  # entries of all folders, and folders in folders
_TEXT_BYTES = 2**16  # limit of a config; ComfyUI's example has 1 kB
_WHOLE, _PART = "model_index.json", "diffusion_pytorch_model*.safetensors"
PART_OF = re.compile(r"-\d{5}-of-\d{5}$")  # how names end of files that hold a part of one network
_COMFY = "extra_model_paths.yaml"


class Kind(Enum):
    """What a file is for."""

    MODEL = "model"
    LORA = "LoRA"
    VAE = "VAE"
    EMBEDDING = "embedding"
    CONTROLNET = "ControlNet"
    UNET = "U-Net"
    TEXT_ENCODER = "text encoder"
    UPSCALER = "upscaler"
    IP_ADAPTER = "IP-Adapter"


# What a folder of this name holds, in lower case: A1111's, then ComfyUI's.
_SHELVES = {
    "stable-diffusion": Kind.MODEL,
    "lora": Kind.LORA,
    "lycoris": Kind.LORA,
    "vae": Kind.VAE,
    "vae-approx": Kind.VAE,
    "embeddings": Kind.EMBEDDING,
    "controlnet": Kind.CONTROLNET,
    "checkpoints": Kind.MODEL,
    "diffusers": Kind.MODEL,
    "loras": Kind.LORA,
    "vae_approx": Kind.VAE,
    "unet": Kind.UNET,
    "diffusion_models": Kind.UNET,
    "text_encoders": Kind.TEXT_ENCODER,
    "text_encoder": Kind.TEXT_ENCODER,
    "clip": Kind.TEXT_ENCODER,
    "esrgan": Kind.UPSCALER,
    "realesrgan": Kind.UPSCALER,
    "upscale_models": Kind.UPSCALER,
    "ipadapter": Kind.IP_ADAPTER,
}
# A1111 has two in one folder, and a denoiser alone is a model where its other networks are beside.
_ALSO_IN = {Kind.IP_ADAPTER: Kind.CONTROLNET, Kind.MODEL: Kind.UNET}


@dataclass(frozen=True)
class Entry:
    """A file, or a folder in diffusers' layout. `shelf` is what the folder that it is in is for, None where
    its name does not say; `home` is that folder."""

    path: Path
    home: Path
    shelf: Kind | None

    @property
    def name(self) -> str:
        """By which it can be asked for."""
        return self._bare(self.path.relative_to(self.home)).as_posix()

    @property
    def is_pickle(self) -> bool:
        return self.path.suffix.lower() in _PICKLES

    def is_called(self, name: str) -> bool:
        """Whether its path ends so, with or without its ending."""
        wanted = PurePath(name).parts
        return any(path.parts[-len(wanted) :] == wanted for path in (self.path, self._bare(self.path)))

    def _bare(self, path: Path) -> Path:
        is_file = path.suffix.lower() in _ENDINGS and not self.path.is_dir()
        return path.with_suffix("") if is_file else path


def folders(
    named: Sequence[str | Path] = (), kind: Kind | None = None, *, alone: bool = False
) -> tuple[Path, ...]:
    """Where models are, or those of a `kind`: in the folders that are `named`, and unless they stand `alone`
    in those of TIGHTFIT_MODELS and of the config file, LoRAs in that of TIGHTFIT_LORAS too."""
    of_environment = os.environ.get(ENVIRONMENT, "").split(os.pathsep)
    of_loras = [os.environ.get(LORAS, "")] if kind is Kind.LORA else []
    places = named if alone else (*named, *filter(None, of_loras + of_environment), *_configured())
    return tuple(dict.fromkeys(map(_expanded, places)))


def _expanded(place: str | Path) -> Path:
    try:
        return Path(place).expanduser().absolute()
    except (RuntimeError, ValueError):
        raise TightfitError(f"{shortened(str(place))} is in no folder of a user: name another") from None


def _configured() -> list[str]:
    folder = config_folder()
    if folder is None or not (file := folder / CONFIG).is_file():
        return []
    cure = 'it says models = ["a folder", "another"]'
    try:
        settings = tomllib.loads(read_bytes(file, _TEXT_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise TightfitError(f"{file} cannot be read ({error}): {cure}") from None
    models = settings.pop("models", [])
    if settings:
        raise TightfitError(
            f"{file} has the setting {shortened(next(iter(settings)))}, which is none: {cure}"
        )
    if not isinstance(models, list) or not all(isinstance(place, str) and place for place in models):
        raise TightfitError(f"{file} has models that are no list of folders: {cure}")
    return models


# ------------------------------------------------------------------------------------------ what is there


@dataclass
class Library:
    """What is in folders of models, and notes on what was left out; of that `links` may be asked for."""

    roots: Sequence[Path]
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    links: list[Entry] = field(default_factory=list)
    _left: int = _MOST_FILES

    def walk(self, folder: Path, home: Path, shelf: Kind | None, depth: int = 0) -> None:
        """Add what is in `folder`, and in those in it."""
        try:
            with os.scandir(folder) as places:
                paths = sorted(Path(place) for place in places if not place.name.startswith("."))
            is_model = _is_model(folder)
            entered = [] if is_model else [path for path in paths if self._may_enter(path, home, shelf)]
        except OSError as error:
            self.notes.append(f"{folder} cannot be read ({error.strerror}): allow it, or name another folder")
            return
        self._left -= len(paths)
        if self._left < 0 or depth > _MOST_DEPTH:
            what = f"more than {_MOST_FILES} files" if self._left < 0 else f"more than {_MOST_DEPTH} folders"
            self.notes.append(f"{folder} is not looked into, after {what}: name a folder of models alone")
            return
        if is_model:
            self.entries.append(Entry(folder, home if folder != home else folder.parent, shelf))
        for path in entered:
            self._add(path, home, shelf, depth)

    def _add(self, path: Path, home: Path, shelf: Kind | None, depth: int) -> None:
        if path.is_dir():
            kind = _SHELVES.get(path.name.lower())
            self.walk(path, path if kind else home, kind or shelf, depth + 1)
        elif path.suffix.lower() in _ENDINGS and path.is_file():
            self.entries.append(Entry(path, home, shelf))

    def _may_enter(self, path: Path, home: Path, shelf: Kind | None) -> bool:
        """Whether it is no link, or a link to a file in one of the folders. Folders there are met anyway."""
        if not path.is_symlink():
            return True
        if any(inside(path, root) for root in self.roots):
            return path.is_file()
        if path.is_dir() or path.suffix.lower() in _ENDINGS:
            self.links.append(Entry(path, home, shelf))
            self.notes.append(_left_out(path))
        return False


def _left_out(link: Path) -> str:
    place = link.resolve() if link.is_dir() else link.resolve().parent
    return f"{link} leads out of the folder, and is not followed: --models-dir {place} adds that"


def scan(roots: Sequence[Path]) -> Library:
    """What is in these folders, each A1111's or ComfyUI's (or its folder `models`), or any other. Raises
    TightfitError for one that is none."""
    starts: list[tuple[Path, Kind | None]] = []
    for root in roots:
        with readable(root):
            starts += _starts(root)
    library = Library(list(dict.fromkeys([*roots, *(folder for folder, _ in starts)])))
    for folder, shelf in dict.fromkeys(starts):
        library.walk(folder, folder, shelf)
    first = {entry.path.resolve(): entry for entry in reversed(library.entries)}
    library.entries = sorted(first.values(), key=lambda entry: (entry.path.parent, entry.path.name))
    return library


def _is_model(folder: Path) -> bool:
    """A diffusers folder, or that of one network."""
    return (folder / _WHOLE).is_file() or ((folder / "config.json").is_file() and any(folder.glob(_PART)))


def _starts(root: Path) -> Iterator[tuple[Path, Kind | None]]:
    """The folders of models at a place that somebody named, and what they are for."""
    if root.suffix.lower() in (".yaml", ".yml") and root.is_file():
        yield from _of_comfy(root)
        return
    if not root.is_dir():
        raise TightfitError(
            f"models are to be in {root}, which is no folder: "
            f"--models-dir, {ENVIRONMENT}, {LORAS} and {CONFIG} take folders"
        )
    models = root if root.name.lower() == "models" else root / "models"
    if _is_model(root) or not _has_shelves(models):
        yield root, _SHELVES.get(root.name.lower())
        return
    yield models, None
    if (embeddings := models.parent / "embeddings").is_dir():  # A1111's are beside
        yield embeddings, Kind.EMBEDDING
    if (paths := models.parent / _COMFY).is_file():
        yield from _of_comfy(paths)


def _has_shelves(models: Path) -> bool:
    try:
        return any(path.name.lower() in _SHELVES for path in models.iterdir())
    except OSError:
        return False


def _of_comfy(file: Path) -> Iterator[tuple[Path, Kind | None]]:
    """The folders that ComfyUI's extra_model_paths.yaml names, of kinds that are known here."""
    for section in _sections(file).values():
        texts = {k: v for k, v in section.items() if isinstance(v, str)} if isinstance(section, dict) else {}
        named = texts.pop("base_path", "")
        base = _expanded(named if named.startswith("~") else file.parent / named)
        for key, value in texts.items():
            kind = _SHELVES.get(str(key).lower())
            for line in filter(None, map(str.strip, value.splitlines() if kind else ())):
                if (base / line).is_dir():  # ComfyUI passes over those that are not there
                    yield base / line, kind


def _sections(file: Path) -> dict[str, Any]:
    import yaml  # huggingface_hub's

    try:
        content = yaml.safe_load(read_bytes(file, _TEXT_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:100]
        raise TightfitError(
            f"{file} cannot be read ({said}): mend it, or name the folders themselves"
        ) from None
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------ what a name means


def located(name: str, kind: Kind, models_dirs: Sequence[str | Path] = (), *, or_name: bool = False) -> str:
    """The path of what is called so in `models_dirs` or in the user's folders of models. A path that exists
    comes first, and is itself, as is every name without such folders.

    Raises TightfitError for a name that two have, or none, unless `or_name`.
    """
    roots = folders(models_dirs, kind)
    if not roots or name.startswith((".", "~")) or Path(name).is_absolute() or exists(name):
        return name
    if path := find(name, kind, roots):
        return str(path)
    if or_name:
        return name
    raise missing(name, kind, roots)


def exists(name: str | Path) -> bool:
    """Whether it is the path of something."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or a null character
        return False


def find(name: str, kind: Kind, roots: Sequence[Path]) -> Path | None:
    """The file or folder of this kind that is called so, with or without its ending, or with folders before
    it; None where there is none. Raises TightfitError for two."""
    return called(name, kind, scan(roots))


def called(name: str, kind: Kind, library: Library) -> Path | None:
    """As `find`, among what was scanned."""
    named = [entry for entry in _of_kind(library, kind) if entry.is_called(name)]
    if not named:
        return None
    best = min(_rank(entry, kind) for entry in named)
    first, *others = (entry for entry in named if _rank(entry, kind) == best)
    if others:
        more = f" ({len(others) - 1} more)" if others[1:] else ""
        cure = "rename one, or give its path, or its folder before its name"
        raise TightfitError(f"{first.path} and {others[0].path}{more} have one name: {cure}")
    return first.path


def near(file: Path, kind: Kind) -> list[Path]:
    """Whole files of a kind: in the folder of `file`, where any may be, on shelves there, beside that folder
    or beside the one that it is in, and in the user's folders of models."""
    beside = Library([file.parent])
    for folder in file.absolute().parents[:3]:
        with suppress(OSError):
            shelves = [place for place in folder.iterdir() if _SHELVES.get(place.name.lower()) is kind]
            for place in filter(Path.is_dir, shelves):
                beside.walk(place, place, kind)
    entries = [entry for library in (beside, scan(folders())) for entry in library.entries]
    there = [path for path in file.parent.iterdir() if path.suffix.lower() in SINGLE and path.is_file()]
    named = [*there, *(entry.path for entry in entries if entry.shelf is kind)]
    whole = (path for path in named if path.suffix.lower() in SINGLE and not PART_OF.search(path.stem))
    files = {path.resolve(): path for path in whole}
    return sorted(path for real, path in files.items() if real != file.resolve())


def _of_kind(library: Library, kind: Kind) -> list[Entry]:
    return [entry for entry in library.entries if entry.shelf in (None, kind, _ALSO_IN.get(kind))]


def _rank(entry: Entry, kind: Kind) -> tuple[int, int]:
    """What is in a folder for its kind comes before what is in any, and that before others, then by endings;
    a folder before a file."""
    ending = entry.path.suffix.lower()
    return [kind, None, _ALSO_IN.get(kind)].index(entry.shelf), _ENDINGS.index(
        ending
    ) if ending in _ENDINGS else -1


def _asked_by(shelf: Kind) -> str:
    option = shelf.name.lower().replace("_", "-")
    return "to tightfit upscale" if shelf is Kind.UPSCALER else f"by --{option}"


def missing(name: str, kind: Kind, roots: Sequence[Path], library: Library | None = None) -> TightfitError:
    """The error for a name that `find` finds nothing for, or that is not in what was scanned."""
    library = library or scan(roots)
    more = f" and {len(roots) - _MOST_NAMED} more" if roots[_MOST_NAMED:] else ""
    places = ", ".join(map(str, roots[:_MOST_NAMED])) + more
    said = f"no {kind.value} in {places} is called {shortened(name)}"
    if link := next((link for link in library.links if link.is_called(name)), None):
        return TightfitError(f"{said}: {_left_out(link.path)}")
    if other := next((entry for entry in library.entries if entry.is_called(name)), None):
        kind_there = other.shelf.value if other.shelf else "other"
        cure = f"{_asked_by(other.shelf)}, or as its path" if other.shelf else "as its path"
        return TightfitError(f"{said}: {other.path} is, in a folder for {kind_there} files; give it {cure}")
    return TightfitError(f"{said}{_meant(name, kind, library)}: tightfit models lists what is there")


def missing_here(name: str, kind: Kind, library: Library) -> TightfitError:
    """The same for a client of a server, who is told no path."""
    said = f"no {kind.value} here is called {shortened(name)}{_meant(name, kind, library)}"
    if any(link.is_called(name) for link in library.links):
        return TightfitError(f"{said}: a link that leads out of the folder is, and is not followed")
    if other := next((entry for entry in library.entries if entry.is_called(name)), None):
        return TightfitError(
            f"{said}: one is in a folder for {other.shelf.value if other.shelf else 'other'} files"
        )
    return TightfitError(f"{said}: choose one of the list of models")


def _meant(name: str, kind: Kind, library: Library) -> str:
    names = [entry.name for entry in _of_kind(library, kind)]
    bare = name[: -len(PurePath(name).suffix)] if PurePath(name).suffix.lower() in _ENDINGS else name
    close = get_close_matches(bare, names, 1)
    return f" (did you mean {close[0]}?)" if close else ""
