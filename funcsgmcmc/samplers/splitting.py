"""What BAOA and BADODA share: a step of Langevin dynamics split into parts that are solved exactly.

    B    p₁ = p − h m ∇U(w)
    A    w  ← w + (h/2) p₁
    O    p' = c p₁ + s √T m η
    A    w' = w + (h/2) p'

BADODA regulates a thermostat around O. One gradient a step: the force at w' is the next step's.
"""

from typing import NamedTuple

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc.terms import Parts, Term, Terms, decompose, move, rescaled


class Kick(NamedTuple):
    """The part B.

    Attributes:
        momentum: p₁.
        terms: Those of the momentum: drift h, noise 1.
    """

    momentum: TensorDict
    terms: Terms


def kick(parts: Parts, momentum: TensorDict, lr: Tensor) -> Kick:
    """B: p₁ = p − h m ∇U(w)."""
    terms = decompose(parts, drift=lr, diffusion=1.0)
    return Kick(move(momentum, terms.down(), ()), terms)


def damp(kick: Kick, remaining: Tensor, noise_scale: Tensor) -> TensorDict:
    """O: p' = c p₁ + s √T m η, with c ↔ `remaining`, s ↔ `noise_scale`."""
    noise = kick.terms.noise
    shock = Term(noise_scale * noise.coefficient, noise.direction)
    return move(kick.momentum, (Term(1 - remaining, kick.momentum),), (shock,))


def drift(params: TensorDict, kick: Kick, momentum: TensorDict, lr: Tensor) -> TensorDict:
    """A, twice: w' = w + (h/2) (p₁ + p')."""
    half = lr / 2
    return move(params, (), (Term(half, kick.momentum), Term(half, momentum)))


def position_terms(
    kick: Kick, start: TensorDict, remaining: Tensor, noise_scale: Tensor, lr: Tensor
) -> Terms:
    """Terms of the move w' − w = (h/2) (1 + c) (p − h m ∇U) + (h/2) s √T m η.

    Args:
        kick: The step's.
        start: p, before it.
        remaining: c.
        noise_scale: s.
        lr: h.
    """
    carried = lr * (1 + remaining) / 2
    return rescaled(
        kick.terms, drift=carried, noise=lr * noise_scale / 2, momentum=Term(carried, start)
    )
