"""Copies at an address: each once, whole, and what failed the next time."""

from __future__ import annotations

from threading import get_ident

import fsspec
import pytest
from tightfit.runtime.batch.uploading import Upload
from tightfit.runtime.errors import TightfitError


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_what_is_missing_there_is_copied(tmp_path, monkeypatch, protocol):
    there, root = fsspec.core.url_to_fs(url := f"{protocol}://{tmp_path}/there")
    folder = tmp_path / "d"
    contents = {f"{name}.png": name.encode() * 1000 for name in ("a", "b/c", "b/d/e")}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def uploaded(*begun: str) -> int:
        """How many files were written there: by one thread, as these are no file systems that take several
        calls at once."""
        writes = []
        write = type(there).pipe_file
        with monkeypatch.context() as patch, Upload(folder, f"{url}/") as upload:
            patch.setattr(
                type(there),
                "pipe_file",
                lambda *given, **more: [writes.append(get_ident()), write(*given, **more)],
            )
            for name in begun:
                upload.begin(folder / name)
            said = upload.finish(contents)
        assert said == f"3 pictures are at {url}/, {len(writes)} of them copied now"
        assert len({*writes}) <= 1
        assert {name: there.cat_file(f"{root}/{name}") for name in contents} == contents
        return len(writes)

    assert uploaded("b/c.png") == 3
    assert uploaded() == 0
    there.rm(f"{root}/a.png")
    there.pipe_file(f"{root}/b/c.png", b"half")
    assert uploaded() == 2
    there.rm(f"{root}/a.png")

    def denied(*_: object) -> None:
        raise OSError("denied\nby x")

    with (
        monkeypatch.context() as patch,
        pytest.raises(TightfitError, match=r"1 pictures are not at .* \(denied\): the same command uploads"),
        Upload(folder, url) as upload,
    ):
        patch.setattr(type(there), "pipe_file", denied)
        upload.finish(contents)
    assert uploaded() == 1

    write, failures = type(there).pipe_file, [OSError("denied once")]

    def denied_once(*given: object) -> None:
        if failures:
            raise failures.pop()
        write(*given)

    contents["a.png"] = b"A" * 1000  # painted anew, as large
    (folder / "a.png").write_bytes(contents["a.png"])
    with monkeypatch.context() as patch, Upload(folder, url) as upload:
        patch.setattr(type(there), "pipe_file", denied_once)
        upload.begin(folder / "a.png")
        upload.finish(contents)
    assert there.cat_file(f"{root}/a.png") == contents["a.png"]


def test_a_password_is_not_said(tmp_path):
    said = "--upload nowhere://me:…@host/there cannot be reached"
    with pytest.raises(TightfitError, match=said) as error:
        Upload(tmp_path, "nowhere://me:se:cr@et@host/there")
    assert "et@" not in str(error.value)
