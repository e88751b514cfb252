"""The shared part of samplers with a momentum: state, refreshment, walls, the Euler step.

The Euler step (SGHMC, SGNHT) is

    p' = c p − scaled_grad − localization − weight_decay + noise,    c = 1 − ξ
    w' = w + p'

with ξ the friction, a setting or a thermostat. The other step, a splitting, stands in
`samplers/splitting.py`.

Every step keeps the share c of the momentum and draws the share q of its variance M T anew: the
noise is √(q M T) m η. M is ε in the variables of the Euler step and 1 in those of the splitting.
With `refresh_interval` R, every R-th step has c = 0 and q = 1: a fresh momentum from N(0, m² M T).

With a box, entries that leave it are clamped and their momentum changes sign.
"""

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, State, clamp_to_box
from funcsgmcmc.terms import Factors, Slope, Term, Terms, diagonal_factors, scaled, step_terms
from funcsgmcmc.tree import AnyTree, Scalar, Tree


class MomentumState(State, frozen=True):
    """State of a chain with a momentum.

    Attributes:
        momentum: p, leaves `[*chains, *shape]`, in float32 or better.
    """

    momentum: TensorDict


class ThermostatState(MomentumState, frozen=True):
    """State of a chain with a momentum and a thermostat.

    Attributes:
        thermostat: ξ, `[*chains]`.
    """

    thermostat: Tensor


class MomentumSampler(Sampler, frozen=True):
    """Settings of a sampler with a momentum.

    Attributes:
        refresh_interval: R; None means never.
    """

    refresh_interval: Tensor | None

    @abstractmethod
    def momentum_variance(self) -> Tensor:
        """M T, the variance of a momentum at temperature T, `[*chains]` or `[]`."""

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> MomentumState:
        """State at `params`, which are copied, with momenta √(M T) m η₀."""
        return MomentumState(**self.start_with_momentum(params, noise))

    def start_with_momentum(self, params: TensorDict, noise: TensorDict | None) -> dict[str, Any]:
        """Make the fields of a state with a momentum.

        Raises:
            ValueError: There is no noise for the momenta.
        """
        if noise is None:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs noise for its momenta: init(params, noise), got None")
        fields = self.start(params)
        # The step size may be a schedule: momenta start with its first value.
        variance = self.at(fields["step"]).momentum_variance()
        return {**fields, "momentum": fresh_momentum(noise, variance, self.mask)}

    def with_refresh(
        self, step: Tensor, remaining: Tensor, renewal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shares c and q of a step: 0 and 1 if it draws the momentum afresh, else as given."""
        if self.refresh_interval is None:
            return remaining, renewal
        # Steps count from 0; the R-th is R − 1. Chosen by `where`, so that chains may differ.
        refreshes = (step + 1) % self.refresh_interval == 0
        return torch.where(refreshes, 0.0, remaining), torch.where(refreshes, 1.0, renewal)

    def mask_factors(self) -> Factors:
        """The factors of a step without preconditioner: the mask."""
        return diagonal_factors(None, self.mask)

    def euler_terms(
        self,
        state: MomentumState,
        evaluation: Evaluation,
        noise: TensorDict,
        *,
        friction: Tensor,
        diffusion_factor: Tensor,
    ) -> Terms:
        """Terms of the Euler step, whose sum is p'.

        Args:
            state: State of batch size `[*chains]`.
            evaluation: The potential at its parameters.
            noise: η.
            friction: ξ, `[*chains]` or `[]`.
            diffusion_factor: A, likewise: q = 2A.
        """
        remaining, renewal = self.with_refresh(state.step, 1 - friction, 2 * diffusion_factor)
        shock = Term((renewal * self.momentum_variance()) ** 0.5, noise)
        slope = self.slope(state, evaluation)
        return euler_terms(
            slope, self.mask_factors(), shock, Term(remaining, state.momentum), drift=self.lr
        )

    def reflect_at_box(
        self, state: State, params: TensorDict, momentum: TensorDict
    ) -> tuple[TensorDict, TensorDict]:
        """Clamp entries that left the box, and turn their momentum round; nothing without a box."""
        if self.bounding_box_size is None:
            return params, momentum
        return reflect_at_box(params, momentum, self.center(state), self.bounding_box_size)


class ThermostatSampler(MomentumSampler, frozen=True):
    """Settings of a sampler with a momentum and a thermostat.

    Attributes:
        diffusion_factor: A, the noise put in and first value of the thermostat.
    """

    diffusion_factor: Tensor

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> ThermostatState:
        """State at `params`, which are copied, with momenta √(M T) m η₀ and thermostats A."""
        fields = self.start_with_momentum(params, noise)
        # Cloned: an expanded ξ would be the sampler's own memory.
        thermostat = self.diffusion_factor.expand(fields["step"].shape).clone()
        return ThermostatState(**fields, thermostat=thermostat)

    def mean_energy(self, momentum: TensorDict) -> Tensor:
        """‖p/m‖²/d over the d sampled entries, `[*chains]`; 0 where d is 0."""
        # A chain that is masked all over has no entries to divide by.
        num_sampled = tree.count(momentum, self.mask).clamp(min=1)
        return energy(momentum, self.mask) / num_sampled


def fresh_momentum(noise: AnyTree, variance: Scalar, mask: AnyTree | None) -> AnyTree:
    """A fresh momentum p = √variance m η."""
    momentum: AnyTree = Term(variance**0.5, scaled(noise, mask)).value()
    return momentum


def energy(momentum: Tree, mask: Tree | None) -> Tensor:
    """‖p/m‖² over the sampled entries, `[*chains]`.

    The mask scales an entry's noise, so that its momentum has the variance m² M T: divided by m,
    all entries have the temperature that a thermostat compares them with.
    """
    if mask is not None:
        momentum = scaled(momentum, tree.map_leaves(_inverse, mask))
    return tree.dot(momentum, momentum)


def _inverse(factor: Tensor) -> Tensor:
    """1/m; 0 where m is 0, where the momentum is 0 too."""
    return torch.where(factor == 0, 0.0, 1 / factor)


def euler_terms(
    slope: Slope,
    factors: Factors,
    shock: Term,
    momentum: Term,
    *,
    drift: Scalar,
    force_first: bool = False,
) -> Terms:
    """Terms of an Euler step: momentum' = c p − drift · m ∇U + shock.

    Args:
        slope: ∇U(w), term by term.
        factors: Preconditioner and mask.
        shock: √(2Aε) · η.
        momentum: c · p.
        drift: ε.
        force_first: Whether friction acts on the momentum after the force has, which multiplies the
            drift by c: p' = c (p − ε ∇U) + noise; the same up to an error of first order in ε.
    """
    if force_first:
        drift = drift * momentum.coefficient
    return step_terms(slope, factors, shock, drift=drift, momentum=momentum)


def reflect_at_box(
    params: AnyTree, momentum: AnyTree, center: AnyTree, half_width: Scalar
) -> tuple[AnyTree, AnyTree]:
    """Clamp entries that left the box, and turn their momentum round.

    Args:
        params: w.
        momentum: p.
        center: w₀.
        half_width: b.
    """

    def reflect(momentum: Tensor, leaf: Tensor, middle: Tensor) -> Tensor:
        # `leaf` is w before it is clamped: a clamped entry would not show that it left.
        inside = (leaf - middle).abs() < tree.expand_right(half_width, leaf)
        return torch.where(inside, momentum, -momentum)

    reflected = tree.map_leaves(reflect, momentum, params, center)
    return clamp_to_box(params, center, half_width), reflected


def check_interval(name: str, value: int | Tensor | None) -> Tensor | None:
    """Check a number of steps >= 1, shared or one a chain.

    Returns:
        int64, `[]` or `[C]`; None for None.

    Raises:
        TypeError: The value is no integer, nor a tensor of integers.
        ValueError: A value is less than 1, or the tensor has more than one dimension.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        checks.count(name, value, minimum=1)
    elif value.is_floating_point():
        raise TypeError(f"{name} must hold integers, got dtype {value.dtype}")
    # `hyperparameter` refuses bool and complex tensors, and values below 1.
    return checks.hyperparameter(name, value, minimum=1.0).to(torch.int64)
