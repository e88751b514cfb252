"""Moments of draws, taken in one draw at a time: memory that does not grow with their number.

    r = W₂/(W₁ + W₂)
    mean = mean₁ + r (mean₂ − mean₁)
    cov = (1 − r) cov₁ + r cov₂ + r (1 − r) (mean₂ − mean₁)(mean₂ − mean₁)ᵀ

merges the moments of two sets of draws with total weights W₁, W₂; a draw is a set with cov = 0.
Draws of one weight have W = their number. Denominators are W, not W − 1.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
recommendations", The American Statistician 37 (1983), eq. 2.1, with weights; for one draw, West,
"Updating mean and variance estimates: an improved method", Communications of the ACM 22 (1979).
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree


class Moments(TensorClass, frozen=True):
    """Moments of the draws of each chain, of batch size `[*chains]`.

    Attributes:
        count: Number of draws, int64 `[*chains]`.
        log_weight: Log of the sum of their weights, `[*chains]`; log of their number if all count
            alike; −∞ for no draws.
        means: Their means by name, leaves `[*chains, *shape]`, in float32 or better.
    """

    count: Tensor
    log_weight: Tensor
    means: TensorDict

    @classmethod
    def of_draw(cls, values: TensorDict, counts: Tensor, log_weight: Tensor | None = None) -> Self:
        """The moments of one draw of each chain.

        Args:
            values: Leaves `[*chains, *shape]`.
            counts: Whether a chain's draw counts, bool `[*chains]`: not after it was frozen.
            log_weight: Of the draws; None if all count alike.
        """
        if log_weight is None:
            log_weight = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
        mean = tree.map_leaves(_number, values)
        zero = tree.map_leaves(torch.zeros_like, mean)
        return cls(
            count=counts.long(),
            log_weight=torch.where(counts, log_weight, -math.inf),
            means=mean,
            **{cls.second(): cls._products(zero)},
            batch_size=values.batch_size,
            lock=False,
        )

    def of_no_draw(self, chains: torch.Size) -> Self:
        """The moments of no draws, of the same quantities.

        Args:
            chains: Their batch size.
        """
        chain = self[0] if self.log_weight.ndim else self

        def zeros(leaf: Tensor) -> Tensor:
            return leaf.new_zeros(chains + leaf.shape)

        def over_chains(values: TensorDict) -> TensorDict:
            return tree.build({name: zeros(leaf) for name, leaf in tree.leaves(values)}, chains)

        return type(self)(
            count=zeros(chain.count),
            log_weight=zeros(chain.log_weight) - math.inf,
            means=over_chains(chain.means),
            **{self.second(): over_chains(getattr(chain, self.second()))},
            batch_size=chains,
            lock=False,
        )

    def merged(self, other: Self) -> Self:
        """The moments of the draws of both, chain by chain.

        Raises:
            TypeError, ValueError: The other are of other quantities, or of other chains.
        """
        checks.instance("other", other, type(self))
        tree.check_same_structure("the other means", other.means, self.means)
        # An empty set takes no share, of another empty one either.
        share = torch.sigmoid(other.log_weight - self.log_weight)
        share = torch.where(other.log_weight == -math.inf, 0.0, share)

        def of_leaf(leaf: Tensor) -> Tensor:
            return tree.expand_right(share.to(leaf.dtype), leaf)

        def mixed(one: Tensor, two: Tensor) -> Tensor:
            return torch.lerp(one, two, of_leaf(one))

        # What does not count may be so far off that its square overflows.
        away = tree.map_leaves(
            lambda one, two: torch.where(of_leaf(one) > 0, two - one, 0.0), self.means, other.means
        )
        spread = tree.map_leaves(
            lambda each: each * of_leaf(each) * (1 - of_leaf(each)),
            self._products(away),
        )
        within = tree.map_leaves(mixed, getattr(self, self.second()), getattr(other, self.second()))
        return type(self)(
            count=self.count + other.count,
            log_weight=torch.logaddexp(self.log_weight, other.log_weight),
            means=tree.map_leaves(mixed, self.means, other.means),
            **{self.second(): tree.map_leaves(torch.add, within, spread)},
            batch_size=self.batch_size,
            lock=False,
        )

    def pooled(self) -> Self:
        """The moments of the draws of all chains together, of batch size `[]`.

        Raises:
            ValueError: They are those of one set of draws already.
        """
        if self.log_weight.ndim != 1:
            shape = tuple(self.log_weight.shape)
            raise ValueError(f"moments to pool must be those of chains [C], got of shape {shape}")
        share = torch.softmax(self.log_weight, 0)

        def average(leaf: Tensor) -> Tensor:
            return torch.tensordot(share.to(leaf.dtype), leaf, 1)

        def over_chains(values: TensorDict) -> TensorDict:
            return tree.build({name: average(v) for name, v in tree.leaves(values)}, torch.Size())

        mean = over_chains(self.means)
        away = tree.map_leaves(torch.sub, self.means, mean.expand(*self.log_weight.shape))
        second = tree.map_leaves(torch.add, getattr(self, self.second()), self._products(away))
        return type(self)(
            count=self.count.sum(),
            log_weight=torch.logsumexp(self.log_weight, 0),
            means=mean,
            **{self.second(): over_chains(second)},
            batch_size=[],
            lock=False,
        )

    @staticmethod
    @abstractmethod
    def second() -> str:
        """The name of the second moments."""

    @staticmethod
    @abstractmethod
    def _products(away: TensorDict) -> TensorDict:
        """The products of deviations that the second moments average."""


class DrawMoments(Moments, frozen=True):
    """Means and variances of parameters.

    Attributes:
        variances: Of each entry, leaves `[*chains, *shape]`: the diagonal of the covariance.
    """

    variances: TensorDict

    @staticmethod
    def second() -> str:
        """`"variances"`."""
        return "variances"

    @staticmethod
    def _products(away: TensorDict) -> TensorDict:
        return tree.map_leaves(torch.square, away)


class ObservableMoments(Moments, frozen=True):
    """Means and covariances of observables.

    Attributes:
        covariances: Of the entries of observables f and g, `covariances[f, g]`,
            `[*chains, *shape of f, *shape of g]`, for each pair of names.
    """

    covariances: TensorDict

    @staticmethod
    def second() -> str:
        """`"covariances"`."""
        return "covariances"

    @staticmethod
    def _products(away: TensorDict) -> TensorDict:
        chains = away.batch_size

        def product(f: Tensor, g: Tensor) -> Tensor:
            rows, columns = f.reshape(*chains, -1, 1), g.reshape(*chains, 1, -1)
            return (rows * columns).reshape(f.shape + g.shape[len(chains) :])

        pairs: dict[Any, Tensor] = {
            (f, g): product(away[f], away[g]) for f, g in itertools.product(away.keys(), repeat=2)
        }
        return tree.build(pairs, chains)


def _number(value: Tensor) -> Tensor:
    """A value as a number to average: float32 at least, and float64 for integers."""
    if not value.is_floating_point():
        return value.double()
    # A copy: a state's parameters may be used up by a later step.
    return tree.widened(value).clone()


def with_draw(
    moments: Mapping[str, Moments],
    record: Collection[str],
    params: TensorDict,
    observed: Mapping[str, Tensor],
    counts: Tensor,
    log_weight: Tensor | None,
) -> dict[str, Moments]:
    """The moments that are recorded, with one more draw of each chain.

    Args:
        moments: Those of the draws before, by name; empty for the first draw.
        record: Names of what is recorded.
        params: w, leaves `[*chains, *shape]`.
        observed: The observables of the draw, `[*chains, …]`.
        counts: As for `Moments.of_draw`.
        log_weight: As for `Moments.of_draw`.
    """
    found: dict[str, Moments] = {}
    if "draw_moments" in record:
        found["draw_moments"] = DrawMoments.of_draw(params, counts, log_weight)
    if "observable_moments" in record:
        values = tree.build(dict(observed.items()), counts.shape)
        found["observable_moments"] = ObservableMoments.of_draw(values, counts, log_weight)
    if not moments:
        return found
    return {name: moments[name].merged(draw) for name, draw in found.items()}
