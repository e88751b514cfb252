"""Sharded parameters (`fully_shard`) of an optimizer: noise of generators, and state.

The rest, which functional samplers need too, stands in `funcsgmcmc/shards.py`. State is kept local,
and is sharded as its parameter in a state dict, which torch's distributed checkpoint reads for any
number of processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from funcsgmcmc import random
from funcsgmcmc.shards import check_placement, keyed_noise, local, part_of, with_part


def check_placements(params: list[Tensor]) -> None:
    """Refuse DTensors whose local tensors are no parts of them.

    Raises:
        TypeError: A placement is neither a shard nor a replica, or it is a subclass's.
    """
    for index, param in enumerate(params):
        check_placement(f"params[{index}]", param)


def noise_of(
    param: Tensor, generator: Generator | Tensor | None, place: Callable[[Tensor], int]
) -> Tensor:
    """Standard normals of a parameter's shape, in the default dtype: the part that is here.

    Args:
        param: The parameter.
        generator: A generator, or None for the global one: the noise of the whole parameter is
            drawn, as all processes do, and this one keeps its part. Or a key, which gives each
            entry its noise: then only the part is drawn.
        place: Tells the parameter's place among all, for a key.
    """
    dtype = torch.get_default_dtype()
    if isinstance(generator, Tensor):
        key = random.fold_in(generator, place(param)).to(param.device)
        return keyed_noise(key, param, dtype)
    # Contiguous, in the default dtype, as torch.normal(size=…) of the published package draws it:
    # in another layout or dtype the same seed gives other numbers.
    if type(param) is not DTensor:
        empty = torch.empty_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        return empty.normal_(generator=generator)
    whole = torch.empty(param.shape, dtype=dtype, device=param.device)
    # A copy, so that the rest is free.
    return part_of(whole.normal_(generator=generator), param).clone()


def momentum_noise(param: Tensor) -> Tensor:
    """Standard normals of a parameter's shape and dtype, from the global generator."""
    if not isinstance(param, DTensor):
        return torch.randn_like(param.detach())
    # In the whole's layout, which decides which number an entry gets.
    whole = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device)
    return part_of(whole.normal_(), param).clone()


def check_generators(params: list[Tensor], generator: Generator | Tensor | None) -> None:
    """Refuse processes whose generators would draw different noise of one parameter.

    Raises:
        ValueError: Their states differ.
    """
    meshes = {param.device_mesh for param in params if isinstance(param, DTensor)}
    for mesh in meshes:
        state = _state_of(generator, mesh.device_type)
        # Both ends in one reduction.
        ends = torch.stack([state, -state]).to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
        if int(ends[0]) != -int(ends[1]):
            raise ValueError(
                "all processes must draw the same noise, of which each keeps its part: seed them "
                "alike (torch.manual_seed), or give a key (noise_generator=…), got generators in "
                "different states"
            )


def _state_of(generator: Generator | Tensor | None, device_type: str) -> Tensor:
    """A number that names the state of a generator, int64 `[]`."""
    if isinstance(generator, Tensor):
        words = generator.cpu()
    elif generator is not None:
        words = generator.get_state()
    elif device_type == "cuda":
        words = torch.cuda.get_rng_state()
    else:
        words = torch.get_rng_state()
    # The high bits of a wrapping sum of products with odd numbers.
    factors = torch.arange(len(words), dtype=torch.int64) * 2654435761 * 2 + 1
    return (words.long() * factors).sum() >> 2


def localized(entries: Any, param: Tensor) -> Any:
    """State of a parameter, as its own part: shards, and parts of what is given whole."""
    if not isinstance(param, DTensor):
        return entries

    def of_entry(entry: Any) -> Any:
        if isinstance(entry, DTensor):
            same = (entry.device_mesh, entry.placements) == (param.device_mesh, param.placements)
            here = entry if same else entry.redistribute(param.device_mesh, param.placements)
            return here.to_local()
        if isinstance(entry, Tensor) and entry.shape == param.shape and entry.ndim:
            return part_of(entry, param).clone()
        return entry

    return pytree.tree_map(of_entry, entries)


def sharded(entries: Any, param: Tensor) -> Any:
    """State of a parameter as a state dict has it: what is like its part is sharded like it."""
    if not isinstance(param, DTensor):
        return entries
    shape = local(param).shape

    def of_entry(entry: Any) -> Any:
        if not isinstance(entry, Tensor) or entry.shape != shape or not entry.ndim:
            return entry
        return with_part(entry, param)

    return pytree.tree_map(of_entry, entries)


def sharded_state(states: Mapping[Any, Any], params: list[Tensor]) -> dict[Any, Any]:
    """The state of a state dict, sharded: parameters are named by their place."""
    return {
        name: sharded(entries, params[name]) if isinstance(name, int) else entries
        for name, entries in states.items()
    }
