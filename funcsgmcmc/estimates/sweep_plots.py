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
# Of the largest estimate of a cell that is fine: estimates above are drawn at the edge.
_HIGHEST = 2.5


def plot_sweep(sweep: Sweep) -> "Figure":
    """Plot the learning coefficient of a sweep's cells over the step size, marked by verdict.

    A line for each nβ and a panel for each combination of labels of the other axes. Error bars are
    total errors. Cells that diverged, or whose estimate is far above those that are fine, stand at
    the upper edge, so that they leave the scale to the others. Dotted: what chains would give that
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
    highest = _highest(sweep)
    for axes, panel in itertools.zip_longest(grid, layout.panels):
        if panel is None:
            axes.set_visible(False)
            continue
        cells = [cell for cell in sweep.cells if panel.items() <= cell.labels.items()]
        _plot_panel(axes, cells, layout, highest)
        axes.set_title(name_of(panel), loc="left", fontsize="medium")
    _label_panels(grid[: len(layout.panels)], columns, sweep, layout, highest)
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


def _highest(sweep: Sweep) -> float:
    """The largest estimate that is drawn in its place."""
    of_cells = [(cell.verdict.name, cell.llc.mean) for cell in sweep.cells if cell.llc is not None]
    fine = [mean for name, mean in of_cells if name == "fine"]
    others = sorted(mean for _, mean in of_cells)
    # Without a fine cell, half of the estimates are looked at.
    known = max(fine) if fine else others[len(others) // 2] if others else 1.0
    return _HIGHEST * max(known, 1e-12)


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
    is_inside = cell.llc is not None and cell.llc.mean <= highest
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
    if is_inside and cell.llc is not None:
        axes.plot([place], [cell.llc.mean], **style)
    else:
        # Its height is that of the panel, not of its estimate, and another one for each line.
        height = 1 - 0.04 * list(layout.colors.values()).index(color)
        axes.plot([place], [height], transform=axes.get_xaxis_transform(), **style)


def _label_panels(panels: Any, columns: int, sweep: Sweep, layout: _Layout, highest: float) -> None:
    """Scales, limits and names of axes."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

    estimates = [cell.llc for cell in sweep.cells if cell.llc and cell.llc.mean <= highest]
    lowest = min((each.mean - each.error for each in estimates), default=0.0)
    is_log = lowest > 0 and highest / lowest > 10
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
        axes.set_ylim(top=highest)
        if index % columns == 0:
            axes.set_ylabel(r"LLC $\hat\lambda$ ± total error")
        if index + columns >= len(panels):
            axes.set_xlabel(layout.x)
            axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


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
