"""Norms and inner products of the terms of an update."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.terms import Term, Terms
from funcsgmcmc.tree import Scalar

_NORMS = ("scaled_grad", "unscaled_grad", "localization", "weight_decay", "noise", "distance")
_DOTS = (
    ("scaled_grad", "localization"),
    ("scaled_grad", "weight_decay"),
    ("scaled_grad", "noise"),
    ("localization", "noise"),
    ("weight_decay", "noise"),
)
_PAIRS = tuple((name, name) for name in _NORMS) + _DOTS


class Metrics(NamedTuple):
    """L2 norms and inner products of one step's terms, each `[*chains]`.

    Sums over parameters are taken in float32 or better.

    Norms are of the terms as applied (step size, preconditioner and mask included), except
    `unscaled_grad`, without preconditioner and mask, and `distance` = ‖w − w₀‖ before the update.
    A cosine similarity is `dot / (norm_a * norm_b)`.

    Attributes:
        scaled_grad: ‖scaled_grad‖.
        unscaled_grad: ‖unscaled_grad‖.
        localization: ‖localization‖, a user's log-prior included.
        weight_decay: ‖weight_decay‖.
        noise: ‖noise‖.
        distance: ‖w − w₀‖.
        dot_grad_prior: ⟨scaled_grad, localization + weight_decay⟩.
        dot_grad_noise: ⟨scaled_grad, noise⟩.
        dot_prior_noise: ⟨localization + weight_decay, noise⟩.
        numel: Number of parameters whose mask is not zero, int64.
    """

    scaled_grad: Tensor
    unscaled_grad: Tensor
    localization: Tensor
    weight_decay: Tensor
    noise: Tensor
    distance: Tensor
    dot_grad_prior: Tensor
    dot_grad_noise: Tensor
    dot_prior_noise: Tensor
    numel: Tensor

    @property
    def prior(self) -> Tensor:
        """√(‖localization‖² + ‖weight_decay‖²)."""
        return torch.hypot(self.localization, self.weight_decay)


def metrics(terms: Terms, mask: TensorDict | None = None) -> Metrics:
    """Compute the metrics of a step.

    Args:
        terms: The step's terms, of batch size `[*chains]`.
        mask: The sampler's mask, of batch size `[]` or `[*chains]`; None means 1.

    Returns:
        Metrics, each entry `[*chains]`.
    """
    numel = tree.count(cast(TensorDict, terms.noise.direction), mask)
    return from_products(terms, products(terms).unbind(-1), numel)


def products(terms: Terms) -> Tensor:
    """Inner products of the directions of a step's terms, without their coefficients.

    They add up over the parts of a parameter vector: a driver that updates one part at a time sums
    them, and asks for norms at the end.

    Returns:
        `[*chains, 11]`, for `from_products`, which never reads those of a term that is `()`.
    """
    directions = {name: term.direction for name, term in _present(terms).items()}
    # Without preconditioner, mask and log-prior, several terms share a direction.
    distinct = list({id(direction): direction for direction in directions.values()}.values())
    place = {
        name: next(i for i, other in enumerate(distinct) if other is direction)
        for name, direction in directions.items()
    }
    # A term that is not there is given the first one's place.
    return tree.inner_products(distinct, [(place.get(a, 0), place.get(b, 0)) for a, b in _PAIRS])


def from_products(terms: Terms, values: Sequence[Scalar], numel: Tensor) -> Metrics:
    """Norms and inner products of terms from those of their directions.

    Args:
        terms: Terms with the step's coefficients.
        values: The result of `products`, or a sum of such, entry by entry: `[*chains]` each, or
            numbers, if the coefficients are numbers.
        numel: Number of parameters whose mask is not zero.
    """
    product: dict[tuple[str, str], Any] = dict(zip(_PAIRS, values, strict=True))
    coefficient = {name: term.coefficient for name, term in _present(terms).items()}

    def dot(a: str, b: str) -> Any:
        if a not in coefficient or b not in coefficient:
            return 0.0
        return coefficient[a] * coefficient[b] * product[a, b]

    def norm(name: str) -> Any:
        if name not in coefficient:
            return 0.0
        return abs(coefficient[name]) * product[name, name] ** 0.5

    return Metrics(
        **{name: norm(name) for name in _NORMS},
        dot_grad_prior=dot("scaled_grad", "localization") + dot("scaled_grad", "weight_decay"),
        dot_grad_noise=dot("scaled_grad", "noise"),
        dot_prior_noise=dot("localization", "noise") + dot("weight_decay", "noise"),
        numel=numel,
    )


def _present(terms: Terms) -> dict[str, Term]:
    """The terms that metrics are about, as far as the update has them."""
    named = {name: getattr(terms, name) for name in _NORMS}
    return {name: term for name, term in named.items() if term}
