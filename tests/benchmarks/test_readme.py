"""README.md and docs/results.md say what the results say; links of all pages lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tightfit.benchmarks import readme


@pytest.mark.parametrize("name", readme.pages())
def test_tables_are_not_stale(name):
    text = (readme.ROOT / name).read_text(encoding="utf-8")
    if readme.replaced(text, readme.pages()[name]()) != text:
        pytest.fail(f"{name} is stale: run python -m tightfit.benchmarks.readme")


@pytest.mark.parametrize("name", readme.pages())
def test_a_stale_page_is_noticed_and_mended(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for file, section in readme.pages().items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        text = readme.replaced(f"before {readme.BEGIN}{readme.END} after\n", section())
        (tmp_path / file).write_text(text, encoding="utf-8")
    page, (other,) = tmp_path / name, (tmp_path / file for file in readme.pages() if file != name)
    fresh = page.read_text(encoding="utf-8")
    unchanged = other.read_bytes()
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    readme.main()  # nothing is stale
    page.write_text(fresh.replace(" 2.", " 3."), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"{name} is stale"):
        readme.main()
    monkeypatch.setattr("sys.argv", ["readme"])
    readme.main()
    assert page.read_text(encoding="utf-8") == fresh
    assert other.read_bytes() == unchanged


def test_a_page_without_marks_is_not_written():
    with pytest.raises(ValueError, match="made by"):
        readme.replaced("nothing marked", "a table")
    with pytest.raises(ValueError, match="until here"):
        readme.replaced(f"the end is gone {readme.BEGIN} old table", "a table")


def test_contenders_of_the_readme_exist():
    """A renamed contender would leave the table without a word."""
    assert set(readme.README_CONTENDERS) <= readme.whole_peers()["rows"].keys()
    table = readme.summary()
    assert all(f"| {name} |" in table.replace("**", "") for name in readme.README_CONTENDERS)


def test_what_was_lost_stays(tmp_path, monkeypatch):
    """A plan that ran out of memory, and a contender that failed, are rows."""
    request = {"width": 512, "height": 512, "steps": 4}
    row = {
        "summary": "torch fp32",
        "outcome": "out of memory",
        "model": "m",
        "command": "tightfit bench",
        "request": request,
    }
    assert "| torch fp32 | out of memory |" in readme.of_model([row])
    rows = {
        "diffusers bf16": {"peak_bytes": 4, "step_seconds": 2.0, "seconds": 9.0},
        "sd.cpp f16": {"failed": "no"},
        "tightfit": {"peak_bytes": 8, "step_seconds": 1.0, "seconds": 9.0},
    }
    run = {"rows": rows, "model": "sd15", "size": 512, "steps": 4, "rounds": 2}
    monkeypatch.setattr(readme, "whole_peers", lambda: run)
    assert "| sd.cpp f16 | failed: no |" in readme.peers()
    assert "| **tightfit** | 8 bytes, 2.00 | 1.00 s, 0.50 | 9.0 s |" in readme.peers()


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:\s]+)\)", prose)
    return [link for link in links if not (page.parent / link).exists()]


def test_links_lead_somewhere(tmp_path):
    pages = [*readme.ROOT.glob("*.md"), *(readme.ROOT / "docs").glob("*.md")]
    assert not {page.name: dead for page in pages if (dead := dead_links(page))}
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](gone.md) ![c](docs/gone.png) [d](https://example.com/gone.md)")
    assert dead_links(page) == ["gone.md", "docs/gone.png"]
