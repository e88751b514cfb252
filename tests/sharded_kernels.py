"""What the processes of `test_sharded_kernels.py` do: kernels on sharded and on whole trees."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from funcsgmcmc import pieces, shards
from sharded import made

SHARED = {"nbeta": 10.0, "localization": 2.0, "weight_decay": 0.5}
SAMPLERS: dict[str, Callable[[TensorDict], fs.samplers.Sampler]] = {
    "sgld, in a box": lambda _: fs.sgld(1e-3, bounding_box_size=0.05, **SHARED),
    "sgld, masked": lambda params: fs.sgld(
        1e-3, mask={name: leaf > 0 for name, leaf in params.items()}, **SHARED
    ),
    "rmsprop_sgld": lambda _: fs.rmsprop_sgld(1e-3, **SHARED),
    "adam": lambda _: fs.sgld(1e-3, preconditioner=fs.preconditioners.adam(), **SHARED),
    "contour_sgld": lambda _: fs.contour_sgld(
        1e-3, energy_range=(0.0, 60.0), num_partitions=5, **SHARED
    ),
    "sglrw": lambda _: fs.sglrw(1e-3, **SHARED),
    "sghmc": lambda params: fs.sghmc(1e-3, anchor=params.apply(lambda leaf: leaf + 0.1), **SHARED),
    "sgnht": lambda _: fs.sgnht(1e-3, **SHARED),
    "sgnht, masked": lambda params: fs.sgnht(
        1e-3, mask={name: leaf > 0 for name, leaf in params.items()}, **SHARED
    ),
    "baoa": lambda _: fs.baoa(0.03, friction=1.0, **SHARED),
    "badoda": lambda _: fs.badoda(0.03, diffusion_factor=1.0, **SHARED),
}
# Three processes have two rows of the last bias together, and two of 7 or of 5 are uneven.
KEY = fs.key(3)


def whole(value: Any) -> Any:
    """A value with its DTensors put together."""
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, value)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def batch(step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 5, generator=generator)
    return inputs[rows], (inputs.sum(1) > 0).long()[rows]


def shard(params: TensorDict, mesh: DeviceMesh, dim: int) -> TensorDict:
    """Every leaf along its first or last dimension; but one that all processes have."""
    return TensorDict(
        {
            name: leaf
            if name == "2.bias" and dim
            else distribute_tensor(leaf, mesh, [Shard(dim if leaf.ndim > 1 else 0)])
            for name, leaf in params.items()
        }
    )


def moved(
    sampler: fs.samplers.Sampler,
    loss_fn: Any,
    params: TensorDict,
    metrics: bool,
    batches: Callable[[int], Any] = batch,
    **how: Any,
) -> dict[str, Any]:
    """Four steps."""
    step = fs.kernel(sampler, loss_fn, metrics=metrics, **how)
    state = sampler.init(params, fs.tree.normal_like(fs.random.fold_in(KEY, 99), params))
    infos = []
    for index in range(4):
        state, info = step(state, batches(index), KEY)
        infos.append(info)
    return whole({"state": state.to_dict(), "infos": infos})


def on_dtensors(
    mesh: DeviceMesh | None, name: str, metrics: bool, dim: int = 0, in_pieces: bool = False
) -> dict[str, Any]:
    """Of DTensors, whose loss is of torch's own operations on them."""
    model = network()
    params = fs.params_of(model)
    sampler = SAMPLERS[name](params)
    before = pieces._MANY_LEAVES, pieces._PIECE
    if in_pieces:
        pieces._MANY_LEAVES, pieces._PIECE = 1, 6
    try:
        given = params if mesh is None else shard(params, mesh, dim)
        return moved(sampler, fs.module_loss(model, cross_entropy), given, metrics)
    finally:
        pieces._MANY_LEAVES, pieces._PIECE = before


def sketched(mesh: DeviceMesh | None, dim: int) -> dict[str, Any]:
    """Sketches of the terms of a step."""
    params = fs.params_of(network())
    sketch = fs.sketch.count_sketch(fs.tree.size(params), 8)
    given = params if mesh is None else shard(params, mesh, dim)
    sampler = SAMPLERS["sgld, in a box"](params)
    noise = fs.tree.normal_like(KEY, given)
    evaluation = fs.gradients.Evaluation(given.apply(lambda leaf: leaf * 2))
    terms = sampler.update(sampler.init(given), evaluation, noise)[1]
    return fs.sketch.sketches(terms, sketch)._asdict()


def with_a_prior(mesh: DeviceMesh | None) -> dict[str, Any]:
    """A log-prior of one leaf, and micro-batches."""
    model = network()
    params = fs.params_of(model)
    given = params if mesh is None else shard(params, mesh, 0)
    loss_fn = fs.accumulated(fs.module_loss(model, cross_entropy), 3)
    return moved(
        SAMPLERS["sgld, in a box"](params),
        loss_fn,
        given,
        True,
        log_prior=lambda params: -params["0.weight"].square().sum(),
    )


def on_a_module(mesh: DeviceMesh | None, name: str, metrics: bool) -> dict[str, Any]:
    """Of a module that `fully_shard` has sharded, whose own parameters have moved meanwhile."""
    model = made(mesh)
    params = fs.params_of(model)
    whole_params = fs.params_of(made(None))
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(1.0)
    return moved(
        SAMPLERS[name](whole_params),
        fs.module_loss(model, lambda output, targets: cross_entropy(output, targets)),
        params,
        metrics,
        tokens,
    )


def losses_of_a_module(mesh: DeviceMesh | None) -> list[float]:
    """Losses at one point after another, without gradients."""
    model = made(mesh)
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    with torch.no_grad():
        return [
            loss_fn(params.apply(lambda leaf, k=k: leaf * k), tokens(0)).item() for k in (1, 2, 3)
        ]


def tokens(step: int) -> tuple[Tensor, Tensor]:
    given = (torch.arange(12) * (step + 1)) % 11
    return given, (given + 1) % 11


def on_parts_of_a_batch(mesh: DeviceMesh) -> dict[str, Any]:
    """Each of two processes has half of the batch."""
    model = network()
    fully_shard(model, mesh=mesh)
    params, rank = fs.params_of(model), mesh.get_rank()
    here = slice(6 * rank, 6 * rank + 6)
    sampler = SAMPLERS["baoa"](fs.params_of(network()))
    loss_fn = fs.module_loss(model, cross_entropy)
    return moved(sampler, loss_fn, params, False, lambda step: batch(step, here))


def with_another_slice(mesh: DeviceMesh, name: str) -> dict[str, Any]:
    """The same as `on_dtensors`, but each process draws the noise of entries one place further."""
    draw = shards.keyed_noise
    shards.keyed_noise = lambda key, param, dtype, **where: draw(
        key, param, dtype, **{**where, "first": max(where["first"] - 1, 0)}
    )
    try:
        return on_dtensors(mesh, name, False)
    finally:
        shards.keyed_noise = draw


def through_functional_call(mesh: DeviceMesh) -> None:
    """A loss of the user's own, through a sharded module."""
    model = network()
    fully_shard(model, mesh=mesh)
    model(batch(0)[0])
    model.reshard()

    def loss_fn(params: TensorDict, batch: Any) -> Tensor:
        return cross_entropy(functional_call(model, dict(params), (batch[0],)), batch[1])

    moved(fs.sgld(1e-3, nbeta=2.0), loss_fn, fs.params_of(model), False)


def while_gathered(mesh: DeviceMesh) -> None:
    model = network()
    fully_shard(model, mesh=mesh)
    model(batch(0)[0])
    fs.params_of(model)


def under_torch_func(mesh: DeviceMesh) -> None:
    model = network()
    fully_shard(model, mesh=mesh)
    loss_fn = fs.module_loss(model, cross_entropy)
    torch.func.grad(lambda params: loss_fn(params, batch(0)))(fs.params_of(model))


def with_curvature(mesh: DeviceMesh) -> None:
    model = network()
    sampler = fs.rmsprop_sgld(1e-3, nbeta=2.0, curvature="hutchinson")
    params = shard(fs.params_of(model), mesh, 0)
    moved(sampler, fs.module_loss(model, cross_entropy), params, False)


def with_partial_sums(mesh: DeviceMesh) -> None:
    part = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    fs.sgld(1e-3, nbeta=2.0).init(TensorDict({"w": part}))


def with_a_dtype(mesh: DeviceMesh) -> None:
    model = network()
    fully_shard(model, mesh=mesh)
    loss_fn = fs.module_loss(model, cross_entropy, dtype=torch.bfloat16)
    moved(fs.sgld(1e-3, nbeta=2.0), loss_fn, fs.params_of(model), False)
