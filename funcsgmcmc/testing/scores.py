"""Families of z-tests: scores, the limit for the largest of them, and the error they find."""

import math
from collections.abc import Mapping
from statistics import NormalDist

from torch import Tensor

NORMAL = NormalDist()


def z_limit(false_alarm: float, num_tests: int) -> float:
    """The limit with P(any |z| > limit) ≤ `false_alarm`, for tests that may depend on one another.

    Bonferroni's bound, two-sided.
    """
    return -NORMAL.inv_cdf(false_alarm / num_tests / 2)


def detectable_shift(standard_error: float, limit: float, power: float) -> float:
    """The shift of a mean that takes its z-score over the limit with probability `power`."""
    return (limit + NORMAL.inv_cdf(power)) * standard_error


def z_score(values: Tensor) -> float:
    """z-score of the mean, which should be 0, of independent values `[n]` of a symmetric law."""
    return float(values.mean() / values.std()) * math.sqrt(len(values))


def skewed_z_score(values: Tensor) -> float:
    """z-score of the mean, which should be 0, of independent values `[n]` of a skewed law.

    With W = mean/sd and γ the skewness of the values,

        z = √n (W + γ W²/3 + γ² W³/27 + γ/(6n)).

    For 200 squares of normals, where 10⁻⁵ is due beyond ±4.4, this z lies there with probability
    2·10⁻⁵, and √n W with 5·10⁻⁴.

    Source: Hall, "On the removal of skewness by transformation", JRSS B 54, 1992.
    """
    n, away = len(values), values - values.mean()
    ratio = values.mean() / values.std()
    skewness = away.pow(3).mean() / away.square().mean().pow(1.5)
    cubic = ratio + skewness * ratio**2 / 3 + skewness**2 * ratio**3 / 27 + skewness / (6 * n)
    return math.sqrt(n) * float(cubic)


def check_zero_means(
    values: Mapping[str, Tensor], false_alarm: float, claim: str = "means are not 0"
) -> dict[str, float]:
    """Check that means over independent chains are 0, as one family of z-tests.

    Args:
        values: By name, one number a chain, `[n]`.
        false_alarm: Probability that the check fails although all means are 0.
        claim: The start of the error's message.

    Returns:
        The z-scores, by name.

    Raises:
        AssertionError: A z-score exceeds the limit.
    """
    found = {name: skewed_z_score(each) for name, each in values.items()}
    limit = z_limit(false_alarm, len(found))
    wrong = {name: z for name, z in found.items() if not abs(z) <= limit}
    if wrong:
        lines = [
            f"{name}: off by {float(values[name].mean()):+.4f} ± "
            f"{standard_error(values[name]):.4f}, z = {z:.1f}"
            for name, z in sorted(wrong.items(), key=lambda item: -abs(item[1]))
        ]
        raise AssertionError(
            f"{claim} (|z| <= {limit:.2f} for {len(found)} scores):\n  " + "\n  ".join(lines)
        )
    return found


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values `[n]`."""
    return float(values.std()) / math.sqrt(len(values))
