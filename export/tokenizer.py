"""A CLIP tokenizer's files from its byte-pair merges, so that no vocabulary has to be copied around."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token to id, in CLIP's order: 256 bytes, the same bytes ending a word, the merges, start and end of
    text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def write(folder: Path, merges: Sequence[tuple[str, str]], length: int, pad: str = END) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json. `length` is the longest text in tokens, with
    both ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
