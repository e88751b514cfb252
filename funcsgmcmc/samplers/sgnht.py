"""Stochastic gradient Nosé–Hoover thermostat, localized and tempered.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), d the number of sampled
entries, products elementwise:

    scaled_grad   = ε m nβ g
    localization  = ε m (γ (w − w₀) − ∇log p(w))
    weight_decay  = ε m λ w
    noise         = √(2Aε) m η
    p'            = (1 − ξ) p − scaled_grad − localization − weight_decay + noise
    w'            = w + p'
    ξ'            = ξ + ‖p'‖²/d − ε

ε ↔ `lr`, nβ ↔ `nbeta`, γ ↔ `localization`, λ ↔ `weight_decay`, A ↔ `diffusion_factor`,
w₀ ↔ `anchor`, m ↔ `mask`, log p ↔ the `log_prior` given to `kernel` or `sample`; p the momentum,
p₀ = √ε m η₀; ξ the thermostat, one a chain, ξ₀ = A. With a box, entries that leave it are clamped
and their momentum changes sign.

The thermostat finds the friction that the noise of the minibatches asks for, so that the
temperature is right without knowing that noise.

Exact laws at stationarity, whatever the noise: E‖p'‖²/d = ε; and for U quadratic with curvature Λ
along a coordinate, εΛ E w² = E p² − E[ξ w p] there (w, p and ξ of one state, w around the mean),
about ε (1 − ξ/2), so that Var w is 1/Λ to first order in ξ.

Source: Ding, Fang, Babbush, Chen, Skeel and Neven, "Bayesian sampling using stochastic gradient
thermostats", NeurIPS 2014, algorithm 2, with their step size √ε and p = √ε · (their momentum).
"""

from collections.abc import Mapping
from typing import cast

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.samplers.base import State, shared_settings
from funcsgmcmc.samplers.momentum import MomentumSampler, MomentumState
from funcsgmcmc.terms import Terms
from funcsgmcmc.tree import Scalar


class SGNHTState(MomentumState, frozen=True):
    """State of a chain of SGNHT.

    Attributes:
        thermostat: ξ, `[*chains]`.
    """

    thermostat: Tensor


class SGNHT(MomentumSampler, frozen=True):
    """Settings of SGNHT; made by `sgnht`."""

    diffusion_factor: Tensor

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> SGNHTState:
        """State at `params`, which are copied, with momenta √ε m η₀ and thermostats A.

        Args:
            params: w, a tree of batch size `[*chains]`.
            noise: η₀, a tree like `params`, entries N(0, 1).

        Raises:
            TypeError, ValueError: As `Sampler.start`; or `noise` is missing.
        """
        momentum, start = self.momenta(noise), self.start(params)
        return SGNHTState(
            params=start.params,
            step=start.step,
            anchor=start.anchor,
            momentum=momentum,
            thermostat=self.diffusion_factor.expand(start.shape).clone(),
            batch_size=start.shape,
            lock=False,
        )

    def update(
        self,
        state: State,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None = None,
    ) -> tuple[SGNHTState, Terms]:
        """Make one step; the equation stands in the module's docstring.

        Args:
            state: State of batch size `[*chains]`.
            grads: g = ∇L(w), raw: without nβ.
            noise: η, entries N(0, 1).
            prior_pull: −∇log p(w) of a user's log-prior, or None.

        Returns:
            The next state, and the terms of the update.
        """
        state = cast(SGNHTState, state)
        params, momentum, terms = self.pushed(
            state,
            grads,
            noise,
            prior_pull,
            friction=state.thermostat,
            diffusion_factor=self.diffusion_factor,
        )
        energy = tree.dot(momentum, momentum)
        sampled = tree.count(state.params, self.mask).clamp(min=1)
        new_state = SGNHTState(
            params=params,
            step=state.step + 1,
            anchor=state.anchor,
            momentum=momentum,
            thermostat=regulated(state.thermostat, energy, sampled, self.lr),
            batch_size=state.shape,
            lock=False,
        )
        return new_state, terms


def regulated(thermostat: Tensor, energy: Tensor, sampled: int | Tensor, lr: Scalar) -> Tensor:
    """ξ' = ξ + ‖p'‖²/d − ε, from the energy ‖p'‖² and the number d ≥ 1 of sampled entries."""
    return thermostat + energy / sampled - lr


def sgnht(
    lr: float | Tensor,
    *,
    nbeta: float | Tensor,
    diffusion_factor: float | Tensor = 0.01,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> SGNHT:
    """Make a sampler of the stochastic gradient Nosé–Hoover thermostat.

        p' = (1 − ξ) p − ε m [nβ g + γ (w − w₀) + λ w − ∇log p(w)] + √(2Aε) m η
        w' = w + p'
        ξ' = ξ + ‖p'‖²/d − ε

    with d the number of sampled entries (Ding et al. 2014, algorithm 2). With a box, entries that
    leave it are clamped and their momentum changes sign. The module's docstring gives the exact
    laws.

    Args:
        lr: ε ≥ 0, in units of w²: the square of the step size of the dynamics.
        nbeta: Inverse temperature nβ ≥ 0; `default_nbeta(n)` for local learning coefficients.
        diffusion_factor: A ≥ 0, the friction without minibatch noise and first value of the
            thermostat, a fraction of the momentum lost in a step.
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
            "diffusion_factor": checks.hyperparameter("diffusion_factor", diffusion_factor),
        }
    )
    return SGNHT(**fields, batch_size=chains, lock=False)
