"""Monte Carlo errors of many means at once, by batches of draws.

Each chain's D draws are cut into b batches, of which the means y_{c,k} are taken in one after the
other: memory is that of a few of them, whatever the number of chains and draws.

    s²         = Var_{c,k} y_{c,k}/(C b)        all batches, as if they were independent
    s²_within  = Var_k y_{c,k}/(C b)            averaged over chains
    s²_between = Var_c (mean_k y_{c,k})/C       autocorrelation within chains included

All three estimate the variance of the mean where batches are longer than autocorrelation and chains
sample one distribution. Where s²_between exceeds s²_within by more than chance, chains have not
mixed, and it alone is right.

Source: for batch means, Flegal and Jones, "Batch means and spectral variance estimators in Markov
chain Monte Carlo", Annals of Statistics 38 (2010), section 3; for the comparison, Gelman and Rubin,
"Inference from iterative simulation using multiple sequences", Statistical Science 7 (1992).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

_MANY_BATCHES = 64
# Chance alone brings log F so many of its standard deviations from 0 once in 1,000 times or less.
_BEYOND_CHANCE = 3.0


def batches_of(num_chains: int, num_draws: int) -> list[slice]:
    """Cut the draws of each chain into batches of equal length, to one draw.

    Args:
        num_chains: C.
        num_draws: D.

    Returns:
        As few batches as make 64 of all chains, two at least, and √D at most.
    """
    number = min(math.isqrt(num_draws), max(2, math.ceil(_MANY_BATCHES / num_chains)))
    bounds = [num_draws * k // number for k in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class BatchMeans:
    """The mean of a quantity over all draws of all chains, and its Monte Carlo error.

    Values of any shape `[…]` are added chain by chain, batch by batch: `add` for each batch of a
    chain, then `end_chain`.
    """

    def __init__(self) -> None:
        self._num_batches = self._num_chains = 0
        self._weight = 0.0

    def add(self, mean: Tensor, num_draws: int) -> None:
        """Take in the mean of a batch, `[…]`, float64."""
        if not self._num_batches:
            # Squares of small deviations from a large mean would be lost: they are taken from here.
            self._shift = mean.clone()
            zero = torch.zeros_like(mean)
            self._total, self._squares = zero.clone(), zero.clone()
            self._chain_squares, self._chain = zero.clone(), zero.clone()
            # Of the means of batches, for the errors: each counts alike.
            self._batch_total = zero.clone()
        away = mean - self._shift
        self._total.add_(away, alpha=num_draws)
        self._squares.addcmul_(away, away)
        self._chain.add_(away)
        self._weight += num_draws
        self._num_batches += 1

    def end_chain(self) -> None:
        """All batches of a chain are in."""
        self._chain_squares.addcmul_(self._chain, self._chain)
        self._batch_total.add_(self._chain)
        self._chain.zero_()
        self._num_chains += 1

    @property
    def mean(self) -> Tensor:
        """The mean over all draws, `[…]`."""
        return self._shift + self._total / self._weight

    @property
    def mcse_between(self) -> Tensor:
        """The error as the chains' means show it, `[…]`; NaN of a single chain."""
        return self._variance_between().sqrt()

    @property
    def mcse_within(self) -> Tensor:
        """The error as batches within chains show it, `[…]`; NaN of a single batch a chain."""
        return self._variance_within().sqrt()

    @property
    def mcse(self) -> Tensor:
        """The Monte Carlo standard error of `mean`, `[…]`; NaN of a single batch of all."""
        between, within = self._variance_between(), self._variance_within()
        free_between = self._num_chains - 1
        free_within = self._num_batches - self._num_chains
        if not free_between or not free_within:
            return (within if free_within else between).sqrt()
        pooled = (free_between * between + free_within * within) / (free_between + free_within)
        spread = math.sqrt(2 / free_between + 2 / free_within)
        is_apart = between > within * math.exp(_BEYOND_CHANCE * spread)
        return between.where(is_apart, pooled).sqrt()

    def _variance_between(self) -> Tensor:
        number = self._num_chains
        if number < 2:
            return torch.full_like(self._shift, torch.nan)
        length = self._num_batches / number
        squares = self._chain_squares / length**2
        means = self._batch_total / length
        deviations = (squares - means.square() / number).clamp(min=0)
        return deviations / (number - 1) / number

    def _variance_within(self) -> Tensor:
        free = self._num_batches - self._num_chains
        if not free:
            return torch.full_like(self._shift, torch.nan)
        length = self._num_batches / self._num_chains
        deviations = (self._squares - self._chain_squares / length).clamp(min=0)
        return deviations / free / self._num_batches


def means_over_draws(trace: Tensor, of_batch: Callable[[Tensor], Tensor]) -> BatchMeans:
    """The mean of something over the draws `[C, D, …]`, from its means over batches `[d, …]`."""
    found = BatchMeans()
    for chain in trace:
        for batch in batches_of(*trace.shape[:2]):
            values = chain[batch].double()
            found.add(of_batch(values), len(values))
        found.end_chain()
    return found
