"""What samplers with a momentum share: their state, its refreshment, walls, the Euler step.

The Euler step (SGHMC, SGNHT) is

    p' = (1 − ξ) p − scaled_grad − localization − weight_decay + noise
    w' = w + p'

with ξ the friction; the samplers differ in where it comes from. The other step, a splitting, stands
in `samplers/splitting.py`.

With a box, entries that leave it are clamped and their momentum changes sign. Every R-th step, if
that is asked for, the momentum is drawn afresh from N(0, m² M T), M = ε in the variables of the
Euler step and 1 in those of the splitting: friction and its noise give way to one that forgets all.
"""

from abc import abstractmethod
from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers.base import Evaluation, Sampler, State, boxed
from funcsgmcmc.terms import Parts, Term, Terms, decompose, move, scaled
from funcsgmcmc.tree import AnyTree, Scalar


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
        if noise is None:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs noise for its momenta: init(params, noise), got None")
        start = self.start(params)
        variance = self.at(start.step).momentum_variance()
        return MomentumState(
            params=start.params,
            step=start.step,
            anchor=start.anchor,
            momentum=first_momentum(noise, variance, self.mask),
            batch_size=start.shape,
            lock=False,
        )

    def refreshes(self, step: Tensor) -> Tensor | None:
        """Whether a step draws the momentum afresh, bool `[*chains]`; None if none does."""
        interval = self.refresh_interval
        return None if interval is None else (step + 1) % interval == 0

    def walls(self, state: State) -> tuple[TensorDict, Tensor] | None:
        """w₀ and b of the box, if there is one."""
        half_width = self.bounding_box_size
        return None if half_width is None else (self.center(state), half_width)

    def arrived(self, state: State, params: TensorDict, momentum: TensorDict) -> MomentumState:
        """The next state."""
        return MomentumState(
            params=params,
            step=state.step + 1,
            anchor=state.anchor,
            momentum=momentum,
            batch_size=state.shape,
            lock=False,
        )

    def pushed(
        self,
        state: MomentumState,
        evaluation: Evaluation,
        noise: TensorDict,
        *,
        friction: Tensor,
        diffusion_factor: Tensor,
    ) -> tuple[TensorDict, TensorDict, Terms]:
        """Make the Euler step.

        Args:
            state: State of batch size `[*chains]`.
            evaluation: The potential at its parameters.
            noise: η.
            friction: ξ, `[*chains]` or `[]`.
            diffusion_factor: A, likewise.

        Returns:
            w', p' and the terms of the update.
        """
        parts = self.parts(state, evaluation, noise)
        refreshed = self.refreshes(state.step)
        if refreshed is not None:
            # With friction 1 and A = ½ the noise is √(εT) m η: a momentum of its own.
            friction = torch.where(refreshed, 1.0, friction)
            diffusion_factor = torch.where(refreshed, 0.5, diffusion_factor)
        slowed = Term(friction, state.momentum)
        terms = underdamped(parts, slowed, cast(Tensor, self.lr), diffusion_factor)
        params, momentum = push(state.params, slowed, terms, self.walls(state))
        return params, momentum, terms


class ThermostatSampler(MomentumSampler, frozen=True):
    """Settings of a sampler with a momentum and a thermostat.

    Attributes:
        diffusion_factor: A, the noise put in and first value of the thermostat.
    """

    diffusion_factor: Tensor

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> ThermostatState:
        """State at `params`, which are copied, with momenta √(M T) m η₀ and thermostats A."""
        start = super().init(params, noise)
        return self.regulated(start, self.diffusion_factor.expand(start.shape).clone())

    def regulated(self, arrived: MomentumState, thermostat: Tensor) -> ThermostatState:
        """The state that a chain has arrived at, with its thermostat."""
        return ThermostatState(
            params=arrived.params,
            step=arrived.step,
            anchor=arrived.anchor,
            momentum=arrived.momentum,
            thermostat=thermostat,
            batch_size=arrived.shape,
            lock=False,
        )


def first_momentum(noise: AnyTree, variance: Scalar, mask: AnyTree | None) -> AnyTree:
    """p₀ = √variance m η₀."""
    root = variance**0.5
    return tree.map_leaves(lambda leaf: tree.expand_right(root, leaf) * leaf, scaled(noise, mask))


def underdamped(
    parts: Parts, friction: Term, lr: Scalar, diffusion_factor: Scalar, *, split: bool = False
) -> Terms:
    """Terms of an Euler step: drift ε, noise √(2Aε), friction ξ · p on the momentum.

    Args:
        parts: What the update is made of.
        friction: ξ · p.
        lr: ε.
        diffusion_factor: A.
        split: Whether friction acts on the momentum after the force has, which multiplies the
            drift by 1 − ξ: p' = (1 − ξ) (p − ε ∇U) + noise. It is the same to first order in ε.
    """
    remaining = 1 - friction.coefficient
    momentum = Term(remaining, friction.direction)
    drift = lr * remaining if split else lr
    diffusion = (2 * diffusion_factor * lr) ** 0.5
    return decompose(parts, drift=drift, diffusion=diffusion, momentum=momentum)


def push(
    params: AnyTree, friction: Term, terms: Terms, box: tuple[AnyTree, Scalar] | None
) -> tuple[AnyTree, AnyTree]:
    """Change the momentum by the terms, then the parameters by the momentum.

    Args:
        params: w.
        friction: ξ · p.
        terms: The step's.
        box: w₀ and b; None for no box.

    Returns:
        w' and p'.
    """
    start = cast(AnyTree, friction.direction)
    momentum = move(start, (friction, *terms.down()), terms.up())
    return bounced(move(params, (), (Term(1.0, momentum),)), momentum, box)


def bounced(
    params: AnyTree, momentum: AnyTree, box: tuple[AnyTree, Scalar] | None
) -> tuple[AnyTree, AnyTree]:
    """Clamp what left the box, and turn its momentum round; without a box, change nothing."""
    if box is None:
        return params, momentum
    center, half_width = box

    def reflect(momentum: Tensor, leaf: Tensor, middle: Tensor) -> Tensor:
        inside = (leaf - middle).abs() < tree.expand_right(half_width, leaf)
        return torch.where(inside, momentum, -momentum)

    reflected = tree.map_leaves(reflect, momentum, params, center)
    return boxed(params, center, half_width), reflected
