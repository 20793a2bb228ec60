"""Rows become pictures: what a table says, line by line, and what is wrong with it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tightfit.runtime.batch.columns import types
from tightfit.runtime.batch.ledger import Ledger
from tightfit.runtime.batch.requests import Picture, Reading, options_of
from tightfit.runtime.batch.table import RowError, rows
from tightfit.runtime.errors import TightfitError


@pytest.fixture
def read(tmp_path):
    """Called with the text of a table: its pictures, and what is wrong with rows."""

    def reader(text: str | bytes, name: str = "t.jsonl", **about: Any) -> list[Picture | RowError]:
        table = tmp_path / name
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [*Reading(**about).pictures(rows(table))]

    return reader


def whole(picture: Picture | RowError) -> dict[str, Any]:
    assert isinstance(picture, Picture), picture
    model, wishes, options = options_of(picture.group)
    return {"model": model, **wishes, **options, **picture.options}


def test_a_column_for_every_option_of_a_request():
    from tightfit.runtime import asking
    from tightfit.runtime.open_models import ASKABLE

    apart = {"adapters", "conditions", "preview_every", "models_dirs"}
    assert {*types()} == {"model", "name", *asking.names(), *ASKABLE} - apart


def test_every_kind_of_table_asks_the_same(read):
    line = '{"prompt": "a, b", "steps": 3, "guidance_scale": 2.5, "seed": 4, "invert_mask": null}'
    csv = 'prompt,Steps,guidance-scale,seed\n"a, b",3,2.5,4\n'
    asked = [whole(one) for one in (*read(line), *read(csv, "t.csv"), *read(csv.replace(",", ";"), "t.csv"))]
    assert asked[0] == {
        "model": "emoji", "prompt": "a, b", "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 4,
    }  # fmt: skip
    assert asked[1] == asked[0]
    defaults = {"num_inference_steps": 3, "guidance_scale": 2.5, "seed": 4}
    assert [whole(one) for one in read("a, b\n\n", "t.txt", defaults=defaults)] == asked[:1]


def test_a_byte_order_mark_is_none_of_a_columns_name(read):
    assert whole(read("\ufeffprompt,seed\nä,1\n".encode(), "t.csv")[0])["prompt"] == "ä"


def test_lists_and_spans_multiply(read):
    row = {"prompt": ["a", "b"], "seed": "1..3", "width": [64, 96]}
    asked = [whole(one) for one in read(json.dumps(row))]
    assert [(one["prompt"], one["seed"], one["width"]) for one in asked] == [
        (prompt, seed, width) for prompt in "ab" for seed in (1, 2, 3) for width in (64, 96)
    ]
    tens = read('{"prompt": "a", "seed": 5, "num_inference_steps": "10..30..10", "num_images": 2}', repeat=2)
    assert [whole(one)["seed"] for one in tens] == [5, 6, 7, 8] * 3


NAMES = [
    ({"seed": "1..2", "name": "a"}, ["a-1", "a-2"]),
    ({"seed": "1..2", "name": "[seed]"}, ["[seed]"] * 2),
    ({"width": [64, 96], "name": "[seed].png"}, ["[seed]-1.png", "[seed]-2.png"]),
    ({"seed": 1, "num_images": 2, "name": "[width]"}, ["[width]-1", "[width]-2"]),
    ({"steps": [1, 2], "num_images": 2, "seed": 1, "name": "[steps]/[seed]"}, ["[steps]/[seed]"] * 4),
    ({"prompt": ["a", "b"], "name": "[prompt_words]"}, ["[prompt_words]"] * 2),
    ({"width": [64, 96], "name": "[number]"}, ["[number]"] * 2),
    ({"width": [64, 96], "name": "[[width]]"}, ["[[width]]-1", "[[width]]-2"]),
]


@pytest.mark.parametrize(("row", "names"), NAMES)
def test_names_tell_the_pictures_of_a_row_apart(read, row, names):
    """By its fields, or by a number in the order of the row."""
    assert [one.name for one in read(json.dumps({"prompt": "a", **row}))] == names


def test_an_open_seed_is_drawn_for_each(read):
    seeds = [whole(one)["seed"] for one in read("a\na\n", "t.txt", repeat=3)]
    assert len({*seeds}) == 6


def test_variants_are_drawn_by_the_seed_as_generate_draws_them(read):
    from tightfit.runtime.request import Request
    from tightfit.runtime.wildcards import variants

    pytest.importorskip("dynamicprompts")
    asked = read('{"prompt": "{a|b|c|d|e} star", "seed": 3, "num_images": 4}')
    drawn = variants(Request("{a|b|c|d|e} star", seed=3, num_images=4))
    assert [(whole(one)["prompt"], whole(one)["seed"]) for one in asked] == [
        (r.prompt, r.seed) for r in drawn
    ]


BAD = [
    ("prompt,seed\na,1\nb,x\nc,2\n", "t.csv", "row 3: seed must be a whole number"),
    ("prompt,seed\na\n", "t.csv", "row 2: it has 1 cells, and the header 2"),
    ("prompt|seed\na|1\n", "t.csv", "row 1: unknown column 'prompt|seed'.*commas, semicolons or tabs"),
    ("prompt,sampler\na,x\n", "t.csv", "row 1: unknown column 'sampler': it is scheduler"),
    ("prompt,promt\na,x\n", "t.csv", r"row 1: unknown column 'promt': did you mean prompt\?"),
    ("prompt,steps,num_inference_steps\na,1,1\n", "t.csv", "num_inference_steps is there twice"),
    ("seed\n1\n", "t.csv", "row 2: it has no prompt"),
    ('prompt\n"a\n', "t.csv", "row 2: it is no CSV"),
    ("prompt,guidance_scale\na,\"7,5\"\n", "t.csv", "row 2: .*write 7.5, with a point"),
    (b"prompt\n\xff\n", "t.csv", "row 2: byte 1 is no UTF-8"),
    ("\ufeffa".encode("utf-16-le"), "t.txt", "UTF-16"),
    ('{"prompt": "a"', "t.jsonl", "row 1: it is no JSON"),
    ("[1]", "t.jsonl", r"row 1: '?\[1\]'? is no object"),
    ("[" * 100_000, "t.jsonl", "row 1: it is no JSON"),
    ('{"prompt": "a", "width": "9..1"}', "t.jsonl", "row 1: width '9..1' is no span"),
    ('{"prompt": "a", "width": 1e9}', "t.jsonl", "row 1: width must be"),
    ('{"prompt": 5}', "t.jsonl", "row 1: prompt must be text"),
    ('{"prompt": "\\ud800"}', "t.jsonl", "row 1: prompt is not valid UTF-8"),
    ('{"prompt": "a", "precision": "int9"}', "t.jsonl", "row 1: unknown precision 'int9'"),
    ('{"prompt": "a", "name": "../b"}', "t.jsonl", "row 1: name '../b' is no name inside"),
    ('{"prompt": "a", "name": "/b"}', "t.jsonl", "row 1: name '/b' is no name inside"),
    ('{"prompt": "a", "name": "b"}\n{"prompt": "c", "name": "B"}', "t.jsonl", "row 2: .* that of row 1"),
    ('{"prompt": "a", "seed": "1..9000000", "width": "1..9000000"}', "t.jsonl", "81000000000000 pictures"),
    ('{"prompt": "a", "steps": 0}', "t.jsonl", "row 1: steps must be"),
    ('{"prompt": "a", "steps": "x"}', "t.jsonl", "row 1: steps must be"),
    ('{"prompt": "a", "num_inference_steps": 0}', "t.jsonl", "row 1: num_inference_steps must be"),
    ("prompt,Steps\na,0\n", "t.csv", "row 2: Steps must be"),
    ("prompt,Steps\na,x\n", "t.csv", "row 2: Steps must be"),
    ('{"prompt": "a", "num_images": 0}', "t.jsonl", "num_images must be"),
    ('{"prompt": "a", "num_images": 1000000000}', "t.jsonl", "1000000000 pictures"),
    ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "t.jsonl", "prompt has a list in a list"),
    ('{"prompt": "a", "name": "\\ud800"}', "t.jsonl", "is no name of a file"),
    (f'{{"prompt": "a", "name": "{"x" * 300}"}}', "t.jsonl", "is no name of a file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "said"), BAD)
def test_what_is_wrong_names_its_row(read, text, name, said):
    import re

    try:
        found = [str(one) for one in read(text, name) if isinstance(one, RowError)]
    except TightfitError as error:
        found = [str(error)]
    assert len(found) == 1, found
    assert re.search(said, found[0]), found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(("name", "said"), [("t.xlsx", "ends in none of"), ("no.csv", "does not exist")])
def test_what_is_no_table(tmp_path, name, said):
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(TightfitError, match=said):
        next(rows(tmp_path / name))


def test_rows_after_a_wrong_one_are_read(read):
    found = read('{"prompt": "a"}\nx\n{"prompt": "b", "sed": 1}\n{"prompt": "c"}')
    assert [type(one) for one in found] == [Picture, RowError, RowError, Picture]


def test_a_long_table_is_read_as_it_comes(tmp_path):
    """Of a span of ten million the first is there at once, and nothing is kept of those that follow."""
    table = tmp_path / "t.jsonl"
    table.write_text('{"prompt": "a", "seed": "1..10000000"}')
    first = [*islice(Reading().pictures(rows(table)), 3)]
    assert [whole(one)["seed"] for one in first] == [1, 2, 3]


def test_keys_are_of_what_is_asked(read, tmp_path: Path):
    """The same table asks for the same pictures, also where a seed is drawn; twins are what is sure to be the
    same picture."""
    text = '{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "a", "seed": 1}\n{"prompt": "a", "seed": "1..2"}'
    asked, again = ([one for one in read(text) if isinstance(one, Picture)] for _ in range(2))
    assert [one.key for one in asked] == [one.key for one in again]
    assert len({one.key for one in asked}) == 5
    assert [one.twin for one in asked] == [None, None, None, asked[2].key, None]
    with Ledger(tmp_path / "d") as ledger:
        assert not ledger.ask(asked)
        assert not ledger.ask(again[:3])
        assert ledger.counts() == {"waiting": 3}
        drawn = [record["request"]["seed"] for record in ledger.records()]
        assert drawn[:2] == [one.options["seed"] for one in asked[:2]]  # not those of the second reading


def test_a_wrong_table_changes_nothing(read, tmp_path):
    with Ledger(tmp_path / "d") as ledger:
        assert not ledger.ask(read('{"prompt": "a"}'))
        errors = ledger.ask(read('{"prompt": "b"}\n' + "x\n" * 30))
        assert [error.number for error in errors] == [*range(2, 22)]
        assert not ledger.ask(read('{"prompt": "a"}'))
        assert ledger.counts() == {"waiting": 1}
