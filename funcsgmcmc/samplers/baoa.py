"""BAOA: Langevin dynamics with a momentum, split so that quadratics are sampled exactly.

With U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p and η ~ N(0, I), products elementwise:

    p₁ = p − h m ∇U(w)
    w½ = w + (h/2) p₁
    p' = e^(−ζh) p₁ + √(1 − e^(−2ζh)) √T m η
    w' = w½ + (h/2) p'

h ↔ `lr`, nβ ↔ `nbeta`, ζ ↔ `friction`, T ↔ `temperature`, γ ↔ `localization`, λ ↔ `weight_decay`,
w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to `kernel` or `sample`; p the momentum,
p₀ = √T m η₀. With a box, entries that leave it are clamped and their momentum changes sign. With
`refresh_interval` R, every R-th step has p' = √T m η: a fresh momentum.

It discretizes dw = p dt, dp = −∇U dt − ζ p dt + √(2ζT) dB, which leaves e^(−(U + ‖p‖²/2)/T)
invariant, with one gradient a step. In w, averages at stationarity are of weak order 2.

Exact law: for U quadratic with curvature Λ along a coordinate and gradient noise of variance V (of
nβ g; 0 for full batches), with c = e^(−ζh), the chain without refreshment is stationary, for
h²Λ < 4, with

    Var w = T/Λ + V h² (1 + c)/((1 − c) Λ (4 − h²Λ))
    E p²  = T + 4 V h² c²/((1 − c²)(4 − h²Λ))
    E w p = (h/2) (T + 2 V h² c/((1 − c)(4 − h²Λ)))

around the mean: exact in w and p, at every stable h, without gradient noise.

Source: Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for
molecular sampling", AMRX 2013 (the splitting, and its order); "Molecular Dynamics", Springer 2015,
section 7.3, with unit masses.
"""

from collections.abc import Mapping
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.samplers.base import Evaluation, State, shared_settings
from funcsgmcmc.samplers.momentum import MomentumSampler, MomentumState, bounced
from funcsgmcmc.samplers.splitting import damp, drift, kick, position_terms
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Terms


class BAOA(MomentumSampler, frozen=True):
    """Settings of BAOA; made by `baoa`.

    Attributes:
        friction: ζ.
    """

    friction: Tensor

    def momentum_variance(self) -> Tensor:
        """T."""
        return cast(Tensor, self.temperature)

    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[MomentumState, Terms]:
        """Make one step; the equation stands in the module's docstring."""
        state, lr = cast(MomentumState, state), cast(Tensor, self.lr)
        remaining = torch.exp(-self.friction * lr)
        noise_scale = (-torch.expm1(-2 * self.friction * lr)) ** 0.5
        refreshed = self.refreshes(state.step)
        if refreshed is not None:
            remaining = torch.where(refreshed, 0.0, remaining)
            noise_scale = torch.where(refreshed, 1.0, noise_scale)
        kicked = kick(self.parts(state, evaluation, noise), state.momentum, lr)
        momentum = damp(kicked, remaining, noise_scale)
        moved = drift(state.params, kicked, momentum, lr)
        terms = position_terms(kicked, state.momentum, remaining, noise_scale, lr)
        return self.arrived(state, *bounced(moved, momentum, self.walls(state))), terms


def baoa(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    friction: float | Tensor,
    refresh_interval: int | Tensor | None = None,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> BAOA:
    """Make a sampler of Langevin dynamics by the splitting BAOA.

        p₁ = p − h m [nβ g + γ (w − w₀) + λ w − ∇log p(w)]
        p' = c p₁ + √(1 − c²) √T m η,    c = e^(−ζh)
        w' = w + (h/2) (p₁ + p')

    (Leimkuhler and Matthews 2013.) With a box, entries that leave it are clamped and their momentum
    changes sign. The module's docstring gives the exact law.

    Args:
        lr: Step size h ≥ 0 of the dynamics, in units of w; about the square root of SGLD's ε.
            Stable for h < 2/√(largest curvature of U).
        nbeta: As for `sgld`.
        friction: Rate ζ ≥ 0, in units of 1/h: a step keeps e^(−ζh) of the momentum. Of the order of
            the square root of U's curvature it mixes fastest; with noisy gradients more is needed,
            to take out the energy that their noise puts in.
        refresh_interval: R ≥ 1, the steps after which the momentum is drawn afresh (default: it
            never is).
        temperature: As for `sgld`.
        localization: As for `sgld`.
        weight_decay: As for `sgld`.
        anchor: As for `sgld`.
        bounding_box_size: As for `sgld`.
        mask: As for `sgld`.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
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
            "friction": checks.hyperparameter("friction", friction),
            "refresh_interval": checks.interval("refresh_interval", refresh_interval),
        }
    )
    return BAOA(**fields, batch_size=chains, lock=False)
