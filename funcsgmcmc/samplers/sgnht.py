"""Stochastic gradient Nosé–Hoover thermostat, localized and tempered.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), d the number of sampled
entries, products and quotients elementwise, quotients over the sampled entries:

    scaled_grad   = ε m nβ g
    localization  = ε m (γ (w − w₀) − ∇log p(w))
    weight_decay  = ε m λ w
    noise         = √(2AεT) m η
    p'            = (1 − ξ) p − scaled_grad − localization − weight_decay + noise
    w'            = w + p'
    ξ'            = ξ + ‖p'/m‖²/d − εT

ε ↔ `lr`, nβ ↔ `nbeta`, T ↔ `temperature`, γ ↔ `localization`, λ ↔ `weight_decay`,
A ↔ `diffusion_factor`, w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to `kernel` or
`sample`; p the momentum, p₀ = √(εT) m η₀; ξ the thermostat, one a chain, ξ₀ = A. With a box,
entries that leave it are clamped and their momentum changes sign. With `refresh_interval` R, every
R-th step has √(εT) m η instead of (1 − ξ) p + noise: a fresh momentum.

The thermostat finds the friction that the noise of the minibatches asks for, so that the
temperature is right without knowing that noise.

Exact laws at stationarity, whatever the noise: E‖p'/m‖²/d = εT; and without refreshment, for U
quadratic with curvature Λ along a coordinate, εΛ E w² = E p² − E[ξ w p] there (w, p and ξ of one
state, w around the mean), about εT (1 − ξ/2), so that Var w is T/Λ up to an error
of first order in ξ.

Source: Ding, Fang, Babbush, Chen, Skeel and Neven, "Bayesian sampling using stochastic gradient
thermostats", NeurIPS 2014, algorithm 2, with their step size √ε and p = √ε · (their momentum).
"""

from typing import Unpack

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.momentum import ThermostatSampler, ThermostatState, check_interval
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, add
from funcsgmcmc.tree import Scalar


class SGNHT(ThermostatSampler, frozen=True):
    """Settings of SGNHT; made by `sgnht`."""

    def momentum_variance(self) -> Tensor:
        """εT."""
        return self.lr * self.temperature

    def advance(
        self, state: ThermostatState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ThermostatState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        moved, terms = self.advance_entries(state, evaluation, noise)
        return self.couple(state, moved), terms

    def is_entrywise(self) -> bool:
        """The thermostat is a value of the chain."""
        return type(self) is SGNHT

    def advance_entries(
        self, state: ThermostatState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ThermostatState, Terms]:
        """The next momentum p' and parameters w', with ξ as it is."""
        terms = self.euler_terms(
            state,
            evaluation,
            noise,
            friction=state.thermostat,
            diffusion_factor=self.diffusion_factor,
        )
        momentum = terms.total()
        params = add(state.params, Term(1.0, momentum))
        params, momentum = self.reflect_at_box(state, params, momentum)
        return state.replace(params=params, momentum=momentum, step=state.step + 1), terms

    def couple(self, before: ThermostatState, moved: ThermostatState) -> ThermostatState:
        """ξ', from p'."""
        thermostat = next_thermostat(
            before.thermostat,
            # A reflected momentum has the energy of p': signs do not change it.
            mean_energy=self.mean_energy(moved.momentum),
            variance=self.momentum_variance(),
        )
        return moved.replace(thermostat=thermostat)


def next_thermostat(thermostat: Tensor, *, mean_energy: Tensor, variance: Scalar) -> Tensor:
    """ξ' = ξ + ‖p'/m‖²/d − εT.

    Args:
        thermostat: ξ.
        mean_energy: ‖p'/m‖²/d.
        variance: εT.
    """
    return thermostat + mean_energy - variance


@takes_shared_settings
def sgnht(
    lr: float | Tensor | Schedule,
    *,
    diffusion_factor: float | Tensor = 0.01,
    refresh_interval: int | Tensor | None = None,
    **shared: Unpack[SharedSettings],
) -> SGNHT:
    """Make a sampler of the stochastic gradient Nosé–Hoover thermostat.

        p' = (1 − ξ) p − ε m [nβ g + γ (w − w₀) + λ w − ∇log p(w)] + √(2AεT) m η
        w' = w + p'
        ξ' = ξ + ‖p'/m‖²/d − εT

    with d the number of sampled entries (Ding et al. 2014, algorithm 2). With a box,
    entries that leave it are clamped and their momentum changes sign. The module's docstring gives
    the exact laws.

    Args:
        lr: ε ≥ 0, in units of w²: the square of the step size of the dynamics.
        diffusion_factor: A ≥ 0, the friction without minibatch noise and first value of the
            thermostat, a fraction of the momentum lost in a step.
        refresh_interval: R ≥ 1, the steps after which the momentum is drawn afresh (default: it
            never is).
        **shared: The settings that all samplers share.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    return build(
        SGNHT,
        lr,
        shared,
        diffusion_factor=checks.hyperparameter("diffusion_factor", diffusion_factor),
        refresh_interval=check_interval("refresh_interval", refresh_interval),
    )
