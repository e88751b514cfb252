"""Every Python block of the README and the documentation runs, a file's blocks in order.

What a page shows right below a block is what the block prints.
"""

import re
from pathlib import Path

import mktestdocs
import pytest
import torch

from funcsgmcmc.testing import SPECS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    mktestdocs.check_md_file(page, memory=True)
    printed = capsys.readouterr().out
    for shown in re.findall(r"```\n\n```text\n(.*?)```", page.read_text(), re.DOTALL):
        assert shown in printed


def test_pages_have_code():
    docs = ROOT / "docs"
    without = {page for page in PAGES if "```python" not in page.read_text()}
    exempt = {
        docs / "architecture.md",
        docs / "glossary.md",
        docs / "samplers" / "index.md",
        docs / "mutants.md",
    }
    assert without == exempt | set(docs.glob("api/*.md")) | set(docs.glob("benchmarks/*.md"))


def test_every_sampler_has_its_page():
    factories = {spec.name for spec in SPECS.values()}
    pages = {page.stem for page in ROOT.glob("docs/samplers/*.md")}
    assert factories <= pages
