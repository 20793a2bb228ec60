"""What A1111's endpoints have of one server: what may be named, and the options."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from PIL import Image

from ...service import Service
from ..served import picture_of
from .lists import Shelf
from .options import Options

_MAKING = threading.Lock()


@dataclass(frozen=True)
class Desk:
    """Of one application, for as long as that runs."""

    service: Service
    shelf: Shelf
    options: Options

    @classmethod
    def made(cls, service: Service, model: str) -> Desk:
        assert service.shelves, "a server needs Shelves: without them a name would be a path"
        shelf = Shelf(service.shelves)
        folder = service.folder
        return cls(service, shelf, Options(shelf, model, folder))

    def picture(self, text: Any, name: str) -> Image.Image:
        """The picture in base64. Raises TightfitError; for one that is too large before its pixels are
        decoded."""
        return picture_of(text, name, self.service.limits.pixels)


def _desk(request: Request) -> Desk:
    state = request.app.state
    with _MAKING:
        if not hasattr(state, "a1111"):
            state.a1111 = Desk.made(state.service, state.door.model)
        return state.a1111


At = Annotated[Desk, Depends(_desk)]
"""A handler's parameter."""
