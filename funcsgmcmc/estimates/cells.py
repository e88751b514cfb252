"""The cells of a sweep, judged one by one and beside one another, and their table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from funcsgmcmc.estimates.llc import LLC
from funcsgmcmc.estimates.verdicts import Findings, Verdict, find, judge, on_plateau
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.grid import Cell, name_of
from funcsgmcmc.runs.record import Samples


@dataclass(frozen=True, eq=False)
class SweepCell:
    """A cell of a sweep: what was run there, and what came of it.

    Attributes:
        labels: Its label on each axis of the grid: a number, or a name.
        samples: The record of its chains.
        findings: What the record says.
        verdict: The judgement, with its reason.
        control: λ̂ as chains would give it that only localization holds: nβ/T times E L − L(w₀) of
            the cell of nβ = 0 with the same other labels; NaN if the grid has none. Where λ̂ is near
            it, the estimate tells of localization, not of the loss.
    """

    labels: Cell
    samples: Samples
    findings: Findings
    verdict: Verdict
    control: float

    @property
    def name(self) -> str:
        """Its labels in one line, such as `lr=0.001, nbeta=240`."""
        return name_of(self.labels)

    @property
    def llc(self) -> LLC | None:
        """The estimate; None at nβ = 0, or if no chain is healthy."""
        return self.findings.estimate


def judged(labels: Sequence[Cell], records: Sequence[Samples]) -> list[SweepCell]:
    """Judge the cells of a sweep.

    Args:
        labels: Of each cell.
        records: Those of its chains.

    Raises:
        ImportError, ValueError: As `find`.
    """
    found = [find(samples) for samples in records]
    verdicts = [judge(*both) for both in zip(found, records, strict=True)]
    for rows in _lines(labels):
        lrs = [float(labels[row]["lr"]) for row in rows]
        of_line = on_plateau(lrs, [found[row] for row in rows], [verdicts[row] for row in rows])
        for row, verdict in zip(rows, of_line, strict=True):
            verdicts[row] = verdict
    for row, cell in enumerate(labels):
        if isinstance(cell.get("lr", ""), str):
            verdicts[row] = on_plateau([math.nan], [found[row]], [verdicts[row]])[0]
    controls = [_control(cell, labels, found, records) for cell in labels]
    return [
        SweepCell(*each) for each in zip(labels, records, found, verdicts, controls, strict=True)
    ]


def count_of(cells: Sequence[SweepCell]) -> str:
    """How many cells have each verdict, in one line."""
    names = [cell.verdict.name for cell in cells]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def table(cells: Sequence[SweepCell]) -> str:
    """A line for each cell, under a line that says what all share."""
    labels = {name: [cell.labels[name] for cell in cells] for name in cells[0].labels}
    varied = [name for name, each in labels.items() if len(set(each)) > 1]
    shared = {name: each[0] for name, each in labels.items() if name not in varied}
    header = [*varied, "LLC ± error", "MCSE", "bias", "drift", "R-hat", "distance", "control"]
    rows = [[*header, "verdict"], *(_row(cell, varied) for cell in cells)]
    if not any(row[-2] for row in rows[1:]):
        rows = [[*row[:-2], row[-1]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    title = f"{len(cells)} cells of {cells[0].samples.num_chains} chains, {count_of(cells)}"
    if shared:
        title += f"; {name_of(shared)}"
    return "\n".join([title, *lines])


def _row(cell: SweepCell, varied: list[str]) -> list[str]:
    names = [
        label if isinstance(label, str) else f"{label:.3g}"
        for label in (cell.labels[name] for name in varied)
    ]
    found, estimate = cell.findings, cell.llc
    figures = ["", "", "", ""]
    if estimate is not None:
        figures = [
            f"{estimate.mean:.4g} ± {estimate.error:.2g}",
            f"{estimate.mcse:.2g}",
            "?" if math.isnan(estimate.bias) else f"{estimate.bias:.2g}",
            f"{estimate.drift:.2g}" if estimate.drift else "",
        ]
    more = [
        "" if math.isnan(value) else f"{value:.3g}"
        for value in (found.r_hat, found.distance, cell.control if estimate else math.nan)
    ]
    return [*names, *figures, *more, str(cell.verdict)]


def _of_llc(name: str) -> Callable[[SweepCell], float]:
    return lambda cell: math.nan if cell.llc is None else float(getattr(cell.llc, name))


def _of_findings(name: str) -> Callable[[SweepCell], float]:
    return lambda cell: float(getattr(cell.findings, name))


# What a table has of each cell, by name.
FIGURES: dict[str, Callable[[SweepCell], float]] = {
    "llc": _of_llc("mean"),
    **{name: _of_llc(name) for name in ("error", "mcse", "bias", "drift", "corrected")},
    **{
        name: _of_findings(name)
        for name in ("r_hat", "ess", "distance", "reach", "signal_to_noise", "frozen")
    },
    "control": lambda cell: cell.control,
}


def _lines(labels: Sequence[Cell]) -> list[list[int]]:
    """Rows of the cells that differ in lr alone, a number, in rising order of it."""
    lines: dict[str, list[int]] = {}
    for row, cell in enumerate(labels):
        if not isinstance(cell.get("lr", ""), str):
            lines.setdefault(name_of({**cell, "lr": "any"}), []).append(row)
    return [sorted(rows, key=lambda row: labels[row]["lr"]) for rows in lines.values()]


def _control(
    cell: Cell, labels: Sequence[Cell], found: Sequence[Findings], records: Sequence[Samples]
) -> float:
    """λ̂ of a cell as chains would give it that localization alone holds; NaN if it is not known."""
    other = {**cell, "nbeta": 0.0}
    if "nbeta" not in cell or cell == other or other not in labels:
        return math.nan
    nbeta, temperature = settings_of_draws(records[labels.index(cell)])
    return float((nbeta / temperature).mean()) * found[labels.index(other)].rise
