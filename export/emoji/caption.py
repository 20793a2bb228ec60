"""What an emoji is called: captions to train on, and a CLIP tokenizer whose vocabulary fits them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from ...runtime.models import vocabulary as clip
from .data import Emoji

TEMPLATES = ("{}", "{}", "a {}", "a {}", "an emoji of a {}", "a picture of a {}", "{} emoji")
LENGTH = 32  # tokens; SD's 77 would cost the little model more than it has to say


def caption(one: Emoji, rng: random.Random, empty: float = 0.1) -> str:
    """A label most of the time, sometimes with or instead of a few tags; empty (for guidance) with chance
    `empty`."""
    if rng.random() < empty:
        return ""
    dice = rng.random()
    label = rng.choice(TEMPLATES).format(one.label)
    if dice < 0.75 or len(one.tags) < 3:
        return label
    tags = " ".join(rng.sample(one.tags, rng.randint(2, min(4, len(one.tags)))))
    return f"{label} {tags}" if dice < 0.9 else tags


def ids(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """(texts, LENGTH), padded or cut."""
    padded = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids


def tokenizer(chosen: list[Emoji], folder: Path, size: int = 2048) -> CLIPTokenizerFast:
    """Learn about `size` byte-pair tokens from every label, tag and template; write CLIP's usual files into
    `folder`.

    Any text can be encoded, as bytes where no longer token fits. Returns the tokenizer as loaded from those
    files.
    """
    text = " ".join(t.format(one.label) + " " + " ".join(one.tags) for one in chosen for t in TEMPLATES)
    clip.write(folder, [], LENGTH)  # one that knows letters alone splits text as they all do
    splitter: Any = CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer
    words = sorted(
        w for w, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=size - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learned = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learned.train_from_iterator(words, trainer)
    clip.write(folder, [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]], LENGTH)
    return CLIPTokenizerFast.from_pretrained(folder)
