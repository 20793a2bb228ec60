"""The request in a PNG: exact for any text, readable by the field's tools, and A1111's own pictures
understood."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import tightfit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tightfit.runtime import infotext as parameters
from tightfit.runtime.adapters.vae import Vae
from tightfit.runtime.conditions import asked, carried
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.kept import Hashes
from tightfit.runtime.models.hub import BUILT_IN
from tightfit.runtime.models.samplers.names import SAMPLERS
from tightfit.runtime.pictures import save
from tightfit.runtime.request import Request

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
    scheduler=st.sampled_from(sorted(SAMPLERS)),
)


@given(request=REQUEST, model=TEXT)
def test_round_trip(request, model):
    carried = parameters.parse(parameters.write(request, model, "bf16"), "x.png")
    assert (carried.model, carried.precision, carried.notices) == (model, "bf16", ())
    assert Request(**carried.request) == request


@pytest.mark.parametrize(
    "prompt", ["a red heart", "ein rötes Hérz 心", "two\nlines", "Negative prompt: x\nSteps: 3, Seed: 4"]
)
def test_through_a_file(tmp_path, prompt):
    request = Request(prompt, "blue", 64, 64, 20, 7.5, 7, "euler_a")
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = parameters.write(request, "emoji", "fp32")
    path = save(image, tmp_path / "x.png")
    assert Image.open(path).text["parameters"] == image.info["parameters"]  # pyright: ignore[reportAttributeAccessIssue]
    assert Request(**parameters.read(path).request) == request


def test_an_empty_prompt_of_a1111_stays_empty():
    text = "\nNegative prompt: ugly\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64"
    request = parameters.parse(text, "x.png").request
    assert (request["prompt"], request["negative_prompt"]) == ("", "ugly")


def test_fields_that_other_tools_look_for():
    """The shape that A1111's infotext regular expression and its readers expect."""
    text = parameters.write(
        Request("a heart", "blue", 512, 768, 20, 7.5, 7, "dpmpp_2m_karras"), "a,b", "fp32"
    )
    lines = text.split("\n")
    assert lines[:2] == ["a heart", "Negative prompt: blue"]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines[2]))
    assert pairs["Steps"] == "20"
    assert pairs["Sampler"] == "DPM++ 2M Karras"
    assert pairs["CFG scale"] == "7.5"
    assert pairs["Seed"] == "7"
    assert pairs["Size"] == "512x768"
    assert pairs["Model"] == '"a,b"'


# What tightfit 0.1.0 wrote.
OF_TODAY = (
    "a red heart\nNegative prompt: blue\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: emoji, "
    r'Precision: fp32, tightfit: "{\"model\": \"emoji\", \"precision\": \"fp32\", '
    r"\"prompt\": \"a red heart\", "
    r"\"negative_prompt\": \"blue\", \"width\": 64, \"height\": 48, \"num_inference_steps\": 20, "
    r"\"guidance_scale\": 7.5, "
    r'\"seed\": 7, \"scheduler\": \"euler_a\", \"num_images\": 1}"'
)
REQUEST_OF_TODAY = Request("a red heart", "blue", 64, 48, 20, 7.5, 7, "euler_a")


def changed(remove: tuple[str, ...] = (), **add) -> str:
    """OF_TODAY with other fields in its JSON."""
    head, _, quoted = OF_TODAY.partition("tightfit: ")
    exact = {name: value for name, value in json.loads(json.loads(quoted)).items() if name not in remove}
    return f"{head}tightfit: {json.dumps(json.dumps(exact | add))}"


def test_pictures_of_today_stay_readable():
    carried = parameters.parse(OF_TODAY, "x.png")
    assert Request(**carried.request) == REQUEST_OF_TODAY
    assert (carried.model, carried.precision, carried.notices) == ("emoji", "fp32", ())
    more = OF_TODAY.replace("Precision: fp32", "RNG: CPU, Precision: fp32, Version: tightfit 0.1.0")
    assert parameters.write(REQUEST_OF_TODAY, "emoji", "fp32") == more


@pytest.mark.parametrize(
    "missing", [("num_images",), ("seed", "scheduler"), ("negative_prompt", "width", "height")]
)
def test_what_an_older_picture_does_not_know_has_its_default(missing):
    carried = parameters.parse(changed(missing), "x.png")
    defaults = {name: getattr(Request("a"), name) for name in missing}
    assert Request(**carried.request) == dataclasses.replace(REQUEST_OF_TODAY, **defaults)
    assert (carried.model, carried.notices) == ("emoji", ())


def test_what_a_newer_picture_knows_is_noted():
    carried = parameters.parse(changed(strength=0.5, mask=None, loras=["x" * 1000]), "x.png")
    assert Request(**carried.request) == REQUEST_OF_TODAY
    (notice,) = carried.notices
    assert "x.png" in notice
    assert "strength 0.5, loras ['xxx" in notice
    assert "mask" not in notice  # null: nothing was asked
    assert len(notice) < 200
    many = parameters.parse(changed(**{f"field{i}": i for i in range(1000)}), "x.png")
    assert "990 more" in many.notices[0]
    assert len(many.notices[0]) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", "64"),
        ("width", 6.5),
        ("seed", True),
        ("guidance_scale", "7"),
        ("scheduler", ["euler"]),
        ("negative_prompt", 3),
        ("num_images", None),
        ("num_inference_steps", {}),
    ],
)
def test_wrong_types_are_one_line(name, value):
    with pytest.raises(TightfitError, match=rf"inside x\.png is damaged, in its {name}: it cannot") as caught:
        parameters.parse(changed(**{name: value}), "x.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asking",
    [
        5, {"strength": "all"}, {"strength": True}, {"control": 5}, {"control": "ab"}, {"control": [1]},
        {"mask_image": "a.png"}, {"control_image": ["a.png"]}, {"image": "a.png", "strength": 0.5},
        {"control": ["a.png:weight=1"]}, {"control": [r":model=\\evil\share\m"]},
    ],
)  # fmt: skip
def test_a_strangers_conditions_name_no_pictures(asking):
    """Nor anything of another type; whatever a picture says of its conditions' names."""
    for names in (["ImageToImage"], None, 3):
        with pytest.raises(TightfitError, match=r"inside x\.png is damaged, in its asking") as caught:
            parameters.parse(changed(asking=asking, conditions=names), "x.png")
        assert "\n" not in str(caught.value)


def test_what_conditions_say_is_what_a_picture_may_carry():
    picture = Image.new("RGB", (64, 64), "red")
    mask = {"image": picture, "mask_image": Image.new("L", (64, 64), 255)}
    every = [
        *asked({**mask, "mask_padding": 8}), *asked({"image": picture, "outpaint": "left=8"}),
        *asked({"control_image": picture, "controlnet": "x"}),
        *asked({"image": picture, "image_guidance_scale": 1.5}),
    ]  # fmt: skip
    assert len(every) == 4
    for condition in every:
        assert condition.said().keys() <= carried().keys()
    said = {name: value for condition in every for name, value in condition.said().items()}
    assert parameters.parse(changed(asking=said), "x.png").asking == {
        name: value for name, value in said.items() if value is not None
    }


@pytest.mark.parametrize("name", ["prompt", "model", "precision"])
def test_what_every_picture_has_is_demanded(name):
    for text in (changed((name,)), changed(**{name: None}), changed(**{name: 3})):
        with pytest.raises(TightfitError, match="is damaged"):
            parameters.parse(text, "x.png")


A1111 = """a cat, (masterpiece:1.2)
in a hat
Negative prompt: dog,
ugly
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768,\
 Model hash: 6ce0161689"""


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
        "noise_source": "gpu",
    }
    assert (carried.model, carried.precision) == (None, None)
    assert "Hypernet x" in parameters.parse(A1111 + ", Hypernet: x", "x.png").notices[0]
    words = parameters.parse(A1111 + ", Clip skip: 2, Emphasis: No norm", "x.png")
    assert (words.request["clip_skip"], words.request["emphasis"]) == (2, "no-norm")
    assert words.notices == carried.notices
    automatic = parameters.parse(A1111.replace("Karras", "Automatic"), "x.png")
    assert automatic.request["scheduler"] == "dpmpp_2m_karras"
    other = parameters.parse(A1111.replace("DPM++ 2M, Schedule type: Karras", "Restart"), "x.png")
    with pytest.raises(TightfitError, match="unknown scheduler 'Restart'"):
        Request(**other.request).checked()


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


def test_no_negative_prompt_is_none():
    """A1111 zeroes SDXL's conditioning where the negative prompt is empty (its modules/sd_models_xl.py); None
    does here."""
    line = "Steps: 1, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64"
    for text in (f"a\n{line}", f"a\nNegative prompt:\n{line}", f"a\nNegative prompt: \n{line}"):
        assert parameters.parse(text, "x.png").request["negative_prompt"] is None


def test_lines_below_the_settings():
    """Dynamic Prompts writes its templates there; the request stays what it is, our own exact one too."""
    below = "\nTemplate: a {cat|dog}, Steps: many\nNegative Template: ugly: very,\nsecond line"
    assert parameters.parse(A1111 + below, "x.png") == parameters.parse(A1111, "x.png")
    request = Request("Steps: 3, of stairs\nSteps: 4", None, 64, 64, 20, 7.5, 7, "euler_a")
    text = parameters.write(request, "m", "fp32")
    for more in ("", below):
        assert Request(**parameters.parse(text + more, "x.png").request) == request


# A1111's own, modules/infotext_utils.py.
ORIGINAL = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize(
    "line",
    [
        A1111.split("\n")[-1],
        'Steps: 20, Sampler: Euler, Lora hashes: "a: 1, b: 2", TI hashes: "x: \\\\"y\\\\"", Version: v1.10',
        'Steps: 20, Model: "unclosed, Seed: 1, VAE: "a" b, Size: 1x1,',
        "Steps: 20,,Sampler:,CFG scale:7 , Hires upscale: 2,",
        "Steps: 1, Name: C:/models/x.safetensors, Size: 8x8",
    ],
)
def test_settings_are_split_as_a1111_splits_them(line):
    assert list(parameters._pairs(line)) == [
        (name.strip(), value.strip()) for name, value in ORIGINAL.findall(line)
    ]


def test_what_is_written_is_what_png_info_shows(tmp_path):
    """By A1111's own expression: the model by its name and hash, the VAE, and where the noise is from."""
    file = tmp_path / "dream, shaper_8.safetensors"
    file.write_bytes(b"a model of few bytes")
    vae = tmp_path / "mse"
    shutil.copytree(BUILT_IN["emoji"] / "vae", vae)
    job = Request("a heart", None, 64, 48, 20, 7.0, 7, "euler_a", adapters=(Vae(vae),))
    line = parameters.write(job, str(file), "fp32").split("\n")[-1]
    pairs = dict(ORIGINAL.findall(line))
    assert pairs == {
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7.0",
        "Seed": "7",
        "Size": "64x48",
        "Model hash": hashlib.sha256(file.read_bytes()).hexdigest()[:10],
        "Model": '"dream, shaper_8"',
        "VAE": "mse",
        "RNG": "CPU",
        "Precision": "fp32",
        "Version": "tightfit 0.1.0",
        "tightfit": pairs["tightfit"],
    }
    assert json.loads(json.loads(pairs["tightfit"]))["model"] == str(file)


def test_a_large_model_is_not_hashed_for_a_picture(tmp_path, monkeypatch):
    """To read 2 GB takes 4 s. A hash that is known is written."""
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.truncate(2**26 + 1)
    request = Request("a", None, 64, 48, 20, 7.0, 7, "euler")
    assert "Model hash" not in parameters.write(request, str(file), "fp32")
    digest = Hashes().compute(file)
    monkeypatch.setattr("tightfit.runtime.kept.sha256", lambda _: pytest.fail("was hashed"))
    assert f"Model hash: {digest[:10]}, Model: large," in parameters.write(request, str(file), "fp32")
    for other in ("emoji", "someone/a-model", str(tmp_path), str(tmp_path / "gone"), "a\0b", ""):
        assert "Model hash" not in parameters.write(request, other, "fp32")


@pytest.mark.parametrize(
    "unit", ["a", "a ", "a:", 'a:"', 'a:"\\",', ":", ",", "Steps: 1\n", "a: ", '"', "\\", "Steps: 1, a: x, "]
)
def test_hostile_text_takes_no_time(unit):
    """A word of 60 kB took 15 s: every letter of it was tried as the beginning of a name."""
    import time

    start = time.process_time()
    for text in (unit * (600_000 // len(unit)), "Steps: 1, " + unit * (600_000 // len(unit))):
        with contextlib.suppress(TightfitError):
            carried = parameters.parse(text, "x.png")
            assert len(carried.notices[0]) < 1000
    assert time.process_time() - start < 20  # about a second; hours if any of it were quadratic
    with pytest.raises(TightfitError, match="too many"):
        parameters.parse("a" * 5_000_000, "x.png")


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000, '{"prompt": ' + "[" * 100_000])
def test_nested_json(nested):
    with pytest.raises(TightfitError, match="is damaged"):
        parameters.parse(f"a\nSteps: 1, tightfit: {json.dumps(nested)}", "x.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1)) -> bytes:
    """A whole picture with these chunks; pixels are a chunk IDAT of no content."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(4)))
    rest = b"".join(pixels if kind == b"IDAT" else chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + chunk(b"IEND", b"")


TEXT_CHUNK = (b"tEXt", b"parameters\0" + A1111.encode("latin-1"))
PIXELS = (b"IDAT", b"")
LARGE = bytes(2 * 2**20)


@pytest.mark.parametrize(
    "chunks",
    [
        [TEXT_CHUNK, PIXELS],
        [PIXELS, TEXT_CHUNK],
        [PIXELS, (b"zTXt", b"parameters\0\0" + zlib.compress(A1111.encode()))],
        [PIXELS, (b"iTXt", b"parameters\0\0\0en\0\0" + A1111.encode())],
        [PIXELS, (b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(A1111.encode()))],
        [(b"tEXt", b"workflow\0" + b"x" * 2**21), TEXT_CHUNK, PIXELS],
        [(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)), TEXT_CHUNK, PIXELS],
        [(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE)), PIXELS, TEXT_CHUNK],
        [(b"tEXt", b"parameters2\0x"), (b"tEXt", b"no end"), TEXT_CHUNK, PIXELS],
    ],
)
def test_parameters_anywhere_in_the_file(tmp_path, chunks):
    (tmp_path / "x.png").write_bytes(png(*chunks))
    assert parameters.read(tmp_path / "x.png") == parameters.parse(A1111, "x.png")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (png((b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**24)))), "too long"),  # 16 MiB in 16 kB
        (png((b"zTXt", b"parameters\0\0" + zlib.compress(b"a")[:-3])), "cut"),
        (png((b"zTXt", b"parameters\0\0garbage")), "not a picture"),
        (png((b"zTXt", b"parameters\0")), "unknown way"),
        (png((b"iTXt", b"parameters\0\0\0")), "damaged"),
        (png((b"iTXt", b"parameters\0\0\0\0\0\xff")), "not a picture"),
        (png((b"tEXt", b"parameters\0" + bytes(5 * 2**20))), "too many"),
        (png(TEXT_CHUNK, size=(60_000, 60_000)), "too large"),
        (png(TEXT_CHUNK, size=(0, 1)), "or none"),
        (png(TEXT_CHUNK).replace(b"masterpiece", b"masterpie  "), "checksum"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31, b"tEXt"), "no header"),
        (b"\xff\xd8\xff\xe0 a JPEG", "no PNG"),
        (b"", "no PNG"),
        (png(PIXELS), "carries no"),
        (png((b"tEXt", b"parameters\0")), "carries no"),
        (png(*[(b"IDAT", b"")] * 3)[:-30], "carries no"),
    ],
)
def test_damaged_pictures(tmp_path, data, word):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(TightfitError, match=word) as caught:
        parameters.read(tmp_path / "x.png")
    assert "x.png" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system there")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for path in (tmp_path / "x.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(TightfitError):
            parameters.read(path)


def test_unreadable_pictures(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    for name, word in (
        ("nothing.png", "does not exist"),
        ("x.png", "not a picture"),
        ("y.png", "carries no"),
    ):
        with pytest.raises(TightfitError, match=word):
            parameters.read(tmp_path / name)


def test_save_leaves_nothing_half_written(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(TightfitError, match=r"\.png"):
        save(image, tmp_path / "x.gif")
    with pytest.raises(TightfitError, match="cannot be written"):
        save(image, tmp_path / "no" / "x.png")
    with pytest.raises(TightfitError, match="cannot be written"):
        save(image, tmp_path / "a\0b.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(TightfitError, match="cannot be written"):
        save(image, tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("links", [True, False])
def test_many_at_once_never_replace_each_other(tmp_path, monkeypatch, links):
    """As processes that paint the same prompt; also where the file system has no links."""
    from concurrent.futures import ThreadPoolExecutor

    if not links:
        monkeypatch.setattr(
            "os.link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
        )
    images = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda image: save(image, tmp_path / "a.png", overwrite=False), images))
    assert (
        {path.name for path in paths}
        == {"a.png", *(f"a-{i}.png" for i in range(2, 25))}
        == {p.name for p in tmp_path.iterdir()}
    )
    for path, image in zip(paths, images, strict=True):
        assert Image.open(path).getpixel((0, 0)) == image.getpixel((0, 0))


def test_words_travel():
    """What changes how a prompt is read is written; a picture of 0.1.0 with marks was painted as words."""
    for request in (
        Request("a (red:1.3) heart", seed=1, clip_skip=2, emphasis="ignore"),
        Request("a (red:1.3) heart", seed=1, prompt_syntax="plain"),
        Request("a red heart", "long " * 40, seed=1),
        Request("", seed=1),
    ):
        whole = dataclasses.replace(
            request, num_inference_steps=1, guidance_scale=1.0, scheduler="euler", width=8, height=8
        )
        text = parameters.write(whole, "m", "fp32")
        assert Request(**parameters.parse(text, "x.png").request) == whole
        assert ("Clip skip: 2" in text) == (request.clip_skip == 2)
        assert ("Emphasis: Ignore" in text) == (request.emphasis == "ignore")
    old = changed(prompt="a (red:1.3) heart")
    assert parameters.parse(old, "x.png").request["prompt_syntax"] == "plain"
    assert "prompt_syntax" not in parameters.parse(changed(), "x.png").request


# Lines of settings as A1111 writes them, each of which has something that does nothing for its sampler, or is
# out of our bounds: every one is repeated, without these.
WRITTEN = [
    ("Sampler: DPM++ 2M Karras, ENSD: 31337", {"scheduler": "dpmpp_2m_karras"}),
    ("Sampler: DDIM, ENSD: 31337, Eta: 0.67", {"scheduler": "ddim"}),
    ("Sampler: DDIM, Eta DDIM: 0.5, ENSD: 31337", {"eta": 0.5, "ensd": 31337}),
    ("Sampler: Euler a, ENSD: 31337, Eta: 0.67", {"ensd": 31337, "eta": 0.67}),
    ("Sampler: Euler a, Eta: 0, ENSD: 31337", {"eta": 0.0}),
    ("Sampler: DPM++ 2M SDE, Eta: 0.67, Eta DDIM: 0.2", {"eta": 0.67}),
    ("Sampler: DPM++ SDE Karras, Eta: 0.67", {"scheduler": "dpmpp_sde_karras"}),
    ("Sampler: Heun, Sigma noise: 1.003", {"scheduler": "heun_uniform"}),
    ("Sampler: DPM2, Sigma churn: 5", {"scheduler": "dpm2_karras"}),
    ("Sampler: Euler, Sigma churn: 5, Sigma noise: 1.003, Eta: 0.5", {"s_churn": 5.0, "s_noise": 1.003}),
    ("Sampler: LMS, Eta: 0.5, Skip Early CFG: 1.0", {"scheduler": "lms_uniform"}),
    ("Sampler: Euler, Seed resize from: 500x500", {"seed_resize": "496x496"}),
    (
        "Sampler: Euler, Clip skip: 0, Variation seed: 5, Variation seed strength: 0",
        {"scheduler": "euler_uniform"},
    ),
    ("Sampler: PLMS, Schedule type: Karras", {"scheduler": "pndm"}),
    ("Sampler: DPM++ 2M, Schedule type: KL Optimal", {"scheduler": "dpmpp_2m_karras"}),
    ("Sampler: Euler a, Emphasis: None", {"scheduler": "euler_a_uniform"}),
]


@pytest.mark.parametrize(("line", "fields"), WRITTEN)
def test_what_other_programs_always_write_is_no_reason_to_refuse(line, fields, tiny_models):
    text = f"a cat\nSteps: 4, {line}, CFG scale: 7, Seed: 5, Size: 64x64, Version: v1.10.1"
    carried = parameters.parse(text, "x.png")
    assert carried.request.items() >= fields.items()
    job = Request(**carried.request).resolve(tightfit.inspect(str(tiny_models["sd1"])))
    assert job.seed == 5
    for name in ("Emphasis", "Schedule type"):
        assert not re.search(f"{name}: ", line) or f"{name} " in carried.notices[0]


def test_a_prompt_that_begins_with_a_brace(tmp_path):
    """As Fooocus's JSON does."""
    for number, prompt in enumerate(("{masterpiece}, a cat", "{cat|dog", '{"a": 1}')):
        image = Image.new("RGB", (8, 8))
        line = "Steps: 3, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"
        image.info["parameters"] = f"{prompt}\nNegative prompt: {{bad}}\n{line}"
        save(image, tmp_path / f"{number}.png")
        request = parameters.read(tmp_path / f"{number}.png").request
        assert (request["prompt"], request["negative_prompt"]) == (prompt, "{bad}")


def test_text_without_our_json_says_the_same(tiny_models):
    """For each sampler, plain words, and an empty negative prompt."""
    spec = tightfit.inspect(str(tiny_models["sd1"]))
    for scheduler in SAMPLERS:
        wanted = Request("a (b)", "", scheduler=scheduler, prompt_syntax="plain", seed=1, width=64, height=64)
        text = parameters.write(wanted.resolve(spec), "m", "fp32").rpartition(", tightfit: ")[0]
        read = Request(**parameters.parse(text, "x").request).resolve(spec)
        assert (read.scheduler, read.prompt_syntax, read.negative_prompt) == (
            wanted.resolve(spec).scheduler, "plain", "",
        ), scheduler  # fmt: skip
