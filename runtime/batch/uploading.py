"""Copies of a batch's pictures at an address that fsspec knows: s3://, gs://, sftp:// and many others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from ..errors import TightfitError, first_line

# A small file waits for answers, not for bandwidth. What fsspec runs on its own loop takes several calls at
# once; others, such as ftp, have one connection, on which two threads' commands would mix.
_AT_ONCE, _ONE = 4, 1
_PASSWORD = re.compile(r"(://[^/@:]*:)[^/]*@")  # ftp://user:password@host: what is said goes into logs


class Upload:
    """What is in a folder, and is to be at an address by the same names. Use as a context manager."""

    def __init__(self, folder: Path, url: str) -> None:
        """Raises TightfitError for an address that cannot be read."""
        import fsspec

        self._folder, self._said = folder, _PASSWORD.sub(r"\1…@", url)
        try:
            self._there, root = fsspec.core.url_to_fs(url)
            self._root = root.rstrip("/")
            self._sizes = self._listed()
        except ImportError as error:  # which names the package
            raise TightfitError(f"--upload {self._said}: {first_line(error)}") from None
        except Exception as error:  # whatever the protocol's package raises
            raise TightfitError(f"--upload {self._said} cannot be reached: {first_line(error)}") from None
        at_once = _AT_ONCE if self._there.async_impl else _ONE
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="tightfit-upload")
        self._coming: list[Future[None]] = []
        self._copied: set[str] = set()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # after an error the same command goes on

    def begin(self, file: Path) -> None:
        """Copy one, while others are painted."""
        self._coming.append(self._pool.submit(self._put, file))

    def finish(self, files: Iterable[str]) -> str:
        """Wait for those, and copy what of `files` is not there, once more what failed; a line that says so.
        Raises TightfitError where that fails again; the next time goes on."""
        wait(self._coming)
        places = [self._folder / file for file in files]
        missing = [file for file in places if self._sizes.get(self._place(file)) != file.stat().st_size]
        again = [self._pool.submit(self._put, file) for file in missing]
        errors = [error for one in again if (error := one.exception())]
        if errors:
            said = f"{len(errors)} pictures are not at {self._said} ({first_line(errors[0])})"
            raise TightfitError(f"{said}: the same command uploads them")
        return f"{len(places)} pictures are at {self._said}, {len(self._copied)} of them copied now"

    def _put(self, file: Path) -> None:
        place = self._place(file)
        self._sizes.pop(place, None)  # of what is replaced: it may be as large
        self._there.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._there.pipe_file(place, content := file.read_bytes())
        self._sizes[place] = len(content)
        self._copied.add(place)

    def _place(self, file: Path) -> str:
        return f"{self._root}/{file.relative_to(self._folder).as_posix()}"

    def _listed(self) -> dict[str, int]:
        try:
            found = self._there.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {name: about["size"] for name, about in found.items()}
