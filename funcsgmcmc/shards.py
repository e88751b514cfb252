"""Sharded parameters (DTensors): the part of each that this process has.

A step is elementwise, so that it is made on local tensors. What belongs to the whole of a parameter
is made for it: the noise of its entries, and sums over them. A tensor that is no DTensor is its own
part, and the same on all processes.

Shapes: a parameter `[*shape]`; its part, a block of it, has as many dimensions.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from funcsgmcmc import random

# Values of one draw, where noise is made piece by piece: a block of the generator.
_DRAW = 1 << 19
# Where parts lie: torch takes 0.1 ms to tell, at every step of every parameter.
_REGIONS: dict[tuple[Any, ...], tuple[slice, ...]] = {}


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

    def largest(self, value: Tensor) -> Tensor:
        """The largest value of the parts, in place."""
        for dim in self.dims:
            dist.all_reduce(value, dist.ReduceOp.MAX, self.mesh.get_group(dim))
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


def mesh_of(value: Any) -> DeviceMesh | None:
    """The mesh over which the tensors in a pytree are sharded; None if none is.

    Raises:
        ValueError: They have meshes of other processes.
    """
    leaves = pytree.tree_leaves(value)
    meshes = list(dict.fromkeys(leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor)))
    ranks = list(dict.fromkeys(tuple(ranks_of(mesh)) for mesh in meshes))
    if len(ranks) > 1:
        raise ValueError(
            f"params must be sharded over the same processes, got leaves over ranks "
            f"{list(ranks[0])} and {list(ranks[1])}"
        )
    return meshes[0] if meshes else None


def refuse(function: str, params: Any) -> None:
    """Refuse sharded parameters where a function takes whole ones.

    Raises:
        TypeError: A leaf is sharded.
    """
    if (mesh := mesh_of(params)) is not None:
        raise TypeError(
            f"{function} takes whole parameters, got some that are sharded over ranks "
            f"{ranks_of(mesh)}: sample and kernel take them"
        )


def ranks_of(mesh: DeviceMesh) -> list[int]:
    """The ranks of a mesh, in their own order."""
    return sorted(mesh.mesh.flatten().tolist())


def check_placement(name: str, param: Tensor) -> None:
    """Refuse a DTensor whose local tensor is no part of it.

    Raises:
        TypeError: A placement is neither a shard nor a replica, or it is a subclass's.
    """
    if not isinstance(param, DTensor):
        return
    if type(param) is not DTensor:
        raise TypeError(f"{name} must be a DTensor itself, got {type(param).__name__}")
    if not all(type(each) in (Shard, Replicate) for each in param.placements):
        raise TypeError(
            f"{name} must be sharded or replicated on each dimension of its mesh, got "
            f"{param.placements}"
        )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, the same memory."""
    return tensor.to_local() if type(tensor) is DTensor else tensor


def part_of(whole: Tensor, param: Tensor) -> Tensor:
    """Of a tensor like a whole parameter, the part that this process has.

    Args:
        whole: `[*shape]`, whole or sharded in some way; or of another shape, which broadcasts
            against a part, and is returned as it is.
        param: The parameter.

    Returns:
        A view, unless it was sharded in another way.
    """
    if type(param) is not DTensor:
        return local(whole)
    if isinstance(whole, DTensor):
        if whole.placements != param.placements or whole.device_mesh != param.device_mesh:
            whole = whole.redistribute(param.device_mesh, param.placements)
        return whole.to_local()
    return whole[region_of(param)] if whole.shape == param.shape else whole


def with_part(part: Tensor, param: Tensor) -> Tensor:
    """The tensor like a parameter of which this process has a part; the part itself if all."""
    if type(param) is not DTensor:
        return part
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def with_rows(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of some chains of which this process has a part.

    Args:
        part: `[C, …]`.
        like: Of another number of chains, sharded as the result, but not along its chains.
    """
    if type(like) is not DTensor:
        return part
    shape = torch.Size((len(part), *like.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    part = part.to(like.device)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def whole(value: Any) -> Any:
    """A value with the sharded tensors in it put together, on each process."""
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, value)


def whole_result(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of sharded tensors, and put its result together.

    Tensors that it has of its own count as the same on all processes.
    """
    with implicit_replication():
        return whole(function(*arguments))


def of_all_parts(value: Any, param: Tensor) -> list[Any]:
    """A small value that each process of a sharded parameter has, of all of them."""
    values = [value]
    if isinstance(param, DTensor):
        for dim in range(param.device_mesh.ndim):
            group = param.device_mesh.get_group(dim)
            found: list[Any] = [None] * group.size()
            dist.all_gather_object(found, values, group=group)
            values = [each for part in found for each in part]
    return values


def on_parts(function: Callable[..., Tensor], param: Tensor, *others: Any) -> Tensor:
    """Call an elementwise function on this process's parts.

    Args:
        function: Of tensors like the parameter, or None in place of one.
        param: Its first argument.
        others: The others.

    Returns:
        A tensor that is sharded as `param` is.
    """
    if type(param) is not DTensor:
        return function(param, *others)
    parts = (None if other is None else part_of(other, param) for other in others)
    return with_part(function(param.to_local(), *parts), param)


def totals(sums: Sequence[Sequence[tuple[Spread | None, Tensor]]]) -> list[Tensor]:
    """Add up values of the parameters of trees, over their parts.

    Args:
        sums: For each result its values, one of each parameter's part, all of one shape, and over
            which processes the parameter is spread.

    Returns:
        The results. They are exchanged together, once for each mesh.
    """
    # In the order of parameters, which is that of all processes: a set has one of its own.
    spreads = dict.fromkeys(spread for values in sums for spread, _ in values)
    found: list[list[Tensor]] = [[] for _ in sums]
    for spread in spreads:
        rows = [[value for each, value in values if each == spread] for values in sums]
        here = [torch.stack(row).sum(0) if row else torch.zeros(()) for row in rows]
        if spread is not None:
            dtype = max((each.dtype for each in here), key=lambda dtype: dtype.itemsize)
            device = next(row[0].device for row in rows if row)
            here = list(spread.total(torch.stack([e.to(device, dtype) for e in here])))
        for result, value, row in zip(found, here, rows, strict=True):
            result += [value] if row else []
    return [sum(each[1:], start=each[0]) for each in found]


def mean_over_processes(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The mean of a value over the processes of sharded parameters."""
    # Parameters of a module may be sharded over several meshes, which have the same processes.
    mesh = next(param.device_mesh for param in params if isinstance(param, DTensor))
    total = value.clone()
    for dim in range(mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total / mesh.size()


def grads_and_value(
    function: Callable[[Sequence[Tensor]], tuple[Tensor, Any]], params: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Any]:
    """Differentiate a function of sharded parameters.

    By autograd, and not by `torch.func`: the latter hides that its arguments are DTensors.

    Args:
        function: Gives a scalar, and a value that is passed on. Tensors that it has of its own
            count as the same on all processes.
        params: Its argument.

    Returns:
        Gradients, sharded as the parameters are; the scalar, and the value.

    Raises:
        TypeError: A parameter was put into a module that `fully_shard` has sharded.
    """
    given = [param.detach().requires_grad_() for param in params]
    refusing = register_module_forward_pre_hook(_refusing(given))
    try:
        with torch.enable_grad(), implicit_replication():
            value, passed = function(given)
            # Sums of parts are completed before they are differentiated.
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found: Sequence[Tensor | None] = [None] * len(given)
            if value.requires_grad:
                found = torch.autograd.grad(value, given, allow_unused=True)
    finally:
        refusing.remove()
    grads = [
        # As `torch.func.grad` has it where the value does not depend on a parameter.
        torch.zeros_like(param) if grad is None else _like(grad, param)
        for grad, param in zip(found, params, strict=True)
    ]
    return grads, value.detach(), passed


def implicit_replication() -> AbstractContextManager[None]:
    """Plain tensors count as the same on all processes."""
    # Beside it torch imports attention over processes, a quarter of this library's imports.
    module = importlib.import_module("torch.distributed.tensor.experimental")
    return module.implicit_replication()


def _refusing(given: Sequence[Tensor]) -> Callable[[nn.Module, Any], None]:
    """Make a hook that refuses modules of `fully_shard` with other parameters than their own."""
    names = {id(leaf) for leaf in given}

    def refuse(module: nn.Module, args: Any) -> None:
        if isinstance(module, FSDPModule) and any(
            id(leaf) in names for leaf in module.parameters()
        ):
            raise TypeError(
                "functional_call must not be given a module that fully_shard has sharded, got "
                f"{type(module).__name__}, whose hooks gather its own parameters in place of "
                "those given: let module_loss(model, criterion) make the loss"
            )

    return refuse


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient, sharded as its parameter is."""
    if not isinstance(grad, DTensor):
        return with_part(part_of(grad, param), param)
    if not isinstance(param, DTensor):
        return grad.full_tensor()
    if grad.placements == param.placements and grad.device_mesh == param.device_mesh:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def keyed_noise(
    key: Tensor, param: Tensor, dtype: torch.dtype, *, size: int | None = None, first: int = 0
) -> Tensor:
    """The part of a parameter's noise that is here, and of a key's values nothing else.

    Args:
        key: `[2]`.
        param: The parameter, `[*shape]`.
        dtype: As for `random.normal`.
        size: How many values the key draws, those of other parameters included; default: those of
            this one.
        first: Which of them is the parameter's first.

    Returns:
        The entries of `random.normal(key, (size,))[first:]`, in the parameter's shape, that are in
        its part.
    """
    size = param.numel() if size is None else size
    here, start = local(param), _first_of_rows(param)
    if start is not None:
        start += first
        return random.normal_range(key, size, start, start + here.numel(), dtype).view(here.shape)
    # Places in the whole, row by row: along the first dimension as a column, and so on.
    places = torch.zeros((), dtype=torch.int64, device=param.device)
    for length, ends in zip(param.shape, region_of(cast(DTensor, param)), strict=True):
        along = torch.arange(ends.start, ends.stop, device=param.device)
        places = places.unsqueeze(-1) * length + along
    return random.normal_at(key, size, places + first, dtype)


def keyed_vectors(key: Tensor, params: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The noise of the parts of parameters that are here, one vector after the other.

    Args:
        key: `[2]`, whose values are the parameters' noise, one parameter after the other.
        params: The parameters.
        dtype: As for `random.normal`.

    Returns:
        Vectors: for each parameter its part in row-major order, in one or several.
    """
    size, first = sum(param.numel() for param in params), 0
    for param in params:
        start, number = _first_of_rows(param), local(param).numel()
        if start is None or not number:
            yield keyed_noise(key, param, dtype, size=size, first=first).reshape(-1)
        else:
            start += first
            stop = start + number
            for at in range(start, stop, _DRAW):
                yield random.normal_range(key, size, at, min(at + _DRAW, stop), dtype)
        first += param.numel()


def _first_of_rows(param: Tensor) -> int | None:
    """Where the part of a parameter begins in its row-major order; None if it is no whole rows."""
    if not isinstance(param, DTensor) or spread_of(param) is None:
        return 0
    row = math.prod(param.shape[1:])
    ends = region_of(param)[0]
    return ends.start * row if param.to_local().numel() == (ends.stop - ends.start) * row else None


def region_of(param: DTensor) -> tuple[slice, ...]:
    """Where the part of a parameter lies in it."""
    known = (param.shape, param.device_mesh, param.placements)
    if known not in _REGIONS:
        # The protocol by which distributed checkpoints find a tensor's parts.
        (chunk,) = param.__create_chunk_list__()
        ends = zip(chunk.offsets, chunk.sizes, strict=True)
        _REGIONS[known] = tuple(slice(offset, offset + size) for offset, size in ends)
    return _REGIONS[known]
