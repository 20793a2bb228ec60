"""Models that are sent: whole, once, and nothing of them elsewhere."""

from __future__ import annotations

import os
import time

import pytest
from tightfit.runtime.batch.staging import Stage, parcel, parts
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import BUILT_IN

DIGEST = "0123456789abcdef" * 2


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "cache" / "staged")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "m"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (folder / "empty.txt").write_text("")
    return folder


def sent(stage, packed, part=1000):
    for name, file in packed.files.items():
        for piece in parts(file):
            for start in range(0, max(1, len(piece)), part):
                stage.add(packed.digest, name, piece[start : start + part])
    stage.finish(packed.digest)


def test_a_model_comes_as_it_was(stage, model):
    (model / "unet" / "pickle.bin").write_bytes(b"cos\nsystem\n")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("secret")
    (model / "out.json").symlink_to("/etc/passwd")
    packed = parcel(str(model))
    assert packed and {*packed.files} == {"m/model_index.json", "m/unet/model.safetensors", "m/empty.txt"}
    assert stage.place(packed.digest) is None
    sent(stage, packed)
    place = stage.place(packed.digest)
    assert place.name == "m"
    for file in packed.files.values():
        assert (place / file.relative_to(model)).read_bytes() == file.read_bytes()
    sent(Stage(stage._folder), packed)  # of another process, at the same time
    assert [path.name for path in stage._folder.iterdir()] == [packed.digest]


def test_one_file_and_what_is_not_sent(stage, model):
    packed = parcel(str(model / "unet" / "model.safetensors"))
    assert packed and [*packed.files] == ["model.safetensors"]
    sent(stage, packed)
    assert stage.place(packed.digest).read_bytes() == bytes(range(256)) * 10
    assert parcel("emoji") is None and parcel("owner/on-the-hub") is None
    assert parcel(str(BUILT_IN["emoji"])) is not None
    (model / "unet" / "model.safetensors").write_bytes(b"another")
    assert parcel(str(model / "unet" / "model.safetensors")).digest != packed.digest


def test_what_a_killed_process_has_left_goes(stage):
    stage.add(DIGEST, "m/x", b"x")
    hour_ago = time.time() - 3601
    for path in (stage._coming(DIGEST), *stage._coming(DIGEST).rglob("*")):
        os.utime(path, (hour_ago, hour_ago))
    stage.add(DIGEST, "m/x", b"y")  # which goes on
    Stage(stage._folder)
    assert (stage._coming(DIGEST) / "m" / "x").read_bytes() == b"xy"
    os.utime(stage._coming(DIGEST) / "m" / "x", (hour_ago, hour_ago))
    (stage._folder / ("a" * 32)).mkdir()
    os.utime(stage._folder / ("a" * 32), (hour_ago, hour_ago))
    Stage(stage._folder)
    assert [path.name for path in stage._folder.iterdir()] == ["a" * 32]  # a whole model


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "m/../../x", "m//x", "m/./x", "", ".", "..", "m/.x", "m\\..\\x", "C:x", "m/x\0",
     "x" * 300, "m/a/b/c", "m/x.bin", "m/x.ckpt"],
)  # fmt: skip
def test_no_path_leaves_the_folder(stage, tmp_path, name):
    with pytest.raises(TightfitError, match="not written"):
        stage.add(DIGEST, name, b"x")
    assert not [*tmp_path.rglob("*.*")]


def test_no_digest_and_no_link_leaves_it_either(stage, tmp_path):
    for digest in ("../" + "a" * 29, "", "A" * 32, None):
        with pytest.raises(TightfitError, match="no digest"):
            stage.add(digest, "m/x", b"x")
        with pytest.raises(TightfitError, match="no digest"):
            stage.place(digest)
    stage.add(DIGEST, "m/x", b"x")
    (tmp_path / "aim").write_text("before")
    (stage._coming(DIGEST) / "m" / "link").symlink_to(tmp_path / "aim")
    with pytest.raises(TightfitError, match="cannot be written"):
        stage.add(DIGEST, "m/link", b"x")
    assert (tmp_path / "aim").read_text() == "before"
    with pytest.raises(TightfitError, match="no file of that model"):
        stage.add(DIGEST, "other/x", b"x")
