"""A sweep in one run, against its cells one after the other with the published package.

    python benchmarks/sweeping.py [--steps 2000] [--share 0.1] [--threads 2]
        [--picture docs/benchmarks/sweep.png]

36 cells of 4 chains on network C of the benchmarks with scikit-learn's digits, minibatches of 128.
The published package (devinterp 2.0.1) steps chain after chain; `--share` says what part of its
steps is made, and scaled. Then the cost of cells that diverge: rounds of the same grid, with and
without a third that does. Chains of a cell share their keys with those of the other cells; "shared
batches" has one minibatch a step for all chains, in place of one for each of the four. "First" is
with compilation, from an empty cache.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits

CHAINS, BATCH, LOCALIZATION = 4, 128, 100.0
LRS = [1e-5, 5e-5, 2e-4, 1e-3, 4e-3, 2e-2]
NBETAS = [0.0, 30.0, 60.0, 120.0, 240.0, 480.0]


def ours(model: nn.Module, data: tuple[Tensor, Tensor], lrs: list[float], **run: Any) -> Any:
    return fs.sweep(
        fs.module_loss(model, cross_entropy),
        fs.params_of(model),
        data,
        fs.sgld,
        grid={"lr": lrs, "nbeta": NBETAS, "localization": LOCALIZATION},
        chains_per_cell=CHAINS,
        batch_size=BATCH,
        key=fs.key(0),
        **run,
    )


def published(model: nn.Module, data: tuple[Tensor, Tensor], num_steps: int) -> None:
    """Each cell's chains, one after the other, as the package samples them."""
    from devinterp.optim import SGMCMC

    inputs, targets = data
    for lr in LRS:
        for nbeta in NBETAS:
            for chain in range(CHAINS):
                torch.manual_seed(chain)
                own = copy.deepcopy(model)
                optimizer = SGMCMC.sgld(
                    own.parameters(), lr=lr, nbeta=nbeta, localization=LOCALIZATION
                )
                losses = torch.empty(num_steps)
                for step in range(num_steps):
                    index = torch.randint(len(inputs), (BATCH,))
                    optimizer.zero_grad()
                    loss = cross_entropy(own(inputs[index]), targets[index])
                    loss.backward()
                    optimizer.step()
                    losses[step] = loss.detach()


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="devinterp")
    torch.manual_seed(0)
    data = digits.load()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    digits.train(model, *data, epochs=600)
    steps, burnin = options.steps, options.steps // 4
    run = {"num_draws": steps - burnin, "num_burnin_steps": burnin, "full_loss": 0}
    few = max(1, round(steps * options.share))
    # Interleaved, since a machine's speed drifts.
    theirs = [seconds(lambda: published(model, data, few))]
    ways: dict[str, dict[str, Any]] = {
        "eager": {"compile": False},
        "compiled, first": {},
        "compiled, again": {},
        "compiled, with looks at all data": {"full_loss": 50},
        "compiled, shared batches, first": {"shared_batches": True},
        "compiled, shared batches, again": {"shared_batches": True},
    }
    times = {
        name: seconds(lambda way=way: ours(model, data, LRS, **run | {"compile": True} | way))
        for name, way in ways.items()
    }
    theirs.append(seconds(lambda: published(model, data, few)))
    whole = statistics.mean(theirs) * steps / few
    print(f"published package, cell after cell: {whole:.0f} s (from {few} of {steps} steps)")
    for name, took in times.items():
        print(f"sweep, {name}: {took:.0f} s, {whole / took:.1f} times as fast")

    short = {"num_draws": steps // 20, "full_loss": 0, "compile": True}
    ratios = []
    for _ in range(options.rounds):
        took = [
            seconds(lambda lrs=lrs: ours(model, data, lrs, **short))
            for lrs in (LRS, [*LRS[:4], 1e30, 1e35])
        ]
        ratios.append(took[1] / took[0])
    print(f"with a third of the cells diverged: {statistics.median(ratios):.3f} times as long")
    if options.picture is not None:
        swept = ours(model, data, LRS, compile=True, **run | {"full_loss": 50})
        print(swept)
        fs.plots.plot_sweep(swept).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
