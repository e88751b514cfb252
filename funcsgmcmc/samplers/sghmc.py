"""Stochastic gradient Hamiltonian Monte Carlo.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), products elementwise:

    scaled_grad   = ε m nβ g
    localization  = ε m (γ (w − w₀) − ∇log p(w))
    weight_decay  = ε m λ w
    noise         = √(2(α − β̂)ε) m η
    p'            = (1 − α) p − scaled_grad − localization − weight_decay + noise
    w'            = w + p'

ε ↔ `lr`, nβ ↔ `nbeta`, α ↔ `friction`, β̂ ↔ `noise_estimate`, γ ↔ `localization`,
λ ↔ `weight_decay`, w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to `kernel` or
`sample`; p the momentum, p₀ = √ε m η₀. With a box, entries that leave it are clamped and their
momentum changes sign.

Friction takes energy from the momentum, noise gives it back; what the minibatches' noise gives,
β̂ = ε V/2 for a variance V of nβ g, is left out of the sampler's own.

Exact law: for U quadratic with curvature Λ along a coordinate and full-batch gradients (β̂ = 0), the
chain is stationary, for εΛ < 2 (2 − α), with

    Var w = (1/Λ) (2 − α)/(2 − α − εΛ/2),    E p² = 2ε/(2 − α − εΛ/2),    E w p = E p²/2.

With gradient noise of variance V, these hold times (α − β̂ + εV/2)/α: β̂ = εV/2 makes up for it.

Source: Chen, Fox and Guestrin, "Stochastic gradient Hamiltonian Monte Carlo", ICML 2014, eq. 15,
with their learning rate η = ε.
"""

from collections.abc import Mapping
from typing import cast

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.samplers.base import State, shared_settings
from funcsgmcmc.samplers.momentum import MomentumSampler, MomentumState
from funcsgmcmc.terms import Terms


class SGHMC(MomentumSampler, frozen=True):
    """Settings of SGHMC; made by `sghmc`."""

    friction: Tensor
    noise_estimate: Tensor

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> MomentumState:
        """State at `params`, which are copied, with momenta √ε m η₀.

        Args:
            params: w, a tree of batch size `[*chains]`.
            noise: η₀, a tree like `params`, entries N(0, 1).

        Raises:
            TypeError, ValueError: As `Sampler.start`; or `noise` is missing.
        """
        momentum, start = self.momenta(noise), self.start(params)
        return MomentumState(
            params=start.params,
            step=start.step,
            anchor=start.anchor,
            momentum=momentum,
            batch_size=start.shape,
            lock=False,
        )

    def update(
        self,
        state: State,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None = None,
    ) -> tuple[MomentumState, Terms]:
        """Make one step; the equation stands in the module's docstring.

        Args:
            state: State of batch size `[*chains]`.
            grads: g = ∇L(w), raw: without nβ.
            noise: η, entries N(0, 1).
            prior_pull: −∇log p(w) of a user's log-prior, or None.

        Returns:
            The next state, and the terms of the update.
        """
        params, momentum, terms = self.pushed(
            cast(MomentumState, state),
            grads,
            noise,
            prior_pull,
            friction=self.friction,
            diffusion_factor=self.friction - self.noise_estimate,
        )
        new_state = MomentumState(
            params=params,
            step=state.step + 1,
            anchor=state.anchor,
            momentum=momentum,
            batch_size=state.shape,
            lock=False,
        )
        return new_state, terms


def sghmc(
    lr: float | Tensor,
    *,
    nbeta: float | Tensor,
    friction: float | Tensor = 0.1,
    noise_estimate: float | Tensor = 0.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> SGHMC:
    """Make a sampler of stochastic gradient Hamiltonian Monte Carlo.

        p' = (1 − α) p − ε m [nβ g + γ (w − w₀) + λ w − ∇log p(w)] + √(2(α − β̂)ε) m η
        w' = w + p'

    (Chen, Fox and Guestrin 2014, eq. 15). With a box, entries that leave it are clamped and their
    momentum changes sign. The module's docstring gives the exact law.

    Args:
        lr: ε ≥ 0, in units of w²: the square of the step size of the dynamics.
        nbeta: Inverse temperature nβ ≥ 0; `default_nbeta(n)` for local learning coefficients.
        friction: α in [0, 2), the fraction of the momentum lost in a step; near 1 the chain walks
            as SGLD does, near 0 it coasts for about 1/α steps.
        noise_estimate: β̂ in [0, α], what the minibatches' noise gives: ε V/2 for a variance V of
            nβ g.
        localization: Precision γ ≥ 0 of the pull to the anchor, in units of 1/w².
        weight_decay: Precision λ ≥ 0 of the pull to zero, in units of 1/w².
        anchor: w₀, a tree like the parameters (default: the parameters given to `init`).
        bounding_box_size: Half-width b > 0 of the box around w₀ (default: none).
        mask: m, a tree like the parameters: 0 keeps an entry where it is, 1 samples it.

    Every number may be a tensor `[C]`, one value a chain; `anchor` and `mask` may have batch size
    `[C]`.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    fields, chains = checks.per_chain(
        {
            **shared_settings(
                lr=lr,
                nbeta=nbeta,
                localization=localization,
                weight_decay=weight_decay,
                anchor=anchor,
                mask=mask,
                bounding_box_size=bounding_box_size,
            ),
            "friction": checks.hyperparameter("friction", friction, below=2.0),
            "noise_estimate": checks.hyperparameter("noise_estimate", noise_estimate),
        }
    )
    checks.at_most("noise_estimate", fields["noise_estimate"], "friction", fields["friction"])
    return SGHMC(**fields, batch_size=chains, lock=False)
