"""Schedules: settings that change with the step.

A schedule stands where `lr`, `nbeta` or `temperature` of a sampler does. It is data, a
`TensorClass`, and a pure function of the step's index t = 0, 1, …: a compiled step reads it without
compiling again, and stacked samplers may each have their own.

Shapes: settings `[]`, or `[C]`, one for each chain; t and the value `[*chains]`.
"""

import math
from abc import abstractmethod

import torch
from tensordict import TensorClass
from torch import Tensor

from funcsgmcmc import checks


class Schedule(TensorClass, frozen=True):
    """The contract of a schedule: a `TensorClass` that is called with the step's index."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """The setting's value at a step, `[*chains]`, for the index t of that shape."""


class Constant(Schedule, frozen=True):
    """See `constant`."""

    value: Tensor

    def __call__(self, step: Tensor) -> Tensor:
        """Value at step t."""
        return self.value.expand(torch.broadcast_shapes(self.value.shape, step.shape))


class PolynomialDecay(Schedule, frozen=True):
    """See `polynomial_decay`."""

    scale: Tensor
    offset: Tensor
    power: Tensor

    def __call__(self, step: Tensor) -> Tensor:
        """Value at step t."""
        # A positive offset keeps step 0 finite.
        return self.scale * (self.offset + step) ** -self.power


class Cosine(Schedule, frozen=True):
    """See `cosine`."""

    start: Tensor
    end: Tensor
    num_steps: Tensor

    def __call__(self, step: Tensor) -> Tensor:
        """Value at step t."""
        # Beyond the last step the cosine would go back.
        done = (step / self.num_steps).clamp(max=1)
        return self.end + (self.start - self.end) * _half_cosine(done)


class Cyclical(Schedule, frozen=True):
    """See `cyclical`."""

    peak: Tensor
    num_steps_per_cycle: Tensor

    def __call__(self, step: Tensor) -> Tensor:
        """Value at step t."""
        return self.peak * _half_cosine(_share_of_cycle(step, self.num_steps_per_cycle))


class SamplingPhases(Schedule, frozen=True):
    """See `sampling_phases`."""

    value: Tensor
    num_steps_per_cycle: Tensor
    exploration: Tensor

    def __call__(self, step: Tensor) -> Tensor:
        """Value at step t."""
        explores = _share_of_cycle(step, self.num_steps_per_cycle) < self.exploration
        return torch.where(explores, 0.0, self.value)


def _half_cosine(share: Tensor) -> Tensor:
    """Half a cosine, which falls from 1 to 0 as `share` goes from 0 to 1."""
    return (1 + torch.cos(math.pi * share)) / 2


def _share_of_cycle(step: Tensor, num_steps_per_cycle: Tensor) -> Tensor:
    """The share of its cycle that has passed at a step, in [0, 1)."""
    # In float64: a cycle need not be a whole number of steps.
    return (step % num_steps_per_cycle) / num_steps_per_cycle


def setting(
    name: str, value: float | Tensor | Schedule, *, below: float = math.inf
) -> Tensor | Schedule:
    """Take a setting that may be scheduled.

    Raises:
        TypeError, ValueError: As `checks.hyperparameter`; a schedule's first value is checked.
    """
    if isinstance(value, Schedule):
        # Later values are the schedule's own affair: the first shows a wrong scale.
        first = over_steps(value, torch.zeros(1, dtype=torch.int64))
        checks.hyperparameter(f"{name} at step 0", first.reshape(-1), below=below)
        return value
    return checks.hyperparameter(name, value, below=below)


def over_steps(value: Tensor | Schedule, steps: Tensor) -> Tensor:
    """A setting at many steps.

    Args:
        value: `[]` or `[C]`, scheduled or not.
        steps: Indices, `[T]`.

    Returns:
        `[T]` or `[C, T]`.
    """
    if not isinstance(value, Schedule):
        return value.unsqueeze(-1).expand(*value.shape, len(steps))
    # A schedule of C chains takes an index for each chain, here the same ones.
    return torch.vmap(lambda schedule: schedule(steps))(value) if value.shape else value(steps)


def constant(value: float | Tensor) -> Constant:
    """Make the schedule of a setting that does not change.

    Args:
        value: The setting, ≥ 0. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: It is not a number in its range.
    """
    fields, chains = checks.per_chain({"value": checks.hyperparameter("value", value)})
    return Constant(**fields, batch_size=chains, lock=False)


def polynomial_decay(
    scale: float | Tensor, *, offset: float | Tensor = 1.0, power: float | Tensor = 0.55
) -> PolynomialDecay:
    """Make a schedule that decays as a power of the step.

        ε_t = a (b + t)^(−κ)

    a ↔ `scale`, b ↔ `offset`, κ ↔ `power`. With κ in (1/2, 1] the sum of ε_t diverges and that of
    ε_t² does not, so that SGLD forgets its start and its bias goes to zero; draws then count by
    their step size: E f ≈ Σ ε_t f(w_t)/Σ ε_t (eq. 11).

    Source: Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML
    2011, section 2 and eq. 11, with their γ = κ.

    Args:
        scale: a ≥ 0, in units of the setting. `[]` or `[C]`.
        offset: b > 0, in steps. `[]` or `[C]`.
        power: κ ≥ 0. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "scale": checks.hyperparameter("scale", scale),
            "offset": checks.hyperparameter("offset", offset, exclusive=True),
            "power": checks.hyperparameter("power", power),
        }
    )
    return PolynomialDecay(**fields, batch_size=chains, lock=False)


def cosine(
    start: float | Tensor, end: float | Tensor = 0.0, *, num_steps: float | Tensor
) -> Cosine:
    """Make a schedule that goes from one value to another along half a cosine, and stays there.

        ε_t = ε_end + (ε_start − ε_end) (1 + cos(π min(t/K, 1)))/2

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR
    2017, eq. 5, without restarts.

    Args:
        start: ε_start ≥ 0. `[]` or `[C]`.
        end: ε_end ≥ 0. `[]` or `[C]`.
        num_steps: K > 0, the steps it takes. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "start": checks.hyperparameter("start", start),
            "end": checks.hyperparameter("end", end),
            "num_steps": checks.hyperparameter("num_steps", num_steps, exclusive=True),
        }
    )
    return Cosine(**fields, batch_size=chains, lock=False)


def cyclical(peak: float | Tensor, *, num_steps_per_cycle: float | Tensor) -> Cyclical:
    """Make a step size that starts each cycle large, to leave a mode, and falls to zero.

        ε_t = ε₀ (1 + cos(π (t mod K)/K))/2

    Source: Zhang, Li, Zhang, Chen and Wilson, "Cyclical stochastic gradient MCMC for Bayesian deep
    learning", ICLR 2020, eq. 1; their k is t + 1, their ⌈K/M⌉ is K here.

    Args:
        peak: ε₀ ≥ 0, the first step size of each cycle. `[]` or `[C]`.
        num_steps_per_cycle: K ≥ 1. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "peak": checks.hyperparameter("peak", peak),
            "num_steps_per_cycle": checks.hyperparameter(
                "num_steps_per_cycle", num_steps_per_cycle, minimum=1.0
            ),
        }
    )
    return Cyclical(**fields, batch_size=chains, lock=False)


def sampling_phases(
    temperature: float | Tensor = 1.0,
    *,
    num_steps_per_cycle: float | Tensor,
    exploration: float | Tensor = 0.25,
) -> SamplingPhases:
    """Make a temperature that is zero while a cycle explores, and T while it samples.

        T_t = 0 if (t mod K)/K < β, else T

    At temperature 0 a sampler is an optimizer, which moves to a mode (`sglrw` stands still), and
    `sample` makes no draws.

    Source: Zhang et al. 2020 (see `cyclical`), algorithm 1, with their β.

    Args:
        temperature: T ≥ 0. `[]` or `[C]`.
        num_steps_per_cycle: K ≥ 1, that of the step size. `[]` or `[C]`.
        exploration: β in [0, 1), the share of a cycle that explores. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "value": checks.hyperparameter("temperature", temperature),
            "num_steps_per_cycle": checks.hyperparameter(
                "num_steps_per_cycle", num_steps_per_cycle, minimum=1.0
            ),
            "exploration": checks.hyperparameter("exploration", exploration, below=1.0),
        }
    )
    return SamplingPhases(**fields, batch_size=chains, lock=False)
