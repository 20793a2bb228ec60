"""A1111's syntax: a table of prompts beside what its documentation says they mean, and hostile ones."""

from __future__ import annotations

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.prompt_syntax import MOST_OPEN, line, lines, matters, sections

UP, DOWN = 1.1, 1 / 1.1

# Prompt → its pieces and their weights; | begins what follows a BREAK.
WEIGHTS = {
    "": [],
    " ": [(" ", 1)],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", UP), (" word", 1)],
    "(unbalanced": [("unbalanced", UP)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", UP)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.3 * UP * UP), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.55),
        (", sun, ", UP), ("sky", UP**4), (".", UP),
    ],
    "(a)": [("a", UP)],
    "((a))": [("a", UP**2)],
    "(((a)))": [("a", UP**3)],
    "((((a))))": [("a", UP**4)],
    "[a]": [("a", DOWN)],
    "[[a]]": [("a", DOWN**2)],
    "[[[a]]]": [("a", DOWN**3)],
    "([a])": [("a", DOWN * UP)],
    "[(a)]": [("a", UP * DOWN)],
    "(a:1.5)": [("a", 1.5)],
    "(a:0.25)": [("a", 0.25)],
    "(a:1)": [("a", 1)],
    "(a:1.0)": [("a", 1)],
    "(a:0)": [("a", 0)],
    "(a:.5)": [("a", 0.5)],
    "(a:2.)": [("a", 2)],
    "(a:+1.5)": [("a", 1.5)],
    "(a:-1)": [("a", -1)],
    "(a: 1.5 )": [("a", 1.5)],
    "(a :1.5)": [("a ", 1.5)],
    "((a:1.5))": [("a", 1.5 * UP)],
    "((a:2):0.5)": [("a", 1)],
    "[a:1.5]": [("a:1.5", DOWN)],
    "(a:1.5": [("a:1.5", UP)],
    "a:1.5)": [("a:1.5)", 1)],
    "a)": [("a)", 1)],
    "a]": [("a]", 1)],
    ")(": [(")", 1)],
    "((a)": [("a", UP**2)],
    "(a))": [("a", UP), (")", 1)],
    "(a]": [("a]", UP)],
    "[a)": [("a)", DOWN)],
    "(a[b)c]": [("a", UP), ("b", UP * DOWN), ("c", DOWN)],
    "(a (b)": [("a ", UP), ("b", UP * UP)],
    "x (a:1.2) y (b:1.2) z": [("x ", 1), ("a", 1.2), (" y ", 1), ("b", 1.2), (" z", 1)],
    "(a)(b:1.3)[c]d": [("a", UP), ("b", 1.3), ("c", DOWN), ("d", 1)],
    "masterpiece, (best quality:1.2), [blurry]": [
        ("masterpiece, ", 1), ("best quality", 1.2), (", ", 1), ("blurry", DOWN),
    ],
    r"a \(b\)": [("a (b)", 1)],
    r"a \[b\]": [("a [b]", 1)],
    r"\\": [("\\", 1)],
    r"a\b": [("ab", 1)],
    r"(\(a\):1.5)": [("(a)", 1.5)],
    r"\((a)": [("(", 1), ("a", UP)],
    "a:b": [("a:b", 1)],
    "a ratio of 16:9": [("a ratio of 16:9", 1)],
    "(a:b)": [("a:b", UP)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "(a:1e0)": [("a", 1)],
    "a BREAK b": [("a", 1), "|", ("b", 1)],
    "BREAK": ["|"],
    "BREAK a": ["|", ("a", 1)],
    "a BREAK": [("a", 1), "|"],
    "a BREAK BREAK b": [("a", 1), "|", "|", ("b", 1)],
    "a  BREAK\nb": [("a", 1), "|", ("b", 1)],
    "BREAKFAST": [("BREAKFAST", 1)],
    "break": [("break", 1)],
    "(a BREAK b:1.5)": [("a", 1.5), "|", ("b", 1.5)],
    "a (b) BREAK [c]": [("a ", 1), ("b", UP), "|", ("c", DOWN)],
    "ein (rotes Herz:1.2) über München": [("ein ", 1), ("rotes Herz", 1.2), (" über München", 1)],
    "un [chat:1.1], (très) mignon": [
        ("un ", 1), ("chat:1.1", DOWN), (", ", 1), ("très", UP), (" mignon", 1),
    ],
    "(猫:1.3) と [犬]": [("猫", 1.3), (" と ", 1), ("犬", DOWN)],
    "красное (сердце)": [("красное ", 1), ("сердце", UP)],
    "(🍕:1.4) 🐈": [("🍕", 1.4), (" 🐈", 1)],
    "(👩‍👩‍👧‍👦)": [("👩‍👩‍👧‍👦", UP)],
    "{a|b} <c> #d": [("{a|b} <c> #d", 1)],
    "a\nb": [("a\nb", 1)],
}  # fmt: skip

# Prompt → the texts with the call each ends at, of ten; lengths written as 10 where one text stays.
SCHEDULES = {
    "test": [(10, "test")],
    "": [(10, "")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [b:3 ]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)],
    "[fe|]male": [(step, "female" if step % 2 else "male") for step in range(1, 11)],
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
    "[a|b|c]": [(step, "cab"[step % 3]) for step in range(1, 11)],
    "[|a]": [(step, "" if step % 2 else "a") for step in range(1, 11)],
    "[a:b:0.5]": [(5, "a"), (10, "b")],
    "[a:b:0.25]": [(2, "a"), (10, "b")],
    "[a:b:5]": [(5, "a"), (10, "b")],
    "[a:b:0]": [(10, "b")],
    "[a:b:0.0]": [(10, "b")],
    "[a:b:1]": [(1, "a"), (10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:10]": [(10, "a")],
    "[a::3]b": [(3, "ab"), (10, "b")],
    "[:a:3]": [(3, ""), (10, "a")],
    "[:3]": [(3, ""), (10, "")],
    "[a:3]": [(3, ""), (10, "a")],
    "[1:2]": [(2, ""), (10, "1")],
    "[a:b:3][c:d:7]": [(3, "ac"), (7, "bc"), (10, "bd")],
    "[[a:b:3]:c:7]": [(3, "a"), (7, "b"), (10, "c")],
    "([a:b:3]:1.2)": [(3, "(a:1.2)"), (10, "(b:1.2)")],
    "[(a):[b]:3]": [(3, "(a)"), (10, "[b]")],
    "[[a|b]:c:2]": [(1, "a"), (2, "b"), *[(step, "c") for step in range(3, 11)]],
    "[a:b]": [(10, "[a:b]")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[a:b:x]": [(10, "[a:b:x]")],
    "[a]": [(10, "[a]")],
    "(a:1.2)": [(10, "(a:1.2)")],
    "a | [b:c:3]": [(10, "a | [b:c:3]")],
    "[a|b:3]": [(10, "[a|b:3]")],
    "[a:b:3]\\": [(10, "[a:b:3]\\")],
    r"[a\|b:c:3]": [(3, r"a\|b"), (10, "c")],
    r"[\[a\]:b:3]": [(3, r"\[a\]"), (10, "b")],
    "a photo of [猫:犬:0.5]": [(5, "a photo of 猫"), (10, "a photo of 犬")],
    "[🐈:🐕:0.3] im Garten": [(3, "🐈 im Garten"), (10, "🐕 im Garten")],
    "[le chat:le chien:.7]": [(7, "le chat"), (10, "le chien")],
    "fantasy landscape with a [mountain:lake:0.2] and [an oak:a christmas tree:0.7]"
    "[ in foreground::0.6][: in background:0.2] [shoddy:masterful:0.5]": [
        (2, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (5, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (6, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (7, "fantasy landscape with a lake and an oak in background masterful"),
        (10, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ],
}  # fmt: skip

# Prompt → its branches.
BRANCHES = {
    "a cat": [("a cat", 1)],
    "a cat AND a dog": [("a cat ", 1), (" a dog", 1)],
    "a cat :1.2 AND a dog": [("a cat ", 1.2), (" a dog", 1)],
    "a cat :1.2 AND a dog AND a penguin :2.2": [("a cat ", 1.2), (" a dog ", 1), (" a penguin ", 2.2)],
    "a AND b :0.5": [("a ", 1), (" b ", 0.5)],
    "a AND b :-1": [("a ", 1), (" b ", -1)],
    "a AND b:.5 ": [("a ", 1), (" b", 0.5)],
    "a AND (b:1.5)": [("a ", 1), (" (b:1.5)", 1)],
    "a AND": [("a ", 1), ("", 1)],
    "HAND and SAND": [("HAND and SAND", 1)],
    "a ratio 16:9": [("a ratio 16:9", 1)],
    "ein Hund AND eine Katze :0.8": [("ein Hund ", 1), (" eine Katze ", 0.8)],
}


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights(prompt):
    read = []
    for number, section in enumerate(sections(prompt)):
        read += ["|"] * (number > 0) + [piece for piece in section if piece.text]
    wanted = WEIGHTS[prompt]
    assert [piece if piece == "|" else piece.text for piece in read] == [
        piece if piece == "|" else piece[0] for piece in wanted
    ]
    weights = [(piece.weight, known[1]) for piece, known in zip(read, wanted, strict=True) if piece != "|"]
    for weight, known in weights:
        assert weight == pytest.approx(known, rel=1e-12, abs=0)


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_schedules(prompt):
    read = line(prompt, 10)
    assert [*zip(read.ends, read.texts, strict=True)] == SCHEDULES[prompt]


@pytest.mark.parametrize("prompt", BRANCHES)
def test_branches(prompt):
    branches = lines(prompt, 10)
    assert [(branch.texts, branch.weight) for branch in branches] == [
        ((text,), weight) for text, weight in BRANCHES[prompt]
    ]


def test_the_table_is_long():
    assert len({*WEIGHTS, *SCHEDULES, *BRANCHES}) >= 120


def test_calls_are_counted_as_a1111_counts_them():
    """From 0, and a text is used up to the call that its end says: the first has one call more."""
    change = line("[a:b:0.5]", 10)
    assert "".join(change.at(call) for call in range(10)) == "aaaaaabbbb"
    assert "".join(line("[a|b|c]", 10).at(call) for call in range(10)) == "aabcabcabc"
    assert change.at(11) == "b"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("[a:b:25]", "a change of the prompt at 25.0 is outside of 10 steps: taken as 10"),
        ("[a:b:1.5]", "a change of the prompt at 1.5 is outside of the way (1.0): taken as 1"),
        ("[a:b:-3]", "a change of the prompt at -3.0 is outside of 10 steps: taken as 0"),
        ("a|b [c:d:3]", "a | outside of [ ]"),
    ],
)
def test_what_never_comes_about_is_said(prompt, said):
    (notice,) = line(prompt, 10).notices
    assert said in notice


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("(a:nan)", "nearest is 1"),
        ("(a:inf)", "nearest is 100"),
        ("(a:-1e9)", "nearest is -100"),
        ("(a:1000000000)", "nearest is 100"),
        ("(a:1.2.3)", "no number"),
        ("((((a:10):10):10):10)", "nearest is 100"),
        ("(" * 60 + "a" + ")" * 60, "nearest is 100"),
        ("(" * 100 + "a" + ")" * 100, f"more than {MOST_OPEN} brackets"),
    ],
)
def test_weights_beyond_reason(prompt, said):
    with pytest.raises(TightfitError, match=said) as caught:
        sections(prompt)
    assert "\n" not in str(caught.value)


def test_too_many_texts():
    with pytest.raises(TightfitError, match="200 different texts"):
        line(f"[{'|'.join(map(str, range(200)))}]", 300)


@pytest.mark.parametrize(
    "unit",
    [
        "(",
        "[",
        "(a",
        "[a",
        "[a|",
        "(a)",
        "((a",
        "a)",
        "[a|b]",
        "[a:b:1]",
        "\\",
        ":",
        " ",
        "BREAK ",
        "1",
        "(:1",
    ],
)
def test_hostile_prompts_take_their_length(unit):
    """100 kB each; half a minute if any of it were quadratic."""
    text = (unit * 100_000)[:100_000]
    for read in (sections, lambda text: lines(text, 1000)):
        try:
            read(text)
        except TightfitError as error:
            assert "\n" not in str(error)


def test_what_may_be_read_in_another_way():
    assert not matters("a cat: 3|4, a {b}")
    assert all(
        map(matters, ("(a)", "[a]", "a AND b", "a BREAK b", r"a\b", "<lora:x>", "long " * 20, "İ" * 37))
    )
