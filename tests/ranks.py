"""Processes of one process group, on loopback, that call functions of this module for tests."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from cases import BY_NAME
from funcsgmcmc.runs.restricted import sample_components
from interruptions import batches_of_8
from problems import classification, observables, run

TIMEOUT = 20.0


class Ranks:
    """Processes that wait for calls, those with the first ranks for calls of a few."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, address, timeout, there), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, function: Callable, *arguments: Any, size: int | None = None) -> None:
        """Start a call, of `function(mesh, …)`, whose mesh has the first so many ranks."""
        for pipe in self.pipes:
            pipe.send((function, arguments, size or len(self.pipes)))

    def result(self, rank: int, *, timeout: float = 120.0) -> Any:
        """What a rank returns, or the exception that it raises; None of one without a part."""
        pipe = self.pipes[rank]
        try:
            assert pipe.poll(timeout), f"rank {rank} has not answered"
            return pipe.recv()
        except EOFError:
            return EOFError(f"rank {rank} has ended")

    def results(self) -> list[Any]:
        """What each rank returns."""
        return [self.result(rank) for rank in range(len(self.pipes))]

    def call(self, function: Callable, *arguments: Any, size: int | None = None) -> list[Any]:
        """Call a function on the first so many ranks, and give what each returns.

        Raises:
            AssertionError: One raised something.
        """
        self.start(function, *arguments, size=size)
        results = self.results()
        for result in results:
            if isinstance(result, BaseException):
                raise AssertionError("".join(traceback.format_exception(result)))
        return results[: size or len(results)]

    def errors(self, function: Callable, *arguments: Any, size: int | None = None) -> list[str]:
        """Kinds and messages of what each rank raises."""
        self.start(function, *arguments, size=size)
        results = self.results()[: size or len(self.pipes)]
        return [f"{type(each).__name__}: {each}" for each in results]

    def end(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def ranks_of(size: int, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Ranks that end with the context."""
    ranks = Ranks(size, timeout)
    try:
        yield ranks
    finally:
        ranks.end()


def _serve(rank: int, size: int, address: str, timeout: float, pipe: Any) -> None:
    """Answer calls."""
    # A shell's background jobs ignore it, and their children do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        function, arguments, number = pipe.recv()
        mesh = DeviceMesh("cpu", list(range(number)))
        try:
            result = function(mesh, *arguments) if rank < number else None
        except BaseException as error:
            error.add_note("".join(traceback.format_exception(error)))
            result = error
        pipe.send(result)


def _sgnht() -> fs.samplers.Sampler:
    return fs.sgnht(1e-3, nbeta=3.0, localization=1.0)


def _sweep() -> fs.samplers.Sampler:
    return fs.sgld(torch.linspace(1e-3, 2e-3, 12), nbeta=3.0, localization=1.0)


def _starts() -> TensorDict:
    """Where 12 chains start, each elsewhere."""
    params = fs.params_of(classification()[0])
    return torch.stack([params.apply(lambda leaf, i=i: leaf + 0.01 * i) for i in range(12)])


# Shares of 6 and of 4 chains, both of whole chunks.
BASE = {
    "num_chains": 12,
    "num_draws": 6,
    "num_burnin_steps": 3,
    "num_steps_between_draws": 2,
    "chunk_size": 2,
}
# Made where they are used: functions do not travel.
HOWS: dict[str, Callable[[], tuple[fs.samplers.Sampler, dict[str, Any]]]] = {
    "chunks": lambda: (_sgnht(), {"observables": observables()}),
    "uneven, looped over": lambda: (_sgnht(), {"num_chains": 7, "chain_method": "loop"}),
    "one chain each": lambda: (_sgnht(), {"num_chains": 3, "chunk_size": 1}),
    "a sweep": lambda: (_sweep(), {"initial_loss": torch.linspace(1, 2, 12)}),
    "starts of their own": lambda: (
        _sgnht(),
        {"params": _starts(), "record": ["draws", "metrics"]},
    ),
    "epochs": lambda: (_sgnht(), {"minibatches": "epochs"}),
    "shared batches": lambda: (_sgnht(), {"shared_batches": True}),
    "a list": lambda: (_sgnht(), {"data": batches_of_8(), "batch_size": None}),
    "looks at all data": lambda: (_sgnht(), {"full_loss": 3}),
    "a burn-in that ends by itself": lambda: (
        fs.sgld(1e-3, nbeta=3.0, localization=50.0),
        {"num_burnin_steps": "auto", "num_draws": 120, "chunk_size": 6},
    ),
    "indices of their own": lambda: (_sgnht(), {"chain_offset": torch.arange(12) % 4}),
    "other indices": lambda: (_sgnht(), {"chain_offset": 5}),
    "weights": lambda: (BY_NAME["contour_sgld"].make(fs.params_of(classification()[0])), {}),
    "memory of each chain": lambda: (_sgnht(), {"estimator": lambda loss_fn: fs.svrg(loss_fn, 4)}),
}


def sampled(mesh: DeviceMesh | None, how: str, changes: Mapping[str, Any] = {}) -> fs.Samples:
    """The classification problem, run in some way, with some settings changed."""
    sampler, settings = HOWS[how]()
    settings = {"loss_fn": FailsAt(-1, -1, raise_error)} | BASE | settings | dict(changes)
    estimator = settings.pop("estimator", lambda loss_fn: loss_fn)
    return run(sampler, mesh=mesh, **(settings | {"loss_fn": estimator(settings["loss_fn"])}))


def swept(mesh: DeviceMesh | None, changes: Mapping[str, Any]) -> dict[str, fs.Samples]:
    """The record of each cell of a sweep."""
    sweep = fs.sweep(
        fs.module_loss(classification()[0], cross_entropy),
        fs.params_of(classification()[0]),
        classification()[1],
        fs.sgld,
        grid={"lr": [1e-3, 2e-3, 1e300], "nbeta": [1.0, 3.0]},
        chains_per_cell=2,
        num_draws=5,
        batch_size=16,
        key=fs.key(0),
        record=["draws", "metrics"],
        chunk_size=2,
        mesh=mesh,
        **changes,
    )
    return sweep.samples


def of_components(mesh: DeviceMesh | None, changes: Mapping[str, Any]) -> dict[str, fs.Samples]:
    """The record of each component of the network: a layer, and rows of another."""
    model, data = classification()
    return sample_components(
        fs.module_loss(model, cross_entropy),
        fs.params_of(model),
        data,
        _sgnht(),
        {"first": "0.*", "rows": {"2.weight": torch.tensor([0, 2])}},
        num_chains=6,
        num_draws=4,
        batch_size=8,
        key=fs.key(0),
        record=["draws", "metrics"],
        chunk_size=2,
        observables={"norm": fs.tree.norm},
        mesh=mesh,
        **changes,
    )


class FailsAt:
    """A loss that raises an error, or kills its process, at some call on one rank."""

    def __init__(self, rank: int, calls: int, fails: Callable[[], object]) -> None:
        self.loss_fn = fs.module_loss(classification()[0], cross_entropy)
        here = dist.get_rank() if dist.is_initialized() else 0
        self.calls_left = calls if here == rank else -1
        self.fails = fails

    def __call__(self, params, batch):
        self.calls_left -= 1
        if self.calls_left == 0:
            self.fails()
        return self.loss_fn(params, batch)


def raise_error() -> None:
    raise OSError("the machine is on fire")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(
    mesh: DeviceMesh,
    rank: int,
    calls: int,
    fails: Callable[[], object],
    how: str,
    changes: Mapping[str, Any] = {},
) -> fs.Samples:
    """The same, where one rank fails at some call of the loss."""
    return sampled(mesh, how, {"loss_fn": FailsAt(rank, calls, fails), **changes})


def interrupted(mesh: DeviceMesh, *arguments: Any) -> fs.Samples:
    """What a run that is interrupted hands over."""
    # A shell in the background lets its processes ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failing(mesh, *arguments)
    except fs.SamplingInterrupt as stopped:
        return stopped.samples
    finally:
        signal.signal(signal.SIGINT, before)
    raise AssertionError("not interrupted")


def unlike(mesh: DeviceMesh, rank: int, changes: Mapping[str, Any]) -> fs.Samples:
    """A run that one rank makes with other settings."""
    return sampled(mesh, "chunks", changes if mesh.get_rank() == rank else {})


def other_data(mesh: DeviceMesh) -> fs.Samples:
    """A run whose last rank has other inputs."""
    inputs, targets = classification()[1]
    return sampled(mesh, "chunks", {"data": (inputs + (mesh.get_rank() == 2), targets)})


def other_batches(mesh: DeviceMesh) -> fs.Samples:
    """A run on a loader that shuffles, in an order of each rank."""
    order = torch.Generator().manual_seed(mesh.get_rank())
    loader = DataLoader(TensorDataset(*classification()[1]), 8, shuffle=True, generator=order)
    return sampled(mesh, "chunks", {"data": loader, "batch_size": None})


def with_a_mesh_of_two_dimensions(mesh: DeviceMesh) -> fs.Samples:
    return sampled(DeviceMesh("cpu", [[0], [1]]), "chunks")


def said(mesh: DeviceMesh, how: str, changes: Mapping[str, Any]) -> list[str]:
    """The lines and warnings of a run."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("funcsgmcmc")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sampled(mesh, how, changes)
    logger.removeHandler(handler)
    return [*heard, *(str(each.message) for each in warned)][::-1]


def alone(mesh: DeviceMesh, how: str) -> fs.Samples | None:
    """A run of the first rank, of which the others know nothing."""
    one = DeviceMesh("cpu", [0])  # made by all: else their later groups would have other names
    return sampled(one, how) if mesh.get_rank() == 0 else None


def digits(mesh: DeviceMesh | None, is_sweep: bool, changes: Mapping[str, Any]) -> fs.Samples:
    """The digits network of the example, at its start: twelve chains, or a sweep of them."""
    from sklearn.datasets import load_digits  # of the extra `examples`

    known = load_digits()
    inputs = torch.tensor(known.data / 16, dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).float()
    lr = torch.linspace(1e-4, 1e-3, 12) if is_sweep else 1e-3
    return fs.sample(
        fs.module_loss(model, cross_entropy),
        fs.params_of(model),
        (inputs, torch.tensor(known.target)),
        fs.sgld(lr, nbeta=240.0, localization=100.0),
        num_chains=12,
        num_draws=20,
        num_burnin_steps=20,
        batch_size=128,
        key=fs.key(0),
        record=["draws", "metrics"],
        mesh=mesh,
        **{"chunk_size": 2, **changes},
    )
