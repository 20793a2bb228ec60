"""The request in a PNG: exact for any text, readable by the field's tools, and A1111's own pictures understood."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tightfit.runtime import parameters
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request
from tightfit.runtime.schedulers import SCHEDULERS

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=60)
REQUEST = st.builds(
    Request,
    prompt=TEXT,
    negative_prompt=st.none() | TEXT,
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    num_inference_steps=st.integers(1, 100),
    guidance_scale=st.floats(0, 50),
    seed=st.integers(0, 2**63 - 1),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
)


@given(request=REQUEST, model=TEXT)
def test_round_trip(request, model):
    carried = parameters.parse(parameters.write(request, model, "bf16"), "x.png")
    assert (carried.model, carried.precision, carried.notices) == (model, "bf16", ())
    assert Request(**carried.request) == request


@pytest.mark.parametrize("prompt", ["a red heart", "ein rötes Hérz 心", "two\nlines", "Negative prompt: x\nSteps: 3, Seed: 4"])
def test_through_a_file(tmp_path, prompt):
    request = Request(prompt, "blue", 64, 64, 20, 7.5, 7, "euler_a")
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = parameters.write(request, "emoji", "fp32")
    path = parameters.save(image, tmp_path / "x.png")
    assert Image.open(path).text["parameters"] == image.info["parameters"]  # pyright: ignore[reportAttributeAccessIssue]
    assert Request(**parameters.read(path).request) == request


def test_an_empty_prompt_of_a1111_stays_empty():
    text = "\nNegative prompt: ugly\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64"
    request = parameters.parse(text, "x.png").request
    assert (request["prompt"], request["negative_prompt"]) == ("", "ugly")


def test_fields_that_other_tools_look_for():
    """The shape that A1111's infotext regular expression and its readers expect."""
    text = parameters.write(Request("a heart", "blue", 512, 768, 20, 7.5, 7, "dpmpp_2m_karras"), "a,b", "fp32")
    lines = text.split("\n")
    assert lines[:2] == ["a heart", "Negative prompt: blue"]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines[2]))
    assert pairs["Steps"] == "20"
    assert pairs["Sampler"] == "DPM++ 2M Karras"
    assert pairs["CFG scale"] == "7.5"
    assert pairs["Seed"] == "7"
    assert pairs["Size"] == "512x768"
    assert pairs["Model"] == '"a,b"'


A1111 = """a cat, (masterpiece:1.2)
in a hat
Negative prompt: dog,
ugly
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689"""


def test_pictures_of_a1111():
    carried = parameters.parse(A1111, "x.png")
    assert carried.request == {
        "prompt": "a cat, (masterpiece:1.2)\nin a hat",
        "negative_prompt": "dog,\nugly",
        "num_inference_steps": 25,
        "scheduler": "dpmpp_2m_karras",
        "guidance_scale": 7.0,
        "seed": 965400086,
        "width": 512,
        "height": 768,
    }
    assert (carried.model, carried.precision) == (None, None)
    assert "weights and adapters in the prompt" in carried.notices[0]
    assert "Clip skip 2" in parameters.parse(A1111 + ", Clip skip: 2", "x.png").notices[0]
    automatic = parameters.parse(A1111.replace("Karras", "Automatic"), "x.png")
    assert automatic.request["scheduler"] == "dpmpp_2m_karras"
    heun = parameters.parse(A1111.replace("DPM++ 2M, Schedule type: Karras", "Heun"), "x.png")
    with pytest.raises(TightfitError, match="unknown scheduler 'Heun'"):
        Request(**heun.request).checked()


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "a\nSteps: x, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 8x8",
        'a\nSteps: 1, tightfit: "{}"',
        'a\nSteps: 1, tightfit: "3"',
    ],
)
def test_damaged_text(text):
    with pytest.raises(TightfitError, match=r"x\.png"):
        parameters.parse(text, "x.png")


def test_unreadable_pictures(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    for name, word in (("nothing.png", "does not exist"), ("x.png", "not a picture"), ("y.png", "carries no")):
        with pytest.raises(TightfitError, match=word):
            parameters.read(tmp_path / name)


def test_a_bomb_is_not_opened(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(TightfitError, match="too large"):
        parameters.read(tmp_path / "x.png")


def test_save_leaves_nothing_half_written(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(TightfitError, match=r"\.png"):
        parameters.save(image, tmp_path / "x.jpg")
    with pytest.raises(TightfitError, match="cannot be written"):
        parameters.save(image, tmp_path / "no" / "x.png")
    with pytest.raises(TightfitError, match="cannot be written"):
        parameters.save(image, tmp_path / "a\0b.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(TightfitError, match="cannot be written"):
        parameters.save(image, tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
