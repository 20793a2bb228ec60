"""A tokenizer's files from its byte-pair merges, so that no vocabulary has to be copied around."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a text, ends included, that CLIP's encoders read
# A letter for each byte: itself where that can be printed and is no space, else one from 256 on.
_ALPHABET = tuple(map(chr, (*range(33, 127), *range(161, 173), *range(174, 324))))
_MERGES = Path(__file__).parent / "clip" / "merges.txt"
_HEAD = "#version: 0.2"


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token to id, in CLIP's order: 256 bytes, the same bytes ending a word, the merges, start and end of
    text."""
    tokens = [*_ALPHABET, *(byte + "</w>" for byte in _ALPHABET), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_merges() -> list[tuple[str, str]]:
    """The 48,894 merges of CLIP's own vocabulary, which is in the package."""
    lines = _MERGES.read_text(encoding="utf-8").splitlines()[1:]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def write(folder: Path, merges: Sequence[tuple[str, str]], length: int, pad: str = END) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json. `length` is the longest text in tokens, with
    both ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join([_HEAD, *map(" ".join, merges)]) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# Of T5, in the order of their ids, and the logarithms of how likely they are. "▁" is a space.
_T5_MARKS = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}


EXTRA = "<extra_id_"  # how tokens of T5 begin that no word has
_T5_LETTERS = [*_T5_MARKS.items(), *((letter, -3.0) for letter in map(chr, range(33, 127)))]


def write_t5(folder: Path, pieces: Sequence[tuple[str, float]] = _T5_LETTERS, charsmap: bytes = b"") -> None:
    """Write the files of a tokenizer as T5 has it, of these pieces, with the logarithm of how likely each is:
    the printable letters of ASCII if nothing is said. charsmap: what normalises a text before."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = {n: piece for n, (piece, _) in enumerate(pieces) if n < 3 or piece.startswith(EXTRA)}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ends = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    described = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": mark, "special": True, **plain} for number, mark in marks.items()
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": b64encode(charsmap).decode()}
        if charsmap
        else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        "decoder": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": ends,
            "pair": ends,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*pieces]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": len(marks) - 3,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# Of Qwen3, in the order of their ids. The second half of them are words as others, but in one piece.
_MARKS = {END: True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}
_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}\
{{- message.content + '<|im_end|>\\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}\
{%- endif %}{%- endif %}"""


def write_qwen(folder: Path) -> None:
    """Write the files of a tokenizer as Qwen3 has it, in which each byte is a token, and its marks."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(_ALPHABET)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"{_HEAD}\n")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(ids) + number): {"content": mark, "special": is_special, **plain}
        for number, (mark, is_special) in enumerate(_MARKS.items())
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "model_max_length": 131072,
        "eos_token": "<|im_end|>",
        "pad_token": END,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
