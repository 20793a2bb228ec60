"""Which file a text means: of any kind of adapter, in a folder, and in a picture of a stranger."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tightfit.runtime import infotext
from tightfit.runtime.adapters import ADAPTERS, MOST, read_adapter, written
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.request import Request

KINDS = [kind.option for kind in ADAPTERS if kind.shelf]  # which are files
NO_PATHS = ["a\0b.safetensors", "~nouser99/x", "a" * 400, "a" * 5000, "\ud800.safetensors", ":", "a\0b:0.5"]


def picture(**adapters: list[str]) -> str:
    exact = {"model": "m", "precision": "fp32", "prompt": "x", "adapters": adapters}
    return f"x\nSteps: 2, tightfit: {json.dumps(json.dumps(exact))}"


@pytest.mark.parametrize("option", KINDS)
@pytest.mark.parametrize("text", NO_PATHS)
def test_texts_that_are_no_paths_are_one_line(option, text):
    for act in (
        lambda: written({option: [text]}),
        lambda: infotext.parse(picture(**{option: [text]}), "a.png"),
    ):
        with pytest.raises(TightfitError) as error:
            act()
        assert "\n" not in str(error.value)
        str(error.value).encode()
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("option", KINDS)
@pytest.mark.parametrize(
    "path", ["//host/share/x", r"\\host\share\x:0.5", r"\\.\COM1", r"/\host\x", r"\??\UNC\x"]
)
def test_a_picture_names_no_other_machine(monkeypatch, option, path):
    monkeypatch.setattr(infotext, "written", lambda _: pytest.fail("it is looked at"))
    with pytest.raises(TightfitError, match=rf"on another machine.*--{option}"):
        infotext.parse(picture(**{option: [path]}), "a.png")


def test_a_request_has_a_hundred_adapters_at_most():
    names = [f"{number}.safetensors" for number in range(MOST + 1)]
    unchanging = SimpleNamespace(apply=lambda spec: spec)
    for act in (
        lambda: written({"lora": names[1:], "vae": names[:1]}),
        lambda: infotext.parse(picture(lora=names), "a.png"),
        lambda: Request("x", adapters=(unchanging,) * (MOST + 1)).checked(),
    ):
        with pytest.raises(TightfitError, match=f"{MOST + 1} adapters .* at most {MOST}"):
            act()
    assert Request("x", adapters=(unchanging,) * MOST).checked()


def test_each_kind_has_names_of_its_own_in_a_folder(tmp_path):
    with pytest.raises(TightfitError, match=r"a folder without learned_embeds\.safetensors: "):
        written({"embedding": [str(tmp_path)]})
    save_file(
        {"<toy>": torch.zeros(32)}, tmp_path / "learned_embeds.safetensors"
    )  # as diffusers' trainer does
    (adapter,) = written({"embedding": [str(tmp_path)]})
    assert (adapter.token, adapter) == ("<toy>", read_adapter(tmp_path))
    with pytest.raises(TightfitError, match=r"a folder without pytorch_lora_weights\.safetensors or adapter"):
        written({"lora": [str(tmp_path)]})


def test_pickles_of_every_kind_are_to_be_converted(tmp_path, sd1):
    from tightfit.runtime.models.hub import inspect

    (file := tmp_path / "x.pt").write_bytes(b"PK")
    for option in KINDS:
        with pytest.raises(TightfitError, match=r"tightfit convert \".*x\.pt"):
            written({option: [str(file)]})[0].apply(inspect(str(sd1)))
