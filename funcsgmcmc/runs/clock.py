"""The clock of a run: how far it is, and which of its steps make draws.

A step's index is counted from a chain's first one, also in a run that goes on from another.
"""

import bisect
from dataclasses import dataclass, field

import torch
from torch import Tensor

from funcsgmcmc.schedules import Schedule, over_steps

_LONGEST_EXPLORATION = 1 << 20  # steps


@dataclass
class Clock:
    """The steps of a run, T in all, of which D make draws.

    Attributes:
        draw_steps: The step of each draw, `[D]`; the last one ends the run.
        first_step: The run's first step.
        num_burnin_steps: Steps before those that draws are made of: at most, while burn-in is open.
        is_open: Whether burn-in may end earlier: `end_burnin` says so.
        burnin_settled: Whether burn-in ended because no drift was seen; None where its length was
            given, or while it is open.
        next_step: The step that not all chains have made yet.
        num_steps: T.
    """

    draw_steps: Tensor
    first_step: int = 0
    num_burnin_steps: int = 0
    is_open: bool = False
    burnin_settled: bool | None = None
    next_step: int = field(init=False)
    num_steps: int = field(init=False)
    _draws: list[int] = field(init=False, repr=False)
    _draw_at: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.next_step = self.first_step
        self._number_draws()

    def _number_draws(self) -> None:
        self.num_steps = int(self.draw_steps[-1]) + 1 - self.first_step
        # Asked at every step, which is too often for reading a tensor.
        self._draws = self.draw_steps.tolist()
        self._draw_at = {step: draw for draw, step in enumerate(self._draws)}

    @property
    def steps_done(self) -> int:
        """Steps of this run that all chains have made."""
        return self.next_step - self.first_step

    @property
    def draws_done(self) -> int:
        """Draws that all chains have made."""
        return int((self.draw_steps < self.next_step).sum())

    def due_draw(self) -> int | None:
        """Index of the draw that the next step makes; None if it makes none."""
        return self._draw_at.get(self.next_step)

    def end_burnin(self, num_steps: int, settled: bool) -> None:
        """Let burn-in have so many steps, no more than were allowed: draws begin after them."""
        self.draw_steps = self.draw_steps - (self.num_burnin_steps - num_steps)
        self.num_burnin_steps, self.is_open, self.burnin_settled = num_steps, False, settled
        self._number_draws()

    def steps_until_draw(self) -> int:
        """Steps before the next one that makes a draw, after the next step: 1 or more.

        So many may be made at once, since a draw is where its step begins.
        """
        later = bisect.bisect_right(self._draws, self.next_step)
        last = self.first_step + self.num_steps
        return (self._draws[later] if later < len(self._draws) else last) - self.next_step

    def tick(self, number: int = 1) -> None:
        """Count steps that all chains have made."""
        self.next_step += number


def steps_of_draws(
    temperature: Tensor | Schedule,
    num_draws: int,
    num_burnin_steps: int,
    num_steps_between_draws: int,
    first_step: int,
) -> Tensor:
    """Choose the steps that make draws.

    Args:
        temperature: The sampler's. Where it is scheduled, a step counts only if a step at a
            temperature > 0 led to it.
        num_draws: D.
        num_burnin_steps: Steps before those that count.
        num_steps_between_draws: Of each so many steps that count, the last one makes a draw.
        first_step: The run's first step.

    Returns:
        `[D]`.

    Raises:
        ValueError: Chains sample at different steps, or the temperature stays at 0.
    """
    every = num_steps_between_draws
    first = first_step + num_burnin_steps
    if not isinstance(temperature, Schedule):
        return torch.arange(num_draws) * every + first + every - 1
    # A schedule may be any function of the step: look for steps that count, block by block.
    wanted, found = num_draws * every, torch.empty(0, dtype=torch.int64)
    last, block = first - 1, max(wanted, 1024)
    while len(found) < wanted:
        steps = torch.arange(first, first + block)
        # The parameters that step t evaluates were made by step t − 1.
        samples = over_steps(temperature.cpu(), (steps - 1).clamp(min=0)) > 0
        found = torch.cat([found, steps[_same_for_all_chains(samples.reshape(-1, block))]])
        last = int(found[-1]) if len(found) else last
        first, block = first + block, 2 * block
        if first - last > _LONGEST_EXPLORATION:
            raise ValueError(
                "the temperature's schedule must be > 0 at some steps, where draws are made, got 0 "
                f"at steps {last + 1} to {first - 1}"
            )
    return found[every - 1 : num_draws * every : every]


def _same_for_all_chains(samples: Tensor) -> Tensor:
    """The steps at which chains sample, `[T]`, of those at which each does, `[1, T]` or `[C, T]`.

    Raises:
        ValueError: They differ.
    """
    if not (samples == samples[:1]).all():
        raise ValueError(
            "chains must sample and explore at the same steps, got temperature schedules that are "
            "0 at different ones"
        )
    return samples[0]
