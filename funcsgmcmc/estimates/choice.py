"""The losses that an estimate is made of: those of minibatches, those on all data, or both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funcsgmcmc.estimates.convergence import diagnostics, mean_error
from funcsgmcmc.estimates.draws import full_llc_draws, llc_draws
from funcsgmcmc.runs.record import Samples

# Fewer looks at all data have no standard error.
FEWEST_LOOKS = 4


@dataclass(frozen=True, eq=False)
class Choice:
    """A mean over healthy chains, c of them, and its Monte Carlo error.

    Attributes:
        source: `"minibatches"`, `"all data"` or `"both"`.
        is_unbiased: Whether its losses are those of the draws, on average.
        mean: The mean.
        mcse: Its standard error.
        rank: The same from the draws' autocorrelation: less exact, but less noisy to choose by.
        widening: By what factor noise that chains share makes the error larger than that of
            independent chains; 1 where they share none.
        per_chain: Each chain's mean, `[c]`.
        mcse_per_chain: The standard error of each, `[c]`.
        trace: What tells whether chains have mixed, with the least noise that there is, `[c, …]`.
    """

    source: str
    is_unbiased: bool
    mean: float
    mcse: float
    rank: float
    widening: float
    per_chain: Tensor
    mcse_per_chain: Tensor
    trace: Tensor


def best_of(samples: Samples, draws: Tensor, initial_loss: float | Tensor | None) -> Choice:
    """Choose the losses that are unbiased, and among these the smallest Monte Carlo error.

    Args:
        samples: A run.
        draws: Its `llc_draws`.
        initial_loss: As for `llc`.
    """
    draws = draws[samples.healthy]
    trace = mixing_trace(samples)
    is_shared = share_noise(samples)
    plain = _choice("minibatches", _is_independent(samples), [draws], trace, is_shared)
    looks = samples.looks
    if looks is None or not looks.is_all or len(looks.draws) < FEWEST_LOOKS:
        return plain
    if samples.options["batch_size"] == samples.options["num_examples"]:
        return plain  # every draw is looked at
    full = full_llc_draws(samples, initial_loss)[samples.healthy]
    candidates = [
        plain,
        _choice("all data", True, [full], trace, is_shared),
        _choice("both", True, [draws, full - draws[:, looks.draws]], trace, is_shared),
    ]
    usable = [each for each in candidates if each.is_unbiased and not math.isnan(each.rank)]
    return min(usable, key=lambda each: each.rank, default=plain)


def share_noise(samples: Samples) -> bool:
    """Whether all chains saw the same minibatches, so that noise of these is common to them."""
    # Records of before have no such option.
    return bool(samples.options.get("shared_batches", False))


def pooled_error(*terms: Tensor, is_shared: bool) -> Tensor:
    """The Monte Carlo standard error of a sum of means over chains and draws.

    Of chains that share minibatches, the spread between them lacks what is common. The mean over
    chains, draw by draw, has both: then the error is that of its autocorrelated draws, where it is
    larger than `mean_error`.

    Args:
        *terms: As for `mean_error`.
        is_shared: Whether chains share minibatches.
    """
    error = mean_error(*terms)
    return torch.maximum(error, _error_of_mean_chain(terms)) if is_shared else error


def _error_of_mean_chain(terms: Sequence[Tensor]) -> Tensor:
    errors = [diagnostics(term.double().mean(0, keepdim=True)).mcse_mean for term in terms]
    return torch.stack(errors).square().sum(0).sqrt()


def _choice(
    source: str, is_unbiased: bool, terms: list[Tensor], trace: Tensor, is_shared: bool
) -> Choice:
    """The sum of some means over draws, `[c, …]` each."""
    per_chain = torch.stack([term.mean(1) for term in terms]).sum(0)
    rank, widening = math.hypot(*(float(diagnostics(term).mcse_mean) for term in terms)), 1.0
    if is_shared:
        of_mean = float(_error_of_mean_chain(terms))
        rank, widening = of_mean, of_mean / rank if rank else 1.0
    # Each chain by itself, for a sweep, where no two chains sample one distribution.
    of_chains = [[diagnostics(row[None]).mcse_mean for row in term] for term in terms]
    mcse_per_chain = torch.tensor(of_chains, dtype=torch.float64).square().sum(0).sqrt()
    mean = float(per_chain.mean())
    mcse = float(pooled_error(*terms, is_shared=is_shared))
    return Choice(source, is_unbiased, mean, mcse, rank, widening, per_chain, mcse_per_chain, trace)


def _is_independent(samples: Samples) -> bool:
    """Whether batches do not depend on the draws that they evaluate."""
    batch_size, number = samples.options["batch_size"], samples.options["num_examples"]
    if batch_size is None:  # batches of an iterable, which comes again
        return False
    is_all: bool = batch_size == number
    return is_all or samples.options["minibatches"] == "replacement"


def mixing_trace(samples: Samples) -> Tensor:
    """What tells whether healthy chains have mixed, `[c, K]`: free of minibatches' noise, if known.

    Losses of the draws in units of λ̂, up to a constant: on all data or a part of it, at the looks.
    """
    looks = samples.looks
    if looks is None or len(looks.draws) < 2 * FEWEST_LOOKS:
        return llc_draws(samples, 0.0)[samples.healthy]
    return full_llc_draws(samples, 0.0, of_part=True)[samples.healthy]
