"""Turns blocks of TeX (```` ```math ````) into MathML, which browsers draw without a script."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> None:
    """Called when the configuration is read."""
    options = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fence = {"name": "math", "class": "math", "format": _mathml}
    options["custom_fences"] = [*options.get("custom_fences", []), fence]


def _mathml(source: str, *arguments: Any, **options: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'
