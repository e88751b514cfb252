"""Stochastic gradient lattice random walk: Langevin dynamics by moves of one bit an entry.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), Φ the normal distribution
function, products elementwise:

    d  = scaled_grad + localization + weight_decay − correction, as for SGLD
    δ  = √(εT) m √G
    w' = w + δ  where Φ(η) < (1 − d/δ)/2,  else w − δ
    w' = clamp(w', w₀ − b, w₀ + b)                                           if b is given

ε ↔ `lr`, T ↔ `temperature`, G and Γ ↔ `preconditioner`, and the other symbols as for `sgld`. Every
entry moves by exactly δ, whatever its gradient: up or down with probabilities that give the move
the mean −d, as long as |d| ≤ δ (beyond, it always goes down the potential). The term `noise` is
the move + d, of mean zero and variance δ² − d².

A scheme of weak order 1 for the diffusion that SGLD discretizes.

Exact law: for U quadratic with uncorrelated coordinates, G = 1, Var w = T/Λ along a coordinate of
curvature Λ, for every ε and whatever the gradient noise, up to the (rare) entries where |d| > δ:
the second moment of a move is δ² always. With correlations the covariance Σ at a Hessian H solves

    HΣ + ΣH = 2T·1 + (ε/2) offdiag(HΣH)

so that it is T H⁻¹ up to an error of first order in ε.

Sources: Mensch et al., 2026 (arXiv:2602.15925), for stochastic gradients; Duffield et al., "Lattice
random walk discretisations of stochastic differential equations", 2025 (arXiv:2508.20883).
"""

from typing import Unpack

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.preconditioners import Preconditioner, check_preconditioner, identity
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, add, combine, scaled, step_terms


class SGLRW(LangevinSampler, frozen=True):
    """Settings of the lattice random walk; made by `sglrw`."""

    def is_entrywise(self) -> bool:
        """As its preconditioner is."""
        return type(self) is SGLRW and self.preconditioner.is_entrywise()

    def advance(
        self, state: LangevinState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[LangevinState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        slope = self.slope(state, evaluation)
        factors, averages = self.factors(state, evaluation)
        shock = Term((self.lr * self.temperature) ** 0.5, noise)
        terms = step_terms(slope, factors, shock, drift=self.lr / 2)
        fall = mean_fall(terms)
        # δ as a tree: with a preconditioner each entry has a spacing of its own.
        ones = tree.map_leaves(torch.ones_like, state.params)
        spacing = Term(shock.coefficient, scaled(ones, factors.noise)).value()
        moves = tree.map_leaves(lattice_move, fall, spacing, noise)
        params = self.boxed(add(state.params, Term(1.0, moves)), self.center(state))
        # The noise is the move without its mean −d.
        surplus = tree.map_leaves(torch.add, moves, fall)
        terms = terms.with_noise(Term(torch.ones_like(self.localization), surplus))
        return state.replace(params=params, preconditioner=averages, step=state.step + 1), terms


def mean_fall(terms: Terms) -> TensorDict:
    """Minus the mean of a move: d = scaled_grad + localization + weight_decay − correction."""
    first, *rest = terms.down()
    correction = [] if terms.correction is None else [terms.correction]
    fall: TensorDict = combine(first.value(), minus=correction, plus=rest)
    return fall


def lattice_move(fall: Tensor, spacing: Tensor, noise: Tensor) -> Tensor:
    """The move of an entry: δ where Φ(η) < (1 − d/δ)/2, else −δ; 0 where δ is 0."""
    # With δ = 0 the probability is infinite or not a number: either way the move is 0.
    up = torch.special.ndtr(noise) < (1 - fall / spacing) / 2
    return torch.where(up, spacing, -spacing)


@takes_shared_settings
def sglrw(
    lr: float | Tensor | Schedule,
    *,
    preconditioner: Preconditioner | None = None,
    **shared: Unpack[SharedSettings],
) -> SGLRW:
    """Make a sampler of the stochastic gradient lattice random walk.

        w' = w ± δ,    δ = √(εT) m √G,    P(+) = (1 − d/δ)/2 clamped to [0, 1]
        d  = (ε/2) m (G [nβ g + γ (w − w₀) + λ w − ∇log p(w)] − T Γ)

    followed by clamp(w', w₀ − b, w₀ + b) if b is given (Duffield et al. 2025; Mensch et al. 2026).
    No move is larger than δ, however large the gradient; at temperature 0 nothing moves. The
    module's docstring gives the exact law.

    Args:
        lr: Step size ε ≥ 0, in units of w², that of SGLD. Moves follow the potential as long as
            |d| ≤ δ: for a coordinate of curvature Λ, up to 2/√(εΛ) standard deviations.
        preconditioner: G (default: `identity()`).
        **shared: The settings that all samplers share.

    Raises:
        TypeError, ValueError: As for `sgld`.
    """
    preconditioner = identity() if preconditioner is None else preconditioner
    check_preconditioner(preconditioner)
    return build(SGLRW, lr, shared, preconditioner=preconditioner)
