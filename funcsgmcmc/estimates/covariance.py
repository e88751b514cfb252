"""Covariances of many entries of observables with one another, block by block, and their errors.

From draws, with deviations around the mean of all chains or around each chain's own,

    cov_ij  = (1/(N − 1)) Σ (a_i − ā_i)(b_j − b̄_j)
    corr_ij = cov_ij/√(cov_ii cov_jj)

whose Monte Carlo errors are those of the mean of the products, and for correlations that of

    z_i z_j − (corr_ij/2)(z_i² + z_j²),    z the deviations in units of their standard deviation

(the delta method). From moments that a run has taken in draw by draw, errors are those between
chains.

Shapes: C chains, D draws; entries are flattened, n of one observable and m of the other.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from funcsgmcmc.estimates.batch_means import BatchMeans, batches_of
from funcsgmcmc.runs.moments import ObservableMoments

BLOCK = 1024
Center = Literal["pooled", "chain"]


def covariances(
    rows: Tensor, columns: Tensor | None, normalized: bool, center: Center, block_size: int
) -> tuple[Tensor, Tensor]:
    """Covariances, or correlations, of entries of two traces, and their errors, `[n, m]` each.

    Args:
        rows: `[C, D, …]`, n entries.
        columns: `[C, D, …]`, m entries; None for the same, of which half is computed.
        normalized: Whether to give correlations.
        center: Around what.
        block_size: Entries of either in a block.
    """
    one = _Centered(rows, center, normalized)
    two = one if columns is None else _Centered(columns, center, normalized)
    values = torch.empty(one.size, two.size, dtype=torch.float64)
    mcse = torch.empty_like(values)
    for i in range(0, one.size, block_size):
        here = slice(i, min(i + block_size, one.size))
        for j in range(i if two is one else 0, two.size, block_size):
            there = slice(j, min(j + block_size, two.size))
            values[here, there], mcse[here, there] = _block(one, two, here, there, normalized)
            if two is one and i != j:
                values[there, here] = values[here, there].T
                mcse[there, here] = mcse[here, there].T
    return values, mcse


class _Centered:
    """A trace whose entries are taken around their means, and divided by their deviations.

    Args:
        trace: `[C, D, …]`.
        center: `"pooled"`, or `"chain"` for each chain's own mean.
        normalized: Whether to divide.

    Attributes:
        size: Number of entries.
        num_chains: C.
        num_draws: D.
        scale: What turns mean squares into variances without bias: N/(N − 1), or D/(D − 1).
    """

    def __init__(self, trace: Tensor, center: Center, normalized: bool) -> None:
        self._trace = trace.reshape(*trace.shape[:2], -1)
        self.num_chains, self.num_draws, self.size = self._trace.shape
        number = at_least_two(trace) if center == "pooled" else self.num_draws
        if number < 2:
            raise ValueError(f"center='chain' must have two draws a chain at least, got {number}")
        self.scale = number / (number - 1)
        means = self._trace.mean(1, dtype=torch.float64)
        self._means = means if center == "chain" else means.mean(0).expand_as(means)
        self._deviations: Tensor | None = None
        if normalized:
            everything = slice(0, self.size)
            squares = [
                self.of(chain, slice(None), everything).square().mean(0)
                for chain in range(self.num_chains)
            ]
            self._deviations = torch.stack(squares).mean(0).sqrt()

    def of(self, chain: int, draws: slice, entries: slice) -> Tensor:
        """Some draws and entries of a chain, `[d, k]`, float64."""
        away = self._trace[chain, draws, entries].double() - self._means[chain, entries]
        return away if self._deviations is None else away / self._deviations[entries]


def _block(
    one: _Centered, two: _Centered, here: slice, there: slice, normalized: bool
) -> tuple[Tensor, Tensor]:
    """A block of covariances, or correlations, and their errors."""

    def products(chain: int, draws: slice) -> Tensor:
        a = one.of(chain, draws, here)
        return a.T @ two.of(chain, draws, there) / len(a)

    if normalized:
        # Each chain has as many draws.
        parts = [products(chain, slice(None)) for chain in range(one.num_chains)]
        correlation = torch.stack(parts).mean(0)
    found = BatchMeans()
    for chain in range(one.num_chains):
        for draws in batches_of(one.num_chains, one.num_draws):
            a, b = one.of(chain, draws, here), two.of(chain, draws, there)
            value = a.T @ b / len(a)
            if normalized:
                # The delta method: deviations that divide a covariance are estimates, too.
                squares = a.square().mean(0)[:, None] + b.square().mean(0)
                value = value - correlation / 2 * squares
            found.add(value, len(a))
        found.end_chain()
    if normalized:
        return correlation, found.mcse
    return one.scale * found.mean, one.scale * found.mcse


def at_least_two(trace: Tensor) -> int:
    """The number of draws of all chains, which a covariance needs two of.

    Raises:
        ValueError: There is one.
    """
    number = trace.shape[0] * trace.shape[1]
    if number < 2:
        raise ValueError(f"a covariance must have two draws at least, got {number}")
    return number


def covariances_of_moments(
    moments: ObservableMoments,
    of: str,
    on: str,
    *,
    normalized: bool,
    over_tokens: bool,
    center: Center,
) -> tuple[Tensor, Tensor]:
    """Covariances, or correlations, from the moments of each chain, and their errors.

    Args:
        moments: Of healthy chains, `[C]`.
        of: Name of one observable.
        on: Name of the other.
        normalized: Whether to give correlations.
        over_tokens: Whether entries are averaged over the dimensions after an observable's first.
        center: Around what.

    Raises:
        ValueError: They are those of a single draw.
    """
    number = int(moments.count.sum()) if center == "pooled" else int(moments.count[0])
    if number < 2:
        raise ValueError(f"a covariance must have two draws at least, got {number}")

    def of_chains(f: str, g: str) -> Tensor:
        """Of each chain, `[C, n, m]`, around the common mean or its own."""
        products = moments.covariances[f, g].double()
        shape = moments.means[f].ndim - 1
        if center == "pooled":
            away = [moments.means[name].double() for name in (f, g)]
            rows, columns = (each - each.mean(0) for each in away)
            flat = rows.flatten(1)[:, :, None] * columns.flatten(1)[:, None, :]
            products = products + flat.reshape(products.shape)
        if over_tokens:
            products = _mean_over_tokens(products, 1 + shape, products.ndim)
            products = _mean_over_tokens(products, 1, 1 + shape)
        return products

    found = BatchMeans()
    values = of_chains(of, on)
    if normalized:
        rows, columns = (_diagonal(of_chains(name, name)) for name in (of, on))
        deviations = (rows.mean(0).sqrt(), columns.mean(0).sqrt())
        shape = values.shape
        flat = values.reshape(len(values), rows.shape[1], columns.shape[1])
        flat = flat / deviations[0][:, None] / deviations[1]
        correlation = flat.mean(0)
        squares = (rows / deviations[0] ** 2)[:, :, None] + (columns / deviations[1] ** 2)[:, None]
        for chain in flat - correlation / 2 * squares:
            found.add(chain, 1)
            found.end_chain()
        return correlation.reshape(shape[1:]), found.mcse.reshape(shape[1:])
    for chain in values:
        found.add(chain, 1)
        found.end_chain()
    scale = number / (number - 1)
    return scale * found.mean, scale * found.mcse


def _mean_over_tokens(products: Tensor, start: int, stop: int) -> Tensor:
    """Averages over the dimensions of an item, from `start` to `stop`, after its first."""
    tokens = tuple(range(start + 1, stop))
    return products.nanmean(tokens) if tokens else products


def _diagonal(covariances: Tensor) -> Tensor:
    """Variances of the entries of each chain, `[C, n]`, from `[C, *item, *item]`."""
    size = math.isqrt(covariances[0].numel())
    return covariances.reshape(len(covariances), size, size).diagonal(dim1=1, dim2=2)
