"""Options are those of the fields: named, explained and typed there, and given as they were typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from tightfit.__main__ import app
from tightfit.runtime.cli.options import as_typed, taking, wishes
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.fields import described, option
from tightfit.runtime.planner.wishes import Wishes
from tightfit.runtime.request import Request
from typer.testing import CliRunner


@dataclass(frozen=True)
class Made:
    strength: float | None = option(None, "How much.", "X", options=("--strength", "-s"))
    rounds: int = option(3, "How often.", "N")
    hidden: str = "no option"


@dataclass(frozen=True)
class Own:
    name: Annotated[str, typer.Argument(help="Whose.")]
    loud: Annotated[bool, typer.Option("--loud")] = False


def made(order: str):
    """A command line of one command, and what it was called with."""
    calls, command_line = [], typer.Typer()

    @command_line.command()
    @taking(Own, Made, order=order)
    def command(own, typed):
        """What it does."""
        calls.append((own, typed))

    return command_line, calls


def test_a_field_becomes_an_option():
    command_line, calls = made("loud name ...")
    for arguments in (["x"], ["x", "--loud", "-s", "0.5"], ["x", "--strength", "1", "--rounds", "7"]):
        assert CliRunner().invoke(command_line, arguments).exit_code == 0
    assert calls == [
        (Own("x"), {}),
        (Own("x", True), {"strength": 0.5}),
        (Own("x"), {"strength": 1.0, "rounds": 7}),
    ]
    for wrong in (["x", "--hidden", "y"], ["x", "--rounds", "1.5"], ["x", "-s", "much"], []):
        assert CliRunner().invoke(command_line, wrong).exit_code == 2


def test_help_lists_options_in_order():
    for order, names in (
        ("loud ... name", ["--loud", "--strength", "--rounds"]),
        ("name rounds ... loud", ["--rounds", "--strength", "--loud"]),
    ):
        text = CliRunner().invoke(made(order)[0], ["--help"], env={"COLUMNS": "200"}).output
        assert "What it does." in text
        assert "How much." in text
        assert sorted(names, key=text.index) == names
    with pytest.raises(KeyError):
        made("nothing ...")


def options_of(command: str) -> dict[str, list[str]]:
    commands = typer.main.get_command(app())
    return {parameter.name: parameter.opts for parameter in commands.get_command(None, command).params}  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_with_a_help_is_an_option_of_generate():
    options = options_of("generate")
    for group in (Request, Wishes):
        for name, known in described(group).items():
            if known.help:
                assert options[name] == [*(known.options or [f"--{name.replace('_', '-')}"])]
            elif name != "prompt":
                assert name not in options


def test_names_of_options_stay():
    of_both = """\
--width --height --num-inference-steps --steps --guidance-scale --model --precision --compute --backend
        --provider --device --vram --ram --residency --attention --tiling --min-psnr --lora --embedding --vae
        --prediction --unet --text-encoder --models-dir --json --image --strength --resize --mask-image --mask
        --mask-blur --mask-padding --mask-content --invert-mask --outpaint --image-guidance-scale --ip-adapter
        --ip-image --control --reference --hires --hires-size --hires-strength --hires-steps --hires-upscaler
        --hires-prompt --hires-scheduler --refiner --refiner-start --step-cache --prefer --compile
        --cuda-graphs --negative-prompt --no-text-cache --skip-layers
        --skip-layer-start --skip-layer-end"""
    of_generate = """\
prompt --prompt-file --from --seed --scheduler --num-images --plan --connect -o --output
        --overwrite --prompt-syntax --emphasis --clip-skip --wildcards --schedule --eta --s-churn --s-noise
        --zero-snr --guidance-rescale --guidance-start --guidance-end --noise-source --subseed
        --subseed-strength --seed-resize --skip-layer-scale --ensd
        --format --quality --metadata --grid"""
    for command, more in (("generate", of_generate), ("plan", "--prompt --hardware --all --save")):
        names = {name for opts in options_of(command).values() for name in opts}
        assert names == {*of_both.split(), *more.split()}


def test_wishes_are_those_that_were_typed():
    assert wishes({}) == {"precision": "auto", "requests": 1}
    assert wishes({"budget": "4GiB"}, "int8") == {"budget": 2**32, "precision": "int8", "requests": 1}
    assert wishes({"precision": "fp32"}, "int8")["precision"] == "fp32"
    with pytest.raises(TightfitError, match="--vram or --ram must be"):
        wishes({"budget": "much"})
    with pytest.raises(TightfitError, match="unknown attention"):
        wishes({"attention": "x"})


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("tiny takes no negative_prompt: leave it out", "tiny takes no --negative-prompt: leave it out"),
        ("hires_steps must be 1 to 9, not 0", "--hires-steps must be 1 to 9, not 0"),
        ("num_inference_steps 0", "--num-inference-steps 0"),
        ("mask_content is of a mask", "--mask-content is of a mask"),
        ("guidance_scale and step_cache.", "--guidance-scale and --step-cache."),
        *(
            (as_it_is, as_it_is)
            for as_it_is in (
                "--negative-prompt is no text", "'negative_prompt' is", "/a/negative_prompt/b.png",
                "negative_prompt.csv is no table", "pipe(prompt, guidance_scale=2)", "my_negative_prompts",
            )
        ),
    ],
)  # fmt: skip
def test_messages_name_options_as_they_are_typed(said, typed):
    assert as_typed(said) == typed
