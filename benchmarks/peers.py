"""What this library is compared with, each at its best documented use: one step of all chains."""

import copy
import warnings
from typing import Any

import torch
from measuring import Call
from networks import Workload, criterion
from torch import Tensor
from torch.func import functional_call

import funcsgmcmc as fs

NBETA, LOCALIZATION, LR = 100.0, 1.0, 1e-6
STEPS_PER_SCAN = 10


def bare_loop(workload: Workload) -> Call:
    """Forward and backward, one chain after the other: no sampler at all."""
    inputs, targets = workload.batch
    models = [copy.deepcopy(workload.make()) for _ in range(workload.chains)]

    def step() -> None:
        for model in models:
            model.zero_grad()
            criterion(model(inputs), targets).backward()

    return step


def published_loop(workload: Workload, **settings: Any) -> Call:
    """The optimizer of devinterp 2.0.1, in its loop over chains."""
    from devinterp.optim import SGMCMC

    inputs, targets = workload.batch
    models = [copy.deepcopy(workload.make()) for _ in range(workload.chains)]
    optimizers = [
        SGMCMC.sgld(model.parameters(), lr=LR, nbeta=NBETA, localization=LOCALIZATION, **settings)
        for model in models
    ]

    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()

    return step


def posteriors_vmapped(workload: Workload) -> Call:
    """posteriors, vmapped over chains.

    Neither its updates in place nor `torch.compile` can be had under vmap (0.1.3: both raise).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import posteriors

    model = workload.make()
    anchor = dict(fs.params_of(model).items())

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]):
        inputs, targets = batch
        loss = criterion(functional_call(model, params, (inputs,)), targets)
        pull = sum((params[name] - anchor[name]).square().sum() for name in anchor)
        return -NBETA * loss - LOCALIZATION / 2 * pull, loss

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=LR / 2)
    step_chains = torch.vmap(transform.update, in_dims=(0, None), randomness="different")
    start = {
        name: leaf.expand(workload.chains, *leaf.shape).clone() for name, leaf in anchor.items()
    }
    state = torch.vmap(transform.init)(start)

    def step() -> None:
        nonlocal state
        state, _ = step_chains(state, workload.batch)

    return step


def blackjax_jitted(workload: Workload) -> dict[str, Call]:
    """blackjax, vmapped over chains and jitted: one step a call, and steps within a scan."""
    import blackjax
    import jax
    import jax.numpy as jnp

    assert workload.sizes is not None
    model = workload.make()
    leaves = {name: jnp.asarray(leaf.detach().numpy()) for name, leaf in model.named_parameters()}
    layers = sorted({name.split(".")[0] for name in leaves}, key=int)
    batch = tuple(jnp.asarray(leaf.numpy()) for leaf in workload.batch)

    def log_posterior(params, batch):
        x, targets = batch
        for layer in layers:
            x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
            x = jax.nn.relu(x) if layer != layers[-1] else x
        loss = -jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], 1).mean()
        pull = sum(jnp.sum((params[name] - leaves[name]) ** 2) for name in leaves)
        return -NBETA * loss - LOCALIZATION / 2 * pull

    sgld = blackjax.sgld(jax.grad(log_posterior))

    def step_chains(key, positions):
        keys = jax.random.split(key, workload.chains)
        return jax.vmap(lambda k, p: sgld.step(k, p, batch, LR / 2))(keys, positions)

    one = jax.jit(step_chains, donate_argnums=1)

    def scanned(key, positions):
        def body(positions, key):
            return step_chains(key, positions), None

        return jax.lax.scan(body, positions, jax.random.split(key, STEPS_PER_SCAN))[0]

    many = jax.jit(scanned, donate_argnums=1)

    def stepper(function) -> Call:
        positions = {
            name: jnp.repeat(leaf[None], workload.chains, 0) for name, leaf in leaves.items()
        }
        key = jax.random.key(0)

        def step() -> None:
            nonlocal positions, key
            key, now = jax.random.split(key)
            positions = jax.block_until_ready(function(now, positions))

        return step

    return {"blackjax, jit": stepper(one), "blackjax, scan": stepper(many)}


def peers(workload: Workload) -> dict[str, Call]:
    """All that can run the workload where it is: blackjax only what it has layers for, on a CPU."""
    found = {
        "published loop": published_loop(workload),
        "published loop, metrics": published_loop(workload, save_metrics=True),
        "posteriors, vmapped": posteriors_vmapped(workload),
    }
    if workload.sizes is not None and workload.batch[0].device.type == "cpu":
        found |= blackjax_jitted(workload)
    return found
