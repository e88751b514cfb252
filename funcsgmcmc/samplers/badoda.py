"""BADODA: the splitting BAOA with a Nosé–Hoover thermostat in place of a fixed friction.

With U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p, η ~ N(0, I), d the number of sampled entries,
products elementwise:

    p₁ = p − h m ∇U(w)
    w½ = w + (h/2) p₁
    ξ½ = ξ + (h/2) (‖p₁‖²/d − T)/μ
    p' = e^(−ξ½h) p₁ + √(A (1 − e^(−2ξ½h))/ξ½) √T m η              (2Ah for the fraction at ξ½ = 0)
    ξ' = ξ½ + (h/2) (‖p'‖²/d − T)/μ
    w' = w½ + (h/2) p'

h ↔ `lr`, nβ ↔ `nbeta`, A ↔ `diffusion_factor`, μ ↔ `thermostat_mass`, T ↔ `temperature`,
γ ↔ `localization`, λ ↔ `weight_decay`, w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to
`kernel` or `sample`; p the momentum, p₀ = √T m η₀; ξ the thermostat, one a chain, ξ₀ = A. With a
box, entries that leave it are clamped and their momentum changes sign. With `refresh_interval` R,
every R-th step has p' = √T m η: a fresh momentum.

It discretizes dw = p dt, dp = −∇U dt − ξ p dt + √(2AT) dB, dξ = (‖p‖²/d − T)/μ dt, whose thermostat
finds the friction that the noise of the minibatches asks for. In w, averages at stationarity are of
weak order 2. In the variables of `sgnht`, ε = h², and friction and A are those here times h.

Exact laws at stationarity, whatever the noise: E‖p₁‖² + E‖p'‖² = 2dT; and without refreshment, for
U quadratic with curvature Λ along a coordinate, there

    Λ E w² = (E p₁² + E p'²)/2 − E[(p₁ − p') w½]/h,

w around the mean, so that Var w is T/Λ to second order in h.

Source: Leimkuhler and Shang, "Adaptive thermostats for noisy gradient systems", SIAM Journal on
Scientific Computing 38 (2016), section 3, with unit masses, their σ_A²/2 = A T and μ d their
thermal mass, and the order of parts changed so that a step needs one gradient.
"""

from collections.abc import Mapping
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.samplers.base import Evaluation, State, shared_settings
from funcsgmcmc.samplers.momentum import ThermostatSampler, ThermostatState, bounced
from funcsgmcmc.samplers.splitting import damp, drift, kick, position_terms
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Terms


class BADODA(ThermostatSampler, frozen=True):
    """Settings of BADODA; made by `badoda`.

    Attributes:
        thermostat_mass: μ.
    """

    thermostat_mass: Tensor

    def momentum_variance(self) -> Tensor:
        """T."""
        return cast(Tensor, self.temperature)

    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ThermostatState, Terms]:
        """Make one step; the equation stands in the module's docstring."""
        state, lr = cast(ThermostatState, state), cast(Tensor, self.lr)
        kicked = kick(self.parts(state, evaluation, noise), state.momentum, lr)
        friction = state.thermostat + self.half_step(state, kicked.momentum)
        remaining, noise_scale = ornstein_uhlenbeck(friction, self.diffusion_factor, lr)
        refreshed = self.refreshes(state.step)
        if refreshed is not None:
            remaining = torch.where(refreshed, 0.0, remaining)
            noise_scale = torch.where(refreshed, 1.0, noise_scale)
        momentum = damp(kicked, remaining, noise_scale)
        thermostat = friction + self.half_step(state, momentum)
        moved = drift(state.params, kicked, momentum, lr)
        terms = position_terms(kicked, state.momentum, remaining, noise_scale, lr)
        arrived = self.arrived(state, *bounced(moved, momentum, self.walls(state)))
        return self.regulated(arrived, thermostat), terms

    def half_step(self, state: State, momentum: TensorDict) -> Tensor:
        """D: (h/2) (‖p‖²/d − T)/μ, `[*chains]`; 0 if nothing is sampled."""
        lr, temperature = cast(Tensor, self.lr), cast(Tensor, self.temperature)
        sampled = tree.count(state.params, self.mask)
        excess = tree.dot(momentum, momentum) / sampled.clamp(min=1) - temperature
        return torch.where(sampled > 0, lr / 2 * excess / self.thermostat_mass, 0.0)


def ornstein_uhlenbeck(
    friction: Tensor, diffusion_factor: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor]:
    """What dp = −ξ p dt + √(2A) dB keeps of p in a time h, and the scale of its noise.

    Args:
        friction: ξ, of either sign, `[*chains]`.
        diffusion_factor: A.
        lr: h.

    Returns:
        e^(−ξh), and √(A (1 − e^(−2ξh))/ξ), which is √(2Ah) at ξ = 0.
    """
    at_rest = friction == 0
    divisor = torch.where(at_rest, 1.0, friction)
    time = torch.where(at_rest, 2 * lr, -torch.expm1(-2 * friction * lr) / divisor)
    return torch.exp(-friction * lr), (diffusion_factor * time) ** 0.5


def badoda(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    diffusion_factor: float | Tensor,
    thermostat_mass: float | Tensor = 1.0,
    refresh_interval: int | Tensor | None = None,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> BADODA:
    """Make a sampler of Langevin dynamics with a thermostat, by the splitting BADODA.

        p₁ = p − h m [nβ g + γ (w − w₀) + λ w − ∇log p(w)]
        ξ½ = ξ + (h/2) (‖p₁‖²/d − T)/μ
        p' = e^(−ξ½h) p₁ + √(A (1 − e^(−2ξ½h))/ξ½) √T m η
        ξ' = ξ½ + (h/2) (‖p'‖²/d − T)/μ
        w' = w + (h/2) (p₁ + p')

    with d the number of sampled entries (Leimkuhler and Shang 2016). With a box, entries that leave
    it are clamped and their momentum changes sign. The module's docstring gives the exact laws.

    Args:
        lr: Step size h ≥ 0 of the dynamics, in units of w; about the square root of SGLD's ε.
        nbeta: As for `sgld`.
        diffusion_factor: A ≥ 0, the friction without minibatch noise and first value of the
            thermostat, a rate in units of 1/h.
        thermostat_mass: μ > 0, in units of h²T: the larger, the slower the thermostat adapts.
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
            "diffusion_factor": checks.hyperparameter("diffusion_factor", diffusion_factor),
            "thermostat_mass": checks.hyperparameter(
                "thermostat_mass", thermostat_mass, exclusive=True
            ),
            "refresh_interval": checks.interval("refresh_interval", refresh_interval),
        }
    )
    return BADODA(**fields, batch_size=chains, lock=False)
