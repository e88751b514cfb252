"""Choices that are made by the clock, before the first step: how chains run, and what is compiled.

Steps are pure, so that timing them changes nothing. What was chosen holds for the whole run, and a
run that is resumed does not choose again: its chains are those of one way to step.
"""

import statistics
import time
import warnings
from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from funcsgmcmc.runs.need import Cost
from funcsgmcmc.runs.progress import Progress
from funcsgmcmc.runs.run import Run

_TIMED_CALLS, _LONG_CALL = 4, 5.0
# Compiling is tried in runs of so many steps, whose eager steps will take so many times what
# compiling takes: a network that it does not make faster then loses a tenth.
_FEWEST_STEPS, _WORTH_IT = 500, 10.0
# Seconds to compile a step on two cores, without a cache: of any network, and for each leaf.
_TO_COMPILE, _TO_COMPILE_LEAF = 15.0, 0.5


def seconds_of_calls(run: Run, calls: int = _TIMED_CALLS) -> list[float]:
    """Time the next call of a run's first chunk a few times; nothing is recorded or changed."""
    chunk, seconds = run.chunks[0], []
    kept_memory, step = chunk.memory, run.clock.next_step
    # What a pass over the data draws from torch's generator is drawn again by the run.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # The first one compiles, and warms caches: the best of a few is what a run sees.
        for _ in range(calls):
            start = time.perf_counter()
            moved = run.stepper.make(chunk, step, run.stepper.longest)
            moved.info.loss.tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
            if seconds[-1] > _LONG_CALL and not run.stepper.is_compiled:
                break  # it tells enough
    chunk.memory = kept_memory
    return seconds


def seconds_per_chain(run: Run) -> float:
    """The time of a step of a chain, at best of a few."""
    return min(seconds_of_calls(run)) / run.stepper.longest / run.chunks[0].frozen_at.numel()


def cost_of(run: Run) -> Cost:
    """What a run costs, from a few steps that are timed; nothing is recorded or changed."""
    clock, full, batch_size = run.clock, run.full_data, run.batches.batch_size
    looked_at = None if full is None else full.num_examples
    looks = 0 if full is None else run.request.num_draws // full.every
    timed = seconds_of_calls(run)
    # The first of them compiles, and warms caches; the best of the others would be luck.
    a_call = statistics.median(timed[1:] or timed)
    seconds = a_call / run.stepper.longest * len(run.chunks) * clock.num_steps
    if batch_size and looked_at:
        seconds *= 1 + looks * looked_at / (clock.num_steps * batch_size)
    return Cost(run.request.num_chains, clock.num_steps, batch_size, looks, looked_at, seconds)


def fastest(runs: Sequence[Run], progress: Progress) -> Run:
    """The run whose next step takes the least time a chain.

    One that cannot make the step is left out, with a warning. If none can, it is the first: going
    on with it raises its error.
    """
    if len(runs) == 1:
        runs[0].note_compilation(progress)
        return runs[0]
    seconds: dict[int, float] = {}
    for index, run in enumerate(runs):
        run.note_compilation(progress)
        try:
            seconds[index] = seconds_per_chain(run)
        except Exception as error:
            warnings.warn(f"chain_method {run.chain_method!r} fails: {error}", stacklevel=3)
    # What is faster on the first process is taken by all.
    chosen = min(seconds, key=lambda index: seconds[index], default=0)
    return runs[runs[0].processes.meet(chosen)[0]]


def compile_if_it_pays(run: Run, progress: Progress) -> None:
    """Compile the steps of a run that has not begun, where that saves time, and say so.

    It is tried where all eager steps would take ten times as long as compiling is likely to; the
    faster steps are taken. Where nothing can be compiled, steps stay as they are.
    """
    is_open = run.request.compile == "auto" and not run.is_resumed and run.processes.shards == 1
    if not is_open or run.clock.num_steps < _FEWEST_STEPS:
        return
    leaves = len(pytree.tree_leaves(run.chunks[0].state.params))
    enough = _WORTH_IT * (_TO_COMPILE + _TO_COMPILE_LEAF * leaves)

    def seconds_left() -> float:
        return run.clock.num_steps * run.request.num_chains * seconds_per_chain(run)

    # One call, with caches cold, is never too fast.
    first = seconds_of_calls(run, 1)[0] * run.clock.num_steps * len(run.chunks)
    is_long = first > enough and seconds_left() > enough
    if not any(run.processes.meet(is_long)):
        return
    eager, before = run.stepper, seconds_left()
    progress.note(f"compiling the step, since eager steps would take {before:.0f} s")
    run.stepper = run.make_stepper(compile=True)
    try:
        after = seconds_left()
    except Exception as error:
        after = float("inf")
        progress.tell(f"steps are not compiled: {str(error).splitlines()[0]}")
    # All processes or none, so that all chains are stepped alike.
    if all(run.processes.meet(after < before)):
        progress.tell(f"steps are compiled: {after:.0f} s in place of {before:.0f} s")
    else:
        run.stepper = eager
