"""BADODA: the splitting BAOA with a Nosé–Hoover thermostat in place of a fixed friction.

With U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p, η ~ N(0, I), d the number of sampled entries,
products and quotients elementwise, quotients over the sampled entries:

    p₁ = p − h m ∇U(w)
    w½ = w + (h/2) p₁
    ξ½ = ξ + (h/2) (‖p₁/m‖²/d − T)/μ
    p' = e^(−ξ½h) p₁ + √(A (1 − e^(−2ξ½h))/ξ½) √T m η              (2Ah for the fraction at ξ½ = 0)
    ξ' = ξ½ + (h/2) (‖p'/m‖²/d − T)/μ
    w' = w½ + (h/2) p'

h ↔ `lr`, nβ ↔ `nbeta`, A ↔ `diffusion_factor`, μ ↔ `thermostat_mass`, T ↔ `temperature`,
γ ↔ `localization`, λ ↔ `weight_decay`, w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to
`kernel` or `sample`; p the momentum, p₀ = √T m η₀; ξ the thermostat, one a chain, ξ₀ = A. With a
box, entries that leave it are clamped and their momentum changes sign. With `refresh_interval` R,
every R-th step has p' = √T m η: a fresh momentum.

It discretizes dw = p dt, dp = −∇U dt − ξ p dt + √(2AT) dB, dξ = (‖p‖²/d − T)/μ dt, whose thermostat
finds the friction that the noise of the minibatches asks for. In w, averages at stationarity are of
weak order 2. In the variables of `sgnht`, ε = h², and friction and A are those here times h.

Exact laws at stationarity, whatever the noise: E‖p₁/m‖² + E‖p'/m‖² = 2dT; and without refreshment,
for U quadratic with curvature Λ along a coordinate, there

    Λ E w² = (E p₁² + E p'²)/2 − E[(p₁ − p') w½]/h,

w around the mean, so that Var w is T/Λ up to an error of second order in h.

Source: Leimkuhler and Shang, "Adaptive thermostats for noisy gradient systems", SIAM Journal on
Scientific Computing 38 (2016), section 3, with unit masses, their σ_A²/2 = A T and μ d their
thermal mass, and the order of parts changed so that a step needs one gradient.
"""

from typing import Unpack

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.momentum import ThermostatSampler, ThermostatState, check_interval
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.samplers.splitting import damp, kick, position_terms
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, add, step_terms


class BADODA(ThermostatSampler, frozen=True):
    """Settings of BADODA; made by `badoda`.

    Attributes:
        thermostat_mass: μ.
    """

    thermostat_mass: Tensor

    def momentum_variance(self) -> Tensor:
        """T."""
        return self.temperature

    def step_order(self, *, is_noisy: bool) -> int:
        """2, but 1 with gradient noise, of which the thermostat takes up a part."""
        return 1 if is_noisy else 2

    def advance(
        self, state: ThermostatState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ThermostatState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        shock = Term(self.temperature**0.5, noise)
        force = step_terms(self.slope(state, evaluation), self.mask_factors(), shock, drift=self.lr)
        kicked = kick(state.momentum, force)
        friction = state.thermostat + self.half_step(state, kicked)
        remaining, renewal = ornstein_uhlenbeck(friction, self.diffusion_factor, self.lr)
        remaining, renewal = self.with_refresh(state.step, remaining, renewal)
        momentum = damp(kicked, force, remaining, renewal)
        thermostat = friction + self.half_step(state, momentum)
        # Both parts A in one sum: w is rounded once.
        params = add(state.params, Term(self.lr / 2, kicked), Term(self.lr / 2, momentum))
        terms = position_terms(force, state.momentum, remaining, renewal, self.lr)
        params, momentum = self.reflect_at_box(state, params, momentum)
        state = state.replace(params=params, momentum=momentum, step=state.step + 1)
        return state.replace(thermostat=thermostat), terms

    def half_step(self, state: ThermostatState, momentum: TensorDict) -> Tensor:
        """Change of ξ in part D, (h/2) (‖p‖²/d − T)/μ, `[*chains]`; 0 if d is 0."""
        energy = self.mean_energy(momentum)
        change = self.lr / 2 * (energy - self.temperature) / self.thermostat_mass
        # Without an entry to heat, the thermostat would fall without end.
        return torch.where(tree.count(momentum, self.mask) > 0, change, 0.0)


def ornstein_uhlenbeck(
    friction: Tensor, diffusion_factor: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve dp = −ξ p dt + √(2A) dB for a time h.

    Args:
        friction: ξ, of either sign, `[*chains]`.
        diffusion_factor: A.
        lr: h.

    Returns:
        The share of p that remains, e^(−ξh); and the variance of the noise, A (1 − e^(−2ξh))/ξ,
        which is 2Ah at ξ = 0.
    """
    # The limit at ξ = 0 is chosen by `where`: its other branch must not divide by 0.
    at_rest = friction == 0
    divisor = torch.where(at_rest, 1.0, friction)
    # Positive for either sign of ξ; `expm1` since 1 − e^(−2ξh) cancels near ξ = 0.
    time = torch.where(at_rest, 2 * lr, -torch.expm1(-2 * friction * lr) / divisor)
    return torch.exp(-friction * lr), diffusion_factor * time


@takes_shared_settings
def badoda(
    lr: float | Tensor | Schedule,
    *,
    diffusion_factor: float | Tensor,
    thermostat_mass: float | Tensor = 1.0,
    refresh_interval: int | Tensor | None = None,
    **shared: Unpack[SharedSettings],
) -> BADODA:
    """Make a sampler of Langevin dynamics with a thermostat, by the splitting BADODA.

        p₁ = p − h m [nβ g + γ (w − w₀) + λ w − ∇log p(w)]
        ξ½ = ξ + (h/2) (‖p₁/m‖²/d − T)/μ
        p' = e^(−ξ½h) p₁ + √(A (1 − e^(−2ξ½h))/ξ½) √T m η
        ξ' = ξ½ + (h/2) (‖p'/m‖²/d − T)/μ
        w' = w + (h/2) (p₁ + p')

    with d the number of sampled entries (Leimkuhler and Shang 2016). With a box, entries
    that leave it are clamped and their momentum changes sign. The module's docstring gives the
    exact laws.

    Args:
        lr: Step size h ≥ 0 of the dynamics, in units of w; about the square root of SGLD's ε.
        diffusion_factor: A ≥ 0, the friction without minibatch noise and first value of the
            thermostat, a rate in units of 1/h.
        thermostat_mass: μ > 0, in units of h²T: the larger, the slower the thermostat adapts.
        refresh_interval: R ≥ 1, the steps after which the momentum is drawn afresh (default: it
            never is).
        **shared: The settings that all samplers share.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    return build(
        BADODA,
        lr,
        shared,
        diffusion_factor=checks.hyperparameter("diffusion_factor", diffusion_factor),
        thermostat_mass=checks.hyperparameter("thermostat_mass", thermostat_mass, exclusive=True),
        refresh_interval=check_interval("refresh_interval", refresh_interval),
    )
