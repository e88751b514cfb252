"""What the processes of `test_sharded_runs.py` do: runs of sharded and of whole parameters."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc import shards
from sharded import made
from sharded_kernels import SHARED, network, shard, tokens

FIELDS = ("losses", "distances", "log_priors", "log_weights", "metrics", "observables", "frozen_at")
BASE: dict[str, Any] = {
    "num_chains": 3,
    "num_draws": 4,
    "num_burnin_steps": 1,
    "num_steps_between_draws": 2,
    "batch_size": 8,
    "init_noise": 0.05,
    "key": fs.key(5),
    "chain_method": "loop",
    "record": ["metrics"],
}


def positive(params: TensorDict) -> dict[str, Tensor]:
    return {name: leaf > 0 for name, leaf in params.items()}


# Made where they are used: functions do not travel.
HOWS: dict[str, Callable[[TensorDict], tuple[fs.samplers.Sampler, dict[str, Any]]]] = {
    "sgld in a box, with an anchor": lambda params: (
        fs.sgld(
            1e-3,
            bounding_box_size=0.3,
            anchor=params.apply(lambda leaf: leaf + 0.1),
            mask=positive(params),
            **SHARED,
        ),
        {},
    ),
    "momenta, masked": lambda params: (
        fs.sgnht(1e-3, mask=positive(params), **SHARED),
        {"shared_batches": True},
    ),
    "observables and a log-prior": lambda params: (
        fs.baoa(0.03, friction=1.0, **SHARED),
        {
            "observables": {
                "norm": fs.tree.norm,
                "row": lambda params: params["0.weight"][0],
                "sum": lambda params: (params["0.weight"] * torch.ones(7, 5)).sum(),
            },
            "log_prior": lambda params: -params["0.weight"].square().sum(),
            "record": ["observable_moments"],
        },
    ),
    "aux": lambda params: (fs.sgld(1e-3, **SHARED), {"record": ["aux"]}),
    "chains that fail": lambda params: (fs.sgld(1e-3, **SHARED), {"max_distance": 0.85}),
    "settings of their own": lambda params: (
        fs.sgld(torch.tensor([1e-3, 2e-3, 1e-3]), nbeta=3.0, localization=1.0),
        {"observables": {"norm": fs.tree.norm}},
    ),
    "looks at all data": lambda params: (fs.rmsprop_sgld(1e-3, **SHARED), {"full_loss": 2}),
    "control variates": lambda params: (
        fs.contour_sgld(1e-3, energy_range=(0.0, 60.0), num_partitions=5, **SHARED),
        {"estimator": fs.control_variates},
    ),
    "a memory of each chain": lambda params: (
        fs.baoa(0.03, friction=1.0, **SHARED),
        {"estimator": lambda loss_fn: fs.svrg(loss_fn, 3)},
    ),
    "a burn-in that ends by itself": lambda params: (
        fs.sgld(1e-3, nbeta=3.0, localization=50.0),
        {"num_burnin_steps": "auto", "num_draws": 150, "num_steps_between_draws": 2},
    ),
}


def inputs() -> Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(1))


class WithAux:
    """A loss that returns a value of each row beside itself."""

    def __call__(self, params: TensorDict, batch: Any) -> tuple[Tensor, Any]:
        hidden = batch[0] @ params["0.weight"].T
        return hidden.square().mean(), {"rows": hidden.mean(0)}


def run(
    mesh: DeviceMesh | None, parts: DeviceMesh | None, how: str, dim: int = 0, **changes: Any
) -> fs.Samples:
    """A run of the network of `sharded_kernels`, whose parameters are sharded over `parts`."""
    model = network()
    params = fs.params_of(model)
    sampler, settings = HOWS[how](params)
    loss_fn = WithAux() if how == "aux" else fs.module_loss(model, cross_entropy)
    settings = BASE | {"params": params, "loss_fn": loss_fn} | settings | changes
    estimator = settings.pop("estimator", lambda loss_fn: loss_fn)
    given, loss_fn = settings.pop("params"), estimator(settings.pop("loss_fn"))
    if parts is not None and isinstance(given, TensorDict):
        given = shard(given, parts, dim)
    data = (inputs(), (inputs().sum(1) > 0).long())
    return fs.sample(loss_fn, given, data, sampler, mesh=mesh, **settings)


def told(samples: fs.Samples) -> dict[str, Any]:
    """What a record holds, put together, and what is concluded from it."""
    found: dict[str, Any] = {name: getattr(samples, name) for name in FIELDS}
    found["state"] = shards.whole(samples.state.to_dict())
    if samples.looks is not None:
        found["looks"] = [getattr(samples.looks, name) for name in ("losses", "virials", "forces")]
    if samples.observable_moments is not None:
        found["moments"] = dict(samples.observable_moments.means.items())
    found["loss"] = samples.initial_loss
    found["chains"] = samples.chains
    plain = [samples.losses, samples.distances, *samples.observables.values()]
    assert not any(shards.is_sharded(value) for value in plain)
    return found


def meshes(mesh: DeviceMesh | None, rows: int) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """The mesh of a run and that of its parameters; one row is the shards alone."""
    if mesh is None or rows == 0:
        return mesh, mesh
    both = init_device_mesh("cpu", (rows, mesh.size() // rows), mesh_dim_names=("chains", "shards"))
    return both, both["shards"]


def sampled(
    mesh: DeviceMesh | None, how: str, rows: int = 0, dim: int = 0, **changes: Any
) -> dict[str, Any]:
    return told(run(*meshes(mesh, rows), how, dim, **changes))


def gone_on(mesh: DeviceMesh | None, how: str, rows: int = 0) -> dict[str, Any]:
    """A run in two parts."""
    places = meshes(mesh, rows)
    first = run(*places, how, num_draws=3)
    more = {"params": first, "init_noise": 0.0, "num_burnin_steps": 0, "num_draws": 1}
    second = run(*places, how, **more)
    return told(second) | {"losses": first.joined(second).losses}


def of_a_module(mesh: DeviceMesh | None, how: str, rows: int = 0) -> dict[str, Any]:
    """Of a module that `fully_shard` has sharded."""
    whole_mesh, parts = meshes(mesh, rows)
    model = made(parts)
    sampler, _ = HOWS[how](fs.params_of(made(None)))
    given, targets = tokens(0)
    return told(
        fs.sample(
            fs.module_loss(model, lambda output, targets: cross_entropy(output, targets)),
            fs.params_of(model),
            (given, targets),
            sampler,
            mesh=whole_mesh,
            observables={"norm": fs.tree.norm},
            **BASE,
        )
    )


def without_a_mesh(mesh: DeviceMesh, how: str) -> dict[str, Any]:
    """All ranks are those of the shards."""
    return told(run(None, mesh, how))


def small(mesh: DeviceMesh | None) -> dict[str, Any]:
    """A leaf of one entry, which the second process has no part of."""
    params = TensorDict({"w": torch.ones(1)})
    if mesh is not None:
        params = shard(params, mesh, 0)
    samples = fs.sample(
        lambda params, batch: (params["w"].square() * batch.mean()).sum(),
        params,
        inputs(),
        fs.sgld(1e-3, bounding_box_size=0.2, **SHARED),
        mesh=mesh,
        **BASE,
    )
    return told(samples)


def failing_in_one_part(mesh: DeviceMesh | None) -> dict[str, Any]:
    """The loss is finite, and the gradient of the last entry alone is not."""
    params = TensorDict({"w": torch.tensor([1.0, 1.0, 1.0, 0.0])})
    if mesh is not None:
        params = shard(params, mesh, 0)
    samples = fs.sample(
        lambda params, batch: params["w"].clamp(min=0).sqrt().sum() * batch.square().mean(),
        params,
        inputs(),
        fs.sgld(1e-3, **SHARED),
        mesh=mesh,
        **BASE | {"init_noise": 0.0},
    )
    return told(samples)


def on_a_nan(mesh: DeviceMesh, changes: dict[str, Any]) -> None:
    """Only the last process has it."""
    params = fs.params_of(network())
    params["2.weight"][-1] = torch.nan
    run(mesh, mesh, "aux", params=params)


def with_settings(mesh: DeviceMesh, changes: dict[str, Any]) -> None:
    run(mesh, mesh, "momenta, masked", **changes)


def with_starts(mesh: DeviceMesh, changes: dict[str, Any]) -> None:
    """Each chain has its own."""
    many = {name: torch.stack([leaf] * 3) for name, leaf in fs.params_of(network()).items()}
    parts = shard(TensorDict(many), mesh, 1)
    run(mesh, None, "aux", params=TensorDict(dict(parts.items()), batch_size=[3]))


def with_another_function(mesh: DeviceMesh, changes: dict[str, Any]) -> None:
    """A sweep, or a part of the parameters."""
    params = shard(fs.params_of(network()), mesh, 0)
    loss_fn = fs.module_loss(network(), cross_entropy)
    if changes["name"] == "restrict":
        fs.restrict(loss_fn, params, {"0.weight": True})
    else:
        settings = {"num_draws": 2, "batch_size": 4, "chains_per_cell": 1, "key": fs.key(0)}
        fs.sweep(loss_fn, params, inputs(), fs.sgld, grid={"lr": [1e-3]}, **settings)


def over_other_ranks(mesh: DeviceMesh, changes: dict[str, Any]) -> None:
    """Parameters on each process alone, and a mesh of both."""
    alone = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("chains", "shards"))
    run(mesh, alone["shards"], "aux")


class Fails:
    """A loss that does something at some call, on one rank."""

    def __init__(self, rank: int, calls: int, does: Callable[[], object]) -> None:
        self.calls_left = calls if dist.get_rank() == rank else -1
        self.does = does
        self.loss_fn = fs.module_loss(network(), cross_entropy)

    def __call__(self, params: TensorDict, batch: Any) -> Tensor:
        self.calls_left -= 1
        if self.calls_left == 0:
            self.does()
        return self.loss_fn(params, batch)


def interrupted(mesh: DeviceMesh, rank: int, rows: int = 0) -> dict[str, Any]:
    """What a run that is interrupted on one rank hands over."""
    fails = Fails(rank, 40, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        run(*meshes(mesh, rows), "momenta, masked", loss_fn=fails, num_draws=30)
    except fs.SamplingInterrupt as stopped:
        return told(stopped.samples)
    raise AssertionError("not interrupted")


def burn() -> None:
    raise OSError("the machine is on fire")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(
    mesh: DeviceMesh, rank: int, calls: int, does: Callable[[], object]
) -> tuple[str, Tensor]:
    """What a run says, of which one rank stops, and the losses until then."""
    fails = Fails(rank, calls, does)
    try:
        run(mesh, mesh, "momenta, masked", loss_fn=fails, num_draws=30)
    except fs.SamplingError as error:
        return str(error), error.samples.losses
    raise AssertionError("not stopped")
