"""What an option is called here that others call otherwise, by diffusers' own signatures."""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest
import tightfit
from tightfit.runtime import spelling
from tightfit.runtime.asking import names
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.planner.wishes import Wishes

KNOWN = {*names(), "conditions"}
PIPELINES = [
    f"StableDiffusion{xl}{kind}Pipeline"
    for xl in ("", "XL")
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "Adapter")
]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_argument_of_diffusers_is_known_or_explained(name):
    arguments = inspect.signature(getattr(diffusers, name).__call__).parameters
    for argument in arguments.keys() - KNOWN - {"self", "kwargs"}:
        assert argument in spelling.OF_REQUESTS, argument


@pytest.mark.parametrize(
    ("table", "known"), [(spelling.OF_REQUESTS, KNOWN), (spelling.OF_MODELS, {*Wishes.__dataclass_fields__})]
)
def test_what_it_is_here_exists(table, known):
    assert not table.keys() & known
    for meant in table.values():
        named = re.match(r"it is (\w+)", meant)
        assert not named or named[1] in {*known, "adapters", "device", "of"}, meant


def test_in_python(sd1):
    with tightfit.load(str(sd1), device="cpu") as pipe:
        for name, said in (
            ("num_images_per_prompt", "it is num_images$"),
            ("padding_mask_crop", "it is mask_padding$"),
            ("guidance_scales", r"did you mean guidance_scale\?"),
            ("mask_images", r"did you mean mask_image\?"),
            ("zzz", "choose negative_prompt, "),
        ):
            with pytest.raises(TightfitError, match=f"unknown option '{name}': {said}"):
                pipe("a cat", **{name: 1})
    with pytest.raises(TightfitError, match="unknown option 'torch_dtype': it is precision"):
        tightfit.load(str(sd1), torch_dtype="float16")
    with pytest.raises(TightfitError, match="did you mean residency"):
        tightfit.load(str(sd1), residence="staged")
