"""What an export writes: nothing outside of its folder, nothing from outside of the model's, none that cannot
be read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tightfit.__main__ import app
from tightfit.export import folder as folders
from tightfit.runtime.errors import TightfitError
from typer.testing import CliRunner

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")
COMPONENTS = ("text_encoder", "unet", "vae")


def copied(source, target):
    target.mkdir()
    for name in COMPONENTS:
        (target / name).mkdir()
    folders.copy_the_rest(source, target, COMPONENTS)
    return {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}


def test_what_is_copied_has_names_of_a_list(sd1_copy, tmp_path):
    """Whatever else lies there, and whatever keys model_index.json has: one of them was a path to a sibling's
    file before."""
    before = copied(sd1_copy, tmp_path / "plain")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "vocab.json").write_text("mine")
    for place in ("tokenizer", "scheduler", "unet"):
        for name in ("leak.json", "notes.txt", ".env.json", "evil.py"):
            (sd1_copy / place / name).write_text("{}")
    index = json.loads((sd1_copy / "model_index.json").read_text())
    (sd1_copy / "tokenizer_x").mkdir()
    (sd1_copy / "tokenizer_x" / "vocab.json").write_text("{}")
    hostile = [
        "tokenizer_x/../../../victim",
        "tokenizer_x/../../victim",
        "tokenizer_x",
        "scheduler/../../victim",
        "/tmp/tokenizer",
    ]
    (sd1_copy / "model_index.json").write_text(
        json.dumps(index | {key: ["transformers", "CLIPTokenizer"] for key in hostile})
    )
    assert copied(sd1_copy, tmp_path / "out") == before
    assert before >= {
        "model_index.json",
        "unet/config.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    }
    assert (victim / "vocab.json").read_text() == "mine"
    assert json.loads((tmp_path / "out/model_index.json").read_text())["tokenizer_x"] == [None, None]


@posix
@pytest.mark.parametrize(
    "place", ["tokenizer/vocab.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer"]
)
def test_links_out_of_the_model_are_not_followed(sd1_copy, tmp_path, place):
    """To a file, to a folder, to nothing: one line. A link to another file of the model is copied as the
    file."""
    outside = tmp_path / "secret"
    (sd1_copy / place).rename(outside)
    for target in (outside, tmp_path / "nothing", Path("..") / outside.name):
        (sd1_copy / place).symlink_to(target)
        with pytest.raises(TightfitError, match="link out of the model's folder"):
            copied(sd1_copy, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        (sd1_copy / place).unlink()
    outside.rename(sd1_copy / "elsewhere")
    (sd1_copy / place).symlink_to(sd1_copy / "elsewhere")
    assert any(file.startswith(place) for file in copied(sd1_copy, tmp_path / "out"))


@posix
def test_links_of_the_hubs_cache(sd1, tmp_path):
    """As huggingface_hub lays it out: each file a link to ../../../blobs. Other folders of the cache are not
    the model's."""
    home = tmp_path / "hub" / "models--someone--model"
    snapshot = home / "snapshots" / "0123abcd"
    (home / "blobs").mkdir(parents=True)
    for i, file in enumerate(sorted(file for file in sd1.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(sd1)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, home / "blobs" / str(i))
        link.symlink_to(os.path.relpath(home / "blobs" / str(i), link.parent))
    assert copied(snapshot, tmp_path / "out") == copied(sd1, tmp_path / "plain")
    other = tmp_path / "hub" / "models--another--model" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (snapshot / "tokenizer" / "vocab.json").unlink()
    (snapshot / "tokenizer" / "vocab.json").symlink_to(other / "0")
    with pytest.raises(TightfitError, match="link out of the model's folder"):
        copied(snapshot, tmp_path / "again")


@pytest.mark.parametrize("to", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/diffusion_pytorch_model", lambda name: name.replace("conv_in", "conv_inn")),
        ("text_encoder/model", lambda name: name.replace("fc1", "fc7")),
        ("vae/diffusion_pytorch_model", lambda name: name.replace("decoder.conv_out", "decoder.conv_outt")),
        ("vae/diffusion_pytorch_model", lambda name: name.replace("encoder.conv_out", "encoder.conv_outt")),
    ],
)
def test_tensors_are_those_of_the_config(sd1_copy, tmp_path, file, change, to):
    """A renamed one would make a folder that nothing can load: said before anything is written, the VAE's
    encoder's too."""
    weights = sd1_copy / f"{file}.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(weights).items()}, weights)
    before = sorted(tmp_path.iterdir())
    precision = "int8" if to == "torch" else "fp32"
    arguments = ["export", str(sd1_copy), "--to", to, "--precision", precision, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app(), arguments)
    assert isinstance(done.exception, TightfitError | SystemExit), done.exception
    assert "the weights of" in f"{done.exception} {done.output}"
    assert sorted(tmp_path.iterdir()) == before


OWNER = """
import sys, time
from pathlib import Path
from tightfit.export.folder import appearing
with appearing(Path(sys.argv[1])) as partial:
    (partial / "unet").mkdir()
    print(partial.name, flush=True)
    time.sleep(60)
"""


@posix
def test_leftovers_of_killed_exports_go(tmp_path):
    """What a living process writes stays, whatever its number: as another container's, which has numbers of
    its own. What a killed one left goes when another is written beside it, but nothing that only has a name
    like it."""
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER, tmp_path / name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    try:
        living, killed = (tmp_path / owner.stdout.readline().strip() for owner in owners)  # pyright: ignore
        owners[1].send_signal(signal.SIGKILL)
        owners[1].wait()
        other = tmp_path / ".tightfit-mine.partial"
        other.mkdir()
        link = tmp_path / f".tightfit-{'0' * 32}.partial"
        link.symlink_to(other)
        assert killed.exists()
        with folders.appearing(tmp_path / "out") as partial:
            (partial / "file").write_text("")
        assert sorted(tmp_path.iterdir()) == sorted([living, other, link, tmp_path / "out"])
        assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "file"]
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
            owner.stdout.close()  # pyright: ignore


@posix
def test_a_folder_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between making a folder and locking it another process may lock it, or may have removed it."""
    import fcntl

    lock, taken = fcntl.flock, []

    def late(descriptor, how):
        if len(taken) < 2:
            taken.append(next(tmp_path.glob(".tightfit-*.partial")))
            if len(taken) == 1:
                taken[0].rmdir()
            else:
                raise BlockingIOError
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with folders.appearing(tmp_path / "out") as partial:
        assert partial.exists()
        assert partial not in taken
    assert (tmp_path / "out").exists()


@posix
def test_where_there_are_no_locks_nothing_goes(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    left = tmp_path / f".tightfit-{'0' * 32}.partial"
    left.mkdir()
    with folders.appearing(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "out"]
