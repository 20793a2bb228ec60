"""Where pictures go: templates of names, formats, sheets, and what is never replaced."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tightfit.__main__ import app
from tightfit.runtime import infotext, pictures
from tightfit.runtime.cli.naming import Template, safe, values
from tightfit.runtime.cli.saving import Saver, Writing, target
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request
from typer.testing import CliRunner

MOMENT = datetime(2026, 3, 4, 15, 6, 7)


def painted(prompt: str = "A red heart, please", seed: int = 7) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    request = Request(prompt, "blue", 64, 48, 20, 7.5, seed, "dpmpp_2m_karras")
    image.info["parameters"] = infotext.write(request, "/models/dreamshaper_8.safetensors", "bf16")
    return image


def filled(template: str, prompt: str = "A red heart, please") -> str:
    carried = infotext.parse(painted(prompt).info["parameters"], "x")
    return Template(Path(template)).filled(values(carried, "3", MOMENT)).as_posix()


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("plain.png", "plain.png"),
        ("a[1].png", "a[1].png"),
        ("out/[date]/[seed]-[prompt_words].png", "out/2026-03-04/7-A red heart please.png"),
        ("[steps]_[CFG]_[width]x[Height].png", "20_7.5_64x48.png"),
        ("[sampler].jpg", "DPM++ 2M Karras.jpg"),
        ("[model_name]-[model_hash].png", "dreamshaper_8-unknown.png"),
        ("[datetime].png", "20260304150607.png"),
        ("[datetime<%Y/%m %H:%M>].png", "2026_03 15_06.png"),
        ("[prompt].png", "A_red_heart,_please.png"),
        ("[prompt_spaces].png", "A red heart, please.png"),
        ("[number]-[generation_number].png", "3-3.png"),
        ("[precision]-[scheduler]-[negative_prompt].png", "bf16-dpmpp_2m_karras-blue.png"),
        ("[[seed]]-[seed].png", "[seed]-7.png"),
        ("../[seed]/..x/[seed].webp", "../7/..x/7.webp"),
    ],
)
def test_fields(template, path):
    if "%Y/%m" in template:
        template = template.replace("/", "|")
    assert filled(template) == path


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "_.._etc_passwd"),
        ('a/b\\c:d*e?f"g<h>i|j', "a_b_c_d_e_f_g_h_i_j"),
        ("...", "_"),
        ("con", "_con"),
        ("LPT1.txt", "_LPT1.txt"),
        ("console", "console"),
        ("a\n\tb\x1b\u202ec", "a bc"),
        (" . a . ", "a"),
    ],
)
def test_values_are_safe(prompt, name):
    assert filled("[prompt_spaces].png", prompt) == f"{name}.png"


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=300))
def test_any_value_is_one_short_part(text):
    part = safe(text)
    assert len(part.encode()) <= 120
    assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', part)
    assert part == part.strip(" .")
    path = Template(Path("a/[prompt_spaces][prompt_spaces][prompt_spaces]/[prompt_spaces].png"))
    whole = path.filled({"prompt_spaces": part})
    assert len(whole.parts) == 3
    assert all(len(name.encode()) <= 255 for name in whole.parts)
    assert not any(name.strip(".") == "" for name in whole.parts)
    assert not PureWindowsPath(whole.name).is_reserved()


@pytest.mark.parametrize(
    ("template", "nearest"),
    [("[sed].png", "[seed]"), ("[promt_words]", "[prompt_words]"), ("[modelname]/x", "")],
)
def test_unknown_fields_are_one_line(template, nearest):
    with pytest.raises(TightfitError, match="in --output is no field") as caught:
        target(Path(template), "a", 1)
    assert nearest in str(caught.value)
    assert "[[" in str(caught.value)


def test_a_folder_with_brackets_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "[old] x" + "y" * 240 + "."
    Path(name).mkdir()
    saver = Saver(target(Path(name), "a heart", 1), 1, Writing())
    saver(painted(), 0)
    assert saver.paths == [Path(name) / "a-heart.png"]


def test_several_pictures_and_their_sheet(tmp_path, monkeypatch):
    """A number where nothing else tells them apart; nothing that is there is replaced."""
    monkeypatch.chdir(tmp_path)
    for output, names, sheet in (
        (None, ["a.png", "a.png"], "a-grid.png"),
        ("x.webp", ["x.webp", "x.webp"], "x-grid.webp"),
        ("[seed].jpg", ["7.jpg", "8.jpg"], "7-grid.jpg"),
        ("[date]/[number].png", ["1.png", "2.png"], "grid.png"),
    ):
        saver = Saver(target(output and Path(output), "a", 2), 2, Writing(grid=True))
        images = [painted(seed=7), painted(seed=8)]
        for number, image in enumerate(images):
            saver(image, number)
        saver.sheet(images)
        numbered = [n if n[0].isdigit() else n.replace(".", f"-{i}.") for i, n in enumerate(names, 1)]
        assert [path.name for path in saver.paths] == numbered
        assert saver.grid
        assert saver.grid.name == sheet
        assert infotext.read(saver.grid).request["seed"] == 7
    again = Saver(target(Path("[seed].jpg"), "a", 1), 1, Writing())
    again(painted(), 0)
    assert again.paths == [Path("7-2.jpg")]


def test_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form, ending, name in (("png", ".png", "PNG"), ("jpeg", ".jpg", "JPEG"), ("webp", ".webp", "WEBP")):
        assert target(None, "a", 1, form).path == Path(f"a{ending}")
        assert target(Path(f"x{ending}"), "a", 1, form).path == Path(f"x{ending}")
        saver = Saver(target(None, "a", 1, form), 1, Writing(form, 80, "a1111"))
        saver(painted(), 0)
        with Image.open(saver.paths[0]) as image:
            assert image.format == name
    for wrong in (Writing("gif"), Writing(metadata="much"), Writing(quality=0)):
        with pytest.raises(TightfitError, match=r"choose|whole number"):
            wrong.checked()
    with pytest.raises(TightfitError, match="leave one of them out"):
        target(Path("x.png"), "a", 1, "webp")


def test_by_the_command(tmp_path, monkeypatch):
    """Each is repeated to the last bit, a1111's text without our JSON too."""
    monkeypatch.chdir(tmp_path)

    one_way = "--residency", "staged", "--attention", "sdpa", "--tiling", "whole"

    def run(*arguments):
        done = CliRunner().invoke(app(), ["generate", *arguments, *one_way])
        assert done.exit_code == 0, done.output
        return done

    size = ("--steps", "1", "--width", "64", "--height", "64", "--precision", "fp32", "--scheduler", "euler")
    run("a red heart", *size, "--seed", "5", "--num-images", "2", "--grid", "-o", "[seed].png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5-grid.png", "5.png", "6.png"]
    run("--from", "6.png", "-o", "a.webp", "--metadata", "a1111", "--quality", "100")
    run("--from", "a.webp", "-o", "b.jpg", "--metadata", "none")
    run("--from", "a.webp", "-o", "c.png")
    pixels = [Image.open(name).convert("RGB").tobytes() for name in ("6.png", "a.webp", "c.png")]
    assert len(set(pixels)) == 1
    assert pictures.texts(Path("b.jpg")) == {}
