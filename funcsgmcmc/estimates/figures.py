"""Matplotlib's figures (the extra `plot`)."""

from typing import TYPE_CHECKING

from funcsgmcmc import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(name: str) -> "type[Figure]":
    """Matplotlib's figure, without its global state.

    Raises:
        ImportError: The extra `plot` is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise checks.missing_extra("plot", "matplotlib", name) from missing
    return Figure
