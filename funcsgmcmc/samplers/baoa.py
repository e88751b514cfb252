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

from typing import Any, Unpack

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.momentum import MomentumSampler, MomentumState, check_interval
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.samplers.splitting import damp, kick, position_terms
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, add, step_terms


class BAOA(MomentumSampler, frozen=True):
    """Settings of BAOA; made by `baoa`.

    Attributes:
        friction: ζ.
    """

    friction: Tensor

    def momentum_variance(self) -> Tensor:
        """T."""
        return self.temperature

    def relaxation_rate(self) -> Tensor | None:
        """The rate h² (1 + c)/(1 − c) γ/2: that of SGLD with ε = h² (1 + c)/(1 − c)."""
        if isinstance(self.lr, Schedule):
            return None
        remaining = torch.exp(-self.friction * self.lr)
        return self.lr**2 * (1 + remaining) / (1 - remaining) * self.localization / 2

    def virial_excess(self, force: Tensor, noise: Tensor) -> Tensor | None:
        """The excess (h²/4) (1 + c)/(1 − c) V of gradient noise of variance V, from the exact law.

        The law's V h² (1 + c)/((1 − c)(4 − h²Λ)) in Λ Var w, at small h²Λ. The step itself adds
        none for quadratic U, and terms of order h² else, which are not in it.
        """
        if isinstance(self.lr, Schedule) or self.refresh_interval is not None:
            return None
        remaining = torch.exp(-self.friction * self.lr)
        return self.lr**2 / 4 * (1 + remaining) / (1 - remaining) * noise

    def step_order(self, *, is_noisy: bool) -> int:
        """2, but 1 where the noise of minibatches meets less damping in shorter steps.

        The law's share of gradient noise is of order h² at fixed e^(−ζh), and h/ζ at fixed ζ.
        """
        return 1 if is_noisy and not self.has_one_damping() else 2

    def has_one_damping(self) -> bool:
        """Whether ζh is the same for all chains, as it is by default."""
        if isinstance(self.lr, Schedule):
            return False
        damping = (self.friction * self.lr).reshape(-1)
        return torch.allclose(damping, damping[:1].expand_as(damping), rtol=1e-6)

    def is_entrywise(self) -> bool:
        """Every entry has its own momentum."""
        return type(self) is BAOA

    def advance(
        self, state: MomentumState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[MomentumState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        remaining = torch.exp(-self.friction * self.lr)
        # 1 − c² by `expm1`: the difference would cancel for frictions far below 1/h.
        renewal = -torch.expm1(-2 * self.friction * self.lr)
        remaining, renewal = self.with_refresh(state.step, remaining, renewal)
        shock = Term(self.temperature**0.5, noise)
        force = step_terms(self.slope(state, evaluation), self.mask_factors(), shock, drift=self.lr)
        kicked = kick(state.momentum, force)
        momentum = damp(kicked, force, remaining, renewal)
        # Both parts A in one sum: w is rounded once.
        params = add(state.params, Term(self.lr / 2, kicked), Term(self.lr / 2, momentum))
        terms = position_terms(force, state.momentum, remaining, renewal, self.lr)
        params, momentum = self.reflect_at_box(state, params, momentum)
        return state.replace(params=params, momentum=momentum, step=state.step + 1), terms


@takes_shared_settings
def baoa(
    lr: float | Tensor | Schedule,
    *,
    friction: float | Tensor | None = None,
    refresh_interval: int | Tensor | None = None,
    **shared: Unpack[SharedSettings],
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
        friction: Rate ζ ≥ 0, in units of 1/h: a step keeps e^(−ζh) of the momentum. Default: 1/h,
            which was safe near the limit of stability and with noisy gradients, where less was not.
            Of the order of the square root of U's curvature it mixes fastest.
        refresh_interval: R ≥ 1, the steps after which the momentum is drawn afresh (default: it
            never is).
        **shared: The settings that all samplers share.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number; or
            friction is left out where lr is a schedule, or 0.
    """
    if friction is None:
        friction = _default_friction(lr)
    return build(
        BAOA,
        lr,
        shared,
        friction=checks.hyperparameter("friction", friction),
        refresh_interval=check_interval("refresh_interval", refresh_interval),
    )


def _default_friction(lr: Any) -> Tensor:
    """The friction 1/h.

    Raises:
        ValueError: h is a schedule, or 0.
    """
    if isinstance(lr, Schedule):
        raise ValueError("friction must be given where lr is a schedule: 1/lr changes with it")
    step = checks.hyperparameter("lr", lr)
    if not (step > 0).all():
        raise ValueError(f"friction must be given where lr is 0, got lr={lr}")
    return 1 / step
