"""The shared part of BAOA and BADODA: Langevin dynamics, split into steps that are solved exactly.

    B    p₁ = p − h m ∇U(w)                            `kick`
    A    w½ = w + (h/2) p₁
    O    p' = c p₁ + √(q T) m η                        `damp`
    A    w' = w½ + (h/2) p'

BADODA changes a thermostat before and after O. One gradient a step: the force at w' is the next
step's. Both steps A are one sum, w' = w + (h/2) (p₁ + p').
"""

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc.terms import Term, Terms, add, combine


def kick(momentum: TensorDict, force: Terms) -> TensorDict:
    """B: p₁ = p − h m ∇U(w)."""
    # Without the noise of `force`, which belongs to O.
    return combine(momentum, minus=force.down(), plus=())


def damp(kicked: TensorDict, force: Terms, remaining: Tensor, renewal: Tensor) -> TensorDict:
    """O: p' = c p₁ + √(q T) m η, with c ↔ `remaining`, q ↔ `renewal`."""
    # √T and the mask are in the noise of `force` already.
    return add(Term(remaining, kicked).value(), force.noise.times(renewal**0.5))


def position_terms(
    force: Terms, momentum: TensorDict, remaining: Tensor, renewal: Tensor, lr: Tensor
) -> Terms:
    """Terms of the move w' − w = (h/2) (1 + c) (p − h m ∇U) + (h/2) √(q T) m η.

    Args:
        force: h m ∇U term by term, and the noise √T · m η.
        momentum: p, before the step.
        remaining: c.
        renewal: q.
        lr: h.
    """
    # w moves by half of p₁ and by half of c p₁ + noise.
    carried = lr * (1 + remaining) / 2
    noise = lr * renewal**0.5 / 2
    return force.rescaled(drift=carried, noise=noise, momentum=Term(carried, momentum))
