"""Shares of a run's chains: what is asked of all is cut for one process, and records are joined."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import shards
from funcsgmcmc.runs.looks import Looks
from funcsgmcmc.runs.processes import Processes
from funcsgmcmc.runs.record import Samples, check_initial_loss
from funcsgmcmc.runs.request import Request
from funcsgmcmc.runs.rows import gather
from funcsgmcmc.runs.start import check_chains
from funcsgmcmc.samplers.base import Sampler, State


class Share(NamedTuple):
    """What one process is asked for.

    Attributes:
        request: The settings, with its number of chains and the index of the first.
        given: Where its chains start.
        sampler: Its chains' sampler.
    """

    request: Request
    given: Any
    sampler: Sampler


def share_of(request: Request, given: Any, sampler: Sampler, rows: slice) -> Share:
    """Cut some chains out of what `sample` was asked for.

    Args:
        request: The settings of all chains.
        given: A tree, a state, or the record of a run.
        sampler: Of all chains, of batch size `[]` or `[C]`.
        rows: The chains.

    Raises:
        ValueError: Something is neither shared, nor one for each of all chains.
    """
    number = request.num_chains
    if rows == slice(0, number):
        return Share(request, given, sampler)
    check_chains("sampler", sampler.shape, request)
    offset = request.chain_offset
    first = offset[rows] if isinstance(offset, Tensor) else offset + rows.start
    if isinstance(given, Samples | State):
        size = given.state.shape if isinstance(given, Samples) else given.shape
        check_chains("params", size, request, shared=False)
        # The chains of a record keep their indices.
        first = first if isinstance(offset, Tensor) or offset else 0
        given = given[rows]
    elif isinstance(given, TensorDictBase) and given.batch_size:
        check_chains("params", given.batch_size, request)
        given = given[rows]
    loss = request.initial_loss
    if loss is not None:
        loss = check_initial_loss(loss, number)
        loss = loss[rows] if loss.shape else loss
    share = replace(
        request, num_chains=rows.stop - rows.start, chain_offset=first, initial_loss=loss
    )
    return Share(share, given, sampler[rows] if sampler.shape else sampler)


def on_cpu(samples: Samples) -> Samples:
    """A record with all its tensors on the CPU."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor | TensorDictBase) or hasattr(value, "batch_size"):
            return value.to("cpu")
        return value

    def is_whole(value: Any) -> bool:
        return hasattr(value, "batch_size")

    fields = {
        name: pytree.tree_map(moved, getattr(samples, name), is_leaf=is_whole)
        for name in samples.__dataclass_fields__
        if name != "options"
    }
    return samples.replaced(**fields)


def of_all_chains(processes: Processes, value: Any) -> Any:
    """A sampler or a state of all chains, of those that processes have, on the CPU.

    Sharded tensors stay so, where they are: the processes that send theirs have the same parts.
    """
    here = pytree.tree_map_only(Tensor, lambda leaf: shards.local(leaf).cpu(), value)
    whole = gather(processes.gather(here))
    return pytree.tree_map(shards.with_rows, whole, value)


def whole_sampler(processes: Processes, sampler: Sampler) -> Sampler:
    """The sampler of all chains, on the CPU: one that they share, or each its own."""
    # What all share, anchors as large as a model, is not sent.
    return of_all_chains(processes, sampler) if sampler.shape else sampler.to("cpu")


def joined_losses(losses: Sequence[Tensor | None]) -> Tensor | None:
    """L(w₀) of all chains, `[]` where they share an anchor."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return None
    return torch.cat(known) if known[0].shape else known[0]


def whole_record(processes: Processes, record: Samples) -> Samples:
    """The record of all chains, on the CPU, of those of the processes that ran them."""
    if processes.num_shares == 1:
        return record
    sampler = whole_sampler(processes, record.sampler)
    state = of_all_chains(processes, record.state)
    # These are all chains' already.
    parts = processes.gather(on_cpu(record.replaced(sampler=None, state=None)))
    return joined_records(parts).replaced(sampler=sampler, state=state)


def joined_records(parts: Sequence[Samples]) -> Samples:
    """The record of all chains but for sampler and state, of records of some of them each."""

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else gather(values)

    def joined_leaves(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else pytree.tree_map(lambda *v: torch.cat(v), *values)

    return parts[0].replaced(
        losses=joined("losses"),
        distances=joined("distances"),
        looks=_joined_looks([part.looks for part in parts]),
        draws=joined("draws"),
        observables=joined_leaves("observables"),
        draw_moments=joined("draw_moments"),
        observable_moments=joined("observable_moments"),
        log_weights=joined("log_weights"),
        log_priors=joined("log_priors"),
        metrics=joined_leaves("metrics"),
        chains=joined("chains"),
        initial_loss=joined_losses([part.initial_loss for part in parts]),
        frozen_at=joined("frozen_at"),
    )


def _joined_looks(parts: Sequence[Looks | None]) -> Looks | None:
    """The looks of all chains; None if there are none."""
    known = [looks for looks in parts if looks is not None]
    if not known:
        return None
    return known[0]._replace(
        losses=torch.cat([looks.losses for looks in known]),
        virials=torch.cat([looks.virials for looks in known]),
        forces=torch.cat([looks.forces for looks in known]),
        noises=torch.cat([looks.noises for looks in known]),
    )
