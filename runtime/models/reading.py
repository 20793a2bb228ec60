"""From a path to a model: a layout reads it, a family claims it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..files import readable
from .families import family_of
from .families.family import Network, Role
from .families.networks import check_config
from .layouts import Layout, Source
from .layouts.diffusers import DiffusersLayout
from .layouts.gguf import GGUFLayout
from .layouts.single_file import SingleFileLayout
from .layouts.split_file import SplitLayout
from .spec import Component, ModelSpec

LAYOUTS: tuple[Layout, ...] = (SplitLayout(), SingleFileLayout(), GGUFLayout(), DiffusersLayout())


def read_source(path: Path) -> Source:
    """What the first layout that claims `path` finds there. Raises TightfitError."""
    return next(layout for layout in LAYOUTS if layout.claims(path)).read(path)


def read_model(path: Path, name: str | None = None) -> ModelSpec:
    """The model at `path`, called `name`. Raises TightfitError for whatever is missing, broken or not
    supported."""
    with readable(path):
        source = read_source(path)
        design = family_of(source)
        components = {network.name: source.component(network) for network in design.networks}
        for component in components.values():
            check_config(component)
        denoiser = next(component for component in components.values() if component.role is Role.DENOISER)
        spec = ModelSpec(
            name=name or str(path.absolute()),
            folder=source.folder,
            design=design,
            components=components,
            scheduler=source.scheduler(),
            defaults=source.manifest.get("defaults", {}),
            precision=source.manifest.get("precision") if denoiser.formats is not None else None,
            source=source.manifest.get("source"),
            pipeline=source.pipeline,
            notes=source.notes,
            sides=dict(source.sides),
            spare=partial(_checked, source),
            settings=source.settings,
        )
        design.check(spec)
        return spec


def _checked(source: Source, network: Network) -> Component:
    with readable(source.folder):
        component = source.component(network)
        check_config(component)
        return component
