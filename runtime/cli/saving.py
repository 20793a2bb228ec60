"""Where pictures go: a place checked before anything is computed, files that replace no others unasked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from .. import infotext, pictures
from ..adapters import ADAPTERS
from ..errors import TightfitError
from .naming import NUMBERS, Template, values
from .output import say

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
FORMATS = tuple(ENDINGS)


@dataclass(frozen=True)
class Writing:
    """How pictures are written. `form` is one of FORMATS, None for what the name of a file says."""

    form: str | None = None
    quality: int | None = None
    metadata: str = "full"
    overwrite: bool = False
    grid: bool = False

    def checked(self) -> Writing:
        for name, value, known in (
            ("format", self.form, FORMATS),
            ("metadata", self.metadata, pictures.METADATA),
        ):
            if value is not None and value not in known:
                raise TightfitError(f"unknown --{name} {value}: choose {', '.join(known)}")
        if self.quality is not None:
            pictures.check_quality(self.quality)
        return self


def target(output: Path | None, prompt: str, num_images: int, form: str | None = None) -> Template:
    """The path to write to, whose ending says the format. Raises TightfitError where no picture can be
    written."""
    words = "-".join(re.findall(r"\w+", prompt.lower())).encode()[:60].decode(errors="ignore").strip("-")
    folder, name = output or Path(), f"{words or 'picture'}{ENDINGS[form or 'png']}"
    try:
        if output is not None and output.suffix and "]" not in output.suffix and not output.is_dir():
            _check_ending(output, form)
            folder, name = output.parent, output.name
        template = Template(_plain(folder) / name if folder.is_dir() else folder / name)
        # What of the folder is missing is made for the first picture.
        existing = next(place for place in (template.start, *template.start.parents) if place.exists())
        with suppress(FileNotFoundError):
            (existing / f"{num_images}-{name}").lstat()  # too long a name fails here, not after the work
        TemporaryFile(dir=existing).close()
    except OSError as error:
        cause = f"nothing can be written to {output or name} ({error.strerror})"
        raise TightfitError(f"{cause}: name another place with --output") from None
    return template


def _plain(folder: Path) -> Path:
    """A folder that is there, whatever brackets its name has."""
    return Path(re.sub(r"\[([^\[\]]*)\]", r"[[\1]]", str(folder)))


def _check_ending(output: Path, form: str | None) -> None:
    ending = output.suffix.lower()
    if ending not in pictures.FORMATS:
        *some, last = pictures.FORMATS
        refused = f"--output {output} is no {', '.join(some)} or {last}, as which pictures are written"
        raise TightfitError(f"{refused}: name one of these, or a folder")
    if form and pictures.FORMATS[ending] != form.upper():
        raise TightfitError(f"--output {output} is no {form}, as --format has it: leave one of them out")


class Saver:
    """Writes pictures as they come, and never over a file that is there, unless asked to."""

    def __init__(self, template: Template, count: int, writing: Writing) -> None:
        self.paths: list[Path] = []
        self.grid: Path | None = None
        self._template, self._count, self._writing = template, count, writing
        self._moment = datetime.now()

    def __call__(self, image: Image.Image, index: int) -> None:
        """Write picture `index` of the request."""
        apart = self._count == 1 or not self._template.names.isdisjoint({"seed", *NUMBERS})
        self.paths.append(self._write(image, str(index + 1), "" if apart else f"-{index + 1}"))

    def sheet(self, images: Sequence[Image.Image]) -> None:
        """Write all pictures on one beside them, if that was asked for."""
        if not self._writing.grid or len(images) < 2:
            return
        whole = pictures.sheet(images, self._template.path.suffix.lower())
        if whole is None:
            say(f"note: {len(images)} pictures are too many for one sheet, so there is none", err=True)
            return
        has_number = not self._template.names.isdisjoint(NUMBERS)
        self.grid = self._write(whole, "grid", "" if has_number else "-grid")

    def _write(self, image: Image.Image, number: str, more: str) -> Path:
        wanted = self._template.filled(self._values(image, number), more)
        if wanted in self.paths:  # whose fields say no more than those of one before
            wanted = self._template.filled(self._values(image, number), f"-{number}")
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"the folder {wanted.parent} cannot be made ({error.strerror})"
            raise TightfitError(f"{cause}: name another place") from None
        writing = self._writing
        path = pictures.save(
            image,
            wanted,
            writing.overwrite,
            quality=writing.quality or pictures.QUALITY,
            metadata=writing.metadata,
        )
        if path.name != wanted.name:
            say(f"note: {wanted} is there, so this is {path.name}: --overwrite replaces files", err=True)
        self._say_what_is_left(image, path)
        return path

    def _values(self, image: Image.Image, number: str) -> dict[str, str]:
        """What the fields of the path stand for. The picture carries all of it; its adapters are not looked
        at."""
        if not self._template.names:
            return {}
        given = [kind.option for kind in ADAPTERS]
        carried = infotext.parse(image.info[pictures.PARAMETERS], "the picture", given)
        return values(carried, number, self._moment)

    def _say_what_is_left(self, image: Image.Image, path: Path) -> None:
        text, metadata = image.info.get(pictures.PARAMETERS), self._writing.metadata
        if pictures.kept(text, metadata, path.suffix.lower()) != pictures.kept(text, metadata, ".png"):
            say(f"note: {path} has no room for all of its text: a PNG or a WebP has", err=True)

    def tell(self) -> None:
        """Say what there is of a request that did not end."""
        if self.paths:
            some = f"{self.paths[0]} … {self.paths[-1].name}" if len(self.paths) > 1 else f"{self.paths[0]}"
            say(f"note: {len(self.paths)} of {self._count} pictures are saved: {some}", err=True)
