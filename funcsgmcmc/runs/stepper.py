"""How the chunks of a run are stepped: one step after the other, or in compiled blocks of steps."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcsgmcmc.batches import take_examples
from funcsgmcmc.blocks import LOOPS, Blocks
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.runs.chunks import Chunk
from funcsgmcmc.runs.data import Batches, TensorData
from funcsgmcmc.runs.request import Request
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.stepping import (
    Info,
    StepNoise,
    chain_evaluation,
    chain_step,
    chains_evaluation,
    chains_step,
    compiled,
    freezing,
    step_noise,
)

# From this number on a block's share of a call's cost is small; a frozen chain, an interruption or
# a checkpoint waits for so many steps.
_STEPS_PER_BLOCK = 16

Compile = bool | Literal["noise"]


class Moved(NamedTuple):
    """Where steps have led the chains of a chunk.

    Attributes:
        state: Theirs.
        info: The report of the step, leaves `[*chains, …]`; of a block, `[K, *chains, …]`.
        frozen_at: As of a chunk.
        is_block: Whether they are a block of steps.
    """

    state: State
    info: Info
    frozen_at: Tensor
    is_block: bool = False

    @property
    def log_weight(self) -> Tensor | None:
        """That of the first step, `[*chains]`, if it has one."""
        weight = self.info.log_weight
        return weight if weight is None or not self.is_block else weight[0]


class Stepper:
    """Steps the chunks of a run.

    What cannot be a block goes step by step: batches of an iterable, aux that is recorded, and runs
    that stop where a chain diverges.

    Args:
        request: The settings of the run.
        batches: Its data.
        is_looped: Whether a chunk is one chain, without a dimension for chains.
        memory_dim: Where the chains are in the memory of the gradient's estimator: 0, or None if
            they share it.
        period: P, where chains have the keys of those P before them; else None.
        compile: Whether steps are compiled, or their noise.

    Attributes:
        longest: Steps that are made at once, at most.
    """

    def __init__(
        self,
        request: Request,
        batches: Batches,
        *,
        is_looped: bool,
        memory_dim: int | None,
        period: int | None,
        compile: Compile,
    ) -> None:
        self._batches, self._estimator = batches, request.estimator
        self._is_looped, self.memory_dim = is_looped, memory_dim
        self._log_prior = request.log_prior
        settings: dict[str, Any] = {
            "log_prior": request.log_prior,
            "metrics": "metrics" in request.record,
        }
        draw = compiled(step_noise) if compile == "noise" else step_noise
        if is_looped:
            step = chain_step(self._estimator, noise=StepNoise(draw), **settings)
        else:
            settings |= {"batch_dim": batches.batch_dim, "memory_dim": memory_dim}
            step = chains_step(self._estimator, noise=StepNoise(draw, period), **settings)
        # Chains freeze inside the compiled step, so that no step waits for a look at their health.
        self._eager = freezing(step, max_loss=request.max_loss, max_distance=request.max_distance)
        self.is_compiled = compile is True
        self._step = compiled(self._eager) if self.is_compiled else self._eager
        self.longest = 1
        if self.is_compiled and _can_be_blocks(request, batches):
            self._blocks = Blocks(self._step_of_block, compiled)
            self.longest = _STEPS_PER_BLOCK

    def make(self, chunk: Chunk, first: int, number: int) -> Moved:
        """Make some steps of a chunk, at most `longest`; its state stays as it is.

        Args:
            chunk: Chains that have made all steps before `first`.
            first: Index of the first step.
            number: n.
        """
        if self.longest > 1:
            self.prepare(chunk, first)
            return self._make_block(chunk, first, number)
        # In this order: both may draw from torch's generator, where a loader shuffles.
        batch = self._batches.batch(first, chunk.rows)
        self.prepare(chunk, first)
        keys = chunk.step_keys.at(first)
        return Moved(
            *self._step(chunk.sampler, chunk.state, batch, chunk.memory, keys, chunk.frozen_at)
        )

    def evaluate(self, chunk: Chunk, step: int) -> Evaluation:
        """The potential of a chunk, as its step estimates it."""
        if self._is_looped:
            evaluate = chain_evaluation(self._estimator, log_prior=self._log_prior)
        else:
            evaluate = chains_evaluation(
                self._estimator,
                batch_dim=self._batches.batch_dim,
                memory_dim=self.memory_dim,
                log_prior=self._log_prior,
            )
        batch, keys = self._batches.batch(step, chunk.rows), chunk.step_keys.at(step)
        return evaluate(chunk.sampler, chunk.state, batch, chunk.memory, keys)

    def prepare(self, chunk: Chunk, step: int) -> None:
        """Make the memory of the gradient's estimator, if it is due at a step."""
        if self._estimator.needs_memory:
            chunk.refresh_memory(step, self._estimator, self._batches)

    def _make_block(self, chunk: Chunk, first: int, number: int) -> Moved:
        """The steps of a block, which compiles once for blocks of any length."""
        assert isinstance(self._batches, TensorData)
        every = (
            chunk.step_keys.of_steps(first, number),
            *self._batches.chosen(first, number, chunk.rows),
        )
        (state, frozen_at), info = self._blocks(
            (chunk.state, chunk.frozen_at),
            tuple(_padded(each, self.longest) for each in every),
            number,
            chunk.sampler,
            self._batches.examples,
            chunk.memory,
        )
        return Moved(state, info, frozen_at, is_block=True)

    def _step_of_block(
        self,
        carry: tuple[State, Tensor],
        inputs: tuple[Tensor, ...],
        sampler: Sampler,
        examples: Any,
        memory: Any,
    ) -> tuple[tuple[State, Tensor], Info]:
        """One step, as `block_of` takes it; its inputs are keys, and the chosen examples if any."""
        (state, frozen_at), (keys, *chosen) = carry, inputs
        batch = take_examples(examples, chosen[0]) if chosen else examples
        state, info, frozen_at = self._eager(sampler, state, batch, memory, keys, frozen_at)
        return (state, frozen_at), replace(info, aux=None)


def _can_be_blocks(request: Request, batches: Batches) -> bool:
    """Whether several steps of a run may be made at once."""
    has_long_gaps = request.num_steps_between_draws > 1 or request.num_burnin_steps != 0
    is_simple = request.on_divergence == "freeze" and "aux" not in request.record
    return LOOPS and has_long_gaps and is_simple and isinstance(batches, TensorData)


def _padded(values: Tensor, length: int) -> Tensor:
    """Values `[n, …]` with rows of zeros after them, `[length, …]`.

    In the layout of memory that all blocks have: with another one the block would compile again.
    """
    missing = length - len(values)
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]).contiguous()


def default_compilation(device: torch.device) -> Compile:
    """What is compiled where nobody asks for anything: the noise, on CUDA with Triton.

    On a GPU, in eager code, each operation of the generator is a launch of its own.
    """
    return "noise" if device.type == "cuda" and find_spec("triton") else False
