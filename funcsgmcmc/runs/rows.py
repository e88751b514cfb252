"""Rows of a record: picked by a user, labelled by their chains' settings, and put together."""

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers.base import Sampler


def rows_of(index: Any, num_chains: int) -> Tensor:
    """Rows of chains, int64 `[c]`, from what a user picks them with.

    Raises:
        IndexError: A chain does not exist, or none is left.
        TypeError: It is no index.
    """
    if isinstance(index, slice):
        rows = torch.arange(num_chains)[index]
    else:
        if isinstance(index, str) or not isinstance(index, int | Sequence | Tensor):
            raise TypeError(
                "chains are picked by an index, a slice, a list or a tensor, got "
                f"{type(index).__name__}: samples.groups() has them by name"
            )
        given = torch.as_tensor(index, device="cpu").reshape(-1)
        if given.dtype == torch.bool and len(given) != num_chains:
            raise IndexError(f"a mask of chains must have {num_chains} entries, got {len(given)}")
        rows = given.nonzero().flatten() if given.dtype == torch.bool else given.long()
    if not len(rows):
        raise IndexError(f"at least one chain must be picked of {num_chains}, got none")
    if not ((rows >= -num_chains) & (rows < num_chains)).all():
        raise IndexError(f"there are {num_chains} chains, got index {rows.tolist()}")
    return rows % num_chains


def setting_labels(sampler: Sampler, num_chains: int, *, anchors: bool) -> list[str]:
    """Name each chain by the settings in which chains differ.

    Args:
        sampler: The chains' sampler.
        num_chains: How many chains there are.
        anchors: Whether anchors count. Where nothing pulls to them, they are only where chains of
            one experiment started.

    Returns:
        A label for each chain; `"all"` where all are alike.
    """
    parts: list[list[str]] = [[] for _ in range(num_chains)]
    settings = sampler.exclude("anchor").to_tensordict()
    for name, leaf in tree.leaves(settings) if sampler.shape else ():
        for part, value in zip(parts, _names(leaf.reshape(num_chains, -1)), strict=False):
            part.append(f"{tree.dotted(name)}={value}")
    if anchors and sampler.anchor is not None and sampler.anchor.batch_size:
        for part, index in zip(parts, which_of(sampler.anchor), strict=False):
            part.append(f"anchor=#{index}")
    return [", ".join(part) or "all" for part in parts]


def _names(rows: Tensor) -> list[str]:
    """Names of the rows of a tensor, equal where rows are; none if all rows are equal."""
    if bool((rows == rows[:1]).all()):
        return []
    distinct = rows.unique(dim=0, return_inverse=True)[1].tolist()
    if rows.shape[1] > 1:  # a tree's leaf, such as a mask's
        return [f"#{index}" for index in distinct]
    numbers = rows.flatten().tolist()
    short = [f"{number:g}" for number in numbers]
    return short if len(set(short)) == len(set(distinct)) else list(map(repr, numbers))


def which_of(anchor: TensorDict) -> list[int]:
    """Which of the distinct anchors each chain has; none if all have one."""
    seen: list[TensorDict] = []
    which = []
    for own in anchor.unbind(0):
        same = [index for index, each in enumerate(seen) if bool((each == own).all())]
        if not same:
            same = [len(seen)]
            seen.append(own)
        which += same
    return which if len(seen) > 1 else []


def gather(parts: list[Any]) -> Any:
    """Put the parts of all chunks back together, tensors or states, `[C, …]`."""
    # Chains of a loop have no chain dimension yet.
    if not parts[0].shape:
        # The state of one large chain is not copied.
        return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
    return torch.cat(parts) if len(parts) > 1 else parts[0]
