"""The plot of a sweep: its cells over the step size, marked by their verdicts."""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from funcsgmcmc import checks
from funcsgmcmc.estimates.calibration import Sweep
from funcsgmcmc.estimates.cells import SweepCell
from funcsgmcmc.estimates.figures import figure_of
from funcsgmcmc.runs.grid import Label, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Marker of each verdict: filled where the cell is fine.
_MARKERS = {
    "fine": "o",
    "too few draws": "o",
    "step not checked": "o",
    "not burnt in": "v",
    "step too large": "^",
    "noise-dominated": "s",
    "left the neighbourhood": "D",
    "negative": "P",
    "diverged": "X",
}
_MOST_PANELS = 16
# Of the largest estimate of a cell that is fine: estimates above are off the scale.
_HIGHEST = 2.5
# The share of a panel's height that a line takes in the strip of what is off the scale.
_STRIP_OF_LINE = 0.04


def plot_sweep(sweep: Sweep) -> "Figure":
    """Plot the learning coefficient of a sweep's cells over the step size, marked by verdict.

    A line for each nβ and a panel for each combination of labels of the other axes. Error bars are
    total errors. Cells that diverged, or whose estimate is far above those that are fine, stand in
    a strip above the scale, which is left to the others. Dotted: what chains would give that
    localization alone holds, where the grid has nβ = 0.

    Args:
        sweep: A sweep. One of a single step size is plotted over its first axis of names, else of
            numbers.

    Returns:
        A figure; `figure.savefig("sweep.png")` writes it.

    Raises:
        ImportError: The extra `plot` is not installed.
        ValueError: There are more than 16 panels; or as `Sweep.cells`.
    """
    figure_class = figure_of("plot_sweep")
    checks.instance("sweep", sweep, Sweep)
    layout = _layout_of(sweep)
    if len(layout.panels) > _MOST_PANELS:
        raise ValueError(
            f"sweep must have at most {_MOST_PANELS} combinations of labels beside "
            f"{layout.x} and {layout.line or 'nothing'} to be plotted, got {len(layout.panels)}"
        )
    columns = min(4, len(layout.panels), max(1, math.ceil(math.sqrt(len(layout.panels)))))
    rows = math.ceil(len(layout.panels) / columns)
    figure = figure_class(figsize=(2 + 4.2 * columns, 0.8 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    lowest, highest = _ends_of_scale(sweep)
    for axes, panel in itertools.zip_longest(grid, layout.panels):
        if panel is None:
            axes.set_visible(False)
            continue
        cells = [cell for cell in sweep.cells if panel.items() <= cell.labels.items()]
        _plot_panel(axes, cells, layout, highest)
        axes.set_title(name_of(panel), loc="left", fontsize="medium")
    panels = grid[: len(layout.panels)]
    is_log = lowest > 0 and highest / lowest > 10
    _label_panels(panels, columns, layout, is_log)
    has_strip = any(_is_off(cell, highest) for cell in sweep.cells)
    share = _STRIP_OF_LINE * len(layout.colors) if has_strip else 0.0
    _end_scale(panels, lowest, highest, share)
    _add_legends(figure, sweep, layout)
    return figure


@dataclass(frozen=True)
class _Layout:
    """What a sweep's axes are drawn as.

    Attributes:
        x: The axis along the horizontal.
        places: Where each of its labels stands.
        is_log: Whether these are on a logarithmic scale.
        line: The axis of which each label is a line; None for one line.
        colors: The color of each line.
        panels: The labels of each panel, on the axes that are left.
    """

    x: str
    places: dict[Label, float]
    is_log: bool
    line: str | None
    colors: dict[Label | None, str]
    panels: list[dict[str, Label]]


def _layout_of(sweep: Sweep) -> _Layout:
    varied = {name: labels for name, labels in sweep.axes.items() if len(labels) > 1}
    numbers = [name for name in varied if not isinstance(varied[name][0], str)]
    names = [name for name in varied if name not in numbers]
    x = next(iter([*(n for n in ("lr",) if n in numbers), *names, *numbers, *sweep.axes]))
    others = [name for name in varied if name != x]
    line = next(iter([*(n for n in ("nbeta",) if n in others), *others]), None)
    rest = {name: varied[name] for name in others if name != line}
    labels = sweep.axes[x]
    is_number = not isinstance(labels[0], str)
    lines: list[Label | None] = [
        label for label in (varied[line] if line else [None]) if (line, label) != ("nbeta", 0.0)
    ]
    return _Layout(
        x=x,
        places={lab: float(lab) if is_number else float(i) for i, lab in enumerate(labels)},
        is_log=is_number and all(float(label) > 0 for label in labels),
        line=line,
        colors={label: f"C{index % 10}" for index, label in enumerate(lines)},
        panels=[dict(zip(rest, each, strict=True)) for each in itertools.product(*rest.values())],
    )


def _ends_of_scale(sweep: Sweep) -> tuple[float, float]:
    """The smallest and the largest value of the scale: estimates above are off it."""
    estimates = [(cell.verdict.name, cell.llc) for cell in sweep.cells if cell.llc is not None]
    fine = [llc for name, llc in estimates if name == "fine"]
    means = sorted(llc.mean for _, llc in estimates)
    # Without a fine cell, half of the estimates are looked at.
    known = [llc.mean for llc in fine] or means[len(means) // 2 :][:1] or [1.0]
    limit = _HIGHEST * max(*known, 1e-12)
    controls = [cell.control for cell in sweep.cells if not math.isnan(cell.control)]
    # Error bars of cells that are not fine may be as long as they like.
    shown = [mean for mean in means if mean <= limit] or known
    lowest = min([*shown, *(llc.mean - llc.error for llc in fine)])
    highest = max([*shown, *controls, *(llc.mean + llc.error for llc in fine)])
    return lowest, min(limit, highest + 0.1 * max(abs(highest), 1e-12))


def _is_off(cell: SweepCell, highest: float) -> bool:
    """Whether a cell has no place on the scale."""
    is_above = cell.llc is None or not cell.llc.mean <= highest
    return is_above and cell.verdict.name != "control"


def _plot_panel(axes: "Axes", cells: list[SweepCell], layout: _Layout, highest: float) -> None:
    for label, color in layout.colors.items():
        of_line = [c for c in cells if layout.line is None or c.labels[layout.line] == label]
        inside = [c for c in of_line if c.llc is not None and c.llc.mean <= highest]
        places = [layout.places[cell.labels[layout.x]] for cell in inside]
        means = [cell.llc.mean for cell in inside if cell.llc is not None]
        errors = [cell.llc.error for cell in inside if cell.llc is not None]
        axes.plot(places, means, color=color, lw=1, alpha=0.6)
        axes.errorbar(places, means, errors, fmt="none", ecolor=color, elinewidth=1, capsize=2)
        for cell in of_line:
            if cell.verdict.name != "control":
                _plot_cell(axes, cell, layout, color, highest)
        known = [cell for cell in of_line if not math.isnan(cell.control)]
        if known:
            held = [layout.places[cell.labels[layout.x]] for cell in known]
            axes.plot(held, [cell.control for cell in known], color=color, lw=1, ls=":")


def _plot_cell(axes: "Axes", cell: SweepCell, layout: _Layout, color: str, highest: float) -> None:
    name = cell.verdict.name
    style: dict[str, Any] = {
        "marker": _MARKERS[name],
        "color": color,
        "ms": 7,
        "mfc": color if name in ("fine", "diverged") else "white",
        "ls": "none",
        "zorder": 3,
        "clip_on": False,
    }
    place = layout.places[cell.labels[layout.x]]
    if _is_off(cell, highest):
        colors = [*layout.colors.values()]
        # Another height in the strip for each line.
        height = 1 - _STRIP_OF_LINE * (colors.index(color) + 0.5)
        axes.plot([place], [height], transform=axes.get_xaxis_transform(), **style)
    elif cell.llc is not None:
        axes.plot([place], [cell.llc.mean], **style)


def _label_panels(panels: Any, columns: int, layout: _Layout, is_log: bool) -> None:
    """Scales and names of axes."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

    for index, axes in enumerate(panels):
        if layout.is_log:
            axes.set_xscale("log")
            # Labels of the scale's own overlap within a decade: those of the grid do not.
            values = list(layout.places.values())
            few = len(values) <= 7
            axes.xaxis.set_major_locator(FixedLocator(values) if few else LogLocator())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif not isinstance(next(iter(layout.places)), float):
            axes.set_xticks(
                list(layout.places.values()), list(layout.places), rotation=30, ha="right"
            )
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if index % columns == 0:
            axes.set_ylabel(r"LLC $\hat\lambda$ ± total error")
        if index + columns >= len(panels):
            axes.set_xlabel(layout.x)
            axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _end_scale(panels: Any, lowest: float, highest: float, share: float) -> None:
    """The ends of the scale, and a strip above it for cells that are off it.

    Args:
        panels: Which have one scale.
        lowest: The smallest value on it.
        highest: Its upper end.
        share: The strip's, of the height of a panel.
    """
    if panels[0].get_yscale() == "log":
        bottom = lowest / 1.2
        top = bottom * (highest / bottom) ** (1 / (1 - share))
    else:
        bottom = lowest - 0.05 * (highest - lowest)
        top = bottom + (highest - bottom) / (1 - share)
    panels[0].set_ylim(bottom, top)
    if not share:
        return
    for is_minor in (False, True):
        ticks = panels[0].get_yticks(minor=is_minor)
        inside = [tick for tick in ticks if bottom <= tick <= highest]
        panels[0].set_yticks(inside, minor=is_minor)
    for axes in panels:
        axes.axhspan(highest, top, color="0.93", lw=0, zorder=2.5)
        place = {"transform": axes.transAxes, "va": "center", "zorder": 3}
        axes.text(0.01, 1 - share / 2, "off the scale", fontsize="x-small", color="0.4", **place)


def _add_legends(figure: "Figure", sweep: Sweep, layout: _Layout) -> None:
    from matplotlib.lines import Line2D

    found = {cell.verdict.name for cell in sweep.cells}
    handles = [
        Line2D(
            [],
            [],
            marker=marker,
            ls="none",
            color="0.3",
            mfc="0.3" if name in ("fine", "diverged") else "white",
            label=name,
        )
        for name, marker in _MARKERS.items()
        if name in found
    ]
    if layout.line is not None:
        handles += [
            Line2D([], [], color=color, label=name_of({layout.line: label}))
            for label, color in layout.colors.items()
            if label is not None
        ]
    if any(not math.isnan(cell.control) for cell in sweep.cells):
        handles.append(Line2D([], [], color="0.3", ls=":", label="localization alone"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
