"""Speed of vmapped SGLD: this library against posteriors, side by side in one process.

One step of every contender in turn, so that a noisy machine disturbs all alike; medians, and ratios
to posteriors' vmapped step. Same networks, batch (shared by the chains), settings and dtype;
posteriors takes the localization in its log-posterior, as its documentation does with priors.

    make bench
"""

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.kernel import chains_kernel, step_noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import posteriors

NBETA, LOCALIZATION, LR = 100.0, 1.0, 1e-4
WORKLOADS = {
    "A: MLP 64-128-128-10, 32 chains, batch 64": ((64, 128, 128, 10), 32, 64),
    "B: MLP 64-512-512-10, 8 chains, batch 64": ((64, 512, 512, 10), 8, 64),
    "C: MLP 64-64-10, 64 chains, batch 128": ((64, 64, 10), 64, 128),
}


def network(sizes: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def ours(model: nn.Module, batch: tuple[Tensor, Tensor], chains: int) -> dict[str, Callable]:
    """Eager, eager with compiled noise, compiled."""
    loss_fn = fs.module_loss(model, cross_entropy)
    sampler = fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION, anchor=fs.params_of(model))
    keys = fs.fold_in(fs.key(0), torch.arange(chains))
    kernels = {
        "eager": chains_kernel(loss_fn, shared_batch=True),
        "eager, compiled noise": chains_kernel(
            loss_fn, shared_batch=True, noise=fs.compiled(step_noise)
        ),
        "compiled": fs.compiled(chains_kernel(loss_fn, shared_batch=True)),
    }

    def stepper(kernel: Callable) -> Callable[[], None]:
        state = sampler.init(fs.params_of(model).expand(chains))

        def step() -> None:
            nonlocal state
            state, _ = kernel(sampler, state, batch, keys)

        return step

    return {name: stepper(kernel) for name, kernel in kernels.items()}


def theirs(model: nn.Module, batch: tuple[Tensor, Tensor], chains: int) -> dict[str, Callable]:
    """posteriors, vmapped over chains."""
    anchor = dict(fs.params_of(model).items())

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]):
        inputs, targets = batch
        loss = cross_entropy(functional_call(model, params, (inputs,)), targets)
        pull = sum((params[name] - anchor[name]).square().sum() for name in anchor)
        return -NBETA * loss - LOCALIZATION / 2 * pull, loss

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=LR / 2)
    step_chains = torch.vmap(transform.update, in_dims=(0, None), randomness="different")
    start = {name: leaf.expand(chains, *leaf.shape).clone() for name, leaf in anchor.items()}
    state = torch.vmap(transform.init)(start)

    def step() -> None:
        nonlocal state
        state, _ = step_chains(state, batch)

    return {"posteriors, vmapped": step}


def medians(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds a step, one step of each in turn after three to warm up."""
    for _ in range(3):
        for step in contenders.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each contender")
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "tensordict", "posteriors")},
        "milliseconds": {},
    }
    print(report["machine"], report["versions"])
    for title, (sizes, chains, batch_size) in WORKLOADS.items():
        torch.manual_seed(0)
        model = network(sizes)
        batch = (torch.randn(batch_size, sizes[0]), torch.randint(sizes[-1], (batch_size,)))
        contenders = theirs(model, batch, chains) | ours(model, batch, chains)
        figures = medians(contenders, arguments.rounds)
        report["milliseconds"][title] = figures
        reference = figures["posteriors, vmapped"]
        print(f"\n{title}")
        for name, milliseconds in figures.items():
            print(f"  {name:24} {milliseconds:8.2f} ms   {milliseconds / reference:5.2f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
