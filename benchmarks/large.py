"""One large chain: the peak of memory beside the parameters, and the time of a step.

Each sampler runs in a process of its own, whose allocator hands freed memory back at once, so that
the peak of pages in memory is that of the tensors alive.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from typing import Any

from measuring import MEBIBYTE, Figure, peak_memory, processor

WIDTH, NUM_LAYERS = 2048, 12  # 50,331,648 parameters
NUM_LEAVES = 2000
SAMPLERS = ("sgld", "rmsprop_sgld", "sgnht")


def measure() -> dict[str, Any]:
    """Copies of the parameters, seconds a step, and seconds a step of a tree of 2,000 leaves."""
    report = {
        name: {
            "copies": _in_a_process("copies", name, {"MALLOC_MMAP_THRESHOLD_": "4194304"}),
            "seconds": Figure.of(_in_a_process("seconds", name, {})),
            "leaves": Figure.of(_in_a_process("leaves", name, {})),
        }
        for name in SAMPLERS
    }
    for name, value in report.items():
        print(f"  {name:14} {value}", flush=True)
    return {"device": processor(), "samplers": report}


def _in_a_process(what: str, sampler: str, environment: dict[str, str]) -> Any:
    command = [sys.executable, __file__, what, sampler]
    answer = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(answer.stdout.splitlines()[-1])


def copies(name: str) -> float:
    """Peak of memory beyond the parameters, in copies of them."""
    import torch

    run, params = _network(name)
    size = sum(leaf.numel() * leaf.itemsize for leaf in params.values())
    return peak_memory(lambda: run(4), torch.device("cpu")) * MEBIBYTE / size


def seconds(name: str) -> list[float]:
    """Times of steps of the network."""
    run, _ = _network(name)
    return _times_of_steps(run, 14)


def leaves(name: str) -> list[float]:
    """Times of steps of a tree of many small leaves."""
    import torch

    import funcsgmcmc as fs

    params = {f"leaf{i}": torch.randn(10) for i in range(NUM_LEAVES)}

    def run(num_steps: int, data: Any = None) -> None:
        fs.sample(
            lambda params, batch: torch.cat(list(params.values())).square().mean(),
            params,
            [torch.zeros(1)] if data is None else data(),
            getattr(fs, name)(1e-4, nbeta=10.0, localization=1.0),
            num_chains=1,
            num_draws=num_steps,
            key=fs.key(0),
            chain_method="loop",
            initial_loss=1.0,
        )

    return _times_of_steps(run, 30)


def _network(name: str) -> tuple[Any, Any]:
    """The function that runs one chain of a network, and its parameters."""
    import torch
    from torch import nn

    import funcsgmcmc as fs

    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)]
    params = fs.params_of(nn.Sequential(*layers))
    loss = fs.module_loss(nn.Sequential(*layers), nn.functional.mse_loss)
    batch = torch.randn(8, WIDTH), torch.randn(8, WIDTH)

    def run(num_steps: int, data: Any = None) -> None:
        fs.sample(
            loss,
            params,
            [batch] if data is None else data(batch),
            getattr(fs, name)(1e-7, nbeta=10.0, localization=1.0),
            num_chains=1,
            num_draws=num_steps,
            key=fs.key(0),
            chain_method="loop",
            initial_loss=1.0,
        )

    return run, params


def _times_of_steps(run: Any, num_steps: int) -> list[float]:
    """The times between two batches, after some steps."""
    times: list[float] = []

    def batches(batch: Any = None) -> Any:
        while True:
            times.append(time.perf_counter())
            yield batch

    run(num_steps, batches)
    return [after - before for before, after in itertools.pairwise(times[4:])]


if __name__ == "__main__":
    print(
        json.dumps(
            {"copies": copies, "seconds": seconds, "leaves": leaves}[sys.argv[1]](sys.argv[2])
        )
    )
