"""Grids: what each cell asks, which one it is measured by, and sheets and pages with all of them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tightfit.__main__ import app
from tightfit.runtime.batch import grid
from tightfit.runtime.batch.grid import Axis, Grid
from tightfit.runtime.errors import TightfitError
from typer.testing import CliRunner


def test_axes_are_columns_and_words_of_the_prompt():
    assert Axis.read("steps=10, 20") == Axis("num_inference_steps", (10, 20))
    assert Axis.read("seed=1..3,7") == Axis("seed", (1, 2, 3, 7))
    assert Axis.read('scheduler=euler,"Euler a"').values == ("euler", "Euler a")
    assert Axis.read("lora=,a:0.5") == Axis("lora", (None, ["a:0.5"]))
    whole = Grid.read('prompt_sr=cat,dog,"red, fox"', "steps=2,3", "seed=5,6")
    cells = [row for _, row in whole.rows({"prompt": "a cat"})]
    assert len(cells) == len(whole.places) == 12
    assert cells[2] == {"prompt": "a red, fox", "num_inference_steps": 2, "seed": 5, "name": "cells/3-1-1"}
    assert cells[-1]["seed"] == 6


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("steps", "an axis is such as steps=10"),
        ("stepz=1", "unknown column 'stepz'"),
        ("name=a", "name is no axis"),
        ("steps=x", "must be a whole number"),
        ("seed=1..9999", "19998 cells"),
        ("width=64", "two axes are width"),
    ],
)
def test_what_is_no_axis(axis, said):
    with pytest.raises(TightfitError, match=said):
        Grid.read(axis, "width=64,96", None)
    with pytest.raises(TightfitError, match="'cow' of prompt_sr is not in the prompt"):
        [*Grid.read("prompt_sr=cow,dog", None, None).rows({"prompt": "a cat"})]


def test_ways_to_run_are_measured_by_fp32():
    whole = Grid.read("precision=int4,fp32", "residency=staged,resident", "seed=1,2")
    assert whole.exact((0, 1, 1)) == (1, 0, 1)
    assert whole.exact((1, 0, 0)) is None
    assert Grid.read("steps=1,2", None, None).exact((1, 0, 0)) is None


def test_psnr_is_skimages_formula():
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image, other = Image.fromarray(values), Image.fromarray(values // 2)
    mean = np.mean((values.astype(float) - values // 2) ** 2)
    assert grid.psnr(image, other) == pytest.approx(20 * np.log10(255) - 10 * np.log10(mean))
    assert grid.psnr(image, image) == 99


def test_a_sheet_and_a_page_have_every_cell(tmp_path):
    prompt = "<b>a cat & co</b>"
    arguments = [
        "grid", prompt, "--x", "prompt_sr=cat,<i>dog", "--y", "precision=fp32,bf16", "--z", "seed=1..2",
        "--width", "64", "--height", "64", "--steps", "2", "--device", "cpu", "--residency", "resident",
        "--attention", "sdpa", "--tiling", "whole", "-o", str(tmp_path / "g"),
    ]  # fmt: skip
    for _ in range(2):  # the second paints nothing
        result = CliRunner().invoke(app(), arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert "0 of them new" in result.output
    cells = [*(tmp_path / "g" / "cells").glob("*.png")]
    assert len(cells) == 8
    page = (tmp_path / "g" / "grid.html").read_text()
    assert not re.search("https?:", page)
    assert "<b>a cat" not in page
    assert "<i>dog" not in page
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = {Image.open(io.BytesIO(base64.b64decode(one))).tobytes() for one in sources}
    assert shown == {Image.open(cell).convert("RGB").tobytes() for cell in cells}
    assert page.count(" dB</small>") == 4
    for k in (1, 2):
        sheet = np.asarray(Image.open(tmp_path / "g" / f"grid-{k}.png"))
        cell = np.asarray(Image.open(Path(tmp_path, "g", "cells", f"2-1-{k}.png")))
        height, width = cell.shape[:2]
        corners = np.argwhere((sheet == cell[0, 0]).all(axis=2)).tolist()
        assert any(np.array_equal(sheet[y : y + height, x : x + width], cell) for y, x in corners)
