"""Stochastic gradient Langevin dynamics, localized and tempered, with a diagonal preconditioner.

With g = ∇L(w) the gradient of the minibatch mean loss, η ~ N(0, I), products elementwise:

    scaled_grad   = (ε/2) m G nβ g
    localization  = (ε/2) m G (γ (w − w₀) − ∇log p(w))
    weight_decay  = (ε/2) m G λ w
    correction    = (ε/2) m T Γ
    noise         = √(εT) m √G σ η
    w'            = w − scaled_grad − localization − weight_decay + correction + noise
    w'            = clamp(w', w₀ − b, w₀ + b)                                if b is given

ε ↔ `lr`, nβ ↔ `nbeta`, γ ↔ `localization`, λ ↔ `weight_decay`, σ ↔ `noise_level`,
T ↔ `temperature`, G and Γ ↔ `preconditioner`, w₀ ↔ `anchor`, m ↔ `mask`, b ↔ `bounding_box_size`,
log p ↔ the `log_prior` given to `kernel` or `sample`.

For m = 1, σ = 1 this is the Euler scheme, of weak order 1, of the Langevin diffusion (see
`samplers/langevin.py`) that leaves e^(−U/T) invariant, with
U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p.

Exact law: for U quadratic with curvature Λ along a coordinate and gradient noise of variance V (of
nβ g; 0 for full batches), G = 1, the chain is stationary, for ε < 4/Λ, with

    Var w = (σ²T + εV/4)/(Λ (1 − εΛ/4)).

Sources: Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011,
eq. 4; localized and tempered as in Lau, Furman, Wang, Murfet and Wei, "The local learning
coefficient: a singularity-aware complexity measure", 2023 (arXiv:2308.12108); preconditioned as in
Li, Chen, Carlson and Carin, AAAI 2016, eqs. 4 to 6.
"""

from typing import Literal, Unpack

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.preconditioners import (
    Identity,
    Preconditioner,
    check_preconditioner,
    identity,
    rmsprop,
)
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, move, step_terms


class SGLD(LangevinSampler, frozen=True):
    """Settings of SGLD; made by `sgld`, `rmsprop_sgld` and `cyclical_sgld`.

    Attributes:
        noise_level: σ.
    """

    noise_level: Tensor

    def is_entrywise(self) -> bool:
        """As its preconditioner is."""
        return type(self) is SGLD and self.preconditioner.is_entrywise()

    def advance(
        self, state: LangevinState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[LangevinState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        slope = self.slope(state, evaluation)
        factors, averages = self.factors(state, evaluation)
        # σ scales the noise alone: Γ keeps the temperature T.
        shock = Term((self.lr * self.temperature) ** 0.5 * self.noise_level, noise)
        terms = step_terms(slope, factors, shock, drift=self.lr / 2)
        # The terms are those of the move before the box clamps it.
        params = self.boxed(move(state.params, terms), self.center(state))
        return state.replace(params=params, preconditioner=averages, step=state.step + 1), terms

    def relaxation_rate(self) -> Tensor | None:
        """The rate (ε/2) γ, for G = 1."""
        if type(self.preconditioner) is not Identity or isinstance(self.lr, Schedule):
            return None
        return self.lr / 2 * self.localization

    def virial_excess(self, force: Tensor, noise: Tensor) -> Tensor | None:
        """The excess (ε/4) (force + noise), for G = 1.

        With v = w − w₀, a stationary chain has E[v'ᵀ A v'] = E[vᵀ A v] for every A, where
        v' − v = −(ε/2) ∇Û + √(εT) η and ∇Û is the estimate of ∇U, so that

            E⟨A v, ∇U⟩ = T tr A + (ε/4) E[∇Ûᵀ A ∇Û]

        For ∇U = Λ v around w₀ and ∇(nβ L) = B v, take A = B Λ⁻¹: the left side is E⟨v, nβ g⟩,
        T tr A its value without the excess, and ∇Uᵀ A ∇U = ⟨nβ g, ∇U⟩. Of the noise, which has
        A as well, all is counted.
        """
        if type(self.preconditioner) is not Identity or isinstance(self.lr, Schedule):
            return None
        return self.lr / 4 * (force + noise)

    def sampled_temperature(self, steps: Tensor) -> Tensor:
        """σ² T: noise of scale σ is that of temperature σ² (exactly so for G = 1)."""
        # A value for each chain, beside one for each step.
        return super().sampled_temperature(steps) * self.noise_level.unsqueeze(-1) ** 2


@takes_shared_settings
def sgld(
    lr: float | Tensor | Schedule,
    *,
    noise_level: float | Tensor = 1.0,
    preconditioner: Preconditioner | None = None,
    **shared: Unpack[SharedSettings],
) -> SGLD:
    """Make a sampler of localized, tempered, preconditioned SGLD.

        w' = w − (ε/2) m (G [nβ g + γ (w − w₀) + λ w − ∇log p(w)] − T Γ) + √(εT) m √G σ η

    followed by clamp(w', w₀ − b, w₀ + b) if b is given (Welling and Teh 2011, eq. 4; Lau et al.
    2023; Li et al. 2016, eqs. 4 to 6). The module's docstring gives the terms and the exact law.

    Args:
        lr: Step size ε ≥ 0, in units of w². Stable for ε < 4/(largest curvature of U).
        noise_level: Scale σ ≥ 0 of the noise. For G = 1 it is the same as temperature σ².
        preconditioner: G (default: `identity()`).
        **shared: The settings that all samplers share.

    Every number may be a tensor `[C]`, one value a chain; `anchor` and `mask` may have batch size
    `[C]`; `lr`, `nbeta` and `temperature` may be schedules.

    Returns:
        A sampler of batch size `[]`, or `[C]` if any setting is per chain.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    preconditioner = identity() if preconditioner is None else preconditioner
    check_preconditioner(preconditioner)
    return build(
        SGLD,
        lr,
        shared,
        noise_level=checks.hyperparameter("noise_level", noise_level),
        preconditioner=preconditioner,
    )


@takes_shared_settings
def rmsprop_sgld(
    lr: float | Tensor | Schedule,
    *,
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 0.1,
    curvature: Literal["exact", "hutchinson"] | None = None,
    noise_level: float | Tensor = 1.0,
    **shared: Unpack[SharedSettings],
) -> SGLD:
    """Make a sampler of SGLD preconditioned by RMSprop (pSGLD; Li et al. 2016).

        V' = α V + (1 − α) g²,    G = 1/(√V' + eps)

    in the update of `sgld`. Unless `curvature` is given, the term Γ = ∂G/∂w is left out, which
    biases the stationary law where G varies over the posterior.

    Args:
        lr: Step size ε ≥ 0, in units of w²/G.
        alpha: α in [0, 1], memory of the running average of g²; at 1, V stays 0.
        eps: eps > 0, in units of the gradient.
        curvature: `"exact"` or `"hutchinson"`, how to find h for Γ; None for no Γ. As for
            `rmsprop`.
        noise_level: Scale σ ≥ 0 of the noise.
        **shared: The settings that all samplers share.

    Raises:
        TypeError, ValueError: As for `sgld` and `rmsprop`.
    """
    preconditioner = rmsprop(alpha, eps, curvature=curvature)
    return sgld(lr, noise_level=noise_level, preconditioner=preconditioner, **shared)
