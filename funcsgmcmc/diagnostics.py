"""Convergence diagnostics and the summary of a run, by ArviZ (the extra `diagnostics`)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import is_tensorclass
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.llc import llc_draws
from funcsgmcmc.samples import Samples

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataTree

# Tail ESS at the 5 % and 95 % quantiles, as in Vehtari et al. 2021, section 4.3.
_TAIL_QUANTILE = 0.95


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


@dataclass(frozen=True)
class Summary:
    """The summary of a run, printed as a table under a line on the health of its chains.

    Attributes:
        table: One row a quantity: mean, sd, interval, ESS, R-hat and MCSE, of healthy chains.
        health: How many chains the table uses, and why others were frozen.
    """

    table: "DataFrame"
    health: str

    def __str__(self) -> str:
        table = self.table.to_string(float_format=lambda number: f"{number:.4g}")
        return f"{self.health}\n{table}"


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
    with _arviz():
        from arviz_stats.base import array_stats
    checks.draws(values)
    array = values.double().cpu().numpy()
    axes = {"chain_axis": 0, "draw_axis": 1}
    return Diagnostics(
        *(
            torch.as_tensor(statistic, dtype=torch.float64)
            for statistic in (
                array_stats.rhat(array, **axes),
                array_stats.ess(array, method="bulk", **axes),
                array_stats.ess(array, method="tail", prob=_TAIL_QUANTILE, **axes),
                array_stats.mcse(array, method="mean", **axes),
            )
        )
    )


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


def weighted_mean(values: Tensor, log_weights: Tensor) -> WeightedMean:
    """Average a quantity over weighted draws, as those of `contour_sgld` are.

        E f ≈ Σ weight · f/Σ weight

    Its error is that of the mean of weight · (f − E f), divided by the mean weight (the delta
    method).

    Args:
        values: `[C, D, …]`, of healthy chains only.
        log_weights: `[C, D]`, of the same chains; a constant added to all changes nothing.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: The shapes do not fit, or there is no draw.
    """
    checks.draws(values)
    checks.weights(log_weights, values)
    weights = (log_weights - log_weights.max()).exp().double()
    weights = weights / weights.mean()
    tall = weights.reshape(*weights.shape, *(1,) * (values.ndim - 2))
    mean = (tall * values.double()).mean((0, 1))
    return WeightedMean(
        mean=mean,
        mcse=diagnostics(tall * (values.double() - mean)).mcse_mean,
        ess_weights=float(weights.numel() / weights.square().mean()),
    )


def summary(samples: Samples) -> Summary:
    """Summarize a run: its loss, learning coefficient and observables, over healthy chains.

    Returns:
        A table with, for each quantity, its mean, standard deviation, 95 % interval, bulk and tail
        ESS, R-hat, and the Monte Carlo standard errors of mean and standard deviation. Recorded
        parameters have no rows; `arviz_stats.summary(samples.to_datatree())` has them.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: No draw was made, no chain is healthy, or the draws have weights.
    """
    checks.unweighted(samples.log_weights)
    with _arviz():
        import arviz_base
        import arviz_stats
    posterior = to_datatree(samples)
    # ArviZ takes both the interval and the quantile of the tail ESS from this setting.
    with arviz_base.rc_context({"stats.ci_prob": _TAIL_QUANTILE}):
        table = arviz_stats.summary(posterior, var_names=[*_quantities(samples)], round_to="none")
    return Summary(table, samples.health())


def to_datatree(samples: Samples) -> "DataTree":
    """Convert a run for ArviZ.

    Returns:
        Groups, all of healthy chains, with the chains' indices as coordinate: `posterior` with
        `loss`, `llc` (if L(w₀) is known), the observables and the recorded parameters under their
        dotted names (`params.loss` for one called like a quantity), dimensions (chain, draw, …);
        `sample_stats` with the metrics of the draws' steps, and their log weights; and `trace` with
        the loss of every step, burn-in included, dimensions (chain, step). The attributes of
        `posterior` hold the settings of the run.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: No draw was made, or no chain is healthy.
    """
    with _arviz():
        import arviz_base
        import xarray
    healthy = checks.usable_chains(samples.healthy, samples.num_draws)
    posterior = _quantities(samples)
    if samples.draws is not None:
        for name, leaf in tree.leaves(samples.draws):
            taken = tree.dotted(name) in posterior
            posterior[f"params.{tree.dotted(name)}" if taken else tree.dotted(name)] = leaf
    groups = {"posterior": posterior}
    if samples.metrics is not None:
        steps = samples.draw_steps
        groups["sample_stats"] = {
            name: value[:, steps] for name, value in samples.metrics._asdict().items()
        }
    if samples.log_weights is not None:
        groups.setdefault("sample_stats", {})["log_weight"] = samples.log_weights
    chains = samples.chains[healthy].numpy()
    result = arviz_base.from_dict(
        {
            group: {name: _array(value[healthy]) for name, value in values.items()}
            for group, values in groups.items()
        },
        coords={"chain": chains},
        attrs={"posterior": _settings(samples)},
    )
    trace = {"loss": (("chain", "step"), _array(samples.losses[healthy]))}
    result["trace"] = xarray.DataTree(
        xarray.Dataset(trace, coords={"chain": chains, "step": range(samples.num_steps)})
    )
    return result


def _quantities(samples: Samples) -> dict[str, Tensor]:
    """What is summarized, `[C, D, …]`: the learning coefficient first, since it is what runs are
    made for.
    """
    known = {} if samples.initial_loss is None else {"llc": llc_draws(samples)}
    return known | {"loss": samples.draw_losses} | samples.observables


def _settings(samples: Samples) -> dict[str, Any]:
    """Attributes for a file: numbers, strings and lists."""
    sampler = samples.sampler
    settings: dict[str, Any] = {
        "sampler": type(sampler).__name__,
        "num_burnin_steps": samples.num_burnin_steps,
        "num_steps_between_draws": samples.num_steps_between_draws,
        "key": samples.key.tolist(),
        "frozen_chains": [str(frozen) for frozen in samples.frozen],
    }
    return settings | _numbers(sampler)


def _numbers(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The numbers in a sampler, those of its schedules and preconditioners under dotted names."""
    found: dict[str, Any] = {}
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name)
        if isinstance(value, Tensor) and value.ndim <= 1:  # a file takes no nested lists
            found[prefix + name] = value.tolist()
        elif is_tensorclass(value):
            found[prefix + name] = type(value).__name__
            found |= _numbers(value, f"{prefix}{name}.")
    return found


def _array(values: Tensor) -> Any:
    """NumPy has no bfloat16, and statistics of booleans are those of 0 and 1."""
    return (values.float() if values.dtype in (torch.bfloat16, torch.bool) else values).numpy()


@contextlib.contextmanager
def _arviz() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise checks.missing_extra(
            "diagnostics", "arviz-stats with xarray", "this diagnostic"
        ) from error
