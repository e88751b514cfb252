"""Stochastic gradient Hamiltonian Monte Carlo.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), products elementwise:

    scaled_grad   = ε m nβ g
    localization  = ε m (γ (w − w₀) − ∇log p(w))
    weight_decay  = ε m λ w
    noise         = √(2(α − β̂)εT) m η
    p'            = (1 − α) p − scaled_grad − localization − weight_decay + noise
    w'            = w + p'

ε ↔ `lr`, nβ ↔ `nbeta`, α ↔ `friction`, β̂ ↔ `noise_estimate`, T ↔ `temperature`,
γ ↔ `localization`, λ ↔ `weight_decay`, w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to
`kernel` or `sample`; p the momentum, p₀ = √(εT) m η₀. With a box, entries that leave it are clamped
and their momentum changes sign. With `refresh_interval` R, every R-th step has √(εT) m η instead of
(1 − α) p + noise: a fresh momentum.

Friction takes energy from the momentum, noise gives it back. The share of the minibatches' noise,
β̂ = ε V/(2T) for a variance V of nβ g, is left out of the sampler's own noise.

Exact law: for U quadratic with curvature Λ along a coordinate and full-batch gradients (β̂ = 0), the
chain without refreshment is stationary, for εΛ < 2 (2 − α), with

    Var w = (T/Λ) (2 − α)/(2 − α − εΛ/2),    E p² = 2εT/(2 − α − εΛ/2),    E w p = E p²/2.

With gradient noise of variance V, these hold times (α − β̂ + εV/(2T))/α: β̂ = εV/(2T) makes up for
it.

Source: Chen, Fox and Guestrin, "Stochastic gradient Hamiltonian Monte Carlo", ICML 2014, eq. 15,
with their learning rate η = ε.
"""

from typing import Unpack

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.momentum import MomentumSampler, MomentumState, check_interval
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, add


class SGHMC(MomentumSampler, frozen=True):
    """Settings of SGHMC; made by `sghmc`.

    Attributes:
        friction: α.
        noise_estimate: β̂.
    """

    friction: Tensor
    noise_estimate: Tensor

    def momentum_variance(self) -> Tensor:
        """εT."""
        return self.lr * self.temperature

    def is_entrywise(self) -> bool:
        """Every entry has its own momentum."""
        return type(self) is SGHMC

    def advance(
        self, state: MomentumState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[MomentumState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        terms = self.euler_terms(
            state,
            evaluation,
            noise,
            friction=self.friction,
            diffusion_factor=self.friction - self.noise_estimate,
        )
        momentum = terms.total()
        # By the new momentum: by the old one the scheme would be unstable without friction.
        params = add(state.params, Term(1.0, momentum))
        params, momentum = self.reflect_at_box(state, params, momentum)
        return state.replace(params=params, momentum=momentum, step=state.step + 1), terms


@takes_shared_settings
def sghmc(
    lr: float | Tensor | Schedule,
    *,
    friction: float | Tensor = 0.1,
    noise_estimate: float | Tensor = 0.0,
    refresh_interval: int | Tensor | None = None,
    **shared: Unpack[SharedSettings],
) -> SGHMC:
    """Make a sampler of stochastic gradient Hamiltonian Monte Carlo.

        p' = (1 − α) p − ε m [nβ g + γ (w − w₀) + λ w − ∇log p(w)] + √(2(α − β̂)εT) m η
        w' = w + p'

    (Chen, Fox and Guestrin 2014, eq. 15). With a box, entries that leave it are clamped and their
    momentum changes sign. The module's docstring gives the exact law.

    Args:
        lr: ε ≥ 0, in units of w²: the square of the step size of the dynamics.
        friction: α in [0, 2), the fraction of the momentum lost in a step; near 1 the chain walks
            as SGLD does, near 0 it coasts for about 1/α steps.
        noise_estimate: β̂ in [0, α], the share of the minibatches' noise: ε V/(2T) for a variance
            V of nβ g.
        refresh_interval: R ≥ 1, the steps after which the momentum is drawn afresh (default: it
            never is).
        **shared: The settings that all samplers share.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    sampler = build(
        SGHMC,
        lr,
        shared,
        friction=checks.hyperparameter("friction", friction, below=2.0),
        noise_estimate=checks.hyperparameter("noise_estimate", noise_estimate),
        refresh_interval=check_interval("refresh_interval", refresh_interval),
    )
    # After `build`, which gave both settings the same chains.
    checks.at_most("noise_estimate", sampler.noise_estimate, "friction", sampler.friction)
    return sampler
