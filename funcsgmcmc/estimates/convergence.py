"""Convergence of draws, diagnosed by ArviZ (the extra `diagnostics`).

Shapes: values of a quantity are `[C, D, …]`, C chains of D draws; what is told of it is `[…]`.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks

# Tail ESS at the 5 % and 95 % quantiles, as in Vehtari et al. 2021, section 4.3.
TAIL_QUANTILE = 0.95
_HUGE = 1e100
# From so many chains on, their spread tells the error of their mean.
FEWEST_CHAINS = 4


class Diagnostics(NamedTuple):
    """Convergence of a quantity, each `[…]` for values `[C, D, …]`; NaN below four draws.

    Attributes:
        r_hat: Rank-normalized split R-hat; 1 at convergence, suspect above 1.01.
        ess_bulk: Effective sample size for the centre of the distribution, in draws.
        ess_tail: The smaller effective sample size of the 5 % and 95 % quantiles, in draws.
        mcse_mean: Monte Carlo standard error of the mean, in units of the quantity.
    """

    r_hat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    mcse_mean: Tensor


class WeightedMean(NamedTuple):
    """An average over draws that do not count alike.

    Attributes:
        mean: `[…]`.
        mcse: Its Monte Carlo standard error, autocorrelation included, `[…]`.
        ess_weights: Number of draws of equal weight that would estimate as well, were draws
            independent: (Σ weight)²/Σ weight².
    """

    mean: Tensor
    mcse: Tensor
    ess_weights: float


def diagnostics(values: Tensor) -> Diagnostics:
    """Diagnose the convergence of one quantity.

    Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and
    localization: an improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021).

    Args:
        values: `[C, D, …]`, of healthy chains only (`samples.draw_losses[samples.healthy]`).

    Returns:
        Each diagnostic, `[…]`, float64.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: `values` has fewer than two dimensions, or no draw.
    """
    with needs_arviz():
        from arviz_stats.base import array_stats
    _check_draws(values)
    # Squares of the values of chains that have run away would overflow.
    largest = float(values.abs().max())
    unit = largest if _HUGE < largest < math.inf else 1.0
    array = (values.double() / unit).cpu().numpy()
    axes = {"chain_axis": 0, "draw_axis": 1}
    return Diagnostics(
        *(
            torch.as_tensor(statistic, dtype=torch.float64)
            for statistic in (
                array_stats.rhat(array, **axes),
                array_stats.ess(array, method="bulk", **axes),
                array_stats.ess(array, method="tail", prob=TAIL_QUANTILE, **axes),
                unit * array_stats.mcse(array, method="mean", **axes),
            )
        )
    )


def mean_error(*terms: Tensor) -> Tensor:
    """The Monte Carlo standard error of a mean over chains and draws, or of a sum of such means.

    Means over draws x̄_c of C independent chains are as good as Gaussian, so that their spread gives
    the error of their mean whatever the autocorrelation is:

        (q/2) √(Σ (x̄_c − x̄)²/(C (C − 1))),    P(|t| < q) = P(|z| < 2) = 0.954

    with t of Student's distribution with C − 1 degrees of freedom and z normal. So the mean is
    within twice the error in 95 % of runs, of few chains and of short ones too. For fewer than four
    chains it is `diagnostics(values).mcse_mean`, which is too small for short chains.

    Args:
        *terms: `[C, D, …]` each, of the same healthy chains; numbers of draws may differ.

    Returns:
        `[…]`, float64.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: There is no term, or one has fewer than two dimensions, or no draw.
    """
    if not terms:
        raise ValueError("mean_error needs the values of one mean at least, got none")
    for values in terms:
        _check_draws(values)
    number = len(terms[0])
    if number < FEWEST_CHAINS:
        errors = [diagnostics(values).mcse_mean for values in terms]
        return torch.stack(errors).square().sum(0).sqrt()
    means = torch.stack([values.double().mean(1) for values in terms]).sum(0)
    return means.std(0) * (wider(number, 2.0) / math.sqrt(number))


def wider(num_chains: int, z: float) -> float:
    """By how much an interval of ±z is wider, where the standard error is that of a few values.

    Args:
        num_chains: C ≥ 2, the values whose spread gave the error.
        z: In standard errors.

    Returns:
        q/z, with P(|t| < q) = P(|z'| < z), t of C − 1 degrees of freedom and z' normal.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
    """
    with needs_arviz():
        from scipy.stats import norm, t
    return float(t.isf(norm.sf(z), num_chains - 1)) / z


def weighted_mean(values: Tensor, log_weights: Tensor) -> WeightedMean:
    """Average a quantity over weighted draws, as those of `contour_sgld` are.

        E f ≈ Σ weight · f/Σ weight

    Its error is that of the mean of weight · (f − E f), divided by the mean weight (the delta
    method).

    Args:
        values: `[C, D, …]`, of healthy chains only.
        log_weights: `[C, D]`, of the same chains; a constant added to all changes nothing.

    Returns:
        The mean over draws and chains, `[…]`, its Monte Carlo error, and the ESS of the weights.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: The shapes do not fit, or there is no draw.
    """
    _check_draws(values)
    _check_weights(log_weights, values)
    # A common factor cancels: the largest weight becomes 1, so that none overflows.
    weights = (log_weights - log_weights.max()).exp().double()
    weights = weights / weights.mean()  # then Σ weight · f/Σ weight is a plain mean
    tall = weights.reshape(*weights.shape, *(1,) * (values.ndim - 2))
    mean = (tall * values.double()).mean((0, 1))
    return WeightedMean(
        mean=mean,
        mcse=diagnostics(tall * (values.double() - mean)).mcse_mean,
        ess_weights=float(weights.numel() / weights.square().mean()),
    )


@contextlib.contextmanager
def needs_arviz() -> Iterator[None]:
    """Name the extra that is missing, where an import of ArviZ fails.

    Raises:
        ImportError: It does.
    """
    try:
        yield
    except ImportError as error:
        raise checks.missing_extra(
            "diagnostics", "arviz-stats with xarray", "this diagnostic"
        ) from error


def _check_draws(values: Tensor) -> None:
    """Refuse values that are not `[C, D, …]`, or empty, or complex.

    Raises:
        TypeError: They are no real tensor.
        ValueError: They have another shape.
    """
    if not isinstance(values, Tensor) or values.is_complex():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values must be a real tensor, got {kind}")
    if values.ndim < 2 or not values.numel():
        raise ValueError(
            f"values must have shape [chains, draws, ...] and not be empty, "
            f"got {tuple(values.shape)}"
        )


def _check_weights(log_weights: Any, values: Tensor) -> None:
    """Refuse weights that are not one for each draw.

    Raises:
        TypeError: There are none.
        ValueError: Their shape is another, or they are those of a frozen chain.
    """
    if not isinstance(log_weights, Tensor):
        raise TypeError(
            f"log_weights must be a tensor [chains, draws], got {type(log_weights).__name__}; "
            "draws without weights have plain means"
        )
    if log_weights.shape != values.shape[:2]:
        raise ValueError(
            f"log_weights must have shape {tuple(values.shape[:2])}, one for each chain and draw, "
            f"got shape {tuple(log_weights.shape)}"
        )
    if log_weights.isnan().any():
        raise ValueError("log_weights must be those of healthy chains (samples.healthy), got NaN")
