"""A run in progress, as a value: its request, its clock, its chunks of chains, its record.

Time is the outer loop and chunks of chains the inner one. So an iterable gives every chunk the same
batch, and a run can stop at any step with everything recorded until then.
"""

import contextlib
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.memory import chunk_size, free_memory, peak_bytes
from funcsgmcmc.runs.burnin import has_settled, is_due, seen
from funcsgmcmc.runs.chunks import Chunk, split
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.encoding import decode, encode, joined, picked, with_chain
from funcsgmcmc.runs.failures import DivergenceError, SamplingError, SamplingInterrupt
from funcsgmcmc.runs.full_data import FullData
from funcsgmcmc.runs.keeping import Keeper, interrupted_by_sigterm
from funcsgmcmc.runs.looks import Looks
from funcsgmcmc.runs.moments import with_draw
from funcsgmcmc.runs.need import Cost, Need, StepBytes, largest_chunk, need_of
from funcsgmcmc.runs.processes import InterruptedProcessError, ProcessError, Processes
from funcsgmcmc.runs.progress import Progress
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.reporting import Reporter
from funcsgmcmc.runs.request import ChainMethod, Request, RunKeys
from funcsgmcmc.runs.rounding import has_noise, is_narrow, warn_of_lost_steps
from funcsgmcmc.runs.rows import gather
from funcsgmcmc.runs.shares import whole_record
from funcsgmcmc.runs.start import Lent, Start
from funcsgmcmc.runs.store import Recorder, Rows
from funcsgmcmc.samplers.base import Sampler
from funcsgmcmc.stepping import (
    FreezingStep,
    chain_evaluation,
    chain_step,
    chains_evaluation,
    chains_step,
    compiled,
    freezing,
    step_noise,
)

_TIMED_STEPS, _LONG_STEP = 4, 5.0


@dataclass
class Run:
    """A run in progress: all that its next step depends on, and its record.

    Attributes:
        request: Its settings.
        chain_method: Whether chunks are vmapped, or chains are looped over.
        clock: Its clock, which several runs may share until one goes.
        batches: Its data.
        shared_memory: The memory of the gradient's estimator, if all chains share one.
        initial_loss: L(w₀) on all data, if known.
        observed: The observables of one chain, as they were tried.
        full_data: All data, and the draws at which it is evaluated, if it is.
        recorder: Its record.
        keeper: What keeps it on disk, if anything does.
        processes: Those that make it, each some of its chains.
        step: The function that steps a chunk.
        chunks: Its chains.
        sampler: The sampler, with its anchor.
        keys: The keys of its chains.
        lent: The tree of the user's that is the anchor, if the run has no copy of it.
        chunk_size: Chains that step at once.
        step_bytes: The memory of a step, if it was measured.
        has_warned: Whether it has warned of steps that are lost to rounding.
        is_with_others: Whether other processes stop at its step.
    """

    request: Request
    chain_method: ChainMethod
    clock: Clock
    start: InitVar[Start]
    batches: Batches
    shared_memory: Any
    initial_loss: Tensor | None
    observed: Mapping[str, Tensor]
    full_data: FullData | None
    recorder: Recorder
    keeper: Keeper | None
    processes: Processes
    step: FreezingStep = field(init=False)
    chunks: list[Chunk] = field(init=False)
    sampler: Sampler = field(init=False)
    keys: RunKeys = field(init=False)
    lent: Lent | None = field(init=False)
    chunk_size: int = field(init=False)
    step_bytes: StepBytes | None = field(init=False, default=None)
    has_warned: bool = False
    is_with_others: bool = True

    def __post_init__(self, start: Start) -> None:
        # The state before the first step is not kept: chunks hold it until they have moved.
        params = start.state.params
        self.sampler, self.keys, self.lent = start.sampler, start.keys, start.lent
        self.step = self._make_step(tree.device(params), self.request.compile)
        self.chunk_size = self._choose_chunk_size(params)
        size = self.chunk_size if self.chain_method == "vmap" else None
        self.chunks = split(start, self.shared_memory, size)
        if self.request.chunk_size == "auto" and not self.is_resumed:
            # All chains are one chunk: a few of them tell what a step takes.
            self.measure()
            assert self.step_bytes is not None
            free = free_memory(self.keys.key.device)
            self.chunk_size = largest_chunk(self.step_bytes, self.chunk_size, free)
            self.chunks = split(start, self.shared_memory, self.chunk_size if size else None)
        if self.keeper is not None and self.keeper.progress is not None:
            self._go_to(self.keeper.progress)

    def go(self, progress: Progress) -> Samples:
        """Make all steps; if anything ends them early, hand over the record until then.

        Raises:
            DivergenceError, SamplingError, SamplingInterrupt: As `sample`.
        """
        clock, keeper = self.clock, self.keeper
        reporter = Reporter(self, progress)
        stopping = contextlib.nullcontext() if keeper is None else interrupted_by_sigterm()
        # Outside of gradients, which each have a transform of their own, nothing needs a graph.
        with torch.no_grad(), stopping, self.processes.interrupts_held_back() as is_interrupted:
            if keeper is not None:
                keeper.begin(self)
            try:
                while clock.steps_done < clock.num_steps:
                    self.processes.check_step(is_interrupted())
                    # Before a step: a run that was interrupted after the last one looks now.
                    if clock.is_open:
                        self._end_burnin(progress)
                    self.make_step_and_look_at_rounding()
                    reporter.step_done()
                    if keeper is not None:
                        keeper.step_done(self)
                    # Reading health waits for the device: only if it is asked for.
                    if self.request.on_divergence == "raise":
                        self._check_health()
                self.processes.check_step(is_interrupted())
                self.processes.meet(None)
            except (KeyboardInterrupt, InterruptedProcessError) as error:
                # So that all chains have made the same steps, and can go on. Where that fails, or
                # Ctrl-C is pressed again, the record is handed over as it is.
                self.is_with_others = False
                with contextlib.suppress(KeyboardInterrupt, Exception):
                    self.finish_step()
                    self._catch_up()
                message = f"interrupted after {clock.steps_done} of {clock.num_steps} steps"
                raise SamplingInterrupt(message, self._end()) from error
            except SamplingError:  # a divergence has its record already
                raise
            except Exception as error:
                cause = self.processes.cause(error)
                reason = str(cause) or type(cause).__name__
                message = f"sampling stopped in step {clock.next_step}: {reason}"
                failure = SamplingError(message, self._end(error))
                for note in getattr(error, "__notes__", ()):
                    failure.add_note(note)
                raise failure from error
            return self._end()

    def _end_burnin(self, progress: Progress) -> None:
        """End a burn-in that lasts as long as drift is seen, if none is; or at its limit."""
        clock, settled = self.clock, False
        if is_due(clock.steps_done):
            healthy = gather([chunk.frozen_at for chunk in self.chunks]).cpu() < 0
            here = seen(self.recorder, clock.steps_done, healthy)
            looks = torch.cat(self.processes.one_a_share(self.processes.meet(here)), 2)
            settled = has_settled(looks, is_shared=self.batches.is_shared)
        if not settled and clock.steps_done < clock.num_burnin_steps:
            return
        if not settled:
            warnings.warn(
                f"burn-in ended at its limit of {clock.steps_done} steps, as many as the draws "
                "take, while loss or distance still drifted: make more draws, with a larger "
                "num_steps_between_draws, or give num_burnin_steps",
                stacklevel=5,
            )
        clock.end_burnin(clock.steps_done, settled)
        progress.shorten(clock.num_steps)
        progress.tell(f"burn-in ended after {clock.steps_done} steps")
        if self.keeper is not None:
            self.keeper.draws_begin(self)

    def _check_health(self) -> None:
        """Stop where a chain has failed.

        Raises:
            DivergenceError: One has.
        """
        if self.num_healthy < self.request.num_chains:
            self.is_with_others = False
            samples = self._end()
            raise DivergenceError("; ".join(map(str, samples.frozen)) or self._frozen(), samples)

    def _frozen(self) -> str:
        """The chains of this process that have failed, if the last checkpoint has none."""
        frozen_at = gather([chunk.frozen_at for chunk in self.chunks]).tolist()
        both = zip(self.keys.chains.tolist(), frozen_at, strict=True)
        return "; ".join(
            f"chain {chain} frozen at step {step}" for chain, step in both if step >= 0
        )

    def _catch_up(self) -> None:
        """Make the steps that other processes have made, when a run is interrupted.

        Raises:
            ProcessError: They do not answer.
        """
        last = self.processes.level(self.clock.next_step)
        while self.clock.next_step < last:
            self.make_step()
        self.is_with_others = True

    def _end(self, error: Exception | None = None) -> Samples:
        """The record; before, what is on disk is made complete.

        A process that cannot meet the others hands over the record of its own chains; on disk the
        run is then as it was at the last checkpoint.
        """
        if self.processes.size > 1 and (error is not None or not self.is_with_others):
            return self._own_samples()
        try:
            if self.keeper is None:
                return whole_record(self.processes, self.samples())
            self.keeper.end(self)
        except ProcessError as failure:
            raise SamplingError(str(failure), self._own_samples()) from failure
        except Exception as failure:
            # The disk may be what failed: the checkpoint before is still there.
            if error is None:
                raise
            error.add_note(f"The store could not be brought up to date either: {failure}")
        return self._own_samples()

    def _own_samples(self) -> Samples:
        """The record of this process's chains; of all as they are on disk, if they are."""
        return self.samples() if self.keeper is None else self.keeper.samples()

    def make_step(self) -> None:
        """Make one step of every chunk that has not made it yet, and record it."""
        request, step, draw = self.request, self.clock.next_step, self.clock.due_draw()
        for chunk in self.chunks:
            if chunk.next_step > step:
                continue
            batch = self._next_batch(chunk)
            keys = chunk.step_keys.at(step)
            state, info, frozen_at = self.step(
                chunk.sampler, chunk.state, batch, chunk.memory, keys, chunk.frozen_at
            )
            moments, drawn = chunk.moments, None
            if draw is not None:
                # A draw is where its step begins: it belongs to the loss that the step evaluates.
                params = chunk.state.params
                observed = self.recorder.write_draw(chunk.rows, draw, params)
                moments = with_draw(
                    moments, request.record, params, observed, frozen_at < 0, info.log_weight
                )
                if request.on_draw is not None:
                    drawn = (params, _with_chains(chunk.rows, observed))
                self._look_at_all_data(chunk, draw, batch)
            self.recorder.write_step(chunk.rows, self.clock.steps_done, draw, info)
            # At once and at last: a step that is interrupted before is made again, to the same end.
            chunk.state, chunk.frozen_at, chunk.moments, chunk.drawn, chunk.next_step = (
                state,
                frozen_at,
                moments,
                drawn,
                step + 1,
            )
        if self.lent is not None:
            self.lent.check()
        # Only a step of all chunks counts: one that fails half way leaves a record of equal length.
        self.clock.tick()

    def make_step_and_look_at_rounding(self) -> None:
        """Make one step; of the first and the last one, see whether narrow parameters took it."""
        chunk, clock = self.chunks[0], self.clock
        is_looked_at = clock.steps_done in (0, clock.num_steps - 1)
        before = chunk.state
        self.make_step()
        # Only noise moves every entry.
        if self.has_warned or not (is_looked_at and is_narrow(before.params)):
            return
        if has_noise(chunk.sampler, before.step):
            self.has_warned = warn_of_lost_steps(
                before.params, chunk.state.params, chunk.sampler.mask
            )

    def note_compilation(self, progress: Progress) -> None:
        """Say that the first step compiles, if it does."""
        if self.request.compile is True:
            progress.note("compiling the step: 15 to 25 s on a new machine, a few when cached")

    @property
    def is_resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.keeper is not None and self.keeper.progress is not None

    @property
    def is_level(self) -> bool:
        """Whether all chains have made the same steps."""
        return all(chunk.next_step == self.clock.next_step for chunk in self.chunks)

    def finish_step(self) -> None:
        """Make the step that was interrupted, if some chunks have made it."""
        if not self.is_level:
            self.make_step()

    def seconds_per_chain(self) -> float:
        """The time of the next step of a chain, at best of a few; nothing is changed."""
        return min(self._timed_steps()) / self.chunks[0].frozen_at.numel()

    def _timed_steps(self) -> list[float]:
        """Time the next step of a chunk a few times; nothing is recorded or changed."""
        chunk, seconds = self.chunks[0], []
        kept_memory = chunk.memory
        # What a pass over the data draws from torch's generator is drawn again by the run.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            batch, keys = self._next_batch(chunk), chunk.step_keys.at(self.clock.next_step)
            # The first step compiles, and warms caches: the best of a few is what a run sees.
            for _ in range(_TIMED_STEPS):
                start = time.perf_counter()
                _, info, _ = self.step(
                    chunk.sampler, chunk.state, batch, chunk.memory, keys, chunk.frozen_at
                )
                info.loss.tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
                if seconds[-1] > _LONG_STEP and self.request.compile is not True:
                    break  # it tells enough
        chunk.memory = kept_memory
        return seconds

    @property
    def num_healthy(self) -> int:
        """Number of chains that were not frozen."""
        return sum(int((chunk.frozen_at < 0).sum()) for chunk in self.chunks)

    def progress(self) -> dict[str, Any]:
        """All that changes, as plain values from which another process goes on."""
        # A run that stops within a step has chains that have made it.
        next_steps = [
            torch.full_like(chunk.frozen_at, chunk.next_step).reshape(-1) for chunk in self.chunks
        ]
        return {
            "num_steps": self.clock.steps_done,
            "next_steps": torch.cat(next_steps).cpu(),
            "state": encode("the state", gather([chunk.state for chunk in self.chunks])),
            "frozen_at": gather([chunk.frozen_at for chunk in self.chunks]).cpu(),
            "moments": encode("the moments of draws", self._moments()),
            "memory": encode("the memory of the gradient's estimator", self._memory()),
            "data": encode("the position in the data", self.batches.position(self.clock.next_step)),
        }

    def _go_to(self, progress: Mapping[str, Any]) -> None:
        """Go to where an earlier process was, whose states the chunks have already."""
        self.clock.next_step = self.clock.first_step + progress["num_steps"]
        device = self.chunks[0].keys.device
        moments = decode(progress["moments"], device)
        for chunk in self.chunks:
            chunk.next_step = int(progress["next_steps"][chunk.rows].reshape(-1)[0])
            chunk.moments = {name: each[chunk.rows] for name, each in moments.items()}
        memory = decode(progress["memory"], device)
        if memory is not None:
            for chunk in self.chunks:
                chunk.memory = picked(memory, chunk.rows)

    def _memory(self) -> Any:
        """The memory of the estimator of all chains; None if all share it, or it is not due yet."""
        memories = [chunk.memory for chunk in self.chunks]
        if self.shared_memory is not None or any(memory is None for memory in memories):
            return None
        if self.chain_method == "loop":
            memories = [with_chain(memory) for memory in memories]
        return joined(memories)

    def _moments(self) -> dict[str, Any]:
        """The moments of all chains' draws, by the name under which they are recorded."""
        # In the step of the first draw, not all chunks may have made theirs.
        return {
            name: gather(
                [
                    chunk.moments.get(name, known.of_no_draw(chunk.frozen_at.shape))
                    for chunk in self.chunks
                ]
            )
            for name, known in self.chunks[0].moments.items()
        }

    def samples(self) -> Samples:
        """The record of the steps done, in memory."""
        clock, recorder, sampler = self.clock, self.recorder, self.sampler
        if self.lent is not None:  # a record is its owner's alone
            assert sampler.anchor is not None
            sampler = sampler.replace(anchor=sampler.anchor.clone())
        draw_steps = clock.draw_steps[: clock.draws_done]
        moments = self._moments()
        frozen_at = gather([chunk.frozen_at for chunk in self.chunks]).cpu()
        # A run that stops within a step has not recorded what some chains did in it.
        frozen_at = frozen_at.where(frozen_at < clock.next_step, -1)
        return Samples(
            losses=recorder.losses(clock.steps_done),
            distances=recorder.distances(clock.steps_done),
            looks=None
            if self.full_data is None
            else Looks.of(recorder.looks(self.num_looks), **self.full_data.settings()),
            draws=recorder.draws(clock.draws_done),
            observables=recorder.observables(clock.draws_done),
            draw_moments=moments.get("draw_moments"),
            observable_moments=moments.get("observable_moments"),
            log_weights=recorder.log_weights(draw_steps, frozen_at),
            log_priors=recorder.log_priors(clock.steps_done),
            metrics=recorder.metrics(clock.steps_done),
            state=gather([chunk.state for chunk in self.chunks]),
            sampler=sampler,
            key=self.keys.key,
            chains=self.keys.chains.cpu(),
            initial_loss=self.initial_loss,
            frozen_at=frozen_at,
            first_step=clock.first_step,
            draw_steps=draw_steps,
            num_burnin_steps=min(clock.num_burnin_steps, clock.steps_done)
            if clock.is_open
            else clock.num_burnin_steps,
            num_steps_between_draws=self.request.num_steps_between_draws,
            chain_method=self.chain_method,
            options=self.options(),
        )

    def options(self) -> dict[str, Any]:
        """`Samples.options`."""
        data = {
            "batch_size": self.batches.batch_size,
            "num_examples": self.batches.num_examples,
            "shared_batches": self.batches.is_shared,
        }
        return self.request.options() | data | {"burnin_settled": self.clock.burnin_settled}

    def _next_batch(self, chunk: Chunk) -> Any:
        """The batch of a chunk's next step; before it, its memory is made where it is due."""
        # In this order: both may draw from torch's generator, where a loader shuffles.
        batch = self.batches.batch(self.clock.next_step, chunk.rows)
        if self.request.estimator.needs_memory:
            chunk.refresh_memory(self.clock.next_step, self.request.estimator, self.batches)
        return batch

    def _look_at_all_data(self, chunk: Chunk, draw: int, batch: Any) -> None:
        """Record what all data says of a chunk's draw, if it is one to be looked at."""
        full = self.full_data
        if full is None or not full.is_due(draw):
            return
        memory_dim = None if self.chain_method == "loop" else self._dims()[1]
        evaluation = full.evaluate(
            self.request.estimator, chunk.state.params, chunk.memory, memory_dim
        )
        estimate = None
        if not self.batches.is_all_data or self.request.log_prior is not None:
            estimate = self._evaluate(chunk, batch)
        look = full.look(evaluation, chunk.sampler, chunk.state, estimate)
        self.recorder.write_look(chunk.rows, (draw + 1) // full.every - 1, look)

    @property
    def num_looks(self) -> int:
        """Draws of all chains that all data was evaluated at."""
        return 0 if self.full_data is None else self.clock.draws_done // self.full_data.every

    def _choose_chunk_size(self, params: TensorDict) -> int:
        """How many chains step at once, as far as it is known before a step was tried."""
        if self.chain_method == "loop":
            return 1
        if self.keeper is not None and (size := self.keeper.chunk_size()) is not None:
            return size
        asked = self.request.chunk_size
        return chunk_size(params) if asked is None or asked == "auto" else asked

    def measure(self) -> None:
        """Measure the memory of a step, by steps of one and of two chains."""
        # Not compiled: two programs more would take a minute, to need less.
        step = self._make_step(self.keys.key.device, False)
        number = 1 if self.chain_method == "loop" else min(2, self.chunk_size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            peaks = []
            for chains in range(1, number + 1):
                few = self.chunks[0].first(chains)
                batch = self._next_batch(few)
                keys = few.step_keys.at(self.clock.next_step)
                arguments = (few.sampler, few.state, batch, few.memory, keys, few.frozen_at)
                peaks.append(peak_bytes(partial(step, *arguments)))
        per_chain = peaks[-1] - peaks[0] if len(peaks) > 1 else 0
        self.step_bytes = StepBytes(peaks[0] - per_chain, per_chain)

    def need(self) -> Need:
        """What the run needs, as far as it is known: `measure` tells of a step."""
        return need_of(
            self.request,
            [chunk.state for chunk in self.chunks],
            self.clock,
            self.observed,
            self.step_bytes,
            self.chunk_size,
            None if self.keeper is None else self.keeper.path,
            self.processes.num_shares,
        )

    def cost(self) -> Cost:
        """What the run costs, from a few steps that are timed; nothing is recorded or changed."""
        steps, looks, size = self.clock.num_steps, 0, self.batches.batch_size
        looked_at = None if self.full_data is None else self.full_data.num_examples
        if self.full_data is not None:
            looks = self.request.num_draws // self.full_data.every
        timed = self._timed_steps()
        # The first of them compiles, and warms caches; the best of the others would be luck.
        seconds = statistics.median(timed[1:] or timed) * len(self.chunks) * steps
        if size and looked_at:
            seconds *= 1 + looks * looked_at / (steps * size)
        return Cost(self.request.num_chains, steps, size, looks, looked_at, seconds)

    def _dims(self) -> tuple[int | None, int | None]:
        """Where the chains are in a chunk's batches, and in the memory of its estimator."""
        is_shared = not self.request.estimator.needs_memory or self.shared_memory is not None
        return self.batches.batch_dim, None if is_shared else 0

    def _evaluate(self, chunk: Chunk, batch: Any) -> Evaluation:
        """The potential of a chunk, as its step estimates it."""
        estimator, log_prior = self.request.estimator, self.request.log_prior
        if self.chain_method == "loop":
            evaluate = chain_evaluation(estimator, log_prior=log_prior)
        else:
            batch_dim, memory_dim = self._dims()
            evaluate = chains_evaluation(
                estimator, batch_dim=batch_dim, memory_dim=memory_dim, log_prior=log_prior
            )
        keys = chunk.step_keys.at(self.clock.next_step)
        return evaluate(chunk.sampler, chunk.state, batch, chunk.memory, keys)

    def _make_step(
        self, device: torch.device, compile: bool | Literal["noise"] | None
    ) -> FreezingStep:
        """Make the function that steps a chunk, compiled if that is asked for."""
        request, estimator = self.request, self.request.estimator
        # On a GPU, in eager code, each operation of the generator is a launch of its own.
        if compile is None and device.type == "cuda" and find_spec("triton"):
            compile = "noise"
        settings: dict[str, Any] = {
            "log_prior": request.log_prior,
            "metrics": "metrics" in request.record,
            "noise": compiled(step_noise) if compile == "noise" else step_noise,
        }
        if self.chain_method == "loop":
            step = chain_step(estimator, **settings)
        else:
            batch_dim, memory_dim = self._dims()
            step = chains_step(estimator, batch_dim=batch_dim, memory_dim=memory_dim, **settings)
        # Chains freeze inside the compiled step, so that no step waits for a look at their health.
        freezing_step = freezing(step, max_loss=request.max_loss, max_distance=request.max_distance)
        return compiled(freezing_step) if compile is True else freezing_step


def _with_chains(rows: Rows, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a chunk, `[c, …]`: those of a single chain get their dimension."""
    single = isinstance(rows, int)
    return {name: value[None] if single else value for name, value in values.items()}


def fastest(runs: Sequence[Run], progress: Progress) -> Run:
    """The run whose next step takes the least time a chain.

    One that cannot make the step is left out, with a warning. If none can, it is the first: going
    on with it raises its error.
    """
    processes = runs[0].processes
    if len(runs) == 1:
        runs[0].note_compilation(progress)
        return runs[0]
    seconds: dict[int, float] = {}
    for index, run in enumerate(runs):
        run.note_compilation(progress)
        try:
            seconds[index] = run.seconds_per_chain()
        except Exception as error:
            warnings.warn(f"chain_method {run.chain_method!r} fails: {error}", stacklevel=3)
    # What is faster on the first process is taken by all.
    index = processes.meet(min(seconds, key=lambda index: seconds[index], default=0))[0]
    return runs[index]
