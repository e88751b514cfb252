"""What samplers with a momentum share (SGHMC, SGNHT): forces push p, and p moves w.

    p' = (1 − ξ) p − scaled_grad − localization − weight_decay + noise
    w' = w + p'

with ξ the friction. With a box, entries that leave it are clamped and their momentum changes sign.
The samplers differ in where ξ comes from.
"""

from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers.base import Sampler, State, boxed
from funcsgmcmc.terms import Parts, Term, Terms, decompose, move, scaled
from funcsgmcmc.tree import AnyTree, Scalar


class MomentumState(State, frozen=True):
    """State of a chain with a momentum.

    Attributes:
        momentum: p, leaves `[*chains, *shape]`, in float32 or better.
    """

    momentum: TensorDict


class MomentumSampler(Sampler, frozen=True):
    """Settings of a sampler with a momentum."""

    def momenta(self, noise: TensorDict | None) -> TensorDict:
        """First momenta √ε m η₀, from noise η₀ with entries N(0, 1).

        Raises:
            ValueError: `noise` is missing.
        """
        if noise is None:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs noise for its momenta: init(params, noise), got None")
        return first_momentum(noise, self.lr, self.mask)

    def pushed(
        self,
        state: MomentumState,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None,
        *,
        friction: Tensor,
        diffusion_factor: Tensor,
    ) -> tuple[TensorDict, TensorDict, Terms]:
        """Make the step that the samplers share.

        Args:
            state: State of batch size `[*chains]`.
            grads: g = ∇L(w).
            noise: η.
            prior_pull: −∇log p(w), or None.
            friction: ξ, `[*chains]` or `[]`.
            diffusion_factor: A, likewise.

        Returns:
            w', p' and the terms of the update.
        """
        parts = self.parts(state, grads, Term(torch.ones_like(self.lr), noise), prior_pull)
        slowed = Term(friction, state.momentum)
        terms = underdamped(parts, slowed, self.lr, diffusion_factor)
        half_width = self.bounding_box_size
        box = None if half_width is None else (self.center(state), half_width)
        params, momentum = push(state.params, slowed, terms, box)
        return params, momentum, terms


def first_momentum(noise: AnyTree, lr: Scalar, mask: AnyTree | None) -> AnyTree:
    """p₀ = √ε m η₀."""
    root = lr**0.5
    return tree.map_leaves(lambda leaf: tree.expand_right(root, leaf) * leaf, scaled(noise, mask))


def underdamped(
    parts: Parts, friction: Term, lr: Scalar, diffusion_factor: Scalar, *, split: bool = False
) -> Terms:
    """Terms of a step: drift ε, noise √(2Aε), friction ξ · p on the momentum.

    Args:
        parts: What the update is made of.
        friction: ξ · p.
        lr: ε.
        diffusion_factor: A.
        split: Whether friction acts on the momentum after the force has, which multiplies the
            drift by 1 − ξ: p' = (1 − ξ) (p − ε ∇U) + noise. It is the same to first order in ε.
    """
    remaining = 1 - friction.coefficient
    momentum = Term(remaining, friction.direction)
    drift = lr * remaining if split else lr
    diffusion = (2 * diffusion_factor * lr) ** 0.5
    return decompose(parts, drift=drift, diffusion=diffusion, momentum=momentum)


def push(
    params: AnyTree, friction: Term, terms: Terms, box: tuple[AnyTree, Scalar] | None
) -> tuple[AnyTree, AnyTree]:
    """Change the momentum by the terms, then the parameters by the momentum.

    Args:
        params: w.
        friction: ξ · p.
        terms: The step's.
        box: w₀ and b; None for no box.

    Returns:
        w' and p'.
    """
    start = cast(AnyTree, friction.direction)
    momentum = move(start, (friction, *terms.down()), terms.up())
    moved = move(params, (), (Term(1.0, momentum),))
    if box is None:
        return moved, momentum
    center, half_width = box

    def reflect(momentum: Tensor, leaf: Tensor, middle: Tensor) -> Tensor:
        inside = (leaf - middle).abs() < tree.expand_right(half_width, leaf)
        return torch.where(inside, momentum, -momentum)

    reflected = tree.map_leaves(reflect, momentum, moved, center)
    return boxed(moved, center, half_width), reflected
