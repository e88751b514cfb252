"""Speed of vmapped SGLD: this library against posteriors, side by side in one process.

One step of every contender in turn, so that a noisy machine disturbs all alike; medians, and ratios
to posteriors' vmapped step. Same networks, batch (shared by the chains), settings and dtype;
posteriors takes the localization in its log-posterior, as its documentation does with priors.

    make bench
"""

import warnings
from collections.abc import Callable

import torch
from measuring import arguments, batch, environment, medians, network, write
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


def main() -> None:
    options = arguments(__doc__ or "", rounds=60)
    report = environment("posteriors") | {"milliseconds": {}}
    for title, (sizes, chains, batch_size) in WORKLOADS.items():
        model, data = network(sizes), batch(sizes, batch_size)
        contenders = theirs(model, data, chains) | ours(model, data, chains)
        figures = medians(contenders, options.rounds)
        report["milliseconds"][title] = figures
        reference = figures["posteriors, vmapped"]
        print(f"\n{title}")
        for name, milliseconds in figures.items():
            print(f"  {name:24} {milliseconds:8.2f} ms   {milliseconds / reference:5.2f}")
    write(report, options.json)


if __name__ == "__main__":
    main()
