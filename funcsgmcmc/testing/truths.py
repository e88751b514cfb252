"""Learning coefficients that are known in closed form, to test estimates against."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from funcsgmcmc import checks


class Truth(NamedTuple):
    """A learning coefficient, of the limit of many examples.

    Attributes:
        coefficient: λ, which multiplies log n in the free energy.
        multiplicity: m, of the pole −λ: the free energy has −(m − 1) log log n too.
    """

    coefficient: float
    multiplicity: int


def monomial(powers: Sequence[int]) -> Truth:
    """The loss Π wᵢ^(2kᵢ), around 0.

        λ = min 1/(2kᵢ),    m = number of i with 1/(2kᵢ) = λ

    Source: Watanabe, "Algebraic Geometry and Statistical Learning Theory", Cambridge 2009, theorem
    6.6, for a normal crossing.

    Args:
        powers: kᵢ ≥ 1.

    Raises:
        TypeError, ValueError: There is none, or one is no integer ≥ 1.
    """
    if not powers:
        raise ValueError("powers must be one for each parameter, got none")
    largest = max(checks.count("powers[…]", power, minimum=1) for power in powers)
    return Truth(1 / (2 * largest), sum(power == largest for power in powers))


def separable(num_parameters: int, power: float) -> Truth:
    """The loss (1/2) Σ |wᵢ|^p of d parameters, around 0.

        λ = d/p,    m = 1

    and E[nβ L] = (d/p) T at every nβ, without localization: w scales out.

    Args:
        num_parameters: d ≥ 1.
        power: p > 0.

    Raises:
        TypeError, ValueError: An argument is out of its range.
    """
    checks.count("num_parameters", num_parameters, minimum=1)
    checks.number("power", power, exclusive=True)
    return Truth(num_parameters / power, 1)


def deep_linear(widths: Sequence[int], rank: int) -> Truth:
    """A deep linear network y = W_L ⋯ W_1 x + noise, around weights whose product has rank r.

    With Δ_s = H_s − r of the L + 1 widths H_s, take the set Σ of ℓ + 1 of them for which

        max_Σ Δ < min_(outside) Δ,    ℓ max_Σ Δ ≤ Σ Δ < ℓ min_(outside) Δ

    Then, with M = ⌈ΣΔ/ℓ⌉ and a = ΣΔ − (M − 1) ℓ, sums over Σ,

        λ = (r (H_0 + H_L) − r²)/2 + a (ℓ − a)/(4ℓ) − (ℓ − 1)/(4ℓ) (ΣΔ)² + (1/2) Σ_(s<t) Δ_s Δ_t
        m = a (ℓ − a) + 1

    Source: Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks
    with linear units", Neural Networks 172 (2024), theorem 1.

    Args:
        widths: H_0, the number of inputs, to H_L, that of outputs.
        rank: r, of the product of the true weights: at most the smallest width.

    Raises:
        TypeError, ValueError: There are fewer than two widths, or a number is out of its range.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must be those of inputs and outputs at least, got {widths}")
    for width in widths:
        checks.count("widths[…]", width, minimum=1)
    if not checks.count("rank", rank, minimum=0) <= min(widths):
        raise ValueError(f"rank must be at most the smallest width {min(widths)}, got {rank}")
    chosen = _deciding([width - rank for width in widths])
    number, total = len(chosen) - 1, sum(chosen)
    remainder = total - (math.ceil(total / number) - 1) * number
    pairs = sum(a * b for a, b in itertools.combinations(chosen, 2))
    regular = rank * (widths[0] + widths[-1]) - rank**2
    singular = remainder * (number - remainder) - (number - 1) * total**2
    return Truth(
        regular / 2 + singular / (4 * number) + pairs / 2, remainder * (number - remainder) + 1
    )


def _deciding(excess: Sequence[int]) -> list[int]:
    """The set Σ of excess widths: some of the smallest."""
    ordered = sorted(excess)
    for number in range(1, len(ordered)):
        chosen, outside = ordered[: number + 1], ordered[number + 1 :]
        least = min(outside, default=math.inf)
        is_apart = chosen[-1] < least
        if is_apart and number * chosen[-1] <= sum(chosen) < number * least:
            return chosen
    raise AssertionError(f"widths beyond the rank {ordered} have no deciding set")
