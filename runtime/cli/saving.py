"""Where pictures go: a place checked before anything is computed, files that replace no others unasked."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from ..errors import TightfitError
from .output import say

if TYPE_CHECKING:
    from PIL import Image


def target(output: Path | None, prompt: str, num_images: int) -> tuple[Path, str]:
    """Folder and file name to write to. Raises TightfitError where no picture can be written."""
    words = "-".join(re.findall(r"\w+", prompt.lower())).encode()[:60].decode(errors="ignore").strip("-")
    folder, name = output or Path(), f"{words or 'picture'}.png"
    try:
        if output is not None and output.suffix and not output.is_dir():
            if output.suffix.lower() != ".png":
                refused = f"--output {output} is no .png, as which pictures are written"
                raise TightfitError(f"{refused}: name a .png, or a folder")
            folder, name = output.parent, output.name
        # What of the folder is missing is made for the first picture.
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with suppress(FileNotFoundError):
            (existing / f"{num_images}-{name}").lstat()  # too long a name fails here, not after the work
        TemporaryFile(dir=existing).close()
    except OSError as error:
        cause = f"nothing can be written to {output or name} ({error.strerror})"
        raise TightfitError(f"{cause}: name another place with --output") from None
    return folder, name


class Saver:
    """Writes pictures as they come, and never over a file that is there, unless asked to."""

    def __init__(self, folder: Path, name: str, count: int, overwrite: bool) -> None:
        self.paths: list[Path] = []
        self._folder, self._name, self._count, self._overwrite = folder, Path(name), count, overwrite

    def __call__(self, image: Image.Image, index: int) -> None:
        """Write picture `index` of the request."""
        from ..png import save

        numbered = f"{self._name.stem}-{index + 1}{self._name.suffix}" if self._count > 1 else self._name.name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"the folder {self._folder} cannot be made ({error.strerror})"
            raise TightfitError(f"{cause}: name another place") from None
        wanted = self._folder / numbered
        path = save(image, wanted, self._overwrite)
        if path.name != numbered:
            say(f"note: {wanted} is there, so this is {path.name}: --overwrite replaces files", err=True)
        self.paths.append(path)

    def tell(self) -> None:
        """Say what there is of a request that did not end."""
        if self.paths:
            some = f"{self.paths[0]} … {self.paths[-1].name}" if len(self.paths) > 1 else f"{self.paths[0]}"
            say(f"note: {len(self.paths)} of {self._count} pictures are saved: {some}", err=True)
