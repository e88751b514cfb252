"""Every Python block of the README and the documentation runs, a file's blocks in order."""

from pathlib import Path

import mktestdocs
import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    mktestdocs.check_md_file(page, memory=True)


def test_pages_have_code():
    with_code = [page.name for page in PAGES if "```python" in page.read_text()]
    assert with_code == ["README.md", "concepts.md", "index.md", "migrating.md"]
