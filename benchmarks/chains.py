"""Speed of one step of many chains: this library and its peers, side by side in one process.

One step of every contender in turn, so that a noisy machine disturbs all alike; medians, ratios.
Same networks, batch (shared by the chains), settings and dtype (float32). Peers that take no
localization have it in their log-posterior, as their documentation does with priors.

    make bench
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import arguments, environment, medians, write
from networks import WORKLOADS, Workload, criterion
from peers import (
    LOCALIZATION,
    LR,
    NBETA,
    STEPS_PER_SCAN,
    Step,
    bare_loop,
    blackjax_jitted,
    posteriors_vmapped,
    published_loop,
)

import funcsgmcmc as fs
from funcsgmcmc import random, tree
from funcsgmcmc.kernel import chain_kernel, chains_kernel, step_noise


def ours(workload: Workload) -> dict[str, Step]:
    """Vmapped and looped, eager and compiled, with metrics and without."""
    model = workload.make()
    loss_fn, params = fs.module_loss(model, criterion), fs.params_of(model)
    sampler = fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION, anchor=params)
    keys = fs.fold_in(fs.key(0), torch.arange(workload.chains))

    def vmapped(wrap: Callable[..., Any], **settings: Any) -> Step:
        kernel = wrap(chains_kernel(loss_fn, shared_batch=True, **settings))
        state = sampler.init(params.expand(workload.chains))

        def step() -> None:
            nonlocal state
            state, _ = kernel(sampler, state, workload.batch, keys)

        return step

    def looped(wrap: Callable[..., Any]) -> Step:
        kernel = wrap(chain_kernel(loss_fn))
        states = [sampler.init(params) for _ in range(workload.chains)]

        def step() -> None:
            for chain, state in enumerate(states):
                states[chain], _ = kernel(sampler, state, workload.batch, keys[chain])

        return step

    def plain(kernel: Any) -> Any:
        return kernel

    noise = fs.compiled(step_noise)
    return {
        "eager": vmapped(plain),
        "eager, metrics": vmapped(plain, metrics=True),
        "eager, compiled noise": vmapped(plain, noise=noise),
        "compiled": vmapped(fs.compiled),
        "compiled, metrics": vmapped(fs.compiled, metrics=True),
        "loop": looped(plain),
        "loop, compiled": looped(fs.compiled),
    }


def noise(workload: Workload) -> dict[str, Step]:
    """The noise of a step alone, against torch's own generator."""
    size = tree.size(fs.params_of(workload.make()))
    keys = fs.fold_in(fs.key(0), torch.arange(workload.chains))
    step = torch.zeros(workload.chains, dtype=torch.int64)
    compiled, buffer = fs.compiled(step_noise), torch.empty(workload.chains, size)
    return {
        "noise, normal_": lambda: buffer.normal_(),
        "noise, eager": lambda: step_noise(keys, step, size, torch.float32),
        "noise, compiled": lambda: compiled(keys, step, size, torch.float32),
        "normals alone, eager": lambda: random.normal(keys, (size,), torch.float32),
    }


def contenders(workload: Workload) -> dict[str, Step]:
    """Everything that is measured on a workload."""
    found = {"bare loop": bare_loop(workload)} | ours(workload) | noise(workload)
    if workload.sizes is None:
        return found
    return found | {
        "published loop": published_loop(workload),
        "published loop, metrics": published_loop(workload, save_metrics=True),
        "posteriors, vmapped": posteriors_vmapped(workload),
        **blackjax_jitted(workload),
    }


def main() -> None:
    options = arguments(__doc__ or "", rounds=30)
    report = environment("posteriors", "blackjax", "jax", "devinterp") | {"milliseconds": {}}
    for workload in WORKLOADS.values():
        figures = medians(contenders(workload), options.rounds)
        if "blackjax, scan" in figures:
            figures["blackjax, scan"] /= STEPS_PER_SCAN
        report["milliseconds"][workload.title] = figures
        print(f"\n{workload.title}\n{'':26}      ms   / bare loop")
        for name, milliseconds in figures.items():
            ratio = milliseconds / figures["bare loop"]
            print(f"  {name:26} {milliseconds:7.2f}   {ratio:5.2f}", flush=True)
    write(report, options.json)


if __name__ == "__main__":
    main()
