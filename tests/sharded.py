"""What the processes of `test_compat_sharded.py` do: sharded parameters against whole ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from compat.shards import sharded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import compat
import funcsgmcmc as fs
from test_compat_differential import STEPS, Run, assert_same_metrics, configuration
from test_compat_differential import TOLERANCE as TOLERANCES


@contextmanager
def default_dtype() -> Iterator[None]:
    """Set the default dtype back in the end."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def whole(value: Any) -> Any:
    """A value with its DTensors put together."""
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, value)


def differential(mesh: DeviceMesh, seeds: range, keyed: bool) -> int:
    """Compare chains of configurations, whole and sharded; gives how many."""
    with default_dtype():
        for seed in seeds:
            try:
                _compare(mesh, seed, keyed)
            except Exception as error:
                error.add_note(f"This happened with {configuration(seed)!r}")
                raise
    return len(seeds)


def _compare(mesh: DeviceMesh, seed: int, keyed: bool) -> None:
    config = configuration(seed)
    one, other = Run(compat, config), _sharded_run(mesh, config)
    _assert_same(one, other, config)
    for step in range(STEPS):
        for run in (one, other):
            if keyed and config.method != "SGNHT":
                run.generator = fs.random.fold_in(fs.key(seed), step)
            _step(run, config)
        _assert_same(one, other, config)


def _sharded_run(mesh: DeviceMesh, config: Any) -> Run:
    """The run of a configuration, on sharded parameters."""

    def shard(param: nn.Parameter) -> nn.Parameter:
        placement = Shard(param.numel() % param.ndim) if param.ndim else Replicate()
        return nn.Parameter(distribute_tensor(param.detach(), mesh, [placement]))

    def make(package: Any, params: list[list[nn.Parameter]]) -> Any:
        for group in params:
            group[:] = [shard(param) for param in group]
        return config.make(package, params)

    made = type("_Config", (), {**vars(config), "make": staticmethod(make)})()
    run = Run(compat, made)
    run.flat = [param for group in run.params for param in group]
    return run


def _step(run: Run, config: Any) -> None:
    for index, param in enumerate(run.flat):
        grad = torch.randn(param.shape, generator=run.grads).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = None if index in config.without_grad else grad
    torch.set_rng_state(run.rng)
    noise = {} if run.generator is None else {"noise_generator": run.generator}
    run.optimizer.step(**noise)
    run.rng = torch.get_rng_state()


def _assert_same(one: Run, other: Run, config: Any) -> None:
    """Compare parameters, state, thermostats, metrics, sketches, and the generators."""
    close = max((TOLERANCES[dtype] for dtype in config.dtypes), key=lambda t: t["rtol"])
    for theirs, ours in zip(one.flat, other.flat, strict=True):
        torch.testing.assert_close(whole(ours.data), theirs.data, **close)
        state, wanted = other.optimizer.state[ours], one.optimizer.state[theirs]
        # Running averages of sharded parameters are made before the first step.
        state = {name: state[name] for name in wanted}
        torch.testing.assert_close(whole(sharded(state, ours)), wanted, **close)
    groups = zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True)
    for theirs, ours in groups:
        if "thermostat" in theirs:
            torch.testing.assert_close(ours["thermostat"], theirs["thermostat"], **close)
    assert torch.equal(one.rng, other.rng)
    coarse = {name: max(value, 1e-5) for name, value in close.items()}
    if config.metrics:
        assert_same_metrics(one.optimizer, other.optimizer, coarse)
    if config.sketches:
        theirs, ours = one.optimizer.get_sketches(), other.optimizer.get_sketches()
        torch.testing.assert_close(ours.tensors(), theirs.tensors(), **coarse)


class Tied(nn.Module):
    """A small language model: an embedding that is its unembedding too, a buffer, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6, bias=False))
        self.unembed = nn.Linear(6, 11, bias=False)
        self.unembed.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.0, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embed(tokens))
        return self.unembed(hidden * self.scale.to(hidden.dtype))


def made(mesh: DeviceMesh | None, precision: torch.dtype | None = None) -> nn.Module:
    """The model, sharded over a mesh; whole without one."""
    torch.manual_seed(3)
    model = Tied()
    if mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float64)
        fully_shard(model.body, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


METHODS: dict[str, Any] = {
    "sgld": lambda params: compat.SGMCMC.sgld(
        params,
        lr=1e-3,
        nbeta=10.0,
        localization=2.0,
        weight_decay=0.5,
        bounding_box_size=0.1,
        save_metrics=True,
        sketch_dim=8,
    ),
    "rmsprop_sgld": lambda params: compat.SGMCMC.rmsprop_sgld(
        params, lr=1e-3, nbeta=10.0, localization=2.0, save_metrics=True
    ),
    "sgnht": lambda params: compat.SGMCMC.sgnht(params, lr=1e-3, nbeta=10.0, save_metrics=True),
    "SGLD": lambda params: compat.SGLD(params, lr=1e-3, nbeta=10.0, localization=1.0),
    "SGNHT": lambda params: compat.SGNHT(params, lr=1e-3, nbeta=10.0),
}


def make_steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps of the global generator, on batches that depend on their index."""
    for step in range(first, last):
        tokens = (torch.arange(12) * (step + 1)) % 11
        optimizer.zero_grad()
        cross_entropy(model(tokens), (tokens + 1) % 11).backward()
        torch.manual_seed(step)
        optimizer.step()


def report(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a chain is: parameters, state, metrics and sketches, put together."""
    found: dict[str, Any] = {"params": [param.detach() for param in model.parameters()]}
    state = optimizer.state_dict()
    found["state"] = state["state"]
    found["thermostats"] = [group.get("thermostat") for group in state["param_groups"]]
    if optimizer.save_metrics:
        found["metrics"] = vars(optimizer.get_metrics())
    if optimizer.save_sketches:
        found["sketches"] = vars(optimizer.get_sketches())
    return whole(found)


def trained(mesh: DeviceMesh | None, method: str, precision: torch.dtype | None = None) -> Any:
    """Six steps of a model."""
    model = made(mesh, precision)
    torch.manual_seed(9)
    optimizer = METHODS[method](model.parameters())
    make_steps(model, optimizer, 0, 6)
    return report(model, optimizer)


def saved(mesh: DeviceMesh, method: str, path: Path) -> None:
    """Three steps, and a checkpoint by torch's distributed checkpoint."""
    model = made(mesh)
    torch.manual_seed(9)
    optimizer = METHODS[method](model.parameters())
    make_steps(model, optimizer, 0, 3)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=path, process_group=mesh.get_group())


def loaded(mesh: DeviceMesh, method: str, path: Path) -> Any:
    """Three steps more, from the checkpoint, by as many processes as there are."""
    model = made(mesh)
    torch.manual_seed(0)  # other momenta, which the checkpoint's replace
    optimizer = METHODS[method](model.parameters())
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path, process_group=mesh.get_group())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=StateDictOptions(strict=True),
    )
    make_steps(model, optimizer, 3, 6)
    return report(model, optimizer)


def seeded_apart(mesh: DeviceMesh) -> None:
    """Processes whose global generators differ."""
    model = made(mesh)
    optimizer = METHODS["sgld"](model.parameters())
    cross_entropy(model(torch.arange(11)), torch.arange(11)).backward()
    torch.manual_seed(mesh.get_rank())
    optimizer.step()


def with_correction(mesh: DeviceMesh) -> None:
    compat.SGMCMC.rmsprop_sgld(made(mesh).parameters(), nbeta=2.0, add_grad_correction=True)


def with_own_masks(mesh: DeviceMesh) -> None:
    params = list(made(mesh).parameters())
    masks = [torch.ones(param.shape) for param in params]
    masking = compat.preconditioner.MaskPreconditioner(masks)
    compat.SGMCMC(params, nbeta=2.0, preconditioner=masking)
