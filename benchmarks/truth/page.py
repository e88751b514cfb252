"""The page that the documentation shows: the picture, tables, and what does not fit."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import picture
from compare import Comparison, comparisons, figures
from known import GROUPS

Line = dict[str, Any]

HEADER = """# Known truths

Of these losses the learning coefficient λ is known in closed form. Each was sampled once, by one
rule for all problems of a kind. `make truth` repeats all of it, `make truth-quick` a few of each
kind; a run that was stopped goes on where it was. [All figures](truth.jsonl).

![Estimates against known learning coefficients](truth.png)

λ is what an estimate tends to for many examples. At the run's own nβ and pull, E[nβ (L − L(w₀))]
is another number: below λ by about (m − 1)/log nβ and more where the pole is m-fold. No sampler
can help that. So estimates are compared with both. The value at nβ is computed without the
library's samplers: by a sum on a grid (monomials), in closed form (separable losses), or by
Hamiltonian Monte Carlo over triangular factors of the singular block, with one layer integrated out
(networks; `benchmarks/truth/values.py` derives it). It counts as known if this had more than 1,000
effective draws, chains agreed, and its error is at most 1 % of λ. At ranks beyond 0 it is an
approximation, and the error has an estimate of what that may cost."""

METHOD = """## How it was done

**Problems.** Deep linear networks whose number of layers, widths, and rank of the truth are drawn
uniformly, from the two smaller classes of Lau et al. 2023. The inputs have covariance 1 and the
targets no noise, so that the loss on all data is ½ ‖W_L ⋯ W_1 − W*‖². The anchor is a most
singular point of W_L ⋯ W_1 = W*: every layer is a partial isometry of the rank of W*. There the
local coefficient is the global one of Aoyagi 2024. Minibatches are of 100,000 Gaussian inputs,
whitened so that their covariance is 1 exactly.

**Sampler.** `fs.baoa`, with settings from widths, layers, nβ and γ alone:

"""

REDUCED = (
    "Inputs, hidden units, outputs: three of each of the four cases of Aoyagi and Watanabe 2005."
)

PUBLISHED = """The first networks of the smaller class through `devinterp.optim.SGMCMC.sgld` of
devinterp 2.0.1 in the loop that it documents, and through this library: the same loss on all data,
nβ, γ, burn-in, number of chains and of gradients. Its step size is the best of three in a pilot,
judged by the known truth. Its error is the spread of its chains. Seconds are those of one processor
core."""

EXCEPTIONS = """An estimate can be right at its nβ and far from λ. Chains at one nβ cannot see that.
Here some chains of each run are at nβ/e², and the estimate warns where it still changes with nβ."""

RULES = (
    ("nβ", "n/log n, n = 10⁶; minibatches n = 10⁵", "1000", "1000"),
    ("localization γ", "mean width", "1", "0"),
    (
        "step h",
        "0.35/√(nβ L + γ), L layers; beyond 5 layers (5/L)² of it",
        "0.2/√(nβ Σ 2kᵢ)",
        "0.2 s/√(p(p − 1)), s = (2/nβ)^(1/p)",
    ),
    ("friction", "4√γ; minibatches at least 0.1 h/h₀², h₀ without (5/L)²", "1", "1/s"),
)

SETTINGS = {
    "num_chains": "chains",
    "num_warm_chains": "of these at nβ/e²",
    "num_burnin_steps": "burn-in steps",
    "num_draws": "draws",
    "num_steps_between_draws": "steps between draws",
    "full_loss": "looks at all data",
    "batch_size": "batch",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, whose cells may hold bars."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [escaped[0], ["---"] * len(head), *escaped[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return "" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def groups_of(lines: Sequence[Line]) -> dict[str, list[Comparison]]:
    """The comparisons of each group that has any."""
    found = {name: comparisons(lines, name) for name in GROUPS}
    return {name: group for name, group in found.items() if group}


def figures_table(lines: Sequence[Line]) -> str:
    """A row of figures for each group."""
    head = [
        "problems",
        "number",
        "off λ: median",
        "95th percentile",
        "value at nβ known",
        "off it: median",
        "without bias",
        "within 2 errors",
        "median error / λ",
        "warned",
        "off λ by > 10 %",
    ]
    rows = []
    for name, group in groups_of(lines).items():
        found = figures(group)
        rows.append(
            [
                GROUPS[name].title,
                str(found.number),
                percent(found.median),
                percent(found.high),
                str(found.known),
                percent(found.median_known),
                percent(found.median_corrected),
                percent(found.share_within, 0),
                percent(found.median_error),
                str(found.warned),
                str(found.far),
            ]
        )
    return table(head, rows)


def problems_table(group: Sequence[Comparison]) -> str:
    """A row for each problem."""
    rows = [
        [
            one.line["name"],
            f"{one.truth:.4g}",
            str(one.line["multiplicity"]),
            "" if one.value is None else f"{one.value:.4g}",
            f"{one.line['mean']:.4g} ± {one.line['error']:.2g}",
            percent(one.off),
        ]
        for one in group
    ]
    head = ["", "λ", "m", "value at nβ", "estimate ± total error", "off it"]
    return table(head, rows)


def published_table(lines: Sequence[Line]) -> str:
    """The same networks through both, and the ratios of their errors and times."""
    published = {line["index"]: line for line in lines if line["kind"] == "published"}
    both = [
        (ours, published[ours.line["index"]])
        for ours in comparisons(lines, "compared")
        if ours.line["index"] in published
    ]
    if not both:
        return ""
    rows = [
        [
            ours.line["name"],
            f"{ours.truth:.4g}",
            f"{ours.reference:.4g}",
            f"{ours.line['mean']:.4g} ± {ours.line['error']:.2g}",
            f"{ours.line['seconds']:.0f}",
            f"{theirs['mean']:.4g} ± {theirs['error']:.2g}",
            f"{theirs['seconds']:.0f}",
        ]
        for ours, theirs in both
    ]
    head = ["", "λ", "at nβ", "here", "s", "devinterp", "s"]
    theirs = _overall([(ours.reference, line) for ours, line in both])
    ours = _overall([(ours.reference, ours.line) for ours, _ in both])
    indices = {line["index"] for _, line in both}
    half = _overall(
        [
            (one.reference, one.line)
            for one in comparisons(lines, "small")
            if one.line["index"] in indices
        ]
    )
    parts = [
        table(head, rows),
        f"devinterp: {_said(*theirs)}. Here: {_said(*ours)}: {_ratios(theirs, ours)}.",
    ]
    if not math.isnan(half[0]):
        parts.append(f"Here with half the chains: {_said(*half)}: {_ratios(theirs, half)}.")
    return "\n\n".join(parts)


def _overall(found: Sequence[tuple[float, Line]]) -> tuple[float, float]:
    """The median absolute deviation from known values, and all seconds."""
    if not found:
        return math.nan, math.nan
    deviations = [abs(line["mean"] / known - 1) for known, line in found]
    return statistics.median(deviations), sum(line["seconds"] for _, line in found)


def _said(deviation: float, seconds: float) -> str:
    return f"median deviation {percent(deviation)} in {seconds:.0f} s"


def _ratios(theirs: tuple[float, float], ours: tuple[float, float]) -> str:
    return (
        f"{theirs[0] / ours[0]:.1f} times as near to the known values, "
        f"{theirs[1] / ours[1]:.1f} times as fast"
    )


def exceptions(lines: Sequence[Line]) -> str:
    """Estimates far from λ, and those that their error does not cover."""
    far, outside = [], []
    for name, group in groups_of(lines).items():
        for one in group:
            row = [
                GROUPS[name].title,
                one.line["name"],
                f"{one.truth:.4g}",
                str(one.line["multiplicity"]),
                "" if one.value is None else f"{one.value:.4g}",
                f"{one.line['mean']:.4g} ± {one.line['error']:.2g}",
                "; ".join(one.line["warnings"]) or "none",
            ]
            if abs(one.off_truth) > 0.1:
                far.append(row)
            elif one.value is not None and not one.is_within:
                outside.append(row)
    head = ["", "", "λ", "m", "value at nβ", "estimate ± total error", "warnings"]
    parts = []
    if far:
        parts += ["Further than 10 % from λ:", table(head, far)]
    if outside:
        parts += ["The value at nβ is not within twice the total error:", table(head, outside)]
    return "\n\n".join(parts) or "None."


def settings_table(lines: Sequence[Line]) -> str:
    """Numbers of chains and steps, by group."""
    rows = []
    for name, group in groups_of(lines).items():
        settings = group[0].line["settings"]
        rows.append([GROUPS[name].title, *(_setting(settings[key]) for key in SETTINGS)])
    return table(["", *SETTINGS.values()], rows)


def _setting(value: int | None) -> str:
    return "all" if value is None else str(value)


def write(lines: Sequence[Line], number: int, folder: Path) -> None:
    """Write `truth.md`, `truth.png` and `truth.jsonl`.

    Args:
        lines: Of all jobs that are done.
        number: Of all jobs.
        folder: Where to.
    """
    groups = groups_of(lines)
    picture.draw(groups, [line for line in lines if line["kind"] == "published"], folder)
    rules = table(["", "networks", "monomials", "½ Σ |wᵢ|^p"], RULES)
    stopped = f"This is a run that was stopped: {len(lines)} of {number} results are there."
    parts = [HEADER, stopped if len(lines) < number else "", "## Figures", figures_table(lines)]
    small = [group for name in ("monomials", "separable") for group in groups.get(name, [])]
    parts += ["## Monomials and separable losses", problems_table(small)]
    parts += ["## Reduced-rank regression", REDUCED, problems_table(groups.get("reduced rank", []))]
    parts += ["## The published optimizer", PUBLISHED, published_table(lines)]
    parts += ["## Exceptions", EXCEPTIONS, exceptions(lines)]
    parts += [METHOD + rules, settings_table(lines)]
    (folder / "truth.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "truth.jsonl").write_text(text + "\n")


def summary(lines: Sequence[Line]) -> str:
    """The figures of all groups, for the terminal."""
    parts = [figures_table(lines)]
    if published := published_table(lines):
        parts.append(published)
    return "\n\n".join(parts)
