"""The summary of a run, and its record as ArviZ takes it (the extra `diagnostics`)."""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.estimates.choice import FEWEST_LOOKS
from funcsgmcmc.estimates.convergence import TAIL_QUANTILE, diagnostics, needs_arviz
from funcsgmcmc.estimates.draws import full_llc_draws, llc_draws
from funcsgmcmc.runs.attributes import (
    Variables,
    attributes_of,
    check_one_law,
    constants_of,
    looks_of,
    moments_of,
)
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


def summary(samples: Samples, *, max_entries: int = 8) -> Summary:
    """Summarize a run: its loss, learning coefficient and observables, over healthy chains.

    Args:
        samples: A run.
        max_entries: An observable of more entries has one row, with the largest R-hat, the smallest
            effective sample sizes and the largest standard error of its entries. Others have a row
            for each entry.

    Returns:
        A table. First what tells whether chains have mixed, without the noise of minibatches, where
        it was recorded: learning coefficient and loss on all data (`Samples.looks`). Then those of
        the draws' minibatches, the observables, and the distance ‖w − w₀‖. For each its mean,
        standard deviation, 95 % interval, bulk and tail ESS, R-hat, and the Monte Carlo standard
        errors of mean and standard deviation. Recorded parameters have no rows;
        `arviz_stats.summary(to_datatree(samples))` has them.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        TypeError: `max_entries` is not an integer.
        ValueError: No draw was made, no chain is healthy, chains have different settings (see
            `Samples.groups`), the draws have weights, or nβ or T of a schedule differ between them.
    """
    checks.instance("samples", samples, Samples)
    checks.count("max_entries", max_entries, minimum=1)
    samples.check_poolable()
    check_one_law(samples)
    with needs_arviz():
        import arviz_base
        import arviz_stats
        import pandas
    quantities = _quantities(samples)
    sizes = {name: values[0, 0].numel() for name, values in quantities.items()}
    small = {name: quantities[name] for name, size in sizes.items() if size <= max_entries}
    of_draws = {_row_name(samples, name): values for name, values in small.items()}
    of_draws.setdefault("distance", samples.distances[:, samples.draw_rows])
    tables = []
    # ArviZ takes both the interval and the quantile of the tail ESS from this setting.
    with arviz_base.rc_context({"stats.ci_prob": TAIL_QUANTILE}), warnings.catch_warnings():
        # More chains than looks at all data are no mistake.
        warnings.filterwarnings("ignore", "Found chain dimension to be longer", UserWarning)
        for values in (_of_looks(samples), of_draws):
            if values:
                arrays = {name: _array(value[samples.healthy]) for name, value in values.items()}
                data = arviz_base.from_dict({"posterior": arrays})
                tables.append(arviz_stats.summary(data, round_to="none"))
    table = pandas.concat(tables)
    worst = {
        f"{name} (worst of {size})": _worst(quantities[name][samples.healthy])
        for name, size in sizes.items()
        if size > max_entries
    }
    table = table.reindex([*table.index, *worst])
    for name, row in worst.items():
        for column, value in row.items():
            table.loc[name, column] = value
    return Summary(table, samples.health())


def _row_name(samples: Samples, name: str) -> str:
    """The name of a quantity's row: losses of minibatches say that they are."""
    options = samples.options
    if name not in ("llc", "loss") or options["batch_size"] == options["num_examples"] is not None:
        return name
    return f"{name} (minibatches)"


def _of_looks(samples: Samples) -> dict[str, Tensor]:
    """What all data says, or a part of it, without the noise of minibatches: `[C, K]` each."""
    looks, options = samples.looks, samples.options
    if looks is None or len(looks.draws) < FEWEST_LOOKS:
        return {}
    if options["batch_size"] == options["num_examples"] is not None:
        return {}  # every draw is looked at
    if not looks.is_all:
        return {f"loss ({looks.num_examples} examples)": looks.losses}
    known = {} if samples.initial_loss is None else {"llc (all data)": full_llc_draws(samples)}
    return known | {"loss (all data)": looks.losses}


def _worst(values: Tensor) -> dict[str, float]:
    """The worst of each diagnostic over the entries of a quantity `[C, D, …]`."""
    entries = values.flatten(2)
    # Losses of tokens are NaN where there is none.
    known = ~entries.isnan().all((0, 1))
    found = diagnostics(entries[:, :, known] if known.any() else entries)
    # Entries that never change have no R-hat.
    return {
        "ess_bulk": float(found.ess_bulk.min()),
        "ess_tail": float(found.ess_tail.min()),
        "r_hat": float(found.r_hat.nan_to_num(nan=-math.inf).max()),
        "mcse_mean": float(found.mcse_mean.max()),
    }


def to_datatree(samples: Samples) -> "DataTree":
    """Convert a run for ArviZ.

    From a file of it alone every estimate follows, with `llc` as (nβ/T) (loss − L(w₀)).

    Args:
        samples: A run.

    Returns:
        Groups, all of healthy chains, with the chains' indices as coordinate:

        - `posterior`: `loss`, `llc` (if L(w₀) is known), the observables and the recorded
          parameters under their dotted names (`params.loss` for one called like a quantity),
          dimensions (chain, draw, …). Its attributes are the settings of the run, plain values.
        - `sample_stats`: the draws' `distance` from the anchor, the metrics of their steps, their
          log-priors and log weights.
        - `constant_data`: `initial_loss`, which is L(w₀), (chain); `nbeta` and `temperature` of the
          law that was sampled, (chain, draw); `step` of each draw, (draw).
        - `trace`: loss, distance and metrics of every step, burn-in included, (chain, step).
        - `full_data`, if all data was evaluated: `loss`, `virial`, `force`, `noise` of `Look`,
          (chain, full_draw), with the indices of the draws as coordinate.
        - `moments`, if they were recorded: `count`, `log_weight`, `means.…`, `variances.…` of
          parameters, `covariances.f.g` of observables, (chain, …).

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: No draw was made, or no chain is healthy.
    """
    checks.instance("samples", samples, Samples)
    with needs_arviz():
        import arviz_base
        import xarray
    healthy = samples.usable_chains()
    groups = {
        "posterior": _quantities(samples) | _parameters(samples),
        "sample_stats": _statistics(samples),
    }
    chains = samples.chains[healthy].numpy()
    result = arviz_base.from_dict(
        {
            group: {name: _array(value[healthy]) for name, value in values.items()}
            for group, values in groups.items()
        },
        coords={"chain": chains},
        attrs={group: attributes_of(samples) if group == "posterior" else {} for group in groups},
    )
    # ArviZ's function knows the dimensions chain and draw only.
    steps = samples.first_step + torch.arange(samples.num_steps)
    constants = constants_of(
        samples.sampler, samples.draw_steps, samples.num_chains, samples.initial_loss
    )
    others: list[tuple[str, Variables, dict[str, Any]]] = [
        ("constant_data", constants, {"draw": range(samples.num_draws)}),
        ("trace", _trace(samples), {"step": steps.numpy()}),
    ]
    if samples.looks is not None:
        others.append(("full_data", looks_of(samples.looks), {"full_draw": samples.looks.draws}))
    if moments := moments_of(samples):
        others.append(("moments", moments, {}))
    for group, variables, coords in others:
        chosen = {
            name: (dims, _array(value[healthy] if dims[0] == "chain" else value))
            for name, (dims, value) in variables.items()
        }
        dataset = xarray.Dataset(chosen, coords={"chain": chains, **coords})
        result[group] = xarray.DataTree(dataset)
    return result


def _trace(samples: Samples) -> Variables:
    """What is recorded at every step."""
    found = {"loss": samples.losses, "distance": samples.distances}
    metrics = {} if samples.metrics is None else samples.metrics._asdict()
    return {name: (("chain", "step"), value) for name, value in (found | metrics).items()}


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
    """Distances, metrics and log-priors of the draws' steps, and log weights, each `[C, D]`."""
    found = {"distance": samples.distances[:, samples.draw_rows]}
    if samples.metrics is not None:
        metrics = samples.metrics._asdict()
        found |= {name: value[:, samples.draw_rows] for name, value in metrics.items()}
    if samples.log_priors is not None:
        found["log_prior"] = samples.log_priors[:, samples.draw_rows]
    if samples.log_weights is not None:
        found["log_weight"] = samples.log_weights
    return found


def _array(values: Tensor) -> Any:
    """A NumPy array of values, as ArviZ takes it."""
    # NumPy has no bfloat16, and statistics of booleans are those of 0 and 1.
    return (values.float() if values.dtype in (torch.bfloat16, torch.bool) else values).numpy()
