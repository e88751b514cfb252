"""Sharded parameters (`fully_shard`): an optimizer's step on the part that this process has.

A step is elementwise, so that it is made on local tensors. What belongs to the whole of a parameter
is made for it: the noise of its entries, and sums over them. State is kept local, too, and is
sharded as its parameter in a state dict, which torch's distributed checkpoint reads for any number
of processes.

Parameters that are no DTensors are their own part.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

from funcsgmcmc import random


class Spread(NamedTuple):
    """The processes over which the entries of a parameter are spread.

    Attributes:
        mesh: Their mesh.
        dims: Its dimensions along which parts differ.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a value over the parts, in place."""
        for dim in self.dims:
            dist.all_reduce(value, group=self.mesh.get_group(dim))
        return value


def spread_of(param: Tensor) -> Spread | None:
    """Over which processes the entries of a parameter are spread; None for none."""
    # Asked at every step of every parameter: `isinstance` would take twice the time.
    if type(param) is not DTensor:
        return None
    dims = tuple(i for i, each in enumerate(param.placements) if each.is_shard())
    return Spread(param.device_mesh, dims) if dims else None


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is one of several processes."""
    return type(param) is DTensor


def check_placements(params: list[Tensor]) -> None:
    """Refuse DTensors whose local tensors are no parts of them.

    Raises:
        TypeError: A placement is neither a shard nor a replica, or it is a subclass's.
    """
    for index, param in enumerate(params):
        if isinstance(param, DTensor) and type(param) is not DTensor:
            raise TypeError(f"params[{index}] must be a DTensor itself, got {type(param).__name__}")
        kinds = param.placements if isinstance(param, DTensor) else ()
        if not all(type(each) in (Shard, Replicate) for each in kinds):
            raise TypeError(
                f"params[{index}] must be sharded or replicated on each dimension of its mesh, got "
                f"{kinds}"
            )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, the same memory."""
    return tensor.to_local() if type(tensor) is DTensor else tensor


def part_of(whole: Tensor, param: Tensor) -> Tensor:
    """Of a tensor like a whole parameter, the part that this process has, a view."""
    if type(param) is not DTensor or isinstance(whole, DTensor):
        return local(whole)
    return whole[_region(param)]


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
        return _keyed_noise(key, param, dtype)
    # Contiguous, in the default dtype, as torch.normal(size=…) of the published package draws it:
    # in another layout or dtype the same seed gives other numbers.
    if type(param) is not DTensor:
        empty = torch.empty_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        return empty.normal_(generator=generator)
    whole = torch.empty(param.shape, dtype=dtype, device=param.device)
    # A copy, so that the rest is free.
    return part_of(whole.normal_(generator=generator), param).clone()


def _keyed_noise(key: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of `random.normal(key, param.shape)` that are here."""
    if not isinstance(param, DTensor) or spread_of(param) is None:
        return random.normal(key, param.shape, dtype)
    region, size = _region(param), param.numel()
    rest = math.prod(param.shape[1:])
    here = local(param)
    if here.numel() == (region[0].stop - region[0].start) * rest:  # whole rows
        start = region[0].start * rest
        drawn = random.normal_range(key, size, start, start + here.numel(), dtype)
        return drawn.view(here.shape)
    # Places in the whole, row by row: along the first dimension as a column, and so on.
    places = torch.zeros((), dtype=torch.int64, device=param.device)
    for length, ends in zip(param.shape, region, strict=True):
        along = torch.arange(ends.start, ends.stop, device=param.device)
        places = places.unsqueeze(-1) * length + along
    return random.normal_at(key, size, places, dtype)


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
        return DTensor.from_local(
            entry,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )

    return pytree.tree_map(of_entry, entries)


def sharded_state(states: Mapping[Any, Any], params: list[Tensor]) -> dict[Any, Any]:
    """The state of a state dict, sharded: parameters are named by their place."""
    return {
        name: sharded(entries, params[name]) if isinstance(name, int) else entries
        for name, entries in states.items()
    }


def _region(param: DTensor) -> tuple[slice, ...]:
    """Where the part of a parameter lies in it."""
    # The protocol by which distributed checkpoints find a tensor's parts.
    (chunk,) = param.__create_chunk_list__()
    ends = zip(chunk.offsets, chunk.sizes, strict=True)
    return tuple(slice(offset, offset + size) for offset, size in ends)
