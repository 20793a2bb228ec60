"""The families that are run. The first that claims a model has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import TightfitError
from .family import Family, Network, Role
from .flux1 import Flux1, Flux1Schnell
from .flux2_klein import Flux2Klein
from .sd3 import SD3, SD3WithoutT5
from .sdxl import SDXL, SDXLRefiner
from .stable_diffusion import StableDiffusion
from .tiny import PREVIEW_DECODER
from .z_image import ZImage

if TYPE_CHECKING:
    from ..layouts import Source

FAMILIES: tuple[Family, ...] = (
    ZImage(),
    Flux2Klein(),
    Flux1Schnell(),
    Flux1(),
    SD3(),
    SD3WithoutT5(),
    SDXLRefiner(),
    SDXL(),
    StableDiffusion("sd2", True, "SD 2.x", 1024),
    StableDiffusion("sd1", False, "SD 1.x", 768),
)


def family_of(source: Source) -> Family:
    """Raises TightfitError for a model that none claims."""
    for family in FAMILIES:
        if family.claims(source):
            return family
    raise TightfitError(f"{source.folder} is of no family that tightfit runs: these are {titles()}")


def titles() -> str:
    """The families, as people call them, in words."""
    *others, last = dict.fromkeys(family.title for family in reversed(FAMILIES) if family.title)
    return f"{', '.join(others)} and {last}"


def networks() -> dict[str, Network]:
    """Every network of every family, by its name. Those of one name have one role."""
    return {network.name: network for family in reversed(FAMILIES) for network in family.networks}


def role_of(name: str) -> Role:
    """Of the network called so. Raises TightfitError for a name that no family has."""
    for network in (PREVIEW_DECODER, *(network for family in FAMILIES for network in family.networks)):
        if network.name == name:
            return network.role
    raise TightfitError(f"{name} is a network of no family that tightfit runs: {', '.join(networks())} are")


def reads_texts(width: int) -> str:
    """Models by how wide the texts are that they read, in words: those of a family, if they are published
    ones."""
    return f"{known_by(width) or 'a model'}, with texts {width} wide"


def known_by(width: int) -> str:
    """The families, in words, whose published models read texts so wide; '' for none."""
    titles = (family.title for family in reversed(FAMILIES) if width and family.reads == width)
    return " or ".join(dict.fromkeys(titles))
