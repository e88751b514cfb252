"""The picture: estimates against known coefficients, and how far they are off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import Comparison
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colors, which color-blind readers tell apart; marker, label.
STYLES = {
    "monomials": ("#E69F00", "s", "monomials"),
    "separable": ("#CC79A7", "P", "½ Σ |wᵢ|ᵖ"),
    "reduced rank": ("#009E73", "D", "reduced-rank regression"),
    "small": ("#0072B2", "o", "deep linear networks, 2–5 layers"),
    "deep": ("#56B4E9", "^", "deep linear networks, 2–10 layers"),
    "small, minibatches": ("#0072B2", "o", "the same on minibatches, 2–5 layers"),
    "deep, minibatches": ("#56B4E9", "^", "the same on minibatches, 2–10 layers"),
}
PUBLISHED = ("#D55E00", "X", "devinterp 2.0.1, as many gradients")
INK, BAND = "#333333", "#efefef"
CROSS = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 4}
Line = dict[str, Any]


def draw(groups: dict[str, list[Comparison]], published: Sequence[Line], folder: Path) -> None:
    """Write `truth.png`.

    Args:
        groups: Comparisons by group.
        published: Lines of the published optimizer.
        folder: Where to.
    """
    ours = {one.line["index"]: one.reference for one in groups.get("compared", [])}
    theirs = [(ours.get(line["index"], line["truth"]), line) for line in published]
    style = {
        "font.size": 11,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
    }
    with plt.rc_context(style):
        figure, (top, bottom) = plt.subplots(
            2,
            1,
            figsize=(7.6, 8.2),
            height_ratios=(2.1, 1),
            sharex=True,
            layout="constrained",
        )
        _draw_estimates(top, groups, theirs)
        _draw_deviations(bottom, groups, theirs)
        figure.savefig(folder / "truth.png", dpi=160, facecolor="white")
        plt.close(figure)


def _draw_estimates(
    axes: Axes, groups: dict[str, list[Comparison]], published: Sequence[tuple[float, Line]]
) -> None:
    known = [one.reference for group in groups.values() for one in group]
    ends = [min(known) / 1.7, max(known) * 1.7]
    band = [[share * end for end in ends] for share in (0.9, 1.1)]
    axes.fill_between(ends, *band, color=BAND, linewidth=0)
    axes.plot(ends, ends, color=INK, linewidth=1)
    for name in STYLES.keys() & groups.keys():
        group = groups[name]
        _points(
            axes,
            name,
            [one.reference for one in group],
            [one.line["mean"] for one in group],
            [2 * one.line["error"] for one in group],
        )
    if published:
        color, marker, label = PUBLISHED
        axes.errorbar(
            [known for known, _ in published],
            [line["mean"] for _, line in published],
            [2 * line["error"] for _, line in published],
            fmt=marker,
            color=color,
            elinewidth=1,
            label=label,
            **CROSS,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_ylabel("estimate ± twice its total error")
    axes.set_title("Learning coefficients: estimated and known", loc="left", fontsize=14, pad=10)
    # In the order of the table, whatever was drawn first.
    handles, labels = axes.get_legend_handles_labels()
    order = [*(label for *_, label in STYLES.values()), PUBLISHED[2]]
    rows = sorted(zip(handles, labels, strict=True), key=lambda row: order.index(row[1]))
    axes.legend(*zip(*rows, strict=True), frameon=False, loc="upper left", fontsize=10)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    _grid(axes)


def _points(
    axes: Axes, name: str, known: list[float], values: list[float], errors: list[float]
) -> None:
    color, marker, label = STYLES[name]
    is_hollow = "minibatches" in name
    axes.errorbar(
        known,
        values,
        errors,
        fmt=marker,
        color=color,
        markersize=5.5,
        markerfacecolor="white" if is_hollow else color,
        markeredgecolor=color if is_hollow else "white",
        markeredgewidth=1 if is_hollow else 0.5,
        elinewidth=0.9,
        label=label,
        zorder=2 if is_hollow else 3,
    )


def _draw_deviations(
    axes: Axes, groups: dict[str, list[Comparison]], published: Sequence[tuple[float, Line]]
) -> None:
    axes.axhspan(-10, 10, color=BAND, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1)
    for name in STYLES.keys() & groups.keys():
        group = groups[name]
        _points(
            axes,
            name,
            [one.reference for one in group],
            [100 * one.off for one in group],
            [200 * one.line["error"] / one.reference for one in group],
        )
    color, marker, _ = PUBLISHED
    for known, line in published:
        axes.plot(known, 100 * (line["mean"] / known - 1), marker, color=color, **CROSS)
    # Linear within ±10 %, logarithmic beyond: there the published ones are.
    axes.set_yscale("symlog", linthresh=10, linscale=1.5)
    ticks = (-50, -10, -5, 0, 5, 10, 50)
    axes.set_yticks(ticks, [f"{tick:+d} %".replace("-", "−") if tick else "0" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-100, 60)
    axes.set_xlabel("known value, at the run's nβ (λ where only that is known)")
    axes.set_ylabel("deviation")
    _grid(axes)


def _grid(axes: Axes) -> None:
    axes.grid(which="major", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
