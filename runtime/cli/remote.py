"""`--connect`: a picture painted by a running server, and saved here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import interrupts
from ..errors import TightfitError
from .output import progress_bar, say
from .serve import KEY

if TYPE_CHECKING:
    from PIL import Image

    from ..client import Painted
    from ..events import Event


def paint(
    url: str,
    asked: Mapping[str, Any],
    wished: Mapping[str, Any],
    save: Callable[[Image.Image, int], object],
) -> Painted:
    """Paint what is asked at the server, and save each picture. Its key is in TIGHTFIT_API_KEY, if it has
    one. Ctrl-C cancels the job. Raises TightfitError, also for what the server says."""
    from ..client import connect

    interrupts.tidily()
    wishes = {name: value for name, value in wished.items() if value is not None}
    with connect(url, os.environ.get(KEY) or None, **wishes) as remote, progress_bar(8) as bar:
        task = bar.add_task("waiting", total=1)

        def show(event: Event) -> None:
            bar.update(task, description=event.stage, completed=event.step, total=event.steps or None)

        painted = remote.generate(on_event=show, **asked)
    for notice in painted.notices:
        say(f"note: {notice}", err=True)
    if not painted.images:
        raise TightfitError(f"{url} answered without a picture: look at the server's log")
    for index, image in enumerate(painted.images):
        save(image, index)
    return painted
