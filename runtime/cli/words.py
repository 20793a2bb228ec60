"""What a person meant who typed a command or an option that tightfit does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from ..errors import TightfitError

COMMANDS = (
    "generate", "batch", "cluster", "grid", "upscale", "plan", "serve", "models", "info", "calibrate",
    "export", "convert", "bench",
)  # fmt: skip
_SERVER = "tightfit serve is the server, with a page to click on"
_KINDS = "--model takes emoji, a checkpoint file, a folder in diffusers' layout or a hub id"
_ELSEWHERE = {
    **dict.fromkeys(("server", "ui", "webui", "gui", "web", "api", "start", "launch"), _SERVER),
    **dict.fromkeys(("download", "pull"), _KINDS),
    **dict.fromkeys(("list", "ls"), "tightfit models lists the models in a folder"),
    **dict.fromkeys(("img2img", "inpaint"), 'tightfit "a red heart" --image FILE does, with --mask FILE'),
    **dict.fromkeys(("enlarge", "esrgan"), "tightfit upscale PICTURE --model FILE enlarges"),
    **dict.fromkeys(("train",), "this version has none"),
    **dict.fromkeys(("run", "paint", "txt2img"), 'tightfit "a red heart" paints'),
    **dict.fromkeys(("quantize", "quantise"), "it is tightfit export"),
    "help": "tightfit --help lists the commands",
    "version": "it is tightfit --version",
    "benchmark": "it is tightfit bench",
}
_NEAR = (
    0.82  # of difflib: infos, plans, exprot and genrate are near a command, beach, planet and expo are not
)
_OPTION_NEAR = 0.75

_DIRS = "it is --models-dir"
_OPTIONS = {
    **dict.fromkeys(("ckpt-dir", "models-path", "base-directory", "extra-model-paths-config"), _DIRS),
    **dict.fromkeys(("sampler", "sampling-method", "sampler-name"), "it is --scheduler"),
    **dict.fromkeys(("cfg", "cfg-scale", "guidance"), "it is --guidance-scale"),
    "skip-guidance-layers": "it is --skip-layers",
    "slg-scale": "it is --skip-layer-scale",
    **dict.fromkeys(("n", "n-iter", "batch-size", "batch-count", "count"), "it is --num-images"),
    **dict.fromkeys(("size", "resolution"), "it is --width and --height"),
    **dict.fromkeys(("prompt", "p"), "the prompt comes without an option, in quotes"),
    **dict.fromkeys(("lowvram", "medvram", "offload"), "give the memory there is with --vram 4GiB"),
    **dict.fromkeys(("dtype", "quantize", "quantise", "fp16", "half"), "it is --precision"),
    **dict.fromkeys(("textual-inversion", "ti"), "it is --embedding"),
    **dict.fromkeys(
        ("controlnet", "control-net", "control-image", "control-model"), "it is --control PICTURE:model=FILE"
    ),
    **dict.fromkeys(("init-image", "init-img"), "it is --image"),
    **dict.fromkeys(("denoise", "denoising-strength"), "it is --strength"),
    **dict.fromkeys(("listen", "server-name"), "it is tightfit serve --host 0.0.0.0, with --api-key"),
    **dict.fromkeys(("api-auth", "gradio-auth"), "it is --api-key of tightfit serve"),
    "api": "tightfit serve has the API in any case",
}


def as_command(arguments: Sequence[str]) -> list[str]:
    """The arguments with their command: what is none of COMMANDS is a prompt, which `generate` paints.

    Raises TightfitError for a single word that is near a command, or a command of other programs.
    """
    if not arguments or arguments[0] in {*COMMANDS, "-h", "--help", "--version"}:
        return list(arguments)
    word = arguments[0]
    if re.fullmatch(r"\w[\w-]*", word) and (meant := _meant(word.lower())):
        raise TightfitError(
            f"'{word}' is no command of tightfit: {meant}; to paint the word: tightfit generate {word}"
        )
    return ["generate", *arguments]


def _meant(word: str) -> str | None:
    if word in _ELSEWHERE:
        return _ELSEWHERE[word]
    close = get_close_matches(word, COMMANDS, 1, _NEAR) if len(word) < 30 else []
    return f"did you mean tightfit {close[0]}?" if close else None


def usage(error: Any) -> str:
    """The message of click's UsageError, with what was meant; of the options that it suggests those that are
    near."""
    name = getattr(error, "option_name", None)
    message = error.format_message()
    if "extra argument" in message:
        return f"{message}: put the prompt in quotes"
    if (kind := re.search(r"valid (integer|number|float)", message)) and (
        options := re.findall(r"'(--[\w-]+)'", message)
    ):
        return f"{options[-1]} must be {'a whole number' if kind[1] == 'integer' else 'a number'}"
    if not name or not hasattr(error, "possibilities"):
        return message
    plain = name.lstrip("-").lower().replace("_", "-")
    if plain in _OPTIONS:
        return f"{error.message}: {_OPTIONS[plain]}"
    near = [each for each in error.possibilities or () if _is_near(plain, each.lstrip("-"))]
    return f"{error.message}: did you mean {' or '.join(near)}?" if near else f"{error.message}: see --help"


def _is_near(word: str, option: str) -> bool:
    begins = len(word) > 2 and (option.startswith(word) or word.startswith(option))
    return begins or SequenceMatcher(None, word, option).ratio() >= _OPTION_NEAR


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean emoji?)', or nothing if none is near."""
    close = get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
