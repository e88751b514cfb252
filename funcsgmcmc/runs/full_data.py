"""Looks at all data at some draws: loss, force and gradient noise, which minibatches hide."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict

from funcsgmcmc import tree
from funcsgmcmc.batches import Piece
from funcsgmcmc.gradients import Evaluation, GradientEstimator, estimator_of, mean_evaluation
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches, TensorData
from funcsgmcmc.runs.looks import Look
from funcsgmcmc.runs.request import Request
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import scaled, sum_terms

# Of the gradients of a run, at most this share is spent on all data.
_SHARE = 0.1
_MOST, _FEWEST, _ON_A_PART = 50, 8, 20
# Parameters of a chain from which looks must be asked for.
_LARGE_MODEL = 1 << 22


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
    request: Request, clock: Clock, batches: Batches, num_parameters: int
) -> FullData | None:
    """Choose the draws at which all data is evaluated, and the data if all of it is too much.

    Args:
        request: The settings of the run.
        clock: Its steps and draws.
        batches: Its data.
        num_parameters: Of one chain.

    Returns:
        None if no draw is looked at.

    Raises:
        ValueError: Looks were asked for, at data that cannot be passed over.
    """
    if request.full_loss is not None:
        return _as_asked(request.full_loss, request.num_draws, batches)
    # A pass over an iterable has its own cost, which only its owner knows; a look takes the memory
    # of some gradients.
    if not isinstance(batches, TensorData) or num_parameters >= _LARGE_MODEL:
        return None
    # A burn-in that is open may be short.
    num_steps = clock.num_steps - (clock.num_burnin_steps if clock.is_open else 0)
    spent = _SHARE * num_steps * batches.batch_size
    number = min(_MOST, request.num_draws, int(spent / batches.num_examples))
    if number >= _FEWEST:
        return _all(batches, request.num_draws // number)
    number = min(_ON_A_PART, request.num_draws)
    size = min(int(spent / number), batches.num_examples)
    # Less than a batch would have more noise than the batches have.
    if request.num_draws < _FEWEST or size < batches.batch_size:
        return None
    return FullData(request.num_draws // number, size, False, batches.part(size))


def as_before(settings: Mapping[str, Any] | None, batches: Batches) -> FullData | None:
    """The data of a run that is resumed, and may have more draws now.

    Args:
        settings: What `FullData.settings` gave; None if it looked at none.
        batches: The run's data.
    """
    if settings is None:
        return None
    if settings["is_all"]:
        return _all(batches, settings["every"])
    assert isinstance(batches, TensorData)  # only these are looked at in part
    return FullData(pieces=batches.part(settings["num_examples"]), **settings)


def _as_asked(number: int, num_draws: int, batches: Batches) -> FullData | None:
    """Looks at all data, as many as a user asks for.

    Raises:
        ValueError: The data cannot be passed over.
    """
    if number == 0:
        return None
    if batches.one_pass() is None:
        raise ValueError(
            f"full_loss={number} needs data that can be passed over: tensors, or an iterable with "
            "a length"
        )
    return _all(batches, num_draws // min(num_draws, number))


def _all(batches: Batches, every: int) -> FullData:
    """All data, at the last of every so many draws."""

    def pieces() -> Iterator[Piece]:
        found = batches.one_pass()
        assert found is not None  # checked when the draws were chosen
        return found

    return FullData(every, batches.num_examples, True, pieces)
