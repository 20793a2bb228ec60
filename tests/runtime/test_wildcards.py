"""Variants in prompts, drawn by the seed of each picture."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pytest
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request
from tightfit.runtime.wildcards import variants


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "colour.txt").write_text("red\n# none\nblue\n")
    (tmp_path / "sub" / "animal.txt").write_text("cat\ndog\n")
    (tmp_path / "loop.txt").write_text("__loop__\n")
    return tmp_path


def test_what_has_no_variants_stays(folder):
    for prompt in ("a cat", "[a|b] (c:1.2)", "a {cat}", "__colour__", ""):
        request = Request(prompt, num_images=3)
        assert variants(request) == (request,)
    plain = Request("{a|b}", prompt_syntax="plain")
    assert variants(plain, folder) == (plain,)


def test_variants_need_their_package(monkeypatch):
    imported = builtins.__import__

    def without(name, *given, **more):
        if name.startswith("dynamicprompts"):
            raise ImportError(name)
        return imported(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TightfitError, match="pip install dynamicprompts") as caught:
        variants(Request("a {red|blue} heart"))
    assert "\n" not in str(caught.value)


def test_a_picture_each(folder):
    pytest.importorskip("dynamicprompts")
    request = Request("a {red|blue|green} __sub/animal__ [x|y]", "{a|b}", seed=3, num_images=8)
    drawn = variants(request, folder)
    assert [(one.seed, one.num_images) for one in drawn] == [(seed, 1) for seed in range(3, 11)]
    assert len({one.prompt for one in drawn}) > 2
    assert {one.prompt.split()[1] for one in drawn} <= {"red", "blue", "green"}
    assert {one.prompt.split()[2] for one in drawn} == {"cat", "dog"}
    assert all(one.prompt.endswith(" [x|y]") and one.negative_prompt in "ab" for one in drawn)
    assert drawn == variants(request, folder)
    (alone,) = variants(replace(request, seed=7, num_images=1), folder)
    assert alone == drawn[4]
    assert variants(replace(request, seed=None), folder)[0].seed is not None


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{a|b} __color__", "no wildcard __color__ is in .*did you mean __colour__"),
        ("__zzz__", "no wildcard __zzz__ is in .*, which has colour"),
        ("__../secret__", "no wildcard"),
        ("__loop__", "without end"),
        ("{a|b} {c", "close each {"),
        ("{a|b}" * 3000, "shorten it"),
    ],
)
def test_variants_that_cannot_be(folder, prompt, said):
    pytest.importorskip("dynamicprompts")
    with pytest.raises(TightfitError, match=said) as caught:
        variants(Request(prompt, seed=1), folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none(folder):
    with pytest.raises(TightfitError, match="no folder of wildcards"):
        variants(Request("a"), folder / "colour.txt")
