"""Many tests at once: the limit of a family of z-scores, and what they would find."""

from statistics import NormalDist

from funcsgmcmc import checks

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


def probability(name: str, value: float) -> float:
    """Check a probability, 0 and 1 excluded.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not between 0 and 1.
    """
    checks.finite_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return value
