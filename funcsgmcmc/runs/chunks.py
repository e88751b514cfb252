"""Chunks: the chains of a run that step together.

A chunk is a slice of the run's chains, or one chain without a chain dimension, as a loop over
chains takes it; the same rows pick either out of a state, of keys and of what is recorded.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc.gradients import GradientEstimator
from funcsgmcmc.runs.data import Batches, pass_over
from funcsgmcmc.runs.moments import Moments
from funcsgmcmc.runs.start import Start
from funcsgmcmc.runs.store import Rows
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.stepping import StepKeys

Drawn = tuple[TensorDict, dict[str, Tensor]] | None
"""Parameters and observables of a draw, where a user's function is given them."""


@dataclass
class Chunk:
    """Chains that step together, `[*chains]` of them: c, or one without a chain dimension.

    Attributes:
        rows: Which of the run's chains they are.
        sampler: Their sampler, of batch size `[]` or `[*chains]`.
        state: Their state.
        keys: Their keys, `[*chains, 2]`.
        frozen_at: The step at which each failed, `[*chains]`; −1 for healthy chains.
        memory: The memory of the gradient's estimator; None before it is due.
        next_step: The next step that they make.
        moments: Moments of their draws, by the name under which they are recorded.
        drawn: The last draw's parameters and observables, kept for the user's callback.
        step_keys: The keys of their steps.
    """

    rows: Rows
    sampler: Sampler
    state: State
    keys: Tensor
    frozen_at: Tensor
    memory: Any
    next_step: int
    moments: dict[str, Moments] = field(default_factory=dict)
    drawn: Drawn = None
    step_keys: StepKeys = field(init=False)

    def __post_init__(self) -> None:
        self.step_keys = StepKeys(self.keys)

    def first(self, number: int) -> "Chunk":
        """A chunk of its first chains, which steps on its own; itself if it has no more."""
        if isinstance(self.rows, int) or self.rows.stop - self.rows.start <= number:
            return replace(self)
        few = slice(0, number)
        return replace(
            self,
            rows=slice(self.rows.start, self.rows.start + number),
            sampler=self.sampler[few] if self.sampler.shape else self.sampler,
            state=self.state[few],
            keys=self.keys[few],
            frozen_at=self.frozen_at[few],
        )

    def refresh_memory(self, step: int, estimator: GradientEstimator, batches: Batches) -> None:
        """Make the memory of an estimator that needs one, if it is due at a step."""
        interval = estimator.refresh_interval
        # Not made with the chunk: a run that is only timed need not pass over the data.
        if interval is None and self.memory is None:
            anchor = self.sampler.center(self.state)
            self.memory = estimator.prepare(anchor, pass_over(batches))
        # A run that goes on may begin between two refreshments.
        elif interval is not None and (step % interval == 0 or self.memory is None):
            self.memory = estimator.prepare(self.state.params, pass_over(batches))


def make_shared_memory(estimator: GradientEstimator, anchor: TensorDict, batches: Batches) -> Any:
    """Make the memory that all chains share: one that stays at an anchor that they share.

    Returns:
        None if the estimator needs none, or each chunk has its own.

    Raises:
        ValueError: The estimator needs passes over data that cannot be passed over.
    """
    if not estimator.needs_memory:
        return None
    pass_over(batches)  # refused now, and not in the first step
    if estimator.refresh_interval is not None or anchor.batch_size:
        return None
    return estimator.prepare(anchor, pass_over(batches))


def split(start: Start, shared_memory: Any, size: int | None) -> list[Chunk]:
    """Split a run's chains into chunks.

    Args:
        start: All of them.
        shared_memory: The memory that all chains share, if they do.
        size: Chains a chunk; None for single chains without a chain dimension.
    """
    sampler, keys = start.sampler, start.keys.noise
    num_chains = len(keys)
    all_rows: list[Rows] = list(range(num_chains))
    if size is not None:
        all_rows = [slice(i, min(i + size, num_chains)) for i in range(0, num_chains, size)]
    return [
        Chunk(
            rows,
            sampler[rows] if sampler.shape else sampler,  # shared settings stay shared
            start.state[rows],
            keys[rows],
            start.frozen_at[rows],
            shared_memory,
            start.first_step,
        )
        for rows in all_rows
    ]
