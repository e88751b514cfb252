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
    "small": ("#0072B2", "o", "deep linear networks, up to 5 layers"),
    "deep": ("#56B4E9", "^", "deep linear networks, up to 10 layers"),
    "small, minibatches": ("#0072B2", "o", "the same on minibatches"),
    "deep, minibatches": ("#56B4E9", "^", "the same on minibatches"),
}
PUBLISHED = ("#D55E00", "X", "devinterp 2.0.1, equal gradients")
INK = "#333333"


def draw(
    groups: dict[str, list[Comparison]], published: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Write `truth.png`.

    Args:
        groups: Comparisons by group.
        published: Lines of the published optimizer.
        folder: Where to.
    """
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
        _draw_estimates(top, groups, published)
        _draw_deviations(bottom, groups, published)
        figure.savefig(folder / "truth.png", dpi=160, facecolor="white")
        plt.close(figure)


def _draw_estimates(
    axes: Axes, groups: dict[str, list[Comparison]], published: Sequence[dict[str, Any]]
) -> None:
    truths = [one.truth for group in groups.values() for one in group]
    ends = [min(truths) / 1.6, max(truths) * 1.6]
    axes.fill_between(
        ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#eeeeee", lw=0
    )
    axes.plot(ends, ends, color=INK, lw=1)
    for name, group in groups.items():
        if name in STYLES:
            _points(
                axes,
                name,
                [one.truth for one in group],
                [one.line["mean"] for one in group],
                [2 * one.line["error"] for one in group],
            )
    color, marker, label = PUBLISHED
    if published:
        axes.errorbar(
            [line["truth"] for line in published],
            [line["mean"] for line in published],
            [2 * line["error"] for line in published],
            fmt=marker,
            color=color,
            ms=8,
            mec="white",
            mew=0.6,
            elinewidth=1,
            label=label,
            zorder=4,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_ylabel("estimate λ̂")
    axes.set_title(
        "Estimated against known learning coefficients", loc="left", fontsize=14, weight="bold"
    )
    axes.legend(frameon=False, loc="upper left", fontsize=10)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_formatter(plain)
    axes.grid(which="major", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)


def _points(
    axes: Axes, name: str, truths: list[float], values: list[float], errors: list[float]
) -> None:
    color, marker, label = STYLES[name]
    hollow = "minibatches" in name
    axes.errorbar(
        truths,
        values,
        errors,
        fmt=marker,
        color=color,
        ms=5.5,
        mfc="white" if hollow else color,
        mec=color if hollow else "white",
        mew=1 if hollow else 0.5,
        elinewidth=0.9,
        alpha=0.9,
        label=label,
        zorder=2 if hollow else 3,
    )


def _draw_deviations(
    axes: Axes, groups: dict[str, list[Comparison]], published: Sequence[dict[str, Any]]
) -> None:
    axes.axhline(0, color=INK, lw=1)
    axes.axhspan(-10, 10, color="#eeeeee", lw=0)
    references = {}
    for name, group in groups.items():
        for one in group:
            references[name, one.line["index"]] = one.reference
        if name in STYLES:
            _points(
                axes,
                name,
                [one.truth for one in group],
                [100 * one.off for one in group],
                [200 * one.line["error"] / one.reference for one in group],
            )
    color, marker, _ = PUBLISHED
    for line in published:
        reference = references.get((line["group"], line["index"]), line["truth"])
        axes.plot(
            line["truth"],
            100 * (line["mean"] / reference - 1),
            marker,
            color=color,
            ms=8,
            mec="white",
            mew=0.6,
            zorder=4,
        )
    axes.set_yscale("symlog", linthresh=10, linscale=1.5)
    axes.set_yticks(
        [-50, -10, -5, 0, 5, 10, 50], ["−50 %", "−10 %", "−5 %", "0", "+5 %", "+10 %", "+50 %"]
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-100, 60)
    axes.set_xlabel("known coefficient λ")
    axes.set_ylabel("off the value at the run's nβ")
    axes.grid(which="major", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
