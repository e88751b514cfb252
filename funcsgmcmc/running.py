"""A run in progress: chunks of chains, their health, what their gradients are held against."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, random, tree
from funcsgmcmc.data import IterableData, TensorData
from funcsgmcmc.gradients import ControlVariates, Gradient, Reference, gradient, mean_gradient
from funcsgmcmc.kernel import Info, SamplerStep
from funcsgmcmc.progress import progress_bar
from funcsgmcmc.recording import Chunk, Recorder
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.samples import Samples

ChainMethod = Literal["vmap", "loop"]

_TIMED_STEPS = 4


class SamplingError(RuntimeError):
    """A run stopped before its end.

    Attributes:
        samples: What was recorded until then.
    """

    def __init__(self, message: str, samples: Samples) -> None:
        super().__init__(message)
        self.samples = samples


class DivergenceError(SamplingError):
    """A chain became non-finite, and `on_divergence="raise"` was asked for."""


@dataclass
class _ChunkState:
    """Chains that step together: one (`index` an int, no batch dimension), or a slice of them."""

    index: Chunk
    sampler: Sampler
    state: State
    key: Tensor
    frozen_at: Tensor
    reference: Reference | None = None


class References:
    """Where the chains' control variates are taken.

    Attributes:
        per_chain: Whether each chain has its own.
    """

    def __init__(
        self,
        estimator: ControlVariates,
        sampler: Sampler,
        batches: TensorData | IterableData,
    ) -> None:
        anchor = cast(TensorDict, sampler.anchor)
        self.per_chain = estimator.refresh_interval is not None or bool(anchor.batch_size)
        self._interval = estimator.refresh_interval
        self._batches = batches
        self._one: Callable[..., Gradient] = gradient(estimator.loss_fn)
        self._many = torch.vmap(self._one, in_dims=(0, None))
        if batches.one_pass() is None:
            raise ValueError(checks.cannot_pass())
        self._shared = None if self.per_chain else self._made(anchor)

    def at(self, step: int, chunk: _ChunkState) -> Reference:
        """The reference of some chains at a step: the last one, unless it is due to be made."""
        if self._shared is not None:
            return self._shared
        if self._interval is None and chunk.reference is None:
            chunk.reference = self._made(cast(TensorDict, chunk.sampler.anchor))
        elif self._interval is not None and step % self._interval == 0:
            chunk.reference = self._made(chunk.state.params)
        return cast(Reference, chunk.reference)

    def _made(self, params: TensorDict) -> Reference:
        pieces = cast(Iterable[Any], self._batches.one_pass())
        evaluate = self._many if params.batch_size else self._one
        return Reference(params, mean_gradient(evaluate, params, pieces).grads)


@dataclass
class Run:
    """A run in progress: its chains, and all that their next step depends on."""

    step: "FreezingStep"
    chain_method: ChainMethod
    sampler: Sampler
    key: Tensor
    chains: Tensor
    batches: TensorData | IterableData
    references: References | None
    initial_loss: Tensor | None
    num_burnin_steps: int
    num_steps_between_draws: int
    recorder: Recorder
    chunks: list[_ChunkState] = field(default_factory=list)

    def add_chunks(self, state: State, size: int | None) -> None:
        """Split the chains into chunks of a size, or into single chains without a batch axis."""
        num_chains = len(self.chains)
        indices: list[Chunk] = list(range(num_chains))
        if size is not None:
            indices = [slice(i, min(i + size, num_chains)) for i in range(0, num_chains, size)]
        keys = random.fold_in(self.key, self.chains)
        for index in indices:
            sampler = self.sampler[index] if self.sampler.shape else self.sampler
            frozen_at = torch.full_like(self.chains[index], -1)
            chunk = _ChunkState(index, sampler, state[index], keys[index], frozen_at)
            self.chunks.append(chunk)

    def go(self, *, progress: bool, stop_at_divergence: bool) -> Samples:
        """Make all steps; whatever ends them early, hand over what was recorded."""
        recorder = self.recorder
        with torch.no_grad(), progress_bar(recorder.num_steps, enabled=progress) as advance:
            try:
                while recorder.steps_done < recorder.num_steps:
                    self.make_step()
                    advance(self.status)
                    if stop_at_divergence and self.num_healthy < len(self.chains):
                        samples = self.samples()
                        raise DivergenceError("; ".join(map(str, samples.frozen)), samples)
            except KeyboardInterrupt:
                warnings.warn(
                    f"interrupted after {recorder.steps_done} of {recorder.num_steps} steps; "
                    "what they recorded is returned",
                    stacklevel=3,
                )
            except SamplingError:
                raise
            except Exception as error:
                message = f"sampling stopped in step {recorder.steps_done}: {error}"
                raise SamplingError(message, self.samples()) from error
        return self.samples()

    def make_step(self) -> None:
        """Make one step of every chunk, and record it."""
        for chunk in self.chunks:
            self.recorder.draw(chunk.index, chunk.state.params)
            chunk.state, info, chunk.frozen_at = self.step(
                chunk.sampler, chunk.state, self.batch(chunk), chunk.key, chunk.frozen_at
            )
            self.recorder.step(chunk.index, info)
        self.recorder.steps_done += 1

    def batch(self, chunk: _ChunkState) -> Any:
        """What a chunk's next step sees: its examples, and the reference of control variates."""
        batch = self.batches.batch(self.recorder.steps_done, chunk.index)
        if self.references is None:
            return batch
        return batch, self.references.at(self.recorder.steps_done, chunk)

    def seconds_per_chain(self) -> float:
        """Time a chain's next step takes, at best of a few; nothing is recorded or changed."""
        chunk, seconds = self.chunks[0], []
        # What a pass over the data draws from torch's generator is drawn again by the run.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            batch = self.batch(chunk)
            for _ in range(_TIMED_STEPS):
                start = time.perf_counter()
                _, info, _ = self.step(
                    chunk.sampler, chunk.state, batch, chunk.key, chunk.frozen_at
                )
                info.loss.tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
        chunk.reference = None
        return min(seconds) / chunk.frozen_at.numel()

    @property
    def num_healthy(self) -> int:
        """Number of chains that were not frozen."""
        return sum(int((chunk.frozen_at < 0).sum()) for chunk in self.chunks)

    def status(self) -> str:
        """What the progress bar shows."""
        healthy = f"{self.num_healthy}/{len(self.chains)} chains healthy"
        return f"loss {self.recorder.mean_loss:.4g}, {healthy}"

    def samples(self) -> Samples:
        """The record of the steps done."""
        frozen_at = _gather([chunk.frozen_at for chunk in self.chunks]).cpu()
        return Samples(
            losses=self.recorder.losses(),
            draws=self.recorder.draws(),
            observables=self.recorder.observables(),
            log_weights=self.log_weights(frozen_at),
            metrics=self.recorder.metrics(),
            state=_gather([chunk.state for chunk in self.chunks]),
            sampler=self.sampler,
            key=self.key,
            chains=self.chains.cpu(),
            initial_loss=self.initial_loss,
            # A run that stops within a step has not recorded what some chains did in it.
            frozen_at=frozen_at.where(frozen_at < self.recorder.steps_done, -1),
            draw_steps=self.recorder.draw_steps[: self.recorder.draws_done],
            num_burnin_steps=self.num_burnin_steps,
            num_steps_between_draws=self.num_steps_between_draws,
            chain_method=self.chain_method,
        )

    def log_weights(self, frozen_at: Tensor) -> Tensor | None:
        """Log weights of the draws, NaN from where a chain was frozen."""
        values = self.recorder.log_weights()
        if values is None:
            return None
        steps = self.recorder.draw_steps[: values.shape[1]]
        stopped = (frozen_at[:, None] >= 0) & (steps >= frozen_at[:, None])
        return values.masked_fill(stopped, torch.nan)


def fastest(runs: Sequence[Run]) -> Run:
    """The run whose next step takes the least time a chain.

    One that cannot make the step is left out, with a warning. If none can, it is the first: going
    on with it raises its error.
    """
    if len(runs) == 1:
        return runs[0]
    seconds: dict[int, float] = {}
    for index, run in enumerate(runs):
        try:
            seconds[index] = run.seconds_per_chain()
        except Exception as error:
            warnings.warn(f"chain_method {run.chain_method!r} fails: {error}", stacklevel=3)
    return runs[min(seconds, key=lambda index: seconds[index], default=0)]


FreezingStep = Callable[[Sampler, State, Any, Tensor, Tensor], tuple[State, Info, Tensor]]


def freezing(step: SamplerStep) -> FreezingStep:
    """Make a step that keeps a chain where it is once its loss or parameters are not finite.

    `frozen_at`, `[*chains]`, is the step at which a chain failed, or −1.
    """

    def freezing_step(
        sampler: Sampler, state: State, batch: Any, key: Tensor, frozen_at: Tensor
    ) -> tuple[State, Info, Tensor]:
        moved, info = step(sampler, state, batch, key)
        was_alive = frozen_at < 0
        finite = info.loss.isfinite() & tree.all_finite(moved, moved.shape)
        frozen_at = torch.where(was_alive & ~finite, state.step, frozen_at)
        info = info._replace(loss=torch.where(was_alive, info.loss, torch.nan))
        alive = frozen_at < 0
        # A compiled step chooses for free, and a CPU knows at once that there is nothing to choose.
        if not torch.compiler.is_compiling() and alive.device.type == "cpu" and alive.all():
            return moved, info, frozen_at
        return tree.where(alive, moved, state), info, frozen_at

    return freezing_step


def _gather(parts: list[Any]) -> Any:
    """Put the chunks' chains back together, `[C, …]`."""
    if not parts[0].shape:
        return torch.stack(parts)
    return torch.cat(parts) if len(parts) > 1 else parts[0]
