"""Looks at all data at some draws: loss, force and gradient noise, which minibatches hide."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict

from funcsgmcmc import tree
from funcsgmcmc.batches import Piece
from funcsgmcmc.gradients import Evaluation, GradientEstimator, estimator_of, mean_evaluation
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches, TensorData
from funcsgmcmc.runs.record import Look
from funcsgmcmc.runs.request import Request
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import scaled, sum_terms

# Of the gradients of a run, at most this share is spent on all data.
_SHARE = 0.1
_MOST, _FEWEST, _ON_A_PART = 50, 8, 20


@dataclass(frozen=True, eq=False)
class FullData:
    """The data that looks evaluate, and the draws at which they do.

    Attributes:
        every: Of so many draws, the last one is looked at.
        num_examples: Examples that are evaluated; those of the data, or fewer.
        is_all: Whether these are all data.
        pieces: Makes a pass over them.
    """

    every: int
    num_examples: int | None
    is_all: bool
    pieces: Callable[[], Iterator[Piece]]

    def settings(self) -> dict[str, Any]:
        """What its record needs, plain values: the arguments of `Looks.of` after the first."""
        number = self.num_examples
        return {"every": self.every, "num_examples": number, "is_all": self.is_all}

    def is_due(self, draw: int | None) -> bool:
        """Whether a draw is looked at."""
        return draw is not None and (draw + 1) % self.every == 0

    def evaluate(
        self, estimator: GradientEstimator, params: TensorDict, memory: Any, memory_dim: int | None
    ) -> Evaluation:
        """Loss and gradient on all of this data, of one chain or of many.

        On a part of the data the gradient is estimated as the steps do it, on a larger batch: then
        its noise is theirs, and smaller by the ratio of the sizes.

        Args:
            estimator: The run's.
            params: w.
            memory: The estimator's.
            memory_dim: As for `mean_evaluation`.
        """
        if self.is_all:
            return mean_evaluation(estimator_of(estimator.loss_fn), params, self.pieces())
        return mean_evaluation(estimator, params, self.pieces(), memory, memory_dim)

    def look(
        self, full: Evaluation, sampler: Sampler, state: State, estimate: Evaluation | None
    ) -> Look:
        """What all of this data says of the chains.

        Args:
            full: The loss and its gradient on it.
            sampler: The chains'.
            state: Of batch size `[*chains]`.
            estimate: The potential as the step estimates it; None if that is on all data.
        """
        rules = sampler.at(state.step)
        pull = None if estimate is None else estimate.prior_pull
        slope = rules.slope(state, Evaluation(full.grads, prior_pull=pull))
        assert slope.distance is not None  # a sampler always knows it
        virial = rules.nbeta * tree.dot(slope.distance.direction, full.grads)
        terms = (slope.grad, slope.localization, slope.weight_decay)
        force = sum_terms([term for term in terms if term is not None])
        assert full.loss is not None  # an estimator evaluates the loss
        assert force is not None  # the gradient is one of its terms
        loss = tree.widened(full.loss)
        noise = loss.new_zeros(loss.shape)
        if estimate is not None:
            away = tree.map_leaves(lambda a, b: tree.widened(a) - b, estimate.grads, full.grads)
            noise = rules.nbeta**2 * tree.dot(scaled(away, sampler.mask), away)
        pulled = rules.nbeta * tree.dot(scaled(force.value(), sampler.mask), full.grads)
        return Look(loss, virial, pulled, noise)


def full_data_of(
    request: Request, clock: Clock, batches: Batches, every: int | None
) -> FullData | None:
    """Choose the draws at which all data is evaluated, and the data if all of it is too much.

    Args:
        request: The settings of the run.
        clock: Its steps and draws.
        batches: Its data.
        every: What was chosen before, for a run that is resumed: of its draws so far.

    Returns:
        None if no draw is looked at.

    Raises:
        ValueError: Looks were asked for, at data that cannot be passed over.
    """
    num_draws = request.num_draws
    if request.full_loss == 0 or every == 0:
        return None
    if isinstance(batches, TensorData):
        spent = _SHARE * clock.num_steps * batches.batch_size
        number = min(_MOST, num_draws, int(spent / batches.num_examples))
    else:
        number = 0  # a pass over an iterable has its own cost, which only its owner knows
    if request.full_loss is not None:
        number = min(num_draws, request.full_loss)
        if batches.one_pass() is None:
            raise ValueError(
                f"full_loss={request.full_loss} needs data that can be passed over: tensors, or an "
                "iterable with a length"
            )
    elif number < _FEWEST:
        return _part_of(batches, num_draws, clock, every)
    every = every or num_draws // number
    return FullData(every, batches.num_examples, True, lambda: _pass(batches))


def _part_of(batches: Batches, num_draws: int, clock: Clock, every: int | None) -> FullData | None:
    """A fixed part of the data, where passes over all of it would cost too much."""
    if not isinstance(batches, TensorData) or num_draws < _FEWEST:
        return None
    number = min(_ON_A_PART, num_draws)
    size = int(_SHARE * clock.num_steps * batches.batch_size / number)
    if size < batches.batch_size:
        return None
    part = batches.part(min(size, batches.num_examples))
    return FullData(every or num_draws // number, size, False, part)


def _pass(batches: Batches) -> Iterator[Piece]:
    pieces = batches.one_pass()
    assert pieces is not None  # checked when the draws were chosen
    return pieces
