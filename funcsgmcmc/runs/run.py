"""A run in progress, as a value: its request, its clock, its chunks of chains, its record.

Time is the outer loop and chunks of chains the inner one. So an iterable gives every chunk the same
batch, and a run can stop at any step with everything recorded until then.
"""

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc.memory import chunk_size, free_memory, peak_bytes
from funcsgmcmc.runs.burnin import has_settled, is_due, seen, steps_until_due
from funcsgmcmc.runs.chunks import Chunk, Drawn, split
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.encoding import decode, encode, joined, picked, with_chain
from funcsgmcmc.runs.failures import DivergenceError, SamplingError, SamplingInterrupt
from funcsgmcmc.runs.full_data import FullData
from funcsgmcmc.runs.keeping import Keeper, interrupted_by_sigterm
from funcsgmcmc.runs.looks import Looks
from funcsgmcmc.runs.moments import Moments, with_draw
from funcsgmcmc.runs.need import Need, StepBytes, largest_chunk, need_of
from funcsgmcmc.runs.processes import InterruptedProcessError, ProcessError, Processes
from funcsgmcmc.runs.progress import Progress
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.reporting import Reporter
from funcsgmcmc.runs.request import ChainMethod, Request, RunKeys
from funcsgmcmc.runs.rounding import has_noise, is_narrow, warn_of_lost_steps
from funcsgmcmc.runs.rows import gather
from funcsgmcmc.runs.shares import whole_record
from funcsgmcmc.runs.start import Lent, Start
from funcsgmcmc.runs.stepper import Compile, Moved, Stepper, default_compilation
from funcsgmcmc.runs.store import Recorder, Rows
from funcsgmcmc.samplers.base import Sampler


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
        stepper: What steps its chunks.
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
    stepper: Stepper = field(init=False)
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
        self.stepper = self.make_stepper(self._compile())
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
                    reporter.steps_done(self.make_steps_and_look_at_rounding())
                    if keeper is not None:
                        keeper.steps_done(self)
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
            self.make_steps()
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

    def make_steps(self) -> int:
        """Make the next steps of every chunk that has not made them yet, and record them.

        Returns:
            Their number.
        """
        step, draw, number = self.clock.next_step, self.clock.due_draw(), self._steps_at_once()
        for chunk in self.chunks:
            if chunk.next_step > step:
                continue
            moved = self.stepper.make(chunk, step, number)
            moments, drawn = chunk.moments, None
            if draw is not None:
                moments, drawn = self._make_draw(chunk, draw, moved)
            self._record(chunk, moved, number, draw)
            # At once and at last: a step that is interrupted before is made again, to the same end.
            chunk.state, chunk.frozen_at, chunk.moments, chunk.drawn, chunk.next_step = (
                moved.state,
                moved.frozen_at,
                moments,
                drawn,
                step + number,
            )
        if self.lent is not None:
            self.lent.check()
        # Only steps of all chunks count: one that fails half way leaves a record of equal length.
        self.clock.tick(number)
        return number

    def _make_draw(self, chunk: Chunk, draw: int, moved: Moved) -> tuple[dict[str, Moments], Drawn]:
        """Record the draw of a chunk, which is where its next steps begin.

        It belongs to the loss that the first of them evaluates.

        Returns:
            The moments of its draws, and what a user's function is given of this one.
        """
        request, params = self.request, chunk.state.params
        observed = self.recorder.write_draw(chunk.rows, draw, params)
        # It counts where its own step did not fail, whatever the steps after it do.
        counts = (moved.frozen_at < 0) | (moved.frozen_at > self.clock.next_step)
        moments = with_draw(
            chunk.moments, request.record, params, observed, counts, moved.log_weight
        )
        self._look_at_all_data(chunk, draw)
        if request.on_draw is None:
            return moments, None
        return moments, (params, _with_chains(chunk.rows, observed))

    def _steps_at_once(self) -> int:
        """How many steps are made until something else is to be done.

        All processes give the same answer: it depends on the step alone.
        """
        clock, step = self.clock, self.clock.next_step
        number = min(self.stepper.longest, clock.steps_until_draw())
        if number == 1:
            return 1
        # Of an interrupted run, some chunks have made steps that others have not.
        number = min([number, *(c.next_step - step for c in self.chunks if c.next_step > step)])
        if clock.is_open:
            limit = clock.num_burnin_steps - clock.steps_done
            number = min(number, limit, steps_until_due(clock.steps_done))
        if (interval := self.request.estimator.refresh_interval) is not None:
            number = min(number, interval - step % interval)
        is_first = clock.steps_done == 0 and is_narrow(self.chunks[0].state.params)
        return 1 if is_first else number

    def _record(self, chunk: Chunk, moved: Moved, number: int, draw: int | None) -> None:
        """Write what the next steps of a chunk report."""
        row, recorder = self.clock.steps_done, self.recorder
        if moved.is_block:
            recorder.write_steps(chunk.rows, row, number, draw, moved.info)
        else:
            recorder.write_step(chunk.rows, row, draw, moved.info)

    def make_steps_and_look_at_rounding(self) -> int:
        """Make steps; of the first and the last one, see whether narrow parameters took it.

        Returns:
            Their number.
        """
        chunk, clock = self.chunks[0], self.clock
        is_looked_at = clock.steps_done in (0, clock.num_steps - 1)
        before = chunk.state
        number = self.make_steps()
        if self.has_warned or not (is_looked_at and is_narrow(before.params)):
            return number
        # Only noise moves every entry.
        if has_noise(chunk.sampler, before.step):
            self.has_warned = warn_of_lost_steps(
                before.params, chunk.state.params, chunk.sampler.mask
            )
        return number

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
            self.make_steps()

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
        found = {
            "burnin_settled": self.clock.burnin_settled,
            "is_compiled": self.stepper.is_compiled,
        }
        return self.request.options() | data | found

    def _look_at_all_data(self, chunk: Chunk, draw: int) -> None:
        """Record what all data says of a chunk's draw, if it is one to be looked at."""
        full = self.full_data
        if full is None or not full.is_due(draw):
            return
        evaluation = full.evaluate(
            self.request.estimator, chunk.state.params, chunk.memory, self.stepper.memory_dim
        )
        estimate = None
        if not self.batches.is_all_data or self.request.log_prior is not None:
            estimate = self.stepper.evaluate(chunk, self.clock.next_step)
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
        stepper, step = self.make_stepper(compile=False), self.clock.next_step
        number = 1 if self.chain_method == "loop" else min(2, self.chunk_size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            peaks = []
            for chains in range(1, number + 1):
                few = self.chunks[0].first(chains)
                stepper.prepare(few, step)
                peaks.append(peak_bytes(partial(stepper.make, few, step, 1)))
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

    def make_stepper(self, compile: Compile) -> Stepper:
        """Make what steps the chunks."""
        estimator = self.request.estimator
        is_shared = not estimator.needs_memory or self.shared_memory is not None
        return Stepper(
            self.request,
            self.batches,
            is_looped=self.chain_method == "loop",
            memory_dim=None if is_shared or self.chain_method == "loop" else 0,
            period=self.keys.period,
            compile=compile,
        )

    def _compile(self) -> Compile:
        """What is compiled before the first step, as far as it is known then."""
        if self.request.compile != "auto":
            return self.request.compile
        if self.keeper is not None and self.keeper.is_resumed and self.keeper.is_compiled():
            return True
        return default_compilation(self.keys.key.device)


def _with_chains(rows: Rows, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a chunk, `[c, …]`: those of a single chain get their dimension."""
    single = isinstance(rows, int)
    return {name: value[None] if single else value for name, value in values.items()}
