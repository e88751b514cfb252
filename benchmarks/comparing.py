"""What has become slower since an earlier run, by more than 5 % beyond the noise of both.

A time is compared as its ratio to that of a control, a contender whose code is not ours and that
took turns with ours: a machine that others use slows both. What has no control is compared only
with figures of the same machine, Python and packages.

The noise is measured within each run. With a figure's medians mᵢ over n consecutive parts of its
rounds, and its control's cᵢ (1 without one), the ratio is r = exp(mean of log mᵢ/cᵢ), and the
standard error s of log r is that of this mean: what disturbed both at once drops out. Between two
runs

    log(r'/r) ± t √(s² + s'²),

with Student's t at 99 % for Welch's degrees of freedom. Something is slower if the lower end is
above log 1.05.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

Report = dict[str, Any]

TOLERANCE, CONFIDENCE = math.log(1.05), 0.99
# What a report says of the machine and the packages.
ENVIRONMENT = ("device_type", "device", "threads", "python", "versions")
CONTROLS = (
    "bare loop",
    "copy",
    "published",
    "without draws",
    "import tensordict beyond torch",
    "trivial function",
)
# The code of these is not ours either: how their ratios differ is noise that no run alone can see.
OTHERS = {
    *CONTROLS,
    "noise, normal_",
    "published loop",
    "published loop, metrics",
    "posteriors, vmapped",
    "blackjax, jit",
    "blackjax, scan",
    "import torch",
}


@dataclass(frozen=True)
class Change:
    """How a figure differs between two runs.

    Attributes:
        part: Of the benchmarks.
        path: Of the figure in the part.
        control: Path of what it is divided by; None if it is compared as it is.
        before: The figure of the earlier run, or its ratio.
        now: That of this run.
        margin: Of log(now/before): what noise can do.
    """

    part: str
    path: str
    control: str | None
    before: float
    now: float
    margin: float

    @property
    def factor(self) -> float:
        """How many times as long it takes."""
        return self.now / self.before

    @property
    def is_ours(self) -> bool:
        """Whether code of this library is timed."""
        return not OTHERS.intersection(self.path.split("/"))

    @property
    def verdict(self) -> str:
        """`slower`, `faster`, `unclear` (beyond 5 %, and noise may be why) or `same`."""
        change = math.log(self.factor)
        if abs(change) <= TOLERANCE:
            return "same"
        if abs(change) <= TOLERANCE + self.margin:
            return "unclear"
        return "slower" if change > 0 else "faster"

    def __str__(self) -> str:
        over = f" / {_word(self.control)}" if self.control else ""
        return (
            f"{self.part}: {_shown(self.path)}{over}: {self.factor:.2f} times as long, "
            f"{self.before:.3g} before, {self.now:.3g} now, noise ± {math.expm1(self.margin):.0%}"
        )


def compare(before: Report, now: Report, parts: Collection[str]) -> list[Change]:
    """The changes of all figures with a known noise that both reports have.

    Args:
        before: The report of an earlier run.
        now: That of this run.
        parts: What this run has measured.
    """
    changes = []
    for part in parts:
        old, new = (report.get("spread", {}).get(part, {}) for report in (before, now))
        is_same = not differences(before, now, part)
        # One round alone says nothing of its noise.
        both = [path for path in new if min(len(new[path]), len(old.get(path, []))) > 1]
        for path in both:
            control = _control(path, both)
            if control is None and not is_same:
                continue
            first, second = _logs(old, path, control), _logs(new, path, control)
            ratios = (math.exp(statistics.mean(logs)) for logs in (first, second))
            changes.append(Change(part, path, control, *ratios, _margin(first, second)))
    return changes


def differences(before: Report, now: Report, part: str | None = None) -> list[str]:
    """What differs between the machines and packages of two reports, or of a part of them."""
    old, new = (
        {key: report.get(key) for key in ENVIRONMENT if key != "versions"}
        | report.get("versions", {})
        # A part may have been measured elsewhere than the rest of its report.
        | {key: value for key, value in report.get(part, {}).items() if key == "device"}
        for report in (before, now)
    )
    names = dict.fromkeys([*old, *new])
    return [
        f"{name} {old.get(name)} before, {new.get(name)} now"
        for name in names
        if old.get(name) != new.get(name)
    ]


def text(before: Report, now: Report, parts: Collection[str]) -> str:
    """What a terminal shows of `compare`."""
    changes = compare(before, now, parts)
    differing = differences(before, now)
    lines = ["Against the run before, whose figures these replace:"]
    if differing:
        lines.append(f"  elsewhere ({'; '.join(differing)}): only ratios within a run are compared")
    ours = [change for change in changes if change.is_ours]
    if not ours:
        return "\n".join([*lines, "  it has no figure with a noise to compare with"])
    for verdict in ("slower", "faster", "unclear"):
        found = [change for change in ours if change.verdict == verdict]
        found.sort(key=lambda change: abs(math.log(change.factor)), reverse=True)
        lines += [f"  {verdict:8} {change}" for change in found]
    same = sum(change.verdict == "same" for change in ours)
    lines.append(f"  {same} of {len(ours)} figures are within 5 % of those before")
    others = [change.factor for change in changes if not change.is_ours and change.control]
    if others:
        lines.append(
            f"  of other packages, whose ratios should not change, they are {min(others):.2f} to "
            f"{max(others):.2f} times those before"
        )
    speeds = [change.factor for change in changes if not change.is_ours and not change.control]
    if speeds:
        lines.append(
            f"  the machine itself takes {min(speeds):.2f} to {max(speeds):.2f} times as long"
        )
    return "\n".join(lines)


def _shown(path: str) -> str:
    return path.replace("milliseconds/", "").replace("/", ", ")


def _word(control: str) -> str:
    """The control's own name in its path."""
    return next(key for key in control.split("/") if key in CONTROLS)


def _control(path: str, known: Collection[str]) -> str | None:
    """The path that differs in one place, where a control stands; None for a control itself."""
    keys = path.split("/")
    if set(keys) & set(CONTROLS):
        return None
    swapped = (
        "/".join([*keys[:place], control, *keys[place + 1 :]])
        for control in CONTROLS
        for place in range(len(keys))
    )
    return next((each for each in swapped if each in known), None)


def _logs(spread: dict[str, list[float]], path: str, control: str | None) -> list[float]:
    """Logs of the medians of the parts, divided by the control's."""
    under = spread[control] if control else [1.0] * len(spread[path])
    return [math.log(over / each) for over, each in zip(spread[path], under, strict=True)]


def _margin(*runs: Sequence[float]) -> float:
    """What noise can do to the difference of the means of two runs: t √(s² + s'²)."""
    variances = [statistics.variance(logs) / len(logs) for logs in runs]
    if not any(variances):
        return 0.0
    degrees = sum(variances) ** 2 / sum(
        each**2 / (len(logs) - 1) for each, logs in zip(variances, runs, strict=True)
    )
    return float(student.ppf(CONFIDENCE, degrees)) * math.sqrt(sum(variances))
