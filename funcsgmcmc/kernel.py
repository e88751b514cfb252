"""One step of a chain: gradient, noise, update, as one pure function.

    key ─► normal(fold_in(key, state.step)) ─► noise ─┐
    params, batch ─► ∇L, L, −∇log p ──────────────────┼─► sampler.update ─► state, terms ─► metrics

The noise of a step depends on the chain's key and the step's index only.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._dynamo import config

from funcsgmcmc import checks, random, tree
from funcsgmcmc.gradients import ControlVariates, LossFn, gradient
from funcsgmcmc.memory import keep_freed_memory
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
        log_weight: Log of the importance weight of the parameters before the step, `[*chains]`;
            `()` for samplers whose draws all count alike.
    """

    loss: Tensor
    metrics: Metrics | tuple[()]
    aux: Any
    log_weight: Tensor | tuple[()] = ()


_MAX_VERSIONS = 256

P = ParamSpec("P")
T = TypeVar("T")

Step = Callable[[State, Any, Tensor], tuple[State, Info]]
StepNoise = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
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
        loss_fn: `loss_fn(params, batch) -> loss` or `-> (loss, aux)`, the mean over the batch. Or
            an estimator of its gradient: `accumulated`, `control_variates`, `svrg`.
        log_prior: log p(w) up to a constant; its gradient joins the localization.
        metrics: Whether to compute `Info.metrics`.

    Returns:
        `step(state, batch, key) -> (state, info)`. `state` comes from `sampler.init(params)`;
        `key`, `[2]`, is the chain's and stays the same at every step: the step's noise is drawn
        from `fold_in(key, state.step)`.

    Raises:
        TypeError, ValueError: Now, if an argument is of the wrong type; when stepping, if `loss_fn`
            or `log_prior` does not return a real scalar, or the state is that of many chains.
    """
    checks.sampler(sampler, Sampler)
    sampler_step = chain_kernel(loss_fn, log_prior=log_prior, metrics=metrics)

    def step(state: State, batch: Any, key: Tensor) -> tuple[State, Info]:
        checks.one_chain(state.shape, key.shape)
        return sampler_step(sampler, state, batch, key)

    return step


def step_noise(key: Tensor, step: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Draw all noise of a step.

    Args:
        key: The chains' keys, `[*chains, 2]`.
        step: Index of the step, `[*chains]`.
        size: n, the number of parameters of a chain.
        dtype: What to draw in.

    Returns:
        Independent N(0, 1), `[*chains, n]`.
    """
    return random.normal(random.fold_in(key, step), (size,), dtype)


def chain_kernel(
    loss_fn: LossFn,
    *,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
    noise: StepNoise = step_noise,
) -> SamplerStep:
    """Make the step of one chain, `step(sampler, state, batch, key)`; arguments as for
    `chains_kernel`.
    """
    return _assemble(loss_fn, log_prior, metrics, noise, lambda function, _: function, None)


def chains_kernel(
    loss_fn: LossFn,
    *,
    shared_batch: bool,
    reference_per_chain: bool = False,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
    noise: StepNoise = step_noise,
) -> SamplerStep:
    """Make the step of many chains: gradients under vmap, everything else batched as it is.

    Args:
        loss_fn: As for `kernel`.
        shared_batch: Whether all chains see one batch; else the batch's leaves are `[C, …]`.
        reference_per_chain: Whether chains have references of their own, for control variates.
        log_prior: As for `kernel`.
        metrics: As for `kernel`.
        noise: `step_noise`, or a compiled version of it.

    Returns:
        `step(sampler, state, batch, keys) -> (state, info)` for a state of batch size `[C]`, keys
        `[C, 2]` and a sampler of batch size `[]` or `[C]`.
    """
    batch_dim: Any = None if shared_batch else 0
    if isinstance(loss_fn, ControlVariates):
        batch_dim = (batch_dim, 0 if reference_per_chain else None)
    return _assemble(loss_fn, log_prior, metrics, noise, torch.vmap, batch_dim)


def compiled(function: Callable[P, T], *, cuda_graphs: bool = False) -> Callable[P, T]:
    """Compile a function that draws noise, with `torch.compile`, without graph breaks.

    Args:
        function: For instance a kernel's step, or a `torch.vmap` of it. Compiled anew for every
            shape, structure and loss that it meets.
        cuda_graphs: Whether to replay its kernels as one CUDA graph, for small networks on a GPU,
            where launching them takes longer than running them. A later call overwrites what
            this one returns: clone what you keep. Without effect on a CPU.

    Two of Inductor's options are set here. Rounds of the generator are inlined into one another up
    to 28 operations, so that four of them make one loop: left to its defaults, Inductor inlines a
    step's key into every value drawn from it as well, and takes several times as long; stopped
    earlier, it writes more words to memory, and the noise takes 1.2 times as long.
    """
    keep_freed_memory()
    options: dict[str, Any] = {
        "realize_opcount_threshold": 28,
        "max_pointwise_cat_inputs": 1,
        "triton.cudagraphs": cuda_graphs,
    }
    run = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # All kernels share one code object, so that a run finds what another has compiled. But
        # torch allows it eight versions: a sweep over networks has more.
        limit, config.recompile_limit = config.recompile_limit, _MAX_VERSIONS
        try:
            return run(*args, **kwargs)
        finally:
            config.recompile_limit = limit

    return call


Mapped = Callable[[Callable[..., Any], Any], Callable[..., Any]]


def _assemble(
    loss_fn: LossFn,
    log_prior: LogPrior | None,
    metrics: bool,
    draw_noise: StepNoise,
    mapped: Mapped,
    batch_dim: Any,
) -> SamplerStep:
    """A step for the batch size that `mapped` carries functions of one chain over to.

    Args:
        loss_fn: As for `kernel`.
        log_prior: As for `kernel`.
        metrics: As for `kernel`.
        draw_noise: `step_noise`, or a compiled version of it.
        mapped: `torch.vmap`, or what returns a function as it is; takes the input dimensions.
        batch_dim: Where a batch has the chains.
    """
    evaluate = mapped(gradient(loss_fn), (0, batch_dim))
    pull = None if log_prior is None else mapped(log_prior_pull(log_prior), 0)

    def step(sampler: Sampler, state: State, batch: Any, key: Tensor) -> tuple[State, Info]:
        params = state.params
        flat = draw_noise(key, state.step, tree.size(params), tree.noise_dtype(params))
        loss, grads, aux = evaluate(params, batch)
        prior_pull, value = (None, None) if pull is None else pull(params)
        hessian = None
        curvature = sampler.curvature()
        if curvature is not None:
            probe_key = random.fold_in(random.fold_in(key, state.step), 0)
            diagonal = partial(curvature.evaluate, loss_fn)
            hessian = mapped(diagonal, (0, batch_dim, 0))(params, batch, probe_key)
        new_state, terms = sampler.update(
            state,
            grads,
            tree.unflatten(flat, params),
            prior_pull,
            loss=loss,
            log_prior=value,
            hessian_diagonal=hessian,
        )
        known = metrics_of(terms, sampler.mask) if metrics else ()
        return new_state, Info(loss, known, aux, sampler.log_weight(new_state))

    return step
