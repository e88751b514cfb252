"""What a run needs on the device, in memory and on disk: told, and judged, before it starts."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import shards, tree
from funcsgmcmc.memory import free_memory, in_bytes
from funcsgmcmc.norms import Metrics
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.disk import LARGEST_BLOCK
from funcsgmcmc.runs.request import Request
from funcsgmcmc.samplers.base import State

# Of what is free, the part that chunks are chosen for: operators take memory of their own.
_SHARE = 0.8
_WAYS_OUT = (
    "keep the record on disk (store='run.zarr'), make fewer draws of more steps "
    "(num_steps_between_draws), or record moments in place of values "
    "(record=['draw_moments', 'observable_moments'])"
)


@dataclass(frozen=True)
class StepBytes:
    """The memory of one step of a chunk: `fixed + per_chain · (its chains)` bytes.

    Attributes:
        fixed: What does not depend on the number of chains.
        per_chain: What each chain adds: gradient, activations, noise, next state.
    """

    fixed: int
    per_chain: int

    def of(self, num_chains: int) -> int:
        """Bytes of a chunk of some chains."""
        return self.fixed + self.per_chain * num_chains


def largest_chunk(step: StepBytes, num_chains: int, free: int | None) -> int:
    """The largest even chunk whose step fits the free memory of the device.

    Args:
        step: The memory of a step.
        num_chains: C.
        free: Bytes; None where they are not known: then all chains.

    Raises:
        ValueError: One chain does not fit.
    """
    if free is None:
        return num_chains
    most = int((_SHARE * free - step.fixed) // max(1, step.per_chain))
    if most < 1:
        raise ValueError(
            f"a step of one chain needs {in_bytes(step.of(1))}, more than fits the device, where "
            f"{in_bytes(free)} are free: take smaller batches, or accumulated gradients"
        )
    number_of_chunks = -(-num_chains // most)
    return -(-num_chains // number_of_chunks)


@dataclass(frozen=True)
class Need:
    """What a run needs beyond its data and the chains' first states.

    Attributes:
        device: The device.
        step: Bytes on the device while it steps: states, the largest chunk's step. None if no step
            was tried.
        record: Bytes of all that it records.
        waiting: Bytes of the record in memory: all of it, or blocks that wait for the disk.
        store: Its folder; None if the record is kept in memory.
    """

    device: torch.device
    step: int | None
    record: int
    waiting: int
    store: Path | None

    def __str__(self) -> str:
        parts = [] if self.step is None else [f"{in_bytes(self.step)} on {self.device} for a step"]
        parts.append(f"{in_bytes(self.waiting)} of memory for the record")
        if self.store is not None:
            parts.append(f"{in_bytes(self.record)} on disk")
        return "the run needs " + ", ".join(parts)

    def check(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            ValueError: The record needs more memory, or more of the disk, than is free; or a step
                more of the device.
        """
        memory = free_memory(torch.device("cpu"))
        if memory is not None and self.waiting > memory:
            raise ValueError(
                f"the record needs {in_bytes(self.waiting)} of memory, got {in_bytes(memory)} "
                f"free: {_WAYS_OUT}"
            )
        if self.store is not None and self.record > (free := _free_disk(self.store)):
            raise ValueError(
                f"the record needs {in_bytes(self.record)} on disk, got {in_bytes(free)} free: "
                f"{_WAYS_OUT}"
            )
        free_here = free_memory(self.device)
        if self.step is None or free_here is None:
            return
        # On the CPU the record shares its memory.
        step = self.step + (self.waiting if self.device.type == "cpu" else 0)
        if step > free_here:
            raise ValueError(
                f"a step, with the record, needs {in_bytes(step)} on {self.device}, got "
                f"{in_bytes(free_here)} free: step fewer chains at once (chunk_size='auto'); for "
                f"the record, {_WAYS_OUT}"
            )


@dataclass(frozen=True)
class Cost:
    """The steps of a run, and the time that they are expected to take.

    Attributes:
        num_chains: C.
        num_steps: Steps of each chain.
        batch_size: Examples that a step's gradient is of; None where batches are an iterable's.
        num_looks: Draws of each chain at which all data, or a part, is evaluated.
        num_looked_at: Examples that a look evaluates; None if it is not known.
        seconds: As a few timed steps tell.
    """

    num_chains: int
    num_steps: int
    batch_size: int | None
    num_looks: int
    num_looked_at: int | None
    seconds: float

    @property
    def num_gradients(self) -> int:
        """Gradients on batches, of all chains."""
        return self.num_chains * self.num_steps

    def __str__(self) -> str:
        text = (
            f"{self.num_chains:,} chains × {self.num_steps:,} steps: "
            f"{self.num_gradients:,} gradients"
        )
        if self.batch_size is not None:
            text += f" on {self.batch_size:,} examples each"
        if self.num_looks:
            number = "" if self.num_looked_at is None else f" {self.num_looked_at:,} examples"
            text += f", and {self.num_looks} looks a chain at{number or ' all data'}"
        return f"{text}; about {_duration(self.seconds)}"


def _duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def need_of(
    request: Request,
    states: Sequence[State],
    clock: Clock,
    observed: Mapping[str, Tensor],
    step: StepBytes | None,
    chunk_size: int,
    store: Path | None,
    num_processes: int,
) -> Need:
    """What a run needs.

    Args:
        request: Its settings.
        states: Those of its chunks, of which the first chain's parameters tell the sizes.
        clock: Its steps and draws.
        observed: The observables of one chain.
        step: The memory of a step, if one was tried.
        chunk_size: Chains that step at once.
        store: Where the record goes; None for memory.
        num_processes: Those that have as many chains each: without a store, each gets the record
            and the last states of all.
    """
    params = states[0].params
    num_chains, chains_here = request.num_chains, max(1, params.batch_size.numel())
    parameters = _bytes(params) // chains_here
    number = tree.noise_dtype(params).itemsize
    num_draws = len(clock.draw_steps)
    values = sum(value.numel() * value.element_size() for value in observed.values())
    of_step = 2 + (request.log_prior is not None)  # loss, distance
    of_step += len(Metrics._fields) if "metrics" in request.record else 0
    of_draw = 0
    kept = 0
    if "draws" in request.record:
        of_draw += parameters
    if "draw_moments" in request.record:
        kept += 2 * parameters
    if "observable_moments" in request.record:
        kept += values + sum(value.numel() for value in observed.values()) ** 2 * number
    else:
        of_draw += values
    steps, draws = of_step * number * clock.num_steps, of_draw * num_draws
    record = num_chains * (steps + draws) * num_processes
    waiting = record
    if store is not None:
        leaves = len(list(tree.leaves(params))) if "draws" in request.record else 0
        fields = of_step + len(observed) + leaves
        waiting = min(record, max(fields * LARGEST_BLOCK, num_chains * of_draw))
    elif num_processes > 1:
        waiting += sum(map(_bytes, states)) * num_processes
        kept *= num_processes
    return Need(
        device=tree.device(params),
        # The states of all chains are made anew by a step, chunk by chunk.
        step=None if step is None else sum(map(_bytes, states)) + step.of(chunk_size),
        record=record,
        waiting=waiting + num_chains * kept,
        store=store,
    )


def _bytes(values: TensorDict | State) -> int:
    """Bytes of all tensors of a tree or a state, of sharded ones those that are here."""
    tensors = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
    parts = map(shards.local, tensors)
    return sum(part.numel() * part.element_size() for part in parts)


def _free_disk(folder: Path) -> int:
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    return shutil.disk_usage(existing).free
