"""What a run's lines say: estimates beside known values, and figures of a group."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

Line = dict[str, Any]
# The same networks at the same nβ.
VALUES_OF = {"compared": "small"}


@dataclass(frozen=True)
class Comparison:
    """An estimate beside what is known.

    Attributes:
        line: The estimate's line.
        truth: λ.
        value: The value at the run's nβ; None where it is not known.
        value_error: Its error.
    """

    line: Line
    truth: float
    value: float | None
    value_error: float

    @classmethod
    def of(cls, line: Line, value: Line | None) -> Self:
        """An estimate's line, with the line of its value if there is one that can be trusted."""
        if value is None or not is_known(value):
            return cls(line, line["truth"], None, 0.0)
        return cls(line, line["truth"], value["value"], error_of(value))

    @property
    def reference(self) -> float:
        """The value at the run's nβ, or λ where that is not known."""
        return self.truth if self.value is None else self.value

    @property
    def off_truth(self) -> float:
        """Relative deviation from λ."""
        return self.line["mean"] / self.truth - 1

    @property
    def off(self) -> float:
        """Relative deviation from the reference."""
        return self.line["mean"] / self.reference - 1

    @property
    def off_corrected(self) -> float:
        """Relative deviation of the estimate without its bias."""
        return self.line["corrected"] / self.reference - 1

    @property
    def is_within(self) -> bool:
        """Whether the reference is within twice the errors, its own Monte Carlo error included."""
        error = math.hypot(self.line["error"], self.value_error)
        return abs(self.line["mean"] - self.reference) < 2 * error


def error_of(value: Line) -> float:
    """The error of a value: Monte Carlo, and what is not known of nβ at ranks beyond 0."""
    return math.hypot(value["value_error"], value["slope"] * value["leeway"])


def is_known(value: Line) -> bool:
    """Whether a value at the run's nβ can be compared with.

    It was computed, by an effective number of draws above 1,000 and chains that agree, and its
    error is at most 1 % of λ.
    """
    if value["value"] is None or not value["ess"] > 1000 or not value["rhat"] < 1.1:
        return False
    return error_of(value) <= 0.01 * value["truth"]


def comparisons(lines: Iterable[Line], group: str) -> list[Comparison]:
    """All estimates of a group."""
    lines, source = list(lines), VALUES_OF.get(group, group)
    values = {
        line["index"]: line for line in lines if line["kind"] == "value" and line["group"] == source
    }
    return [
        Comparison.of(line, values.get(line["index"]))
        for line in sorted(lines, key=lambda line: line["index"])
        if line["kind"] == "estimate" and line["group"] == group
    ]


@dataclass(frozen=True)
class Figures:
    """Of a group: what the project aims at.

    Attributes:
        number: Of estimates.
        median, high: Median and 95th percentile of the absolute relative deviation from λ.
        known: How many have a known value at the run's nβ.
        median_known: Median absolute relative deviation from that.
        median_corrected: The same of the estimates without their bias.
        share_within: The share of these that are within twice the total error.
        median_error: Median of the total error, relative to λ.
        far: How many are further than 10 % from λ.
        far_silent: How many of these carry no warning.
        far_wrong: How many are further than 10 % from the reference.
        warned: How many carry a warning.
    """

    number: int
    median: float
    high: float
    known: int
    median_known: float
    median_corrected: float
    share_within: float
    median_error: float
    far: int
    far_silent: int
    far_wrong: int
    warned: int


def figures(found: list[Comparison]) -> Figures:
    """The figures of some comparisons, one at least."""
    deviations = sorted(abs(one.off_truth) for one in found)
    known = [one for one in found if one.value is not None]
    far = [one for one in found if abs(one.off_truth) > 0.1]
    return Figures(
        number=len(found),
        median=statistics.median(deviations),
        # Of n sorted values, the one that 95 % are not above.
        high=deviations[math.ceil(0.95 * len(deviations)) - 1],
        known=len(known),
        median_known=_median([abs(one.off) for one in known]),
        median_corrected=_median([abs(one.off_corrected) for one in known]),
        share_within=statistics.fmean(one.is_within for one in known) if known else math.nan,
        median_error=statistics.median(one.line["error"] / one.truth for one in found),
        far=len(far),
        far_silent=sum(not one.line["warnings"] for one in far),
        far_wrong=sum(abs(one.off) > 0.1 for one in found),
        warned=sum(bool(one.line["warnings"]) for one in found),
    )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
