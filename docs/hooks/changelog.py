"""Shows the repository's `CHANGELOG.md` as a page, with links as a page has them."""

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Called for the text of every page."""
    if page.file.src_uri != "changelog.md":
        return markdown
    return (_ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
