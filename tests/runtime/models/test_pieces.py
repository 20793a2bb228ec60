"""T5's tokenizer out of SentencePiece's file, and out of GGUF, is that of the same pieces in tokenizer.json,
which the tokenizers library's own trainer made."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from tightfit.export import folder as exporting
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models import tokenizer
from tightfit.runtime.models.families.t5 import text_encoder
from tightfit.runtime.models.layouts import pieces
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

MARKS = ["<pad>", "</s>", "<unk>"]
TEXTS = ["a red heart", "  two   spaces\tand a tab ", "", "ＡＡ heart", "心 is not known", "</s> in it <pad>",
         "the last of <extra_id_7> and <extra_id_99>", "Ünïcödé, punctuated: (a:1.2)!"]  # fmt: skip


def charsmap() -> bytes:
    """One letter, of full width, becomes another: a trie of its three bytes, as Darts lays it out."""
    units, before = [0] * 1025, 0
    for base, byte in zip((256, 512, 768), "Ａ".encode(), strict=True):
        units[before] |= (before ^ base) << 10
        before = base ^ byte
        units[before] = byte
    units[before] |= (before ^ 1024) << 10 | 1 << 8
    return struct.pack("<I1025I", 4 * 1025, *units) + b"A\0"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    spaces = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=MARKS, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    vocab = [(name, float(np.float32(score))) for name, score in pieces_of(made)]
    vocab += [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    made.model = models.Unigram(vocab, unk_id=2)
    made.normalizer = normalizers.Precompiled(charsmap())
    made.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    made.add_special_tokens([*MARKS, *(name for name, _ in vocab[-100:])])
    return made


def pieces_of(made) -> list[tuple[str, float]]:
    import json

    return [tuple(one) for one in json.loads(made.to_str())["model"]["vocab"]]


def number(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + number(rest) if rest else bytes([low])


def field(place: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return number(place << 3 | 2) + number(len(value)) + value
    if isinstance(value, float):
        return number(place << 3 | 5) + struct.pack("<f", value)
    return number(place << 3) + number(value)


def spiece(vocab, kind=1) -> bytes:
    """As SentencePiece writes it, the settings after the pieces."""
    made = b"".join(field(1, field(1, n.encode()) + field(2, s) + field(3, 1)) for n, s in vocab)
    normaliser = field(1, b"nmt_nfkc") + field(2, charsmap()) + field(3, 1) + field(4, 1)
    return made + field(2, field(1, b"x.txt") + field(3, kind) + field(4, 32000)) + field(3, normaliser)


def in_gguf(vocab, file, normalises=lambda writer: writer.add_precompiled_charsmap(charsmap())) -> None:
    """As llama.cpp does, with rows that are not used."""
    writer = gguf.GGUFWriter(str(file), "t5encoder")
    unused = [f"[PAD{number}]" for number in range(28)]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([name.encode() for name, _ in vocab] + [name.encode() for name in unused])
    writer.add_token_scores([score for _, score in vocab] + [-10000.0] * len(unused))
    writer.add_token_types([1] * len(vocab) + [5] * len(unused))
    normalises(writer)
    writer.add_tensor("enc.output_norm.weight", np.zeros(8, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def opened(place):
    reading = text_encoder("", 256).reading
    own: Any = SimpleNamespace(tokenizer=place, pad=None, network=SimpleNamespace(reading=reading))
    return tokenizer.tokenizer_of(own, own)


def test_tokens_are_those_of_the_library(trained, tmp_path):
    vocab = pieces_of(trained)[:-100]
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "spiece.model").write_bytes(spiece(vocab))
    in_gguf(vocab, tmp_path / "t5.gguf")
    exporting._copy_tokenizer(tmp_path / "t5.gguf", tmp_path / "written")
    assert len({*trained.encode(TEXTS[0]).ids}) > 4
    assert trained.encode("ＡＡ").ids == trained.encode("AA").ids
    for place in (tmp_path / "of", tmp_path / "t5.gguf", tmp_path / "written"):
        ours = opened(place)
        for text in TEXTS:
            assert ours(text).input_ids == trained.encode(text).ids, (place, text)
        assert ours.pad_token_id == 0


def test_what_is_no_such_file_is_one_line(trained, tmp_path):
    """Broken anywhere, it is refused, or its tokens are others."""
    vocab, file = pieces_of(trained)[:-100], tmp_path / "spiece.model"
    whole = spiece(vocab)
    broken = [b"", spiece(vocab, kind=2), spiece(vocab[1:]), spiece([*vocab[:3], ("a", float("nan"))]),
              whole + b"\x80" * 12, whole + b"\x0b", field(1, 7) + whole, whole + field(3, field(2, 7)),
              spiece(vocab[:3]) + field(1, field(1, 5)), field(1, field(1, b"\xff")) + whole]  # fmt: skip
    draw = random.Random(0)
    broken += [whole[: draw.randrange(len(whole))] for _ in range(40)]
    broken += [whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
               for at in draw.sample(range(len(whole)), 40)]  # fmt: skip
    refused = 0
    for content in broken:
        file.write_bytes(content)
        try:
            pieces.read(file)
        except TightfitError as error:
            refused += 1
            assert "has no T5 tokenizer" in str(error)
            assert "\n" not in str(error)
    assert refused >= 10


def test_a_number_is_no_table_that_normalises(tmp_path):
    """bytes(2**62) would be memory, not a table."""
    file, name = tmp_path / "t5.gguf", "tokenizer.ggml.precompiled_charsmap"
    in_gguf([(mark, 0.0) for mark in MARKS], file, lambda writer: writer.add_uint64(name, 2**62))
    with pytest.raises(TightfitError, match="has no T5 tokenizer that can be read"):
        pieces.read(file)


@pytest.mark.parametrize("table", [b"\1", struct.pack("<I", 8) + bytes(4), bytes(4) + b"\xff"])
def test_a_table_at_which_the_library_panics_is_refused(table, tmp_path):
    file = tmp_path / "t5.gguf"
    in_gguf([(mark, 0.0) for mark in MARKS], file, lambda writer: writer.add_precompiled_charsmap(table))
    with pytest.raises(TightfitError, match="has no T5 tokenizer that can be read"):
        pieces.read(file)
