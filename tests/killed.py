"""Runs that are killed at random moments, and resumed: a process that makes and kills others.

    python tests/killed.py FOLDER CASE SEED

It forks, so that a killed run need not start Python again, and says whether the resumed run is
bit for bit that which nobody killed.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import CASES
from funcsgmcmc.runs.encoding import digest
from interruptions import batches_of_8, of_torchdata
from problems import classification, run

NUM_DRAWS = 60
DATA: dict[str, Callable[[], dict]] = {
    "tensors": dict,
    "list": lambda: {"data": batches_of_8(), "batch_size": None},
    "stateful": lambda: {
        "data": of_torchdata()(batches_of_8()),
        "batch_size": None,
        "initial_loss": 1.0,
    },
}
HOW = {"vmap": {}, "loop": {"chain_method": "loop"}, "compiled": {"compile": True}}


def sample(number: int, **store) -> fs.Samples:
    """The run of a case: each sampler, kind of data and way to run chains in turn."""
    torch.set_default_dtype(torch.float64)
    params = fs.params_of(classification()[0])
    case = CASES[number % len(CASES)]
    data = list(DATA.values())[number % len(DATA)]()
    # Compiling takes seconds: one run in ten.
    how = "compiled" if number % 10 == 9 else ("vmap", "loop")[number % 2]
    settings = {"num_chains": 3, "num_draws": NUM_DRAWS, "num_burnin_steps": 2, "chunk_size": None}
    return run(case.make(params), **(settings | data | HOW[how] | store))


def digest_of(samples: fs.Samples) -> str:
    """A digest of everything that a run recorded, and of its state."""
    recorded = (
        samples.losses,
        samples.distances,
        samples.draws,
        samples.draw_moments,
        samples.metrics,
        samples.log_weights,
        samples.state,
    )
    leaves = [leaf for leaf in pytree.tree_leaves(recorded) if isinstance(leaf, torch.Tensor)]
    return digest([digest(leaf) for leaf in leaves])


def in_a_process(work: Callable[[], str]) -> tuple[int, int]:
    """Start some work in a forked process; returns its number, and where it writes its result."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        result = work()
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    return child, reading


def result_of(child: int, reading: int) -> str:
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if status:
        raise RuntimeError(f"a run that nobody killed ended with {status}")
    return text


def main() -> None:
    folder, number, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    start = time.monotonic()
    wanted = result_of(*in_a_process(lambda: digest_of(sample(number))))
    seconds = time.monotonic() - start

    def kept() -> str:
        # At every step, so that many are killed while they write.
        store = {"store": folder / "run.zarr", "resume": True, "checkpoint_seconds": 0.0}
        return digest_of(sample(number, **store))

    num_killed = 0
    for _ in range(3):
        child, reading = in_a_process(kept)
        time.sleep(chance.uniform(0.3, 1.5) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        num_killed += os.WIFSIGNALED(status)
    found = result_of(*in_a_process(kept))
    print(f"{'same' if found == wanted else 'different'} {num_killed}")


if __name__ == "__main__":
    main()
