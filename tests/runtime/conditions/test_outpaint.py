"""Outpainting: inpainting of a canvas that was made by hand, and a picture that stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import tightfit
from PIL import Image, ImageOps
from tightfit.runtime.conditions import asked
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.conditions.mask import Inpainting
from tightfit.runtime.conditions.outpaint import Margins, Outpainting
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.infotext import parse

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
    (40, 48), 3
)
WISH = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 5.0, "scheduler": "euler"}


def test_it_is_inpainting_of_a_larger_canvas(tiny_models):
    """`original` is begun with edges drawn out; here one column and one row are repeated by hand."""
    canvas = Image.new("RGB", (64, 56))
    canvas.paste(PICTURE.crop((0, 0, 1, 48)).resize((16, 48)), (0, 0))
    canvas.paste(PICTURE, (16, 0))
    canvas.paste(PICTURE.crop((39, 0, 40, 48)).resize((8, 48)), (56, 0))
    canvas.paste(canvas.crop((0, 47, 64, 48)).resize((64, 8)), (0, 48))
    mask = ImageOps.expand(Image.new("L", (40, 48)), (16, 0, 8, 8), 255)
    with tightfit.load(str(tiny_models["sd1"]), device="cpu", precision="fp32") as pipeline:
        mine = pipeline(
            "a cat", image=PICTURE, outpaint="left=16, right=8,bottom=5", mask_content="original",
            strength=0.7, **WISH,
        )  # fmt: skip
        inpainting = Inpainting(open_picture(canvas), mask=open_picture(mask), strength=0.7)
        request = tightfit.Request("a cat", conditions=(inpainting,), **WISH)
        assert (np.asarray(mine) == np.asarray(pipeline.generate(request).images[0])).all()
        (default,) = asked({"image": PICTURE, "outpaint": {"left": 16, "right": 8, "bottom": 8}})
        result = pipeline.generate(tightfit.Request("a cat", conditions=(default,), **WISH))
    for stage, measured in result.stages.items():
        if predicted := result.plan.predicted.stages.get(stage):
            assert abs(measured.peak_bytes - predicted) <= 0.05 * predicted, stage
    for picture in (mine, result.images[0]):
        assert (np.asarray(picture)[:48, 16:56] == np.asarray(PICTURE)).all()
    carried = parse(mine.info["parameters"], "x")
    assert carried.asking["outpaint"] == "left=16,right=8,bottom=8"
    assert asked({**carried.asking, "image": PICTURE}) == asked(
        {
            "image": PICTURE,
            "outpaint": "left=16,right=8,bottom=8",
            "mask_content": "original",
            "strength": 0.7,
        }
    )


def test_what_it_begins_with_is_of_the_edges_alone():
    """Red in the middle of blue leaves no red around it."""
    inner = ImageOps.expand(Image.new("RGB", (40, 40), "red"), 12, "blue")
    (condition,) = asked({"image": inner, "outpaint": "all=32"})
    assert isinstance(condition, Outpainting)
    begun = np.asarray(condition.filled(condition.image.image, condition.mask.image.convert("L")))
    assert (begun[32:96, 32:96] == np.asarray(inner)).all()
    outside = begun.copy()
    outside[32:96, 32:96] = (0, 0, 255)
    assert outside[..., 0].max() < 128
    assert begun[:24].max(axis=(0, 1)).tolist() == [0, 0, 255]


def test_a_canvas_is_as_large_as_models_take(tiny_models):
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    for size, given, sides in (
        ((50, 64), "left=10", (64, 64)),
        ((50, 61), "right=10", (64, 64)),
        ((50, 61), "top=1,right=1", (56, 64)),
    ):
        conditions = asked({"image": Image.new("RGB", size), "outpaint": given})
        job = tightfit.Request("a", conditions=conditions).resolve(spec)
        assert (job.width, job.height) == sides
        assert job.request.resolve(spec).width == job.width
    assert Margins.read("ALL=64, left=8") == (8, 64, 64, 64)
    assert str(Margins.read({"top": 3})) == "top=3"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(
            ({"outpaint": wrong}, "outpaint must be pixels at the left, right, top or bottom")
            for wrong in ("", "left", "top=0", "top=-8", "up=8", "8px", "top=4097", "top=²", {"left": 8.5})
        ),
        ({"outpaint": "left=8", "image": None}, "--outpaint is of a picture to begin with"),
        ({"outpaint": "left=8", "mask_image": PICTURE}, "two masks"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(given, words):
    with pytest.raises(TightfitError, match=words):
        asked({"image": PICTURE, **given})


def test_what_cannot_be_asked(tiny_models):
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    conditions = asked({"image": PICTURE, "outpaint": "left=8"})
    with pytest.raises(TightfitError, match="48x48, not 64x48: leave --width and --height out"):
        tightfit.Request("a", width=64, conditions=conditions).resolve(spec)
    huge = {"image": Image.new("RGB", (4000, 3000)), "outpaint": "left=96"}
    with pytest.raises(TightfitError, match=r"more than 4 times the model's .*: give --mask-padding 64"):
        tightfit.Request("a", conditions=asked(huge)).resolve(spec)
    part = tightfit.Request("a", conditions=asked({**huge, "mask_padding": 64})).resolve(spec)
    assert (part.height, part.width) == spec.native_size


def test_what_is_transparent_is_painted_too():
    alpha = Image.new("L", PICTURE.size, 255)
    alpha.paste(0, (0, 0, 10, 10))
    clear = PICTURE.copy()
    clear.putalpha(alpha)
    (condition,) = asked({"image": clear, "outpaint": "left=8"})
    mask = np.asarray(condition.mask.image.convert("L"))
    assert (mask[:10, 8:18] == 255).all() and (mask[:, :8] == 255).all()
    assert not mask[12:, 20:].any()


def test_more_digits_than_python_reads():
    with pytest.raises(TightfitError, match="outpaint must be pixels"):
        asked({"image": PICTURE, "outpaint": "left=" + "9" * 5000})
