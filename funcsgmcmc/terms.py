"""The decomposition of an update: its terms, and the move that adds them up.

    ∇U(w) = nβ g + γ (w − w₀) + λ w − ∇log p(w)
    w'    = w + momentum − scaled_grad − localization − weight_decay + correction + noise

A term is kept as a product coefficient · direction. Samplers say what the coefficients are; the
rest stands here, once, for trees of many chains and for the bare tensors of an optimizer.

Shapes: coefficients `[*chains]` or `[]` (numbers for bare tensors), directions
`[*chains, *shape]`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.tree import AnyTree, Scalar, Tree


class Term(NamedTuple):
    """One term of an update, kept as the product coefficient · direction.

    Applying a term is then one fused multiply-add a leaf, its norm is the coefficient times the
    direction's, and a term that nobody reads beyond the update takes no memory of its own: an
    eager update is 2 to 3 times as fast as with its terms as tensors.

    Attributes:
        coefficient: `[*chains]` or `[]`: step size, temperature, precision.
        direction: Tree like the parameters: gradient, displacement or noise, times whatever is a
            tensor of the leaf's shape (mask, preconditioner).
    """

    coefficient: Scalar
    direction: Tree

    def value(self) -> Tree:
        """The term itself, a tree in float32 or better."""
        return tree.map_leaves(
            lambda leaf: tree.expand_right(self.coefficient, leaf) * tree.widened(leaf),
            self.direction,
        )


MaybeTerm = Term | tuple[()]
"""A term, or `()` for one that an update does not have (None may not leave a `torch.vmap`)."""


def term(coefficient: Scalar, direction: Tree) -> MaybeTerm:
    """A term; `()` if the coefficient is the number 0."""
    if isinstance(coefficient, Tensor) or coefficient != 0:
        return Term(coefficient, direction)
    return ()


class Terms(NamedTuple):
    """The parts of one update, as applied: step size, preconditioner and mask included.

    A term that an update does not have is `()`.

    Attributes:
        scaled_grad: Drift from the loss.
        unscaled_grad: The same without preconditioner and mask.
        localization: Drift from the pull to the anchor, and from a user's log-prior.
        weight_decay: Drift from the pull to zero.
        noise: What was added at random.
        distance: w − w₀ before the update, with coefficient 1; `()` if nobody knows w₀.
        correction: Drift from the curvature of a preconditioner, Γ.
        momentum: What a momentum carries over from the step before.

    Without a box, w' − w = momentum − scaled_grad − localization − weight_decay + correction +
    noise.
    """

    scaled_grad: MaybeTerm
    unscaled_grad: MaybeTerm
    localization: MaybeTerm
    weight_decay: MaybeTerm
    noise: Term
    distance: MaybeTerm
    correction: MaybeTerm = ()
    momentum: MaybeTerm = ()

    def down(self) -> list[Term]:
        """The terms that the update subtracts."""
        return [term for term in (self.scaled_grad, self.localization, self.weight_decay) if term]

    def up(self) -> list[Term]:
        """The terms that the update adds, momentum aside."""
        return [term for term in (self.correction, self.noise) if term]


class Gains(NamedTuple):
    """Elementwise factors of the terms, with preconditioner and mask in them; None means 1.

    Attributes:
        grad: Factor of the gradient: m G.
        prior: Factor of the pulls: m G.
        noise: Factor of the noise: m √G.
        mask: Factor of Γ: m alone.
    """

    grad: Tree | None = None
    prior: Tree | None = None
    noise: Tree | None = None
    mask: Tree | None = None


def gains(preconditioner: AnyTree | None, mask: AnyTree | None) -> Gains:
    """The gains of a diagonal preconditioner G and a mask m."""
    if preconditioner is None:
        return Gains(mask, mask, mask, mask)
    drift = scaled(preconditioner, mask)
    return Gains(drift, drift, scaled(tree.map_leaves(torch.sqrt, preconditioner), mask), mask)


def scaled(direction: AnyTree, factors: AnyTree | None) -> AnyTree:
    """Multiply elementwise, in the dtype of the direction, float32 at least; None means 1."""
    if factors is None:
        return direction

    def product(leaf: Tensor, factor: Tensor) -> Tensor:
        wide = tree.widened(leaf)
        return wide * (factor if factor.dtype == wide.dtype else factor.to(wide.dtype))

    return tree.map_leaves(product, direction, factors)


class Parts(NamedTuple):
    """What an update is made of, before a sampler's step sizes.

    Attributes:
        grad: nβ · g.
        localization: γ · (w − w₀), or a sum of pulls.
        weight_decay: λ · w.
        noise: √T · η, times a noise level.
        distance: 1 · (w − w₀).
        gains: Preconditioner and mask.
        correction: T · Γ.
        drift_grad: nβ · what stands for g in the drift; `()` for g itself.
    """

    grad: MaybeTerm
    localization: MaybeTerm
    weight_decay: MaybeTerm
    noise: Term
    distance: MaybeTerm
    gains: Gains
    correction: MaybeTerm = ()
    drift_grad: MaybeTerm = ()


def decompose(parts: Parts, *, drift: Scalar, diffusion: Scalar, momentum: MaybeTerm = ()) -> Terms:
    """Decompose a step with drift · m (G ∇U(w) − Γ) down the potential, diffusion · m √G σ η up.

    Args:
        parts: Gradient, pulls, noise, preconditioner and mask.
        drift: Step size of the drift: ε/2 for SGLD.
        diffusion: Scale of the noise: √ε for SGLD.
        momentum: As in `Terms`.
    """
    gains, noise = parts.gains, parts.noise
    unscaled_grad = _applied(drift, parts.grad, None)
    same = gains.grad is None and not parts.drift_grad
    grad = parts.drift_grad or parts.grad
    return Terms(
        scaled_grad=unscaled_grad if same else _applied(drift, grad, gains.grad),
        unscaled_grad=unscaled_grad,
        localization=_applied(drift, parts.localization, gains.prior),
        weight_decay=_applied(drift, parts.weight_decay, gains.prior),
        noise=Term(diffusion * noise.coefficient, scaled(noise.direction, gains.noise)),
        distance=parts.distance,
        correction=_applied(drift, parts.correction, gains.mask),
        momentum=momentum,
    )


def rescaled(terms: Terms, *, drift: Scalar, noise: Scalar, momentum: MaybeTerm) -> Terms:
    """Multiply the drift of a step, and its noise; give it another momentum."""

    def times(factor: Scalar, term: MaybeTerm) -> MaybeTerm:
        return Term(factor * term.coefficient, term.direction) if term else ()

    return terms._replace(
        scaled_grad=times(drift, terms.scaled_grad),
        unscaled_grad=times(drift, terms.unscaled_grad),
        localization=times(drift, terms.localization),
        weight_decay=times(drift, terms.weight_decay),
        correction=times(drift, terms.correction),
        noise=Term(noise * terms.noise.coefficient, terms.noise.direction),
        momentum=momentum,
    )


def _applied(drift: Scalar, term: MaybeTerm, gain: Tree | None) -> MaybeTerm:
    return Term(drift * term.coefficient, scaled(term.direction, gain)) if term else ()


def move(
    params: AnyTree, minus: Sequence[Term], plus: Sequence[Term], *, in_place: bool = False
) -> AnyTree:
    """Make the move: w − Σ minus + Σ plus, in the order given.

    Args:
        params: w.
        minus: Terms to subtract.
        plus: Terms to add.
        in_place: For a bare tensor with numbers as coefficients: whether to write the result to
            `params`. Memory for the sum is then needed only if the dtype is narrower than float32,
            or a direction is `params` (weight decay without preconditioner).

    Returns:
        A tree like `params`: sums are taken in float32 or better, and rounded once.
    """
    if isinstance(params, Tensor):
        moved_leaf: Any = _move_leaf(params, minus, plus, in_place)
        return moved_leaf
    moved = {
        name: _move_leaf(leaf, _at(name, minus), _at(name, plus))
        for name, leaf in tree.leaves(params)
    }
    return tree.build(moved, params.batch_size)


def _at(name: tree.Name, terms: Sequence[Term]) -> list[Term]:
    """Terms of one leaf."""
    return [Term(term.coefficient, cast(TensorDict, term.direction)[name]) for term in terms]


def _move_leaf(
    leaf: Tensor, minus: Sequence[Term], plus: Sequence[Term], in_place: bool = False
) -> Tensor:
    total = tree.widened(leaf)
    # w itself or a wider copy of it may be written to, unless a direction is to be read from there.
    writes = in_place and not _lies_in(total, (*minus, *plus))
    for sign, terms in ((-1, minus), (1, plus)):
        for coefficient, direction in terms:
            if isinstance(coefficient, Tensor):
                coefficient = tree.expand_right(coefficient, leaf)
                total = torch.addcmul(total, direction, coefficient, value=sign)
            elif writes:
                total.add_(direction, alpha=sign * coefficient)
            else:
                total = torch.add(total, direction, alpha=sign * coefficient)
    if in_place:
        return leaf if total is leaf else leaf.copy_(total)
    return total if total.dtype == leaf.dtype else total.to(leaf.dtype)


def _lies_in(memory: Tensor, terms: Sequence[Term]) -> bool:
    """Whether a direction lies in some memory."""
    storage = memory.untyped_storage().data_ptr()
    for _, direction in terms:
        if cast(Tensor, direction).untyped_storage().data_ptr() == storage:
            return True
    return False


def total(terms: Sequence[Term]) -> MaybeTerm:
    """Add terms up to one; `()` for none."""
    if len(terms) < 2:
        return terms[0] if terms else ()
    first, *rest = terms
    return Term(1.0, move(first.value(), (), rest))
