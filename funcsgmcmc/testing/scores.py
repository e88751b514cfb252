"""Many tests at once: the limit of a family of z-scores, and what they would find."""

import math
from statistics import NormalDist

from torch import Tensor

NORMAL = NormalDist()


def limit(false_alarm: float, num_tests: int) -> float:
    """The z-score that the largest of several exceeds with a given probability, at most.

    Bonferroni's bound, two-sided: P(any |z| > limit) ≤ `false_alarm`, however the tests depend on
    one another.
    """
    return -NORMAL.inv_cdf(false_alarm / num_tests / 2)


def detectable(standard_error: float, limit: float, power: float) -> float:
    """The shift that takes a z-score over the limit with probability `power`."""
    return (limit + NORMAL.inv_cdf(power)) * standard_error


def of_symmetric(values: Tensor) -> float:
    """z-score of the mean of independent values `[n]` of a symmetric law, that should be 0."""
    return float(values.mean() / values.std()) * math.sqrt(len(values))


def of_skewed(values: Tensor) -> float:
    """z-score of the mean of independent values `[n]` that should be 0, corrected for skewness.

    With W = mean/sd and γ the skewness of the values,

        z = √n (W + γ W²/3 + γ² W³/27 + γ/(6n)).

    Among 200 squares of normals it is beyond ±4.4 with probability 2·10⁻⁵; √n W, which should be
    there with probability 10⁻⁵, is with 5·10⁻⁴.

    Source: Hall, "On the removal of skewness by transformation", JRSS B 54, 1992.
    """
    n, away = len(values), values - values.mean()
    ratio = values.mean() / values.std()
    skewness = away.pow(3).mean() / away.square().mean().pow(1.5)
    cubic = ratio + skewness * ratio**2 / 3 + skewness**2 * ratio**3 / 27 + skewness / (6 * n)
    return math.sqrt(n) * float(cubic)
