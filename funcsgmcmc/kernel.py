"""One step of a chain: gradient, noise, update, as one pure function.

    key ─► normal(fold_in(key, state.step)) ─► noise ─┐
    params, batch ─► ∇L, L, −∇log p ──────────────────┼─► sampler.update ─► state, terms ─► metrics

The noise of a step depends on the chain's key and the step's index only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import random, tree
from funcsgmcmc.gradients import Gradient, LossFn, gradient
from funcsgmcmc.metrics import Metrics
from funcsgmcmc.metrics import metrics as metrics_of
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.samplers.base import Sampler, State


class Info(NamedTuple):
    """What a step reports.

    Attributes:
        loss: L(w) on the batch at the parameters before the step, `[*chains]`.
        metrics: Norms and inner products of the update's terms, or `()` if not asked for.
        aux: What the loss function returned beside the loss; `()` if nothing.
    """

    loss: Tensor
    metrics: Metrics | tuple[()]
    aux: Any


Step = Callable[[State, Any, Tensor], tuple[State, Info]]
SamplerStep = Callable[[Sampler, State, Any, Tensor], tuple[State, Info]]


def kernel(
    sampler: Sampler,
    loss_fn: LossFn,
    *,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
) -> Step:
    """Make the step of one chain.

    The step is pure. Under `torch.vmap` it steps many chains (make the kernel inside the vmapped
    function to vmap over samplers too), and it compiles with `torch.compile(fullgraph=True)`;
    another `lr`, or any other setting of the same structure, does not compile again. `sample` does
    the same for many chains, and is faster in eager code: there only gradients run under vmap.

    Args:
        sampler: For instance `sgld(…)`.
        loss_fn: `loss_fn(params, batch) -> loss` or `-> (loss, aux)`, the mean over the batch.
        log_prior: log p(w) up to a constant; its gradient joins the localization.
        metrics: Whether to compute `Info.metrics`.

    Returns:
        `step(state, batch, key) -> (state, info)`. `state` comes from `sampler.init(params)`;
        `key`, `[2]`, is the chain's and stays the same at every step: the step's noise is drawn
        from `fold_in(key, state.step)`.

    Raises:
        TypeError, ValueError: When stepping, if `loss_fn` or `log_prior` does not return a real
            scalar.
    """
    sampler_step = chain_kernel(loss_fn, log_prior=log_prior, metrics=metrics)

    def step(state: State, batch: Any, key: Tensor) -> tuple[State, Info]:
        return sampler_step(sampler, state, batch, key)

    return step


def chain_kernel(
    loss_fn: LossFn, *, log_prior: LogPrior | None = None, metrics: bool = False
) -> SamplerStep:
    """Make the step of one chain, `step(sampler, state, batch, key)`; arguments as for `kernel`."""
    pull = None if log_prior is None else log_prior_pull(log_prior)
    return _assemble(gradient(loss_fn), pull, metrics)


def chains_kernel(
    loss_fn: LossFn,
    *,
    shared_batch: bool,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
) -> SamplerStep:
    """Make the step of many chains: gradients under vmap, everything else batched as it is.

    Args:
        loss_fn: As for `kernel`.
        shared_batch: Whether all chains see one batch; else the batch's leaves are `[C, …]`.
        log_prior: As for `kernel`.
        metrics: As for `kernel`.

    Returns:
        `step(sampler, state, batch, keys) -> (state, info)` for a state of batch size `[C]`, keys
        `[C, 2]` and a sampler of batch size `[]` or `[C]`.
    """
    pull = None if log_prior is None else torch.vmap(log_prior_pull(log_prior))
    evaluate = torch.vmap(gradient(loss_fn), in_dims=(0, None if shared_batch else 0))
    return _assemble(evaluate, pull, metrics)


def _assemble(
    evaluate: Callable[[TensorDict, Any], Gradient],
    pull: Callable[[TensorDict], TensorDict] | None,
    metrics: bool,
) -> SamplerStep:
    """A step for the batch size that `evaluate` and `pull` are made for."""

    def step(sampler: Sampler, state: State, batch: Any, key: Tensor) -> tuple[State, Info]:
        params = state.params
        noise_key = random.fold_in(key, state.step)
        flat = random.normal(noise_key, (tree.size(params),), tree.noise_dtype(params))
        loss, grads, aux = evaluate(params, batch)
        prior_pull = None if pull is None else pull(params)
        noise = tree.unflatten(flat, params)
        new_state, terms = sampler.update(state, grads, noise, prior_pull)
        return new_state, Info(loss, metrics_of(terms, sampler.mask) if metrics else (), aux)

    return step
