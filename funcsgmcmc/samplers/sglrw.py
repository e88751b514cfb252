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
what the move adds to −d: of mean zero and variance δ² − d².

A scheme of weak order 1 for the diffusion that SGLD discretizes.

Exact law: for U quadratic with curvature Λ along a coordinate, G = 1, Var w = T/Λ for every ε and
whatever the gradient noise, up to the (rare) entries where |d| > δ: the second moment of a move is
δ² always.

Sources: Mensch et al., 2026 (arXiv:2602.15925), for stochastic gradients; Duffield et al., "Lattice
random walk discretisations of stochastic differential equations", 2025 (arXiv:2508.20883).
"""

from collections.abc import Mapping
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.preconditioners import Preconditioner, identity
from funcsgmcmc.samplers.base import Evaluation, State, shared_settings
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState, langevin
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Parts, Term, Terms, move, scaled


class SGLRW(LangevinSampler, frozen=True):
    """Settings of the lattice random walk; made by `sglrw`."""

    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[LangevinState, Terms]:
        """Make one step; the equation stands in the module's docstring."""
        state = cast(LangevinState, state)
        parts, averages = self.preconditioned(state, evaluation, noise)
        terms = langevin(parts, cast(Tensor, self.lr))
        fall = mean_fall(terms)
        moves = tree.map_leaves(lattice_move, fall, spacing(parts, terms, state.params), noise)
        moved = move(state.params, (), (Term(torch.ones_like(self.localization), moves),))
        surplus = tree.map_leaves(torch.add, moves, fall)
        terms = terms._replace(noise=Term(torch.ones_like(self.localization), surplus))
        return self.arrived(state, moved, averages), terms


def mean_fall(terms: Terms) -> TensorDict:
    """d, what a step goes down in the mean."""
    first, *rest = terms.down()
    correction = [terms.correction] if terms.correction else []
    return move(cast(TensorDict, first.value()), correction, rest)


def spacing(parts: Parts, terms: Terms, params: TensorDict) -> TensorDict:
    """δ = √(εT) m √G."""
    gain = scaled(tree.map_leaves(torch.ones_like, params), cast(TensorDict, parts.gains.noise))
    return cast(TensorDict, Term(terms.noise.coefficient, gain).value())


def lattice_move(fall: Tensor, spacing: Tensor, noise: Tensor) -> Tensor:
    """δ where Φ(η) < (1 − d/δ)/2, else −δ; 0 where δ is."""
    # With δ = 0 the probability is infinite or not a number: either way the move is 0.
    up = torch.special.ndtr(noise) < (1 - fall / spacing) / 2
    return torch.where(up, spacing, -spacing)


def sglrw(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    preconditioner: Preconditioner | None = None,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> SGLRW:
    """Make a sampler of the stochastic gradient lattice random walk.

        w' = w ± δ,    δ = √(εT) m √G,    P(+) = (1 − d/δ)/2 clamped to [0, 1]
        d  = (ε/2) m (G [nβ g + γ (w − w₀) + λ w − ∇log p(w)] − T Γ)

    followed by clamp(w', w₀ − b, w₀ + b) if b is given (Duffield et al. 2025; Mensch et al. 2026).
    No move is larger than δ, however large the gradient. The module's docstring gives the exact
    law.

    Args:
        lr: Step size ε ≥ 0, in units of w², that of SGLD. Moves follow the potential as long as
            |d| ≤ δ: for a coordinate of curvature Λ, up to 2/√(εΛ) standard deviations.
        nbeta: As for `sgld`.
        temperature: As for `sgld`; at 0 nothing moves.
        localization: As for `sgld`.
        weight_decay: As for `sgld`.
        preconditioner: As for `sgld`.
        anchor: As for `sgld`.
        bounding_box_size: As for `sgld`.
        mask: As for `sgld`.

    Raises:
        TypeError, ValueError: As for `sgld`.
    """
    preconditioner = identity() if preconditioner is None else preconditioner
    checks.preconditioner(preconditioner, Preconditioner)
    fields, chains = checks.per_chain(
        {
            **shared_settings(
                lr=lr,
                nbeta=nbeta,
                temperature=temperature,
                localization=localization,
                weight_decay=weight_decay,
                anchor=anchor,
                mask=mask,
                bounding_box_size=bounding_box_size,
            ),
            "preconditioner": preconditioner,
        }
    )
    return SGLRW(**fields, batch_size=chains, lock=False)
