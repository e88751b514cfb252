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

from collections.abc import Mapping
from typing import Literal, cast

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.preconditioners import Preconditioner, identity, rmsprop
from funcsgmcmc.samplers.base import Evaluation, State, shared_settings
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState, langevin
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Term, Terms, move


class SGLD(LangevinSampler, frozen=True):
    """Settings of SGLD; made by `sgld`, `rmsprop_sgld` and `cyclical_sgld`.

    Attributes:
        noise_level: σ.
    """

    noise_level: Tensor

    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[LangevinState, Terms]:
        """Make one step; the equation stands in the module's docstring."""
        state = cast(LangevinState, state)
        parts, averages = self.preconditioned(state, evaluation, noise)
        coefficient, direction = parts.noise
        parts = parts._replace(noise=Term(self.noise_level * coefficient, direction))
        terms = langevin(parts, cast(Tensor, self.lr))
        moved = move(state.params, minus=terms.down(), plus=terms.up())
        return self.arrived(state, moved, averages), terms


def sgld(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    noise_level: float | Tensor = 1.0,
    preconditioner: Preconditioner | None = None,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> SGLD:
    """Make a sampler of localized, tempered, preconditioned SGLD.

        w' = w − (ε/2) m (G [nβ g + γ (w − w₀) + λ w − ∇log p(w)] − T Γ) + √(εT) m √G σ η

    followed by clamp(w', w₀ − b, w₀ + b) if b is given (Welling and Teh 2011, eq. 4; Lau et al.
    2023; Li et al. 2016, eqs. 4 to 6). The module's docstring gives the terms and the exact law.

    Args:
        lr: Step size ε ≥ 0, in units of w². Stable for ε < 4/(largest curvature of U).
        nbeta: Inverse temperature nβ ≥ 0 of the loss, in units of the number of examples, since
            the loss is a mean; `default_nbeta(n)` = n/log n for local learning coefficients, n for
            a posterior.
        temperature: T ≥ 0 of the whole posterior: the chain samples e^(−U/T). 0 is gradient descent
            on U with step ε/2.
        localization: Precision γ ≥ 0 of the pull to the anchor, in units of 1/w².
        weight_decay: Precision λ ≥ 0 of the pull to zero, in units of 1/w².
        noise_level: Scale σ ≥ 0 of the noise. For G = 1 it is the same as temperature σ².
        preconditioner: G (default: `identity()`).
        anchor: w₀, a tree like the parameters (default: the parameters given to `init`).
        bounding_box_size: Half-width b > 0 of the box around w₀ (default: none).
        mask: m, a tree like the parameters: 0 keeps an entry where it is, 1 samples it; other
            values scale its drift and its noise alike.

    Every number may be a tensor `[C]`, one value a chain; `anchor` and `mask` may have batch size
    `[C]`; `lr`, `nbeta` and `temperature` may be schedules.

    Returns:
        A sampler of batch size `[]`, or `[C]` if any setting is per chain.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
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
            "noise_level": checks.hyperparameter("noise_level", noise_level),
            "preconditioner": preconditioner,
        }
    )
    return SGLD(**fields, batch_size=chains, lock=False)


def rmsprop_sgld(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    temperature: float | Tensor | Schedule = 1.0,
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 0.1,
    curvature: Literal["exact", "hutchinson"] | None = None,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    noise_level: float | Tensor = 1.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> SGLD:
    """Make a sampler of SGLD preconditioned by RMSprop (pSGLD; Li et al. 2016).

        V' = α V + (1 − α) g²,    G = 1/(√V' + eps)

    in the update of `sgld`. Unless `curvature` is given, the term Γ = ∂G/∂w is left out, which
    biases the stationary law where G varies over the posterior.

    Args:
        lr: As for `sgld`.
        nbeta: As for `sgld`.
        temperature: As for `sgld`.
        alpha: α in [0, 1), memory of the running average of g².
        eps: eps > 0, in units of the gradient.
        curvature: `"exact"` or `"hutchinson"`, how to find h for Γ; None for no Γ. As for
            `rmsprop`.
        localization: As for `sgld`.
        weight_decay: As for `sgld`.
        noise_level: As for `sgld`.
        anchor: As for `sgld`.
        bounding_box_size: As for `sgld`.
        mask: As for `sgld`.

    Raises:
        TypeError, ValueError: As for `sgld` and `rmsprop`.
    """
    return sgld(
        lr,
        nbeta=nbeta,
        temperature=temperature,
        localization=localization,
        weight_decay=weight_decay,
        noise_level=noise_level,
        preconditioner=rmsprop(alpha, eps, curvature=curvature),
        anchor=anchor,
        bounding_box_size=bounding_box_size,
        mask=mask,
    )
