"""The summary of a run, and its record as ArviZ takes it (the extra `diagnostics`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import is_tensorclass
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.estimates.convergence import TAIL_QUANTILE, needs_arviz
from funcsgmcmc.estimates.llc import llc_draws
from funcsgmcmc.runs.record import Samples

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataTree


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


def summary(samples: Samples) -> Summary:
    """Summarize a run: its loss, learning coefficient and observables, over healthy chains.

    Returns:
        A table with, for each quantity, its mean, standard deviation, 95 % interval, bulk and tail
        ESS, R-hat, and the Monte Carlo standard errors of mean and standard deviation. Recorded
        parameters have no rows; `arviz_stats.summary(to_datatree(samples))` has them.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: No draw was made, no chain is healthy, or the draws have weights.
    """
    samples.check_unweighted()
    with needs_arviz():
        import arviz_base
        import arviz_stats
    posterior = to_datatree(samples)
    # ArviZ takes both the interval and the quantile of the tail ESS from this setting.
    with arviz_base.rc_context({"stats.ci_prob": TAIL_QUANTILE}):
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
    with needs_arviz():
        import arviz_base
        import xarray
    healthy = samples.usable_chains()
    groups = {"posterior": _quantities(samples) | _parameters(samples)}
    statistics = _statistics(samples)
    if statistics:
        groups["sample_stats"] = statistics
    chains = samples.chains[healthy].numpy()
    result = arviz_base.from_dict(
        {
            group: {name: _array(value[healthy]) for name, value in values.items()}
            for group, values in groups.items()
        },
        coords={"chain": chains},
        attrs={"posterior": _settings(samples)},
    )
    # ArviZ knows the dimensions chain and draw only: a trace over steps is a group of our own.
    trace = {"loss": (("chain", "step"), _array(samples.losses[healthy]))}
    result["trace"] = xarray.DataTree(
        xarray.Dataset(trace, coords={"chain": chains, "step": range(samples.num_steps)})
    )
    return result


def _quantities(samples: Samples) -> dict[str, Tensor]:
    """Learning coefficient, loss and observables of the draws, each `[C, D, …]`."""
    # First in the table stands the quantity that most runs are made for.
    known = {} if samples.initial_loss is None else {"llc": llc_draws(samples)}
    return known | {"loss": samples.draw_losses} | samples.observables


def _parameters(samples: Samples) -> dict[str, Tensor]:
    """Recorded parameters by their dotted names, each `[C, D, …]`."""
    if samples.draws is None:
        return {}
    taken = _quantities(samples)
    named = {tree.dotted(name): leaf for name, leaf in tree.leaves(samples.draws)}
    return {f"params.{name}" if name in taken else name: leaf for name, leaf in named.items()}


def _statistics(samples: Samples) -> dict[str, Tensor]:
    """Metrics of the draws' steps and log weights of the draws, each `[C, D]`."""
    found = {}
    if samples.metrics is not None:
        metrics = samples.metrics._asdict()
        found = {name: value[:, samples.draw_steps] for name, value in metrics.items()}
    if samples.log_weights is not None:
        found["log_weight"] = samples.log_weights
    return found


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
    """A NumPy array of values, as ArviZ takes it."""
    # NumPy has no bfloat16, and statistics of booleans are those of 0 and 1.
    return (values.float() if values.dtype in (torch.bfloat16, torch.bool) else values).numpy()
