"""What to do after a sweep: the settings to go on with, and the cells to run next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from funcsgmcmc.estimates.cells import SweepCell, count_of
from funcsgmcmc.estimates.verdicts import ALONE, size_of
from funcsgmcmc.runs.grid import Label, name_of

# Verdicts that a smaller lr may mend, and a larger one.
_TOO_LARGE = {"diverged", "left the neighbourhood", "step too large", "noise-dominated"}
_TOO_SMALL = {"not burnt in", "too few draws"}


@dataclass(frozen=True)
class Recommendation:
    """The settings to go on with.

    Attributes:
        labels: Those of the axes that are numbers.
        cells: The cells with these labels, one for each combination of names of the other axes.
        reason: Why these.
    """

    labels: dict[str, Label]
    cells: list[SweepCell]
    reason: str

    @property
    def settings(self) -> dict[str, float]:
        """The labels as arguments of the sampler's factory."""
        return {name: float(label) for name, label in self.labels.items()}

    def __str__(self) -> str:
        return f"{name_of(self.labels)}: {self.reason}"


@dataclass(frozen=True)
class Proposal:
    """The cells to run next.

    Attributes:
        grid: For `Sweep.refine`.
        reason: Why these.
    """

    grid: dict[str, list[float]]
    reason: str

    def __str__(self) -> str:
        return f"{self.grid}: {self.reason}"


def recommend(cells: Sequence[SweepCell]) -> Recommendation:
    """Choose settings, as `Sweep.recommend` does.

    Raises:
        ValueError: No cell is fine.
    """
    groups: dict[str, list[SweepCell]] = {}
    for cell in cells:
        groups.setdefault(name_of(_numbers(cell)), []).append(cell)
    fine = {name: _fine(group) for name, group in groups.items() if _fine(group)}
    if not fine:
        raise ValueError(f"no cell is fine ({count_of(cells)}): {_next_lrs(cells).reason}")
    most = max(map(len, fine.values()))
    errors = {name: max(map(_share, group)) for name, group in fine.items() if len(group) == most}
    best = min(errors, key=lambda name: errors[name])
    chosen = groups[best]
    if len(chosen) == 1:
        reason = f"it is fine, with a total error of {errors[best]:.1%}"
    else:
        reason = (
            f"{most} of its {len(chosen)} cells are fine, with total errors of {errors[best]:.1%} "
            "at most"
        )
    if len(errors) > 1:
        reason += f", the smallest of {len(errors)} settings of which as many are"
    if any(ALONE in cell.verdict.reason for cell in fine[best]):
        reason += f"; {ALONE}: run half of this lr, too, before you trust it (refine)"
    return Recommendation(_numbers(chosen[0]), chosen, reason)


def propose(cells: Sequence[SweepCell]) -> Proposal:
    """Propose the cells to run next, as `Sweep.propose` does.

    Raises:
        ValueError: No axis is one of step sizes.
    """
    if isinstance(cells[0].labels.get("lr", ""), str):
        raise ValueError("propose needs an axis of step sizes, lr, in the grid")
    return _next_lrs(cells)


def _next_lrs(cells: Sequence[SweepCell]) -> Proposal:
    """Step sizes to run next, and why; none where cells have no number as theirs."""
    kinds: dict[float, set[str]] = {}
    for cell in cells:
        lr = cell.labels.get("lr", "")
        if not isinstance(lr, str):
            kinds.setdefault(lr, set()).add(cell.verdict.name)
    if not kinds:
        return Proposal({}, "look at the reason of each cell")
    lrs = sorted(kinds)
    small = [lr for lr in lrs if kinds[lr] & _TOO_SMALL]
    large = [lr for lr in lrs if kinds[lr] & _TOO_LARGE]
    if _fine(cells):
        best = float(recommend(cells).labels["lr"])
        new, reason = _around(best, lrs), f"step sizes around {best:g}, which is fine"
    elif large and not small:
        new = [min(lrs) / factor for factor in (8, 4, 2)]
        reason = "all steps are too large: smaller ones"
    elif small and not large:
        new = [max(lrs) * factor for factor in (2, 4, 8)]
        reason = "chains are short of their error or on their way: larger steps, or a longer run"
    elif small and large and max(small) < min(large):
        low, high = max(small), min(large)
        new = [low * (high / low) ** (part / 4) for part in (1, 2, 3)]
        reason = f"steps between {low:g}, too small for so short a run, and {high:g}, too large"
    else:
        new = [min(lrs) / 4, min(lrs) / 2]
        reason = (
            "steps are too large before chains have forgotten their start: smaller ones in a "
            "longer run (num_burnin_steps, num_draws), larger batches, or more localization"
        )
    return Proposal({"lr": [lr for lr in new if lr not in lrs]}, reason)


def _numbers(cell: SweepCell) -> dict[str, Label]:
    """A cell's labels on axes of numbers."""
    return {name: label for name, label in cell.labels.items() if not isinstance(label, str)}


def _fine(cells: Sequence[SweepCell]) -> list[SweepCell]:
    return [cell for cell in cells if cell.verdict.name == "fine"]


def _share(cell: SweepCell) -> float:
    """The total error of a cell as a share of its estimate."""
    assert cell.llc is not None  # it is fine
    return cell.llc.error / size_of(cell.llc)


def _around(best: float, lrs: list[float]) -> list[float]:
    """Step sizes on both sides of one, half way to its neighbours, or a factor 2 beyond."""
    below = [lr for lr in lrs if lr < best]
    above = [lr for lr in lrs if lr > best]
    low = math.sqrt(below[-1] * best) if below and below[-1] > 0 else best / 2
    high = math.sqrt(above[0] * best) if above else best * 2
    return [low, high]
