"""What reaches the terminal, and what is said to somebody who typed what is no command, option or plain
prompt."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from tightfit.__main__ import app
from tightfit.runtime import infotext as parameters
from tightfit.runtime.cli import app as cli
from tightfit.runtime.cli import generate as cli_generate
from tightfit.runtime.cli import output as cli_output
from tightfit.runtime.cli.prompt import read_prompt
from tightfit.runtime.cli.words import COMMANDS, as_command, did_you_mean, usage
from tightfit.runtime.errors import TightfitError, printable
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.machine.profiles import profile
from tightfit.runtime.models.hub import inspect
from tightfit.runtime.models.tokens import painted_as_words
from tightfit.runtime.request import Request

ROOT = Path(__file__).parents[3]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egnp.exe\u2028"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\x7f\\u202egnp.exe\\u2028"


def is_harmless(text: str) -> bool:
    """By Unicode's own data, not by our list: no control but the end of a line, no separator, no change of
    direction."""
    changes = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    bad = [
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(c) in changes
    ]
    return not set(bad) - {"\n"}


@given(st.text(max_size=50))
def test_printable_text_is_harmless(text):
    assert is_harmless(printable(text))
    assert "\n" not in printable(text)
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize(
    "text", ["a red heart", "ein rötes Hérz 心", "👩‍🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "قلب أحمر", "C:\\models\\x", "[bold]x[/bold]"]
)
def test_ordinary_text_stays(text):
    assert printable(text) == text
    assert printable(EVIL) == SHOWN
    assert printable("two\nlines\tand") == "two lines and"


@pytest.mark.parametrize(
    "fails",
    [
        lambda: inspect(f"/nowhere/{EVIL}"),
        lambda: profile(EVIL),
        lambda: parameters.parse("just words", EVIL),
        lambda: parameters.read(Path(f"/nowhere/{EVIL}")),
        lambda: as_command(["serve"]) and inspect("https://x.y/" + EVIL),
    ],
)
def test_errors_are_harmless(fails):
    with pytest.raises(TightfitError) as caught:
        fails()
    assert is_harmless(str(caught.value))


def test_what_a_picture_says_is_harmless(tmp_path, capsys):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(
        "parameters", f"a\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Clip skip: {EVIL}"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=text)
    cli_generate._carried(cli_generate.Options(source=tmp_path / "x.png"), {})
    said = capsys.readouterr().err
    assert "Clip skip" in said
    assert is_harmless(said)
    assert said.count("\n") == 1


def test_a_table_of_foreign_names_is_harmless(capsys, monkeypatch):
    """On a terminal of any width and in a file; names that rich would read as markup are shown as they
    are."""
    from rich.table import Column, Table

    title = f"[bold]{EVIL}[/nothing] :heart:"
    for width, terminal in ((80, True), (120, True), (200, True), (80, False)):
        monkeypatch.setenv("COLUMNS", str(width))
        table = Table(Column("plan [/x]", no_wrap=True))
        table.add_row(f"x [/y]{'-' * 120}")
        monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
        monkeypatch.setenv("NO_COLOR", "1")
        cli_output.show_table(title, table, [((f"how {EVIL}", "why [/z]"), None)])
        shown = capsys.readouterr().out
        unstyled = shown.replace("\x1b[1m", "").replace("\x1b[0m", "")  # rich's own, around the title
        assert is_harmless(unstyled)
        assert "[/nothing] :heart:" in shown
        assert ("why [/z]" in shown) == (terminal and width < 130)


def test_json_is_harmless_and_exact(capsys):
    value = {"model": EVIL, "prompt": "心\n"}
    cli_output.say_json(value)
    text = capsys.readouterr().out
    assert is_harmless(text)
    assert text.isascii()
    assert json.loads(text) == value


def test_nothing_is_printed_past_the_one_function():
    """`say` and its kin make text harmless; of what is printed otherwise every line is known here."""
    known = {"f'tightfit {__version__}'", "context.get_help()", "'tightfit: stopped'"}
    doors = {
        *(ROOT / "runtime/cli").glob("*.py"),
        *(ROOT / room / "cli.py" for room in ("export", "benchmarks")),
    } - {ROOT / "runtime/cli/output.py"}
    assert len(doors) > 3
    for name in sorted(doors):
        for node in ast.walk(ast.parse(name.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "typer.echo",
                "print",
                "typer.secho",
            ):
                assert ast.unparse(node.args[0]) in known, f"{name}, line {node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("console.print"):
                assert "printable" in ast.unparse(node.args[0]) or ast.unparse(node.args[0]) == "text", (
                    f"{name}, {node.lineno}"
                )


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["webui"], "tightfit serve is"),
        (["ui", "--port", "80"], "tightfit serve is"),
        (["help"], "tightfit --help"),
        (["download"], "--model takes"),
        (["list"], "tightfit models"),
        (["quantize"], "tightfit export"),
        (["infos"], "did you mean tightfit info?"),
        (["Plan"], "did you mean tightfit plan?"),
        (["plans"], "did you mean tightfit plan?"),
        (["exprot"], "did you mean tightfit export?"),
        (["genrate", "a cat"], "did you mean tightfit generate?"),
        (["calibrat"], "did you mean tightfit calibrate?"),
    ],
)
def test_a_word_that_is_likelier_a_command(arguments, meant):
    with pytest.raises(TightfitError, match="is no command") as caught:
        as_command(arguments)
    assert meant in str(caught.value)
    assert str(caught.value).endswith(f"tightfit generate {arguments[0]}")


@pytest.mark.parametrize(
    "prompt",
    ["heart", "beach", "planet", "a plan", "help me", "serve.", "心", "--steps", "-", "", "x" * 10_000],
)
def test_other_words_are_prompts(prompt):
    assert as_command([prompt, "--seed", "1"]) == ["generate", prompt, "--seed", "1"]


def test_commands_are_the_ones_that_there_are():
    assert set(COMMANDS) == set(typer.main.get_command(app()).list_commands(None))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for word in (*COMMANDS, "-h", "--help", "--version"):
        assert as_command([word, "x"]) == [word, "x"]
    assert as_command([]) == []


def said_of(*arguments: str) -> str:
    usage_error = typer.BadParameter.__mro__[1]
    with pytest.raises(usage_error) as caught:
        cli.app(["generate", "a", *arguments], standalone_mode=False)
    return usage(caught.value)


@pytest.mark.parametrize(
    ("option", "words", "without"),
    [
        ("--controlnet", ["it is --control PICTURE"], ["--ram", "--plan"]),
        ("--xformers", ["--help"], ["--from"]),
        ("--n", ["--num-images"], ["--json", "--plan"]),
        ("--size", ["--width and --height"], ["--seed"]),
        ("--prompt", ["in quotes"], ["--compute"]),
        ("--out", ["--output"], ["--compute"]),
        ("--sampler", ["--scheduler"], []),
        ("--ckpt-dir", ["--models-dir"], ["--guidance-scale"]),
        ("--cfg-scale", ["--guidance-scale"], []),
        ("--negative", ["--negative-prompt"], []),
        ("--stepz", ["did you mean --steps?"], []),
        ("--modle", ["did you mean --model?"], []),
        ("--presicion", ["--precision"], ["--compute"]),
    ],
)
def test_only_options_that_are_meant_are_named(option, words, without):
    said = said_of(option, "3")
    assert said.startswith(f"No such option: {option}")
    assert all(word in said for word in words), said
    assert not any(word in said for word in without), said


def test_other_usage_errors_stay():
    assert "quotes" in said_of("b")
    assert said_of("--steps", "many") == "--steps must be a whole number"
    assert said_of("--guidance-scale", "x") == "--guidance-scale must be a number"


def test_did_you_mean():
    assert did_you_mean("emoj", ["emoji", "x"]) == " (did you mean emoji?)"
    assert did_you_mean("sdxl", ["emoji"]) == ""
    with pytest.raises(TightfitError, match=r"did you mean rtx-2060\?"):
        profile("rtx2060")


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("https://huggingface.co/owner/name", "give --model owner/name"),
        ("https://hf.co/owner/name.x/tree/main", "give --model owner/name.x"),
        ("http://example.org/model.safetensors", "download the model first"),
        ("file:///models/x", "download the model first"),
    ],
)
def test_addresses_keep_their_slashes(url, cure):
    with pytest.raises(TightfitError) as caught:
        inspect(url)
    assert url in str(caught.value)
    assert cure in str(caught.value)


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "data",
    [
        b"a heart\r\n",
        MARK + b"a heart\r\n",
        MARK * 2 + b"a heart",
        "a heart\r\n".encode("utf-16"),
        b"\xfe\xff" + "a heart".encode("utf-16-be"),
    ],
)
def test_the_mark_of_a_file_is_no_part_of_the_prompt(tmp_path, monkeypatch, data):
    (tmp_path / "p.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="cp1252"))
    assert read_prompt(None, tmp_path / "p.txt") == read_prompt("-", None) == "a heart"


@pytest.mark.skipif(sys.platform == "win32", reason="no file without an end there")
def test_a_prompt_without_end_is_not_read_to_the_end(monkeypatch):
    with pytest.raises(TightfitError, match="no prompt is so long"):
        read_prompt(None, Path("/dev/zero"))
    monkeypatch.setattr(sys, "stdin", Path("/dev/zero").open(encoding="utf-8"))  # noqa: SIM115
    with pytest.raises(TightfitError, match="standard input has more"):
        read_prompt("-", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    with pytest.raises(TightfitError, match="not UTF-8"):
        read_prompt("-", None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a (red:1.3) heart", "(red:1.3)"),
        ("a (red : 1.3)", "(red : 1.3)"),
        ("a (red:-.5)", "(red:-.5)"),
        ("((red)) heart", "((red))"),
        ("(((red)))", "((red))"),
        ("a [blurry] heart", "[blurry]"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a cat AND a dog", "AND"),
        ("a cat BREAK a dog", "BREAK"),
        ("x <lora:detail:0.8>", "<lora:detail:0.8>"),
        ("x <hypernet:y:1>", "<hypernet:y:1>"),
        (r"a \(real\) cat", r"\(, \)"),
    ],
)
def test_syntax_of_a1111_is_said(text, found):
    (notice,) = painted_as_words(
        {"negative prompt": text, "prompt": "a heart (red), 3:4, and <b>, BREAKFAST, HAND"}
    )
    assert notice.startswith("the negative prompt has")
    assert f": {found}" in notice


def test_much_syntax_is_said_briefly():
    many = " ".join(f"({'x' * 100}{i}:1.1)" for i in range(1000))
    (notice,) = painted_as_words({"prompt": many})
    assert len(notice) < 400
    assert "and 995 more" in notice
    for unit in ("(", "[", "<", "(a:", "((a", "<lora:", "(:1", "\\"):
        painted_as_words({"prompt": unit * 100_000})  # half a minute if any of it were quadratic


def test_syntax_is_said_at_every_door(sd1):
    """The command line tells a run's notices; Python has them in the result."""
    from tightfit.runtime.pipeline import Pipeline
    from tightfit.runtime.run import Run, Ways

    spec = inspect(str(sd1))
    pipe = Pipeline(spec, Hardware("cpu", "here", 2**30, 2**30, ("fp32",)))
    words = Request("a (red:1.3) heart", "[blurry]", 64, 64, 1, 7.5, 1, "euler", prompt_syntax="plain")
    request = words.resolve(spec)
    run = Run(request, pipe.loaded, Ways(pipe._first, pipe.plans))
    run._prepare()
    assert [each.split(" has ")[0] for each in run.notices] == ["the negative prompt", "the prompt"]


# So that little is planned.
ONE_WAY = "--precision", "fp32", "--residency", "staged", "--attention", "sdpa", "--tiling", "whole"
HOMELESS = """
import os, pwd, sys
def nobody(*_):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = nobody
os.environ.pop("HOME", None)
from tightfit.__main__ import app
from tightfit.runtime.cli.app import main
from tightfit.runtime.backends.torch import calibration, firsts
calibration._fastest = lambda *_: 1e-3  # test_calibrate measures
firsts.network_starts, firsts.quantising = lambda _: {}, lambda _: 1e8
calibration._TURNS = 1
app()
for words in COMMANDS:
    sys.argv = ["tightfit", *words]
    try:
        main()
    except SystemExit as done:
        print("code", done.code, *words[:1])
from huggingface_hub import constants
assert os.path.isabs(constants.HF_HOME), constants.HF_HOME
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no list of users there")
def test_no_home_and_no_user(sd1, tmp_path):
    """`docker run --user 1234`: every command works, and none makes a folder called ~."""
    model = ["--model", str(sd1), "--device", "cpu"]
    commands = [
        ["--version"], ["info", "--device", "cpu"], ["a", *model, "--steps", "1", *ONE_WAY],
        ["--from", "a.png", "-o", "b.png", *ONE_WAY],
        ["export", str(sd1), "--precision", "int8", "-o", "small"], ["calibrate", "--device", "cpu"],
        ["a", "--model", "~/x"], ["a", "--model", "~x/y"],
    ]  # fmt: skip
    code = f"COMMANDS = {commands!r}\n{HOMELESS}"
    environment = {
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    codes = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["0"] * 6 + ["2"] * 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["a.png", "b.png", "small"]


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["tightfit", "a", "--model", MODEL, "--device", "cpu", "--steps", "1"]
from tightfit.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals work otherwise there")
@pytest.mark.parametrize(
    "module",
    [
        "tightfit.runtime.planner.plan",
        "torch._C",
        "diffusers.configuration_utils",
    ],
)
def test_interrupted_while_a_library_is_imported(sd1, tmp_path, module):
    code = f"MODULE, MODEL = {module!r}, {str(sd1)!r}\n{INTERRUPTED}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tightfit: stopped\n")
    assert list(tmp_path.iterdir()) == []
