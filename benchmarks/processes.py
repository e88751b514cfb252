"""Chains over two processes against one, and a model sharded over two against the whole one.

    python benchmarks/processes.py [--small] [--networks A D]

Each process has one thread. Times are of steps, compilation and start left out; the share of
exchanges is the time that a process spends in asking for others, meeting and gathering.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from measuring import MEBIBYTE, _status, processor

ROUNDS = 5


def measure(small: bool, networks: list[str]) -> dict[str, Any]:
    """Ratios of chains a second and of peak memory, medians of alternating rounds."""
    report: dict[str, Any] = {"device": processor()}
    rounds = 1 if small else ROUNDS
    steps = {"A": 40, "D": 4} if small else {"A": 600, "D": 30}
    for name in networks:
        num_steps = steps[name]
        both = {1: [], 2: []}
        for _ in range(rounds):
            for size, found in both.items():
                found.append(_in_processes(size, "chains", name, str(num_steps)))
        # The slowest process decides.
        seconds = {
            size: statistics.median(max(each["seconds"] for each in rank) for rank in found)
            for size, found in both.items()
        }
        shares = [max(each["share"] for each in ranks) for ranks in both[2]]
        report[f"network {name}"] = {
            "chains a second, two to one": seconds[1] / seconds[2],
            "share of exchanges": statistics.median(shares),
            "share of exchanges between records": statistics.median(
                max(each["between"] for each in ranks) for ranks in both[2]
            ),
        }
        print(f"  network {name}: {report[f'network {name}']}", flush=True)
    layers = "4" if small else "32"
    for draws in ("generator", "key"):
        peaks = {
            size: max(each["peak"] for each in _in_processes(size, "memory", layers, draws))
            for size in (1, 2)
        }
        name = f"peak of a rank to the whole, noise from a {draws}"
        report[name] = peaks[2] / peaks[1]
        print(f"  {name}: {report[name]:.2f} ({peaks})", flush=True)
    return report


def _in_processes(size: int, *arguments: str) -> list[dict[str, float]]:
    """What each of some processes of one group reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(size):
        # The allocator gives freed memory back at once, so that peaks are those of tensors.
        settings = {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
        }
        if arguments[0] == "memory":
            settings["MALLOC_MMAP_THRESHOLD_"] = "65536"
        command = [sys.executable, __file__, *arguments]
        environment = os.environ | settings
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
    answers = [process.communicate()[0] for process in processes]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def chains(name: str, num_steps: int) -> dict[str, float]:
    """Seconds of a run's steps after the first few, and the share of exchanges with others."""
    from networks import WORKLOADS, criterion

    import funcsgmcmc as fs
    from funcsgmcmc.runs.processes import Processes, Ranks

    workload = WORKLOADS[name]
    model = workload.make()
    spent = {"meeting": 0.0, "asking": 0.0}

    def timed(kind: str, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                spent[kind] += time.perf_counter() - start

        return call

    for kind, methods in {"meeting": ("meet", "gather"), "asking": ("check",)}.items():
        for method in methods:
            for processes in (Ranks, Processes):
                if method in vars(processes):
                    setattr(processes, method, timed(kind, getattr(processes, method)))
    times: list[float] = []
    inputs, targets = workload.batch

    def note(draw: Any) -> None:
        times.append(time.perf_counter())
        if len(times) == 1:
            spent["asking"] = 0.0

    # Convolutions are slower with weights of each chain's own than one chain after the other.
    how: dict[str, Any] = {"chain_method": "loop"}
    if name != "D":
        how = {"chunk_size": workload.chains // 2}
    fs.sample(
        fs.module_loss(model, criterion),
        fs.params_of(model),
        (inputs, targets),
        fs.sgld(1e-5, nbeta=10.0, localization=1.0),
        num_chains=workload.chains,
        num_draws=2,
        num_burnin_steps=3,
        num_steps_between_draws=num_steps,
        **how,
        initial_loss=1.0,
        full_loss=0,
        key=fs.key(0),
        on_draw=note,
    )
    seconds = times[1] - times[0]
    return {
        "seconds": seconds,
        # Meetings wait for others to start, too: they are of the whole run.
        "share": spent["meeting"] / (spent["meeting"] + seconds),
        "between": spent["asking"] / seconds,
    }


def memory(layers: int, draws: str) -> dict[str, float]:
    """MiB that a model and its sampler take at their peak, beyond what is there before."""
    import gc
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import compat
    import funcsgmcmc as fs

    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    torch.manual_seed(0)
    width = 1024
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    if dist.get_world_size() > 1:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # without the making of the whole model
    optimizer = compat.SGMCMC.sgld(
        model.parameters(), lr=1e-6, nbeta=10.0, localization=1.0, save_metrics=True
    )
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, width)).square().mean().backward()
        key = fs.random.fold_in(fs.key(0), step) if draws == "key" else None
        optimizer.step(noise_generator=key)
    return {"peak": _status("VmHWM") - before, "parameters": layers * width**2 * 4 / MEBIBYTE}


def program(kind: str, *arguments: str) -> None:
    """What one process does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if kind == "chains":
        report = chains(arguments[0], int(arguments[1]))
    else:
        report = memory(int(arguments[0]), arguments[1])
    print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] in (["chains"], ["memory"]):
        program(*sys.argv[1:])
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--small", action="store_true", help="few steps, to see that it runs")
        parser.add_argument("--networks", nargs="*", choices=["A", "D"], default=["A", "D"])
        options = parser.parse_args()
        print(json.dumps(measure(options.small, options.networks), indent=2))
