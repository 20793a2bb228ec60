"""The command line as a user meets it: a picture and one line, or one line and exit code 2."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from tightfit.__main__ import app
from tightfit.runtime import pictures
from tightfit.runtime.cli import generate, saving
from tightfit.runtime.cli import plan as cli_plan
from tightfit.runtime.cli.app import main
from tightfit.runtime.machine import detect
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.request import of_others

STEP = ("--steps", "1")
# One way to run each precision, and one in all, so that little is planned.
ANY = (*STEP, "--residency", "staged", "--attention", "sdpa", "--tiling", "whole")
FAST = (*ANY, "--precision", "fp32")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; answers (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    app()

    def run(*arguments: str, stdin: str | None = None):
        import io

        monkeypatch.setattr(sys, "argv", ["tightfit", *arguments])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    return run


def test_another_models_precision_is_not_carried(call, tiny_models, tmp_path):
    """It may have no such weights. The same model by another way to write its folder is the same."""
    sd1, sd2 = tiny_models["sd1"], tiny_models["sd2"]
    assert call("a", "--model", str(sd1), "--precision", "int8", "--seed", "7", *ANY, "-o", "one.png")[0] == 0
    code, out, err = call("--from", "one.png", "--model", str(sd1), *ANY, "-o", "two.png", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["plan"]["placements"]["unet"]["precision"] == "int8"
    code, out, err = call("--from", "one.png", "--model", str(sd2), *ANY, "-o", "three.png", "--json")
    assert code == 0
    assert "one.png was painted in int8, by another model" in err
    assert json.loads(out)["plan"]["placements"]["unet"]["precision"] != "int8"


def test_rows_are_answered_in_their_columns_names(call):
    Path("rows.jsonl").write_text('{"prompt": "a", "num_inference_steps": -3}\n')
    code, _, err = call("batch", "rows.jsonl", "-o", "out")
    assert (code, err.startswith("tightfit: row 1: num_inference_steps must be")) == (2, True), err


def test_guidance_of_another_kind_of_model_is_said(tiny_model, sd1):
    klein, base = inspect(str(tiny_model("flux2-klein"))), inspect(str(sd1))
    kept = {"guidance_scale": 1.0, "num_inference_steps": 4}
    said = generate._guided_otherwise(kept, {}, base)
    assert said.startswith("the guidance scale of the picture, 1 in 4 steps, is kept; ")
    assert said.endswith("has 7.5 in 20: --guidance-scale 7.5 --steps 20")
    for picture, typed in ((kept, {"num_inference_steps": 8}), ({"guidance_scale": 1.0}, {})):
        said = generate._guided_otherwise(picture, typed, base)
        assert "picture, 1, is kept" in said
        assert said.endswith("has 7.5: --guidance-scale 7.5")
    assert not generate._guided_otherwise(kept, {"guidance_scale": 1.0}, base)
    for spec, scale in ((base, 3.0), (klein, 1.0)):
        assert not generate._guided_otherwise(kept | {"guidance_scale": scale}, {}, spec)
    carried = {"negative_prompt": "ugly", "guidance_rescale": 0.5, "skip_guidance_layers": "1", "seed": 3}
    assert of_others(carried, base) == ["skip_guidance_layers"]
    assert {*of_others(carried, klein)} == {*carried} - {"seed"}


def test_what_another_family_takes_not_is_not_carried(call, sd1, tiny_model, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save("a.png")
    klein, sized = tiny_model("flux2-klein"), ("--width", "64", "--height", "64", *FAST)
    one = ("x", "--model", str(klein), *sized, "--reference", "a.png", "--reference", "a.png", "-o", "b.png")
    assert call(*one)[0] == 0
    code, _, err = call("--from", "b.png", "--model", str(sd1), *FAST, "-o", "c.png")
    assert code == 0
    assert f"{sd1.name} takes no reference, by which it was painted" in err
    code, _, err = call("--from", "b.png", "--model", str(sd1), "--reference", "a.png", *FAST)
    assert code == 2
    assert "--reference is not for SD 1.x" in err


def test_a_device_that_was_passed_over_is_said(call, monkeypatch, sd1):
    """On standard error, before a picture takes its time on a processor."""

    why = "torch could not use cuda: it has no kernels for this card"
    monkeypatch.setattr(
        detect, "_is_there", lambda device, notes: bool(notes.append(why)) if device == "cuda" else False
    )
    code, out, err = call("a cat", "--model", str(sd1), *FAST)
    assert (code, err) == (0, f"note: {why}\n")
    assert "on cpu" in out
    assert why in call("info")[1]


def test_a_picture_and_one_line(call, sd1, tmp_path):
    code, out, err = call("A red heart!", "--model", str(sd1), "--seed", "7", *FAST)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    for word in (
        "a-red-heart.png",
        "seed 7",
        "torch",
        "staged",
        "encode",
        "denoise",
        "decode",
        "MiB",
        "peak",
    ):
        assert word in out
    with Image.open(tmp_path / "a-red-heart.png") as image:
        assert image.size == (64, 64)
        assert image.text["parameters"].startswith("A red heart!\n")  # pyright: ignore[reportAttributeAccessIssue]


def test_generate_is_what_a_bare_prompt_means(call, sd1, tmp_path):
    for words in (["generate", "a"], ["a"], ["--seed", "7", "a"]):
        assert call(*words, "--model", str(sd1), *FAST, "--seed", "7", "-o", f"{len(words)}.png")[0] == 0
    assert len({(tmp_path / f"{n}.png").read_bytes() for n in (1, 2, 3)}) == 1


def test_json(call, sd1):
    code, out, _ = call("a", "--model", str(sd1), *STEP, "--num-images", "2", "--json", "--precision", "fp32")
    report = json.loads(out)
    assert code == 0
    assert report["plan"]["placements"]["unet"]["precision"] == "fp32"
    assert report["predicted"].keys() >= {"peak_bytes", "stages", "seconds"}
    assert report["predicted"]["peak_bytes"] == pytest.approx(report["measured"]["peak_bytes"], rel=0.05)
    assert set(report["measured"]["stages"]) == {"prepare", "encode", "denoise", "decode"}
    assert report["image"] == "a-1.png"
    assert report["images"] == ["a-1.png", "a-2.png"]


def test_repeated_from_a_picture(call, sd1, tmp_path):
    assert (
        call("two\nlines", "--model", str(sd1), *FAST, "--negative-prompt", "blue", "-o", "one.png")[0] == 0
    )
    assert call("--from", "one.png", *ANY, "-o", "two.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert call("--from", "one.png", "--guidance-scale", "2", "-o", "three.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "three.png").read_bytes()


def test_a_picture_that_names_a_repository_downloads_nothing(call, tmp_path, monkeypatch):
    from tightfit.runtime import infotext as parameters
    from tightfit.runtime.request import Request

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: pytest.fail("the hub was asked"))
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = parameters.write(
        Request("a", None, 64, 64, 1, 1.0, 1, "euler"), "someone/no-such-model", "fp32"
    )
    pictures.save(image, tmp_path / "theirs.png")
    code, _, err = call("--from", "theirs.png")
    assert code == 2
    assert "someone/no-such-model" in err
    assert "--model" in err


def test_a_picture_of_a1111(call, sd1, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(
        "parameters", "a cat\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Model: v1-5"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=text)
    code, _, err = call("--from", "theirs.png")
    assert code == 2
    assert "name it with --model" in err
    code, _, err = call("--from", "theirs.png", "--model", str(sd1), *FAST, "-o", "a.png")
    assert (code, err) == (0, "")
    same = ("--scheduler", "euler_a_uniform", "--guidance-scale", "7", "--seed", "5", "--noise-source", "gpu")
    assert call("a cat", "--model", str(sd1), *FAST, *same, "-o", "b.png")[0] == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_prompt_from_a_file_and_from_standard_input(call, sd1, tmp_path):
    (tmp_path / "prompt.txt").write_text("a red heart\n")
    assert "a-red-heart.png" in call("--prompt-file", "prompt.txt", "--model", str(sd1), *FAST)[1]
    assert "a-cat.png" in call("-", "--model", str(sd1), *FAST, stdin="a cat\n")[1]


def test_nothing_is_replaced_unasked(call, sd1, tmp_path):
    names = [call("a", "--model", str(sd1), *FAST)[1].split(" ·")[0] for _ in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    (tmp_path / "there").mkdir()
    assert call("a", "--model", str(sd1), *FAST, "-o", "there")[1].startswith("there/a.png ")
    (tmp_path / "a-1.png").write_text("mine")
    assert (
        "a-1-2.png" in call("a", "--model", str(sd1), *FAST, "--num-images", "2", "-o", "a.png", "--json")[1]
    )
    assert (tmp_path / "a-1.png").read_text() == "mine"
    before = (tmp_path / "a.png").read_bytes()
    code, out, err = call("b", "--model", str(sd1), *FAST, "-o", "a.png")
    assert (code, out.split(" ·")[0], err.count("\n")) == (0, "a-4.png", 1)
    assert "a.png is there, so this is a-4.png: --overwrite replaces files" in err
    assert (tmp_path / "a.png").read_bytes() == before
    assert call("b", "--model", str(sd1), *FAST, "-o", "a.png", "--overwrite")[2] == ""
    assert (tmp_path / "a.png").read_bytes() != before


def test_a_folder_that_is_missing_is_made(call, sd1, tmp_path):
    assert call("a", "--model", "nowhere", "-o", "new/er/a.png")[0] == 2
    assert not (tmp_path / "new").exists()
    assert call("a", "--model", str(sd1), *FAST, "-o", "new/er/a.png")[0] == 0
    assert Image.open(tmp_path / "new/er/a.png").size == (64, 64)
    code, _, err = call("a", "-o", "new/er/a.png/b.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "Not a directory" in err


@pytest.mark.parametrize("residency", ["resident", "staged"])
def test_ctrl_c_keeps_the_pictures_that_are_painted(call, sd1, tmp_path, monkeypatch, residency):
    """Stopped in the third of four, whether the interrupt comes while torch computes or while the command
    prints."""
    from tightfit.runtime.pipeline import Pipeline
    from tightfit.runtime.run import Run

    arguments = (
        "a",
        "--model",
        str(sd1),
        "--steps",
        "2",
        "--seed",
        "3",
        "--num-images",
        "4",
        "--residency",
        residency,
        "--precision",
        "fp32",
    )
    arguments += ("--scheduler", "euler")  # one call a step
    assert call(*arguments, "-o", "whole.png")[0] == 0
    predict, calls = Run._predict, []

    def interrupted(*of):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predict(*of)

    monkeypatch.setattr(Run, "_predict", interrupted)
    code, out, err = call(*arguments, "-o", "part.png")
    assert (code, out) == (130, "")
    assert "2 of 4 pictures are saved: part-1.png … part-2.png" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.glob("part*")) == ["part-1.png", "part-2.png"]
    for number in (1, 2):
        assert (tmp_path / f"part-{number}.png").read_bytes() == (
            tmp_path / f"whole-{number}.png"
        ).read_bytes()
    calls[:] = [1] * 6

    def run(self, request, preview_every=0, run=Pipeline.run):
        events = run(self, request, preview_every)

        class Events:
            def __next__(self):
                event = next(events)
                if event.stage == "denoise" and event.step == 5:
                    raise KeyboardInterrupt
                return event

            throw = staticmethod(events.throw)

        return Events()

    monkeypatch.setattr(Pipeline, "run", run)
    code, _, err = call(*arguments, "-o", "other.png")
    assert code == 130
    assert "2 of 4 pictures are saved" in err
    assert sorted(path.name for path in tmp_path.glob("other*")) == ["other-1.png", "other-2.png"]


def test_no_memory_outside_a_run_is_one_line(call, monkeypatch):
    """While torch itself is imported, say."""
    monkeypatch.setattr("tightfit.runtime.pipeline.inspect", lambda *_, **__: (_ for _ in ()).throw(
        ImportError("libtorch_cpu.so: failed to map segment from shared object")))  # fmt: skip
    code, out, err = call("a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tightfit: out of memory (libtorch_cpu.so: failed")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not kept to elsewhere")
@pytest.mark.parametrize("mebibytes", [500, 1500])
def test_with_a_memory_that_ends(tmp_path, mebibytes):
    """A picture, or a line; never a traceback. A library's own thread that finds no memory ends the process,
    which Python cannot catch."""
    code = f"""import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({mebibytes} << 20, {mebibytes} << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.argv = ["tightfit", "a cat", "--steps", "1", "-o", "a.png", "--residency", "staged",
            "--precision", "fp32", "--attention", "sdpa", "--tiling", "whole"]
from tightfit.__main__ import main
main()"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in run.stderr
    assert run.returncode in (0, 2, -6, -11), run.stderr
    assert (tmp_path / "a.png").exists() == (run.returncode == 0)


def test_what_was_cut_is_said(call, sd1):
    code, _, err = call("heart " * 90, "--model", str(sd1), "--prompt-syntax", "plain", *FAST)
    assert code == 0
    assert err.startswith("note: the prompt is too long; this end of it was cut: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "3"], ["no prompt was given", '"a red heart"']),
        (["(a:nan)"], ["weight", "nan", "the nearest is 1"]),
        (["a (cat:1e9)"], ["weight", "1e9", "the nearest is 100"]),
        (["a AND b :-1000"], ["weight", "-1000", "the nearest is -100"]),
        (["a \udcff"], ["prompt", "UTF-8"]),
        (["a", "--model", "x" * 300], ["no model can be called"]),
        (["a", "--model", "~nosuchuser/x"], ["no model can be called"]),
        (["a", "-o", "x" * 300 + ".png"], ["nothing can be written", "--output"]),
        (["a", "--guidance-scale", "1e38"], ["--guidance-scale must"]),
        (["a", "--bogus", "3"], ["No such option", "--bogus"]),
        (["a", "b"], ["unexpected extra argument", "quotes"]),
        (["a", "--steps", "many"], ["--steps", "whole number"]),
        (["a", "--steps", "0"], ["--num-inference-steps must"]),
        (["a", "--width", "70"], ["width 70", "64 or 72"]),
        (["a", "--scheduler", "restart"], ["unknown scheduler 'restart'", "euler_a", "unipc"]),
        (["a", "--precision", "int3"], ["unknown precision", "bf16"]),
        (["a", "--device", "tpu"], ["unknown device", "cuda"]),
        (["a", "--model", "nowhere"], ["nowhere does not exist"]),
        (["a", "--model", "model.ckpt"], ["model.ckpt does not exist"]),
        (["a", "--model", ""], ["the model has no name", "--model emoji"]),
        (["a", "-o", "x.gif"], ["--output x.gif is no .png"]),
        (["a", "-o", "x.gif"], ["x.gif", ".png"]),
        (["a", "--prompt-file", "p.txt"], ["not both"]),
        (["--prompt-file", "p.txt"], ["p.txt cannot be read"]),
        (["--from", "p.png"], ["p.png does not exist"]),
    ],
)
def test_bad_input(call, sd1, tmp_path, arguments, words):
    model = [] if "--model" in arguments else ["--model", str(sd1)]
    code, out, err = call(*arguments, *model)
    assert (code, out) == (2, "")
    assert err.startswith("tightfit: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(call, sd1, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saving, "TemporaryFile", refuse)
    code, _, err = call("a", "--model", str(sd1), *FAST)
    assert code == 2
    assert "Permission denied" in err
    assert "--output" in err


def test_plan(call, tiny_models):
    model = ("--model", str(tiny_models["sdxl"]))
    model += ("--precision", "fp16")
    code, out, _ = call("plan", *model, "--hardware", "rtx-2060", "--all")
    assert code == 0
    for word in (
        "fp16, VAE fp32",
        "✓ the fastest that fits",
        "times as slow",
        "RTX 2060",
        "streamed",
        "chunked",
        "tiled",
    ):
        assert word in out
    code, out, _ = call("plan", *model, "--hardware", "rtx-2060", "--json")
    plans = json.loads(out)["plans"]
    assert [p["chosen"] for p in plans].count(True) == 1
    for each in plans:
        assert each.keys() >= {"chosen", "fits", "reason", "predicted", "placements"}
        assert each["predicted"]["stages"].keys() == {"encode", "denoise", "decode"}
        assert each["placements"]["unet"].keys() == {
            "backend", "precision", "compute", "residency", "attention", "tiling", "provider", "kept_bytes",
            "packed", "compiled", "captured",
        }  # fmt: skip


def test_a_plan_is_saved_and_run(call, sd1, tmp_path):
    wishes = ("--attention", "chunked", "--residency", "streamed", "--tiling", "tiled", "--precision", "fp32")
    assert call("plan", "--model", str(sd1), "--device", "cpu", *wishes, "--save", "p.json")[0] == 0
    code, out, _ = call("a", "--model", str(sd1), "--device", "cpu", *STEP, "--plan", "p.json", "--json")
    assert code == 0
    ran = json.loads(out)["plan"]["placements"]
    assert ran == json.loads((tmp_path / "p.json").read_text())["placements"]
    assert ran["unet"]["attention"] == "chunked"
    (tmp_path / "p.json").write_text("{}")
    assert call("a", "--model", str(sd1), "--plan", "p.json")[0] == 2
    assert call("a", "--model", str(sd1), "--plan", "none.json")[0] == 2


def test_budgets(call, sd1):
    from tightfit.runtime.machine.hardware import Hardware

    for words in (("a", "--model", str(sd1), *FAST[-2:]), ("plan", "--model", str(sd1), *FAST[-2:])):
        little = Hardware.detect("cpu").context_bytes + 40 * 2**20
        code, _, err = call(
            *words, "--device", "cpu", "--ram", str(little), "--width", "1024", "--height", "1024"
        )
        assert code == 2
        assert "iB: the largest of this shape that fits is" in err
        assert "--ram" in err.split("1024x1024 needs")[1]
    for wrong in ("many", "-1GiB", "0", "4 elephants"):
        code, _, err = call("plan", "--vram", wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert "4GiB" in err
    assert call("plan", "--hardware", "rtx-2060", "--device", "cpu")[0] == 2
    assert "choose" in call("plan", "--hardware", "rtx-9")[2]


def test_info(call):
    code, out, _ = call("info")
    assert code == 0
    for word in ("free of", "TFLOP/s", "ONNX Runtime"):
        assert word in out


def test_calibrate(call, monkeypatch):
    from tightfit.runtime.backends.torch import calibration

    monkeypatch.setattr(calibration, "_fastest", lambda work, _: (work(), 1e-3)[1])  # each once
    monkeypatch.setattr(calibration, "_TURNS", 1)
    assert call("calibrate", "--device", "cpu")[0] == 0
    assert "measured here" in call("info", "--device", "cpu")[1]
    calibration.calibration_file().write_text("[")
    assert "run 'tightfit calibrate' again" in call("info", "--device", "cpu")[1]


def test_help_fits_a_screen(call):
    for arguments in (["--help"], ["generate", "--help"], ["plan", "--help"]):
        code, out, _ = call(*arguments)
        assert code == 0
        assert out.count("\n") <= 82 + 33 * (arguments[0] == "generate")  # which has panels
    assert "0.1.0" in call("--version")[1]


def test_a_plan_of_a_text_says_whether_it_is_known(call, sd1, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_TEXT_CACHE", "64MiB")
    ways = ("--model", str(sd1), *FAST)
    assert call("a red heart", *ways)[0] == 0

    def planned(*more: str) -> bool:
        code, out, _ = call("plan", *ways, "--json", *more)
        assert code == 0
        return json.loads(out)["plans"][0]["texts_known"]

    known = "--prompt", "a red heart"
    assert planned(*known)
    assert "• both texts are in the text cache: no text encoder is needed\n" in call("plan", *ways, *known)[1]
    assert not planned(*known, "--negative-prompt", "blue")
    assert not planned(*known, "--no-text-cache")
    assert not planned()
    painted = json.loads(call("a red heart", *ways, "--no-text-cache", "--json")[1])
    assert not painted["plan"]["texts_known"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tightfit", *arguments]


def test_letters_of_four_bytes(call, sd1, tmp_path):
    """A file name has at most 255 bytes, whatever it has in letters."""
    assert call("𝔞" * 60, "--model", str(sd1), *FAST)[0] == 0
    (picture,) = tmp_path.iterdir()
    assert len(picture.name.encode()) < 100


def test_streams_as_a_process_has_them(sd1, tmp_path):
    """No warning of a library beside our line; a terminal without the letters of a path is no failure."""
    import os

    words = command("心 " + "heart " * 90, "--model", str(sd1), "--prompt-syntax", "plain", *FAST)
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\u5fc3-heart")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr.startswith(b"note: ")
    assert done.stderr.count(b"\n") == 1
    closed = subprocess.run(
        f"{shlex.join(command('-'))} <&-",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("where", ["tightfit.runtime.models.schedulers.step_options", "PIL.Image.Image.save"])
def test_interrupted_anywhere(call, sd1, tmp_path, monkeypatch, where):
    """While painting, and with a half-written picture on the disk."""

    def interrupt(*arguments, **_):
        if isinstance(arguments[1], Path):
            arguments[1].write_bytes(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    assert call("a", "--model", str(sd1), *FAST) == (130, "", "tightfit: stopped\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals work otherwise there")
def test_interrupted(sd1, tmp_path):
    """Ctrl-C in the middle: exit 130, one line, nothing left behind."""
    endless = command(
        "a", "--model", str(sd1), *FAST[2:], "--steps", "900", "--num-images", "1000", "--scheduler", "euler"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore it
    process = subprocess.Popen(endless, cwd=tmp_path, preexec_fn=heard, **pipes)
    painting = psutil.Process(process.pid)
    while process.poll() is None and painting.cpu_times().user < 5:  # well inside the steps
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tightfit: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_export(call, sd1, tmp_path):
    code, out, err = call("export", str(sd1), "--precision", "int4", "-o", "small")
    assert code == 0
    assert out.startswith("small · int4 · ")
    assert "unet: " in err
    code, out, _ = call("a cat", "--model", "small", "--device", "cpu", *ANY, "--json")
    assert code == 0
    assert json.loads(out)["plan"]["placements"]["unet"]["precision"] == "int4"
    assert call("a cat", "--model", str(sd1), "--device", "cpu", *ANY, "--precision", "int8")[0] == 0
    for arguments, words in (
        ((str(sd1), "--precision", "int4", "-o", "small"), "there already"),
        (("small", "--precision", "int8", "-o", "smaller"), "stored in int4 already"),
        ((str(sd1), "--precision", "fp16", "-o", "x"), "--to torch in int8, int4"),
        ((str(sd1), "--precision", "int8", "--to", "tensorrt", "-o", "x"), "--to torch"),
        ((str(sd1), "--precision", "int8", "--bits", "9", "-o", "x"), "--calibrate"),
        (
            (str(sd1), "--precision", "int8", "--bits", "3", "--calibrate", "1", "-o", "x"),
            "--bits must be from",
        ),
        (
            (str(sd1), "--precision", "int8", "--size", "0", "--calibrate", "1", "-o", "x"),
            "--size must be a multiple of 8 pixels, from 8 up, not 0",
        ),
        ((str(sd1), "--precision", "int8", "--steps", "5", "-o", "x"), "--calibrate"),
        ((str(sd1), "--precision", "int8-dynamic", "-o", "x"), "export --precision int8"),
        (("nowhere", "--precision", "int8", "-o", "x"), "does not exist"),
        ((str(sd1), "--precision", "int8", "-o", "/dev/null/x"), "name another place"),
    ):
        code, _, err = call("export", *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert words in err
    code, _, err = call("a cat", "--model", "small", "--precision", "fp16", *ANY)
    assert code == 2
    assert "stored in int4" in err


def test_the_plan_says_its_size_and_its_notes(call, sd1):
    """Memory and seconds depend on the size, and the notes say what they were worked out from."""
    arguments = ("plan", "--model", str(sd1), "--hardware", "rtx-2060", "--width", "128", "--steps", "7")
    arguments += ("--attention", "sdpa", "--tiling", "whole", "--precision", "fp16")
    data = json.loads(call(*arguments, "--json")[1])
    size = {"width": 128, "height": 64, "num_images": 1, "num_inference_steps": 7, "guidance_scale": 7.5}
    assert data["request"].items() >= size.items()
    out = call(*arguments)[1]
    assert len(data["notes"]) >= 3
    assert all(f"• {note}\n" in out for note in data["notes"])


def test_the_table_is_whole_at_every_width(sd1, capsys, monkeypatch):
    """On terminals, and in a file: no cell is cut, and every row has its figures in one line."""
    from tightfit import inspect
    from tightfit.runtime.machine.profiles import profile
    from tightfit.runtime.planner import choose as planner
    from tightfit.runtime.planner.wishes import Wishes

    one_way = Wishes(precision="fp32", attention="sdpa", tiling="whole")
    plans = planner.plan(profile("gtx-1650"), inspect(str(sd1)), None, one_way)
    rows = {(*cli_plan._cells(p), p.reason): p for p in plans}
    monkeypatch.setenv("NO_COLOR", "1")
    for columns, is_wide in ((80, False), (100, False), (None, False), (160, True)):
        monkeypatch.setenv("COLUMNS", f"{columns}")
        monkeypatch.setattr("rich.console.Console.is_terminal", columns is not None)
        cli_plan._print_table("title", rows, {})
        lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines)) <= (columns or 100)
        assert not any("…" in line for line in lines)
        spaced = [f" {' '.join(line.split())} " for line in lines]
        assert any("residency" in line for line in spaced) == is_wide
        for *_, encode, denoise, decode, seconds, psnr, _ in rows:
            figures = (seconds, encode, denoise, decode, psnr)
            figures = (*figures[1:4], seconds, psnr) if is_wide else figures
            assert any(f" {' '.join(figures)} " in line for line in spaced)


def test_a_reason_that_many_rows_have_is_said_once(call, sd1):
    """One or several, on every width of a terminal; what memory is lacking differs from row to row."""
    arguments = ("plan", "--model", str(sd1), "--hardware", "cpu-16gb", "--all")
    refused = ("--residency", "streamed", "--precision", "int8")
    _, out, err = call(*arguments, *refused)
    why = "weights that are quantised while they load cannot stream: export the model first"
    assert err.count(why) == 1
    assert out.count(why) == out.count(f"• refused: {why}\n") == 1
    assert out.count(" refused\n") >= 6
    out = call(*arguments, "--min-psnr", "55")[1]
    assert "• refused (1): " in out
    assert "• refused (2): " in out
    assert out.count("below the floor of 55") <= 4  # a line for each precision
    assert out.count("refused (") > 10


def test_rows_that_are_the_same_are_shown_once(sd1, capsys):
    """Of two text encoders' attentions no column tells."""
    from dataclasses import replace

    from tightfit import inspect
    from tightfit.runtime.machine.profiles import profile
    from tightfit.runtime.planner import choose as planner
    from tightfit.runtime.request import Request

    machine, spec, request = profile("cpu-16gb"), inspect(str(sd1)), Request("a")
    request = request.resolve(spec)
    (first, *_) = planner.plan(machine, spec, request)
    other = replace(first.placements["text_encoder"], attention="chunked")
    twin = replace(
        first, chosen=False, reason="fits, no better", placements={**first.placements, "text_encoder": other}
    )
    slower = replace(twin, predicted=replace(twin.predicted, seconds=9999.0))
    cli_plan.print_plans([first, twin, slower], machine, request, True)
    out = capsys.readouterr().out
    assert "9999" in out
    assert out.count(", VAE ") == 2
    assert "fits, no better" in out  # of the slower one
    assert "1 more are the same in all that is shown here" in out
    why = "the fastest that fits, with 12.00 GiB to spare; 1 step of 3 in full saves 10.0 s of 20.0, 52 dB"
    cli_plan.print_plans([replace(first, step_cache=3, reason=why)], machine, request, True)
    out = capsys.readouterr().out
    assert "saves" in out and ", 1 of 3, " in out
    assert max(map(len, out.splitlines())) < 150


@pytest.mark.parametrize(
    ("card", "holder"), [("m1-8gb", None), ("rtx-2060", "the device's context"), ("cpu-16gb", "the process")]
)
def test_terms_of_nothing_are_left_out(call, sd1, card, holder):
    out = call("plan", "--model", str(sd1), "--hardware", card, "--attention", "sdpa", "--tiling", "whole")[1]
    assert "0 bytes" not in out
    assert (f"of it for {holder}" in out) if holder else ("of it for" not in out)
    assert " to fit in" in out


def test_help_says_the_steps_of_each_kind(call):
    for name in ("generate", "plan"):
        assert "Default 20, or model's." in call(name, "--help")[1]


def test_what_is_imported_before_ctrl_c_is_ours():
    """Each module is time in which Python prints a traceback of its own: typing alone took most of it."""
    code = "import sys; before = {*sys.modules}; import tightfit.__main__; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("tightfit")}
    assert ours == {"tightfit", "tightfit.__main__", "tightfit.runtime", "tightfit.runtime.interrupts"}
    assert {"typing", "dataclasses", "inspect", "typer"}.isdisjoint(done.stdout.split())


@pytest.mark.skipif(sys.platform == "win32", reason="signals work otherwise there")
def test_interrupted_while_libraries_are_imported():
    """An exception would be lost in a callback of the import system, and the command go on, or end with 0."""
    code = """
import os, signal, sys
class Dying:
    def __del__(self):  # what is raised here goes no further
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            Dying()
sys.meta_path.insert(0, Interrupting())
where, sys.argv[1:] = sys.argv[1], ["plan", "--help"]
from tightfit.__main__ import main
main()
"""
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    for where in ("tightfit.runtime.cli.app", "typer", "rich.table"):
        done = subprocess.run(
            [sys.executable, "-c", code, where], capture_output=True, text=True, preexec_fn=heard, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "tightfit: stopped\n"), where


def test_ctrl_c_raises_once_there_is_something_to_tidy_up():
    from tightfit.runtime import interrupts

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.at_once()
        assert signal.getsignal(signal.SIGINT) is interrupts._stop
        interrupts.tidily()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background jobs have it
        interrupts.at_once()
        interrupts.tidily()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
