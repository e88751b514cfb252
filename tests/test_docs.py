"""Every Python block of the README and the documentation runs, a file's blocks in order.

What a page shows right below a block is what the block prints.
"""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import mktestdocs
import pytest
import torch

import compat
import funcsgmcmc as fs
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
        docs / "changelog.md",
        docs / "comparison.md",
        docs / "glossary.md",
        docs / "references.md",
        docs / "stability.md",
        docs / "samplers" / "index.md",
        docs / "mutants.md",
        docs / "reliability.md",
        docs / "truth.md",
    }
    assert without == exempt | set(docs.glob("api/*.md")) | set(docs.glob("benchmarks/*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors that a site, and a forge, make of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    """… in the files themselves, as a forge shows them; the site's are checked by mkdocs."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_pages_of_the_guide_lead_to_the_next():
    """Each page of the guide names the next one, in the order of the site."""
    page, way = ROOT / "docs" / "index.md", []
    while found := re.search(r"\nNext: \[[^\]]+\]\(([^)]+)\)\.\n$", page.read_text()):
        page = (page.parent / found.group(1)).resolve()
        way.append(str(page.relative_to(ROOT / "docs")))
    order = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(way) == 17
    assert way == [name for name in order if name in way]


def test_every_sampler_has_its_page():
    factories = {spec.name for spec in SPECS.values()}
    pages = {page.stem for page in ROOT.glob("docs/samplers/*.md")}
    assert factories <= pages, "a sampler needs docs/samplers/NAME.md"
    # mkdocs leaves out a page that its order does not name, and says nothing.
    order, table = (ROOT / "mkdocs.yml", ROOT / "docs" / "samplers" / "index.md")
    for name in factories:
        assert f"samplers/{name}.md" in order.read_text(), f"mkdocs.yml does not name {name}.md"
        assert f"[`{name}`]({name}.md)" in table.read_text(), f"samplers/index.md lacks {name}"


def documented() -> set[str]:
    """Objects that some page shows: each named, and the listed or all members of each module."""
    for name in fs.__all__:  # which imports the modules that the pages show
        getattr(fs, name)
    shown: set[str] = set()
    for page in PAGES:
        entries = re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]
        for entry in entries:
            name, _, options = entry.partition("\n")
            shown.add(name)
            listed = re.search(r"members:\s*(\[[^\]]*\]|(?:\n\s+- \w+)+)", options)
            members = re.findall(r"\w+", listed.group(1)) if listed else []
            module = sys.modules.get(name)
            if module is not None and not listed:
                members = [member for member in vars(module) if not member.startswith("_")]
            shown |= {f"{name}.{member}" for member in members}
    return shown


@pytest.mark.parametrize("module", [fs, fs.testing, compat], ids=lambda module: module.__name__)
def test_the_pages_show_every_public_name(module):
    shown = documented()
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            continue
        # Under the name at the door, or where it is defined.
        home = f"{getattr(value, '__module__', module.__name__)}.{name}"
        is_shown = bool(shown & {home, f"{module.__name__}.{name}"})
        assert is_shown, f"no page has ::: {home}, nor its module with this member"


def lacks(value: object) -> list[str]:
    """Which parts of a docstring a public name lacks, of those that are its kind's."""
    text = inspect.getdoc(value) or ""
    if not text:
        return ["a docstring"]
    if inspect.isclass(value):
        own = [
            name
            for name, member in vars(value).items()
            if not name.startswith("_") and inspect.isfunction(member)
        ]
        return [f"a docstring of {name}" for name in own if not inspect.getdoc(vars(value)[name])]
    takes = inspect.signature(value).parameters
    lacking = [f"the argument {name}" for name in takes if not re.search(rf"\b{name}:", text)]
    if "Raises:" not in text:
        lacking.append("Raises")
    if value in [spec.make for spec in SPECS.values()]:
        lacking += [] if re.search(r"^    \w.* = ", text, re.MULTILINE) else ["an equation"]
        lacking += [] if re.search(r"\b(19|20)\d\d\b|RMSprop", text) else ["a source"]
    elif "Returns:" not in text and inspect.signature(value).return_annotation is not None:
        lacking.append("Returns")
    return lacking


# Assertions are all that they raise, a decorator's arguments are those of the class that it makes.
EXEMPT = {"law", "problems"}


@pytest.mark.parametrize("module", [fs, fs.testing, compat], ids=lambda module: module.__name__)
def test_docstrings_are_complete(module):
    """Of every public name: each argument, what comes back, errors; of a sampler its equation."""
    values = {name: getattr(module, name) for name in module.__all__ if name not in EXEMPT}
    ours = {
        name: value
        for name, value in values.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }
    assert {name: found for name, value in ours.items() if (found := lacks(value))} == {}


def test_every_fault_has_its_test():
    """The tests that `docs/reliability.md` names are there."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in written} == set()
