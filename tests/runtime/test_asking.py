"""Options by their names: what a model's family does not take is said before what is wrong with a file."""

from __future__ import annotations

import pytest
import tightfit
from tightfit.runtime.asking import Shelves, request_of
from tightfit.runtime.batch.requests import Reading
from tightfit.runtime.cli import app
from tightfit.runtime.errors import TightfitError


@pytest.fixture(scope="module")
def klein(tiny_model):
    return tiny_model("flux2-klein")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("--control", "control"),
        ("--control", "control_image"),
        ("--ip-image", "ip_adapter_image"),
        ("--ip-adapter", "ip_adapter"),
        ("--embedding", "embedding"),
    ],
)
def test_the_familys_refusal_comes_first(klein, typed, name, capsys, monkeypatch):
    said = f"{typed} is not for Flux.2 klein"
    for command in (["a heart"], ["plan"]):
        monkeypatch.setattr("sys.argv", ["tightfit", *command, "--model", str(klein), typed, "missing.png"])
        with pytest.raises(SystemExit):
            app.main()
        assert said in capsys.readouterr().err
    value = "missing.png" if name == "ip_adapter_image" else ["missing.png"]
    asked = {"prompt": "a heart", name: value}
    with pytest.raises(TightfitError, match=said):
        request_of(asked, model=lambda: tightfit.inspect(klein))
    (row,) = Reading(opened=tightfit.inspect).pictures(iter([(1, {**asked, "model": str(klein)})]))
    assert said in str(row)
    with pytest.raises(TightfitError, match="missing"):
        request_of(asked, model=lambda: tightfit.inspect("emoji"))


def test_references_are_refused_before_they_are_opened():
    with pytest.raises(TightfitError, match="--reference is not for SD 1"):
        request_of({"prompt": "a", "reference": ["missing.png"]}, model=lambda: tightfit.inspect("emoji"))


@pytest.mark.parametrize("name", ["lora", "vae"])
def test_a_clients_empty_name_is_not_the_folder_that_serves(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TightfitError) as refused:
        request_of({"prompt": "a", name: [""]}, Shelves([]), model=lambda: tightfit.inspect("emoji"))
    assert str(tmp_path) not in str(refused.value)
