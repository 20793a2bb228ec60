"""A model's folder is hostile until shown otherwise: what is opened is a regular file, and headers are what
the format allows."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tightfit
from tightfit.runtime import files
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.layouts import safetensors as layout
from tightfit.runtime.models.tokenizer import read_tokenizer
from tightfit.runtime.planner.plan import Plan

PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes and devices in folders")


def refused(call, *words):
    with pytest.raises(TightfitError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message, message


def irregular(place: Path, kind: str) -> None:
    """Replace what is at `place` by something that no file is."""
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(place.parent)  # a socket's path has 108 characters at most
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(place.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        place.mkdir()
    else:
        with place.open("wb") as stream:
            stream.truncate(2**42)  # sparse: no bytes on the disk


KINDS = ("pipe", "device", "socket", "folder", "endless")


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_of_a_sane_size_are_opened(tmp_path, kind):
    """Each kind in place of each file that is read: one line at once, where a pipe would be waited for and a
    device read on."""
    file = tmp_path / "a file"
    irregular(file, kind)
    for read in (files.read_json, layout.read_header, Plan.read, files.read_bytes):
        try:
            refused(lambda read=read: read(file), "a file")
        except OSError as error:  # read_bytes leaves the system's own to its callers
            assert (read, kind) == (files.read_bytes, "socket"), error


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"]
)
def test_tokenizers_of_regular_files(sd1, tmp_path, name, kind):
    folder = tmp_path / "tokenizer"
    shutil.copytree(sd1 / "tokenizer", folder)
    irregular(folder / name, kind)
    if kind == "folder" and name in ("tokenizer.json", "chat_template.jinja"):
        return  # transformers takes no folder for a file
    refused(lambda: read_tokenizer(folder), "tokenizer")


@posix
def test_every_file_of_a_model(sd1_copy):
    """No file of the folder may be a pipe: the model is refused, in one line, for each that is read at
    all."""
    for file in sorted(
        file for file in sd1_copy.rglob("*") if file.is_file() and "tokenizer" not in str(file)
    ):
        kept = file.read_bytes()
        irregular(file, "pipe")
        refused(lambda: tightfit.inspect(sd1_copy), file.name, "is a pipe")
        file.unlink()
        file.write_bytes(kept)
    assert tightfit.inspect(sd1_copy).family == "sd1"


def test_tokenizers_open_their_own_files_only(sd1, tmp_path):
    """Whatever tokenizer_config.json names, and whatever version of transformers reads it; nor is code of
    auto_map run."""
    folder = tmp_path / "model" / "tokenizer"
    shutil.copytree(sd1 / "tokenizer", folder)
    before = read_tokenizer(folder)("a cat").input_ids
    other = tmp_path / "vocab.json"
    other.write_text("{}")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "vocab_file": str(other),
        "merges_file": str(other),
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(folder)("a cat").input_ids == before
    assert not (tmp_path / "ran").exists()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"fast_tokenizer_files": ["../../tokenizer.9.json"]})
    )
    refused(lambda: read_tokenizer(folder), "fast_tokenizer_files")


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["evil", "EvilPipeline"]},
        {"_class_name": {"a": 1}},
        {"_class_name": "../evil"},
        {"unet": ["evil", "EvilUNet"]},
        {"unet": ["diffusers", "UNet2DConditionModel", "evil"]},
        {"unet": ["diffusers.evil", "UNet2DConditionModel"]},
        {"unet": [None, "UNet2DConditionModel"]},
        {"vae": ["diffusers", ["AutoencoderKL"]]},
        {"text_encoder": ["os", "system"]},
        {"tokenizer": ["evil", "CLIPTokenizer"]},
        {"scheduler": ["evil", "DDIMScheduler"]},
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        {"tokenizer_x/../../../victim": ["transformers", "CLIPTokenizer"]},
        {"controlnet": ["evil", "ControlNetModel"]},
        {"vae": {"evil": 1}},
        {"\u001b[31mred": ["a", "b"]},
    ],
)
def test_classes_are_of_a_list(sd1_copy, changes):
    """The folder's own code is written beside each name, and is not run."""
    ran = sd1_copy.parent / "ran"
    for place in (sd1_copy, *(each for each in sd1_copy.iterdir() if each.is_dir())):
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    file = sd1_copy / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TightfitError, match=r"code|no model has") as caught:
        tightfit.inspect(sd1_copy)
    assert str(caught.value).isprintable()
    assert not ran.exists()


def test_parts_that_are_never_run_may_be_listed(sd1_copy):
    file = sd1_copy / "model_index.json"
    extra = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
        "_name_or_path": "a/b",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    assert tightfit.inspect(sd1_copy).family == "sd1"


def write(file, header, data=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return file


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": PLAIN | {"data_offsets": [0.0, 8.0]}}, 8),
        ({"a": PLAIN | {"shape": [2.0]}}, 8),
        ({"a": PLAIN | {"shape": [True, 2]}}, 8),
        ({"a": PLAIN | {"shape": [-1, -2]}}, 8),
        ({"a": PLAIN | {"shape": "2"}}, 8),
        ({"a": PLAIN | {"shape": [1] * 8 + [2]}}, 8),
        ({"a": PLAIN | {"shape": [[2]]}}, 8),
        ({"a": PLAIN | {"dtype": 3}}, 8),
        ({"a": PLAIN | {"dtype": ["F32"]}}, 8),
        ({"a": PLAIN | {"data_offsets": [0, 8, 16]}}, 8),
        ({"a": PLAIN | {"data_offsets": [8, 0]}}, 8),
        ({"a": PLAIN | {"data_offsets": [-8, 0]}}, 8),
        ({"a": PLAIN | {"dtype": "I64"}}, 8),
        ({"a": PLAIN | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, 0),
        ({"a": PLAIN, "b": PLAIN}, 8),  # overlap
        ({"a": PLAIN, "b": PLAIN | {"data_offsets": [4, 12]}}, 12),
        ({"a": PLAIN, "b": PLAIN | {"data_offsets": [12, 20]}}, 20),  # a hole
        ({"a": PLAIN | {"data_offsets": [4, 12]}}, 12),
        ({"a": PLAIN}, 9),  # more than was promised
        (b'{"a": %s, "a": %s}' % (json.dumps(PLAIN).encode(), json.dumps(PLAIN).encode()), 8),
        (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', 8),
        ({"a\u001b[2J": PLAIN}, 8),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', 8),
        (b"[" * 100_000, 8),
    ],
)  # fmt: skip
def test_headers_that_the_format_forbids(tmp_path, header, data):
    refused(lambda: layout.read_header(write(tmp_path / "x.safetensors", header, data)), "x.safetensors")


def test_headers_of_too_many_tensors(tmp_path):
    """Held against a limit before they are parsed: the header of 10,010 empty tensors, and one of 17 MB."""
    entry = json.dumps(PLAIN | {"shape": [0], "data_offsets": [0, 0]}).encode()
    many = b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(10_010)) + b"}"
    refused(lambda: layout.read_header(write(tmp_path / "many.safetensors", many, 0)), "10000 tensors")
    refused(
        lambda: layout.read_header(write(tmp_path / "long.safetensors", b"{}" + b" " * 2**24, 0)),
        "10000 tensors",
    )


def test_headers_that_the_format_allows(tmp_path):
    """Metadata, empty tensors, types that are not run, any order of names: read as the safetensors library
    reads them."""
    from safetensors.numpy import load_file

    header = {
        "__metadata__": {"format": "pt"},
        "b": PLAIN | {"data_offsets": [8, 16]},
        "a": PLAIN,
        "none": PLAIN | {"shape": [0, 3], "data_offsets": [8, 8]},
        "positions": {"dtype": "I64", "shape": [1, 1], "data_offsets": [16, 24]},
    }
    file = write(tmp_path / "x.safetensors", header, 24)
    read, theirs = layout.read_header(file), load_file(file)
    assert {name: each.shape for name, each in read.items()} == {
        name: each.shape for name, each in theirs.items()
    }
    buffer = np.empty(8, np.uint8)
    read["b"].read_into(buffer.data)


@pytest.mark.parametrize(
    "text",
    [b'{"a": ' + b"1" * 401 + b"}", b'{"a": 36893488147419103232}', b'{"a": "\\ud800"}', b'{"a": "\xff"}'],
)
def test_json_that_no_program_can_work_with(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    refused(lambda: files.read_json(tmp_path / "x.json"), "not valid JSON")


def test_json_as_diffusers_writes_it(tmp_path):
    """Its DPM++ has the limit -Infinity, and characters beyond 16 bits come as two halves."""
    (tmp_path / "x.json").write_text(
        '{"lambda_min_clipped": -Infinity, "word": "\\ud83d\\ude00", "n": -3, "most": 18446744073709551615}'
    )
    assert files.read_json(tmp_path / "x.json") == {
        "lambda_min_clipped": -np.inf,
        "word": "😀",
        "n": -3,
        "most": 2**64 - 1,
    }


@posix
@pytest.mark.parametrize("given", [True, False])
def test_a_user_without_a_home(tmp_path, given):
    """No HOME and nothing in the list of users, as in `docker run --user 1234`: XDG_CACHE_HOME, or a folder
    of its own."""
    code = """
import os, pwd, sys
def nobody(*_): raise KeyError("getpwuid(): uid not found: 1234")
pwd.getpwuid = nobody
from tightfit.runtime.files import cache_folder
from tightfit.runtime.machine.hardware import Hardware
print(cache_folder(), Hardware.detect("cpu").device)
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    environment |= {"TMPDIR": str(tmp_path)} | ({"XDG_CACHE_HOME": str(tmp_path / "given")} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split()[0])
    assert folder == tmp_path / ("given" if given else f"tightfit-{os.getuid()}") / "tightfit"
    if not given:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@posix
def test_a_temporary_cache_is_nobody_elses(tmp_path, monkeypatch):
    """What another user could have made there before is not used, nor what a link leads to."""

    def found():
        files._temporary_cache.cache_clear()
        return files._temporary_cache()

    monkeypatch.setattr(files, "gettempdir", lambda: str(tmp_path))
    expected = tmp_path / f"tightfit-{os.getuid()}"
    assert found() == expected
    expected.chmod(0o777)
    assert found() != expected
    expected.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    expected.symlink_to(tmp_path / "elsewhere")
    assert found() != expected
    monkeypatch.setattr(files, "gettempdir", lambda: "/nonexistent")
    assert not found().exists()
    files._temporary_cache.cache_clear()
