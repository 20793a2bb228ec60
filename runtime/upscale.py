"""Enlarges pictures by an upscaler, which stays loaded from one to the next, within the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import pictures, spelling
from .conditions.handed import way_of
from .conditions.input_pictures import Picture, open_picture
from .conditions.pasting import filled
from .errors import OutOfMemoryError, TightfitError
from .events import Measured
from .infotext import is_json, place_of_settings, quoted
from .loaded import Loaded
from .machine.hardware import Hardware
from .machine.process import ProcessPeak
from .models.layouts import library
from .models.upscalers import a1111_name, alone, enlarged, file_of, read_upscaler
from .planner import upscaling
from .planner.plan import Plan
from .planner.wishes import Wishes
from .units import shown

MOST_SCALE = 8
MOST_PIXELS = 2**28  # of what a pass makes: 16384x16384


@dataclass(frozen=True)
class Enlarged:
    """A picture, by which plan it was made, and what that took."""

    image: Image.Image
    plan: Plan
    measured: Measured
    notices: tuple[str, ...] = ()


class Upscaler:
    """Enlarges one picture after another by the network in a file. Use as a context manager, or `close` it,
    to free what is loaded.

    model: a path, or a name in folders of models. wishes: fields of Wishes, such as budget ("4GiB") and
    precision. When memory runs out all the same, it goes on by a plan that takes less.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        models_dirs: Sequence[str | Path] = (),
        hardware: Hardware | None = None,
        **wishes: Any,
    ) -> None:
        if unknown := [name for name in wishes if name not in Wishes.__dataclass_fields__]:
            raise spelling.unknown(unknown[0], Wishes.__dataclass_fields__, spelling.OF_MODELS)
        name = str(model)
        if way_of(name) and not library.exists(name):
            raise TightfitError(f"{name} takes no network, as any program resizes: name an upscaler's file")
        self.component = read_upscaler(library.located(file_of(name), library.Kind.UPSCALER, models_dirs))
        self.hardware = hardware or Hardware.detect(device)
        self.wishes, self.spec = Wishes(**wishes), alone(self.component)
        self.loaded = Loaded(self.hardware)

    @property
    def scale(self) -> int:
        """The network's own."""
        return self.component.config["scale"]

    @property
    def name(self) -> str:
        return self.component.folder.stem

    def wanted(self, scale: float | None) -> float:
        return self.scale if scale is None else scale

    def sizes(self, picture: Picture, scale: float | None = None) -> list[tuple[int, int]]:
        """What each pass through the network enlarges. Raises TightfitError for what is too much."""
        if scale is not None and (not isinstance(scale, int | float) or not 1 <= scale <= MOST_SCALE):
            raise TightfitError(f"scale must be a number from 1 to {MOST_SCALE}, not {scale!r}")
        own, wanted = self.scale, self.wanted(scale)
        if own == 1 and wanted > 1:
            raise TightfitError(
                f"{self.name} keeps a picture's size: leave out --scale, or name another model"
            )
        sizes, reached = [(picture.height, picture.width)], own
        while reached < wanted:
            sizes.append((picture.height * reached, picture.width * reached))
            reached *= own
        if picture.height * picture.width * reached**2 > MOST_PIXELS:
            raise TightfitError(
                f"{picture.source} of {picture.width}x{picture.height} pixels would have more than "
                f"{MOST_PIXELS}, {reached} times as large: make it smaller"
            )
        return sizes

    def plans(self, picture: Any, scale: float | None = None, *, every: bool = True) -> list[Plan]:
        """Every way to enlarge `picture` here, the one that will be taken first."""
        sizes = self.sizes(open_picture(picture), scale)
        return upscaling.plans(self.hardware, self.spec, sizes, self.wishes, every=every)

    def __call__(self, picture: Any, scale: float | None = None) -> Image.Image:
        """`picture` (a file, a PIL image or an array) `scale` times as large: the network's own scale, or
        Lanczos' reduction of the next one above, of two passes where one is not enough."""
        return self.enlarge(picture, scale).image

    def enlarge(
        self, picture: Any, scale: float | None = None, on_pass: Callable[[], object] = lambda: None
    ) -> Enlarged:
        """As a call, with everything known about it. `on_pass` is called before each pass through the
        network."""
        given = open_picture(picture)
        sizes = self.sizes(given, scale)
        run = _Run(self, sizes)
        image = run.enlarged(given, on_pass)
        wanted = self.wanted(scale)
        size = round(given.width * wanted), round(given.height * wanted)
        if image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        if given.alpha is not None:
            image.putalpha(Image.fromarray(given.alpha).resize(size, Image.Resampling.LANCZOS))
        image.info |= _texts(picture)
        if text := image.info.get(pictures.PARAMETERS):
            image.info[pictures.PARAMETERS] = said(text, wanted, a1111_name(self.name))
        return Enlarged(image, run.plan, run.measured, tuple(run.notices))

    def close(self) -> None:
        """Free what is loaded. It is loaded again when it is needed."""
        self.loaded.close()

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One picture, enlarged in one pass or more."""

    def __init__(self, upscaler: Upscaler, sizes: Sequence[tuple[int, int]]) -> None:
        self._upscaler, self._sizes, self._loaded = upscaler, sizes, upscaler.loaded
        self.notices: list[str] = []
        self.plan = self._planned(every=False)[0]
        if not self.plan.fits:
            raise upscaling.none_fits(self._planned(), upscaler.hardware, sizes)

    def _planned(self, *, every: bool = True) -> list[Plan]:
        upscaler = self._upscaler
        return upscaling.plans(upscaler.hardware, upscaler.spec, self._sizes, upscaler.wishes, every=every)

    def enlarged(self, picture: Picture, on_pass: Callable[[], object]) -> Image.Image:
        process, start = ProcessPeak(), time.perf_counter()
        array = np.asarray(_opaque(picture)).transpose(2, 0, 1)[None]
        self._load_seconds = 0.0
        with self._loaded.budget.claim(self._loaded):
            process.reset()
            self._take(self.plan)
            self._loaded.reset_peak()
            for _ in self._sizes:
                on_pass()
                array = self._surviving(array)
            peak_bytes = self._loaded.peak_bytes()
            process_bytes = process.bytes()
        seconds = time.perf_counter() - start
        self.measured = Measured(seconds, self._load_seconds, peak_bytes, process_bytes)
        if self.plan.device == "cpu" and process_bytes > self.plan.budget_bytes:
            held, allowed = shown(process_bytes), shown(self.plan.budget_bytes)
            self.notices.append(f"the process held {held}, more than the {allowed} it was to keep to")
        return Image.fromarray(np.ascontiguousarray(array[0].transpose(1, 2, 0)))

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        self._loaded.take(plan, self._upscaler.spec)

    def _called(self, name: str, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        component, is_new = self._upscaler.component, name not in self._loaded.sessions
        start = time.perf_counter()
        session = self._loaded.session(component, self.plan.placements[name])
        if is_new:
            self._load_seconds += time.perf_counter() - start
            self.notices += session.notices
        return session(**arrays)

    def _surviving(self, array: np.ndarray) -> np.ndarray:
        """The array enlarged once; where memory runs out, by a plan that takes less."""
        while True:
            try:
                return enlarged(self._upscaler.component, self._called, array)
            except OutOfMemoryError as error:
                smaller = self._smaller()
                if smaller is None:
                    raise
                self.notices.append(f"out of memory ({error}): goes on {way(smaller)}")
            self._loaded.free()
            self._take(smaller)

    def _smaller(self) -> Plan | None:
        plans, peak_bytes = self._planned(), self.plan.predicted.peak_bytes
        less = (plan for plan in plans if plan.fits and plan.predicted.peak_bytes < peak_bytes)
        return next(iter(sorted(less, key=lambda plan: plan.predicted.seconds)), None)


def way(plan: Plan) -> str:
    """How a plan enlarges, in words: 'bf16, in strips'."""
    (placement,) = plan.placements.values()
    return f"in {placement.precision}, {'whole' if placement.tiling == 'whole' else 'in strips'}"


def _opaque(picture: Picture) -> Image.Image:
    """The picture's colours where it is transparent too: as they are, or those around."""
    if picture.alpha is None:
        return picture.image
    share = picture.alpha[..., None].astype(np.float32) / 255
    colours = (picture.pixels - 255 * (1 - share)) / np.maximum(share, 1 / 255)
    image = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8))
    return filled(image, Image.fromarray(np.where(picture.alpha, 0, 255).astype(np.uint8)))


def _texts(picture: Any) -> dict[str, str]:
    """What programs have written of how the picture was made."""
    if isinstance(picture, Image.Image):
        texts = {name: picture.info.get(name) for name in pictures.KEPT}
        return {name: text for name, text in texts.items() if isinstance(text, str)}
    if isinstance(picture, str | Path):
        for every in (True, False):
            with suppress(TightfitError):  # a picture of another format, or damaged behind the first text
                return pictures.texts(Path(picture), every)
    return {}


def said(text: str, scale: float, name: str) -> str:
    """With what A1111 says of an enlarged picture: on the line of settings, before our JSON. A text that is
    JSON stays as it is."""
    if is_json(text):
        return text
    words = f", Postprocess upscale by: {scale:g}, Postprocess upscaler: {quoted(name)}"
    lines = text.rstrip().split("\n")
    place = place_of_settings(lines)
    ours = pictures.ours(lines[place])
    lines[place] = lines[place].removesuffix(ours) + words + ours
    return "\n".join(lines)


def upscale(picture: Any, model: str | Path, scale: float | None = None, **options: Any) -> Image.Image:
    """`picture` (a file, a PIL image or an array), enlarged by the upscaler at `model`, a file or a name in
    folders of models: `scale` times, the network's own by default.

    Options are those of Upscaler: budget="4GiB", precision="fp32", device="cpu" … For many pictures use an
    Upscaler, which stays loaded.
    """
    with Upscaler(model, **options) as upscaler:
        return upscaler(picture, scale)
