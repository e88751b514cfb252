"""`sample`: checks what it is given, sets a run up, and lets it go."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, memory, random, tree
from funcsgmcmc.data import IterableData, TensorData, stream
from funcsgmcmc.gradients import ControlVariates, LossFn, gradient, loss_and_aux, mean_loss
from funcsgmcmc.kernel import chain_kernel, chains_kernel, compiled, step_noise
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.recording import Observable, Recorder
from funcsgmcmc.running import ChainMethod, References, Run, fastest, freezing
from funcsgmcmc.samplers.base import Sampler
from funcsgmcmc.samples import Samples
from funcsgmcmc.schedules import Schedule, over_steps
from funcsgmcmc.terms import scaled


def sample(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    sampler: Sampler,
    *,
    num_chains: int,
    num_draws: int,
    num_burnin_steps: int = 0,
    num_steps_between_draws: int = 1,
    batch_size: int | None = None,
    minibatches: Literal["replacement", "epochs"] = "replacement",
    key: Tensor,
    chain_offset: int = 0,
    init_noise: float = 0.0,
    log_prior: LogPrior | None = None,
    observables: Mapping[str, Observable] | None = None,
    save_draws: bool = False,
    save_metrics: bool = False,
    chain_method: Literal["vmap", "loop", "auto"] = "vmap",
    chunk_size: int | None = None,
    compile: bool | Literal["noise"] | None = None,
    on_divergence: Literal["freeze", "raise"] = "freeze",
    initial_loss: float | Tensor | None = None,
    progress: bool = False,
) -> Samples:
    """Run many chains of a sampler.

    Every chain makes `num_burnin_steps + num_draws · num_steps_between_draws` steps; where the
    sampler's temperature is scheduled, steps at temperature 0 come on top, which explore: where
    they lead to, no draw is made. Chain c at step t adds noise from the key
    `fold_in(fold_in(key, chain_offset + c), t)`, and its minibatches are chosen by keys of the same
    form. So a chain does not depend on how many run beside it, on `chunk_size`, `chain_method` or
    `compile`, except for rounding in the gradients of batches of another shape.

    No argument is changed. Draws and other records are kept on the CPU.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss` or `-> (loss, aux)`, the mean loss over the batch
            of one chain; `module_loss(model, criterion)` makes one. `aux` is not recorded. Or an
            estimator of its gradient: `accumulated`, `control_variates`, `svrg`.
        params: Where to start: a tree of batch size `[]` for all chains (`params_of(model)`), or
            `[C]`.
        data: Tensors `[n, …]` (one, or a tuple, dict, `TensorDict` or `TensorDataset` of them):
            each chain draws minibatches of its own. Or any other iterable of batches, such as a
            `DataLoader` or a list: all chains see one batch a step, so that their gradient noise is
            common, and it is started again when it ends. (A `DataLoader` that shuffles does so by
            torch's global generator, not by `key`.)
        sampler: For instance `sgld(…)`, of batch size `[]` or `[num_chains]`.
        num_chains: C ≥ 1.
        num_draws: D ≥ 1, for each chain.
        num_burnin_steps: Steps before draws are made.
        num_steps_between_draws: Steps a draw, ≥ 1.
        batch_size: Examples a minibatch, for tensors; None means all of them at every step.
        minibatches: `"replacement"`: uniform, independent at every step. `"epochs"`: a new
            permutation each epoch, without the incomplete batch at its end; its losses are biased
            (see `llc_draws`).
        key: `funcsgmcmc.key(seed)`.
        chain_offset: Index of the first chain: `num_chains=1, chain_offset=17` runs chain 17 alone.
        init_noise: Standard deviation of normal noise added to each chain's start, in units of w;
            masked and clamped as the sampler's steps are. The anchor stays at `params`.
        log_prior: log p(w) of one chain's parameters, up to a constant: a further pull.
        observables: Name to a function of one chain's parameters, evaluated at each draw.
        save_draws: Whether to record parameters.
        save_metrics: Whether to record metrics at every step.
        chain_method: `"vmap"`: gradients of a chunk in one batched computation. `"loop"`: one chain
            after the other, for models that do not vmap. `"auto"`: a few steps of each are timed,
            and the faster one is taken; with `compile`, both are compiled. One that fails is left
            out, with a warning. Which one was taken stands in the record.
        chunk_size: Chains in one vmapped computation. Bounds memory. Default: all; on the CPU, as
            many as make one buffer of parameters of up to 32 MiB, since larger ones are slower, if
            that is 16 or more.
        compile: Whether to compile the step with `torch.compile` (a C++ compiler must be there):
            takes 15 to 20 s the first time on a machine, 4 s later, and makes small networks two
            to three times as fast. `"noise"` compiles the noise only, for losses that do not
            compile. Default: the noise on CUDA with Triton, where each operation would be a
            launch, and nothing elsewhere.
        on_divergence: What to do with a chain whose loss or parameters become non-finite:
            `"freeze"` it at its last finite state, the others go on untouched; or `"raise"`.
        initial_loss: L(w₀), for the learning coefficient. Default: evaluated at the anchor on all
            data, where the data can be passed over twice.
        progress: Whether to show a progress bar (needs the extra `progress`).

    Returns:
        The record of the run. After an interrupt from the keyboard, what was recorded until then,
        with a warning.

    Raises:
        TypeError, ValueError: An argument breaks a rule; nothing has run yet.
        DivergenceError: A chain diverged and `on_divergence` is `"raise"`.
        SamplingError: The loss, the data or an observable raised an error during the run. Both
            carry what was recorded, in `samples`.
    """
    checks.function("loss_fn", loss_fn)
    if log_prior is not None:
        checks.function("log_prior", log_prior)
    checks.sampler(sampler, Sampler)
    checks.count("num_chains", num_chains, minimum=1)
    checks.count("num_draws", num_draws, minimum=1)
    checks.count("num_burnin_steps", num_burnin_steps, minimum=0)
    checks.count("num_steps_between_draws", num_steps_between_draws, minimum=1)
    checks.count("chain_offset", chain_offset, minimum=0)
    if chunk_size is not None:
        checks.count("chunk_size", chunk_size, minimum=1)
    checks.choice("chain_method", chain_method, ("vmap", "loop", "auto"))
    if compile is not None and not isinstance(compile, bool):
        checks.choice("compile", compile, ("noise",))
    checks.choice("on_divergence", on_divergence, ("freeze", "raise"))
    random.check_key(key)
    checks.one_key(key.shape)
    params = checks.parameters(params)
    checks.finite("params", params)
    checks.chains("params", params.shape, num_chains)
    checks.chains("sampler", sampler.shape, num_chains)
    draw_steps = _draw_steps(
        sampler.temperature, num_draws, num_burnin_steps, num_steps_between_draws
    )
    observables = checks.observables(observables, tree.names(params))

    memory.keep_freed_memory()
    device = tree.device(params)
    key = key.to(device)
    if compile is None and device.type == "cuda" and find_spec("triton"):
        compile = "noise"
    data_key, start_key, momentum_key = random.split(key, 3)
    chains = torch.arange(chain_offset, chain_offset + num_chains, device=device)
    anchor = params if sampler.anchor is None else sampler.anchor
    sampler = sampler.to(device).anchored(params)
    starts = _starts(params, sampler, init_noise, random.fold_in(start_key, chains))
    state = sampler.init(starts, tree.normal_like(random.fold_in(momentum_key, chains), starts))
    batches = stream(
        data,
        batch_size=batch_size,
        minibatches=minibatches,
        key=data_key,
        chains=chains,
        device=device,
    )
    size = memory.chunk_size(state.params) if chunk_size is None else chunk_size
    plain_loss = loss_fn.loss_fn if isinstance(loss_fn, ControlVariates) else loss_fn

    def check_functions(method: ChainMethod) -> torch.dtype:
        vmapped = method == "vmap"
        _check_functions(log_prior, observables, state.params, vmapped=vmapped)
        return _check_loss(plain_loss, state.params, batches, vmapped=vmapped)

    methods: list[ChainMethod] = ["loop"] if chain_method == "auto" else [chain_method]
    loss_dtype = check_functions(methods[0])
    if chain_method == "auto":
        try:
            check_functions("vmap")
            methods.append("vmap")
        except Exception as error:
            warnings.warn(f"chains are looped over, since they do not vmap: {error}", stacklevel=2)
    if initial_loss is None:
        reference = _mean_loss(plain_loss, batches, anchor.to(device))
    else:
        reference = checks.initial_loss(initial_loss, num_chains)
    recorder = Recorder(
        num_chains,
        draw_steps=draw_steps,
        observables=observables,
        save_draws=save_draws,
        loss_dtype=loss_dtype,
        device=device,
    )

    references = None
    if isinstance(loss_fn, ControlVariates):
        references = References(loss_fn, sampler, batches)

    def run_by(method: ChainMethod) -> Run:
        make = chain_kernel
        if method == "vmap":
            per_chain = references is not None and references.per_chain
            make = partial(
                chains_kernel, shared_batch=batches.shared, reference_per_chain=per_chain
            )
        noise = compiled(step_noise) if compile == "noise" else step_noise
        step = freezing(make(loss_fn, log_prior=log_prior, metrics=save_metrics, noise=noise))
        run = Run(
            step=compiled(step) if compile is True else step,
            chain_method=method,
            sampler=sampler,
            key=key,
            chains=chains,
            batches=batches,
            references=references,
            initial_loss=None if reference is None else reference.cpu(),
            num_burnin_steps=num_burnin_steps,
            num_steps_between_draws=num_steps_between_draws,
            recorder=recorder,
        )
        run.add_chunks(state, size if method == "vmap" else None)
        return run

    run = fastest([run_by(method) for method in methods])
    return run.go(progress=progress, stop_at_divergence=on_divergence == "raise")


_LONGEST_EXPLORATION = 1 << 20  # steps


def _draw_steps(
    temperature: Tensor | Schedule, num_draws: int, num_burnin_steps: int, every: int
) -> Tensor:
    """The steps that make draws, `[D]`: the last of every so many after burn-in. If the temperature
    is scheduled, of those that a step at a temperature > 0 led to.
    """
    if not isinstance(temperature, Schedule):
        return torch.arange(num_draws) * every + num_burnin_steps + every - 1
    wanted, found = num_draws * every, torch.empty(0, dtype=torch.int64)
    first, last, block = num_burnin_steps, num_burnin_steps - 1, max(wanted, 1024)
    while len(found) < wanted:
        steps = torch.arange(first, first + block)
        led_by = (steps - 1).clamp(min=0)
        samples = (over_steps(temperature.cpu(), led_by) > 0).reshape(-1, block)
        if not (samples == samples[:1]).all():
            raise ValueError(checks.same_phases())
        found = torch.cat([found, steps[samples[0]]])
        last = int(found[-1]) if len(found) else last
        first, block = first + block, 2 * block
        if first - last > _LONGEST_EXPLORATION:
            raise ValueError(checks.always_exploring(last + 1, first - 1))
    return found[every - 1 : num_draws * every : every]


def _starts(params: TensorDict, sampler: Sampler, init_noise: float, keys: Tensor) -> TensorDict:
    """Where the chains with `keys` start: `params`, plus normal noise times the mask."""
    scale = checks.number("init_noise", init_noise).to(keys.device)
    params = params if params.batch_size else params.expand(len(keys))
    center = cast(TensorDict, sampler.anchor)
    if sampler.bounding_box_size is not None:
        checks.inside_box(params, sampler.boxed(params, center))
    if not scale > 0:
        return params
    moved = tree.map_leaves(
        lambda leaf, noise: (leaf + tree.expand_right(scale, leaf) * noise).to(leaf.dtype),
        params,
        scaled(tree.normal_like(keys, params), sampler.mask),
    )
    return sampler.boxed(moved, center)


def _check_loss(
    loss_fn: LossFn, params: TensorDict, batches: TensorData | IterableData, *, vmapped: bool
) -> torch.dtype:
    """Evaluate the first chain's first loss, to refuse what cannot be sampled.

    Returns:
        The dtype of the loss.
    """
    evaluate = gradient(loss_fn)
    try:
        if vmapped:
            in_dims = (0, None if batches.shared else 0)
            chain = (params[:1], batches.batch(0, slice(0, 1)))
            loss = torch.vmap(evaluate, in_dims=in_dims)(*chain).loss
        else:
            chain = (params[0], batches.batch(0, 0))  # a loader may draw to shuffle
            generator = torch.get_rng_state()
            loss, again = (evaluate(*chain).loss for _ in range(2))
            checks.same_twice(loss, again, torch.equal(generator, torch.get_rng_state()))
    except RuntimeError as error:
        if checks.is_impure(error):
            raise ValueError(checks.impure_loss(error)) from error
        raise
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in tree.leaves(params[0])}
    with torch.enable_grad():
        value, _ = loss_and_aux(loss_fn, tree.build(leaves, torch.Size()), batches.batch(0, 0))
        checks.uses_params(value, list(leaves.values()))
    return loss.dtype


def _check_functions(
    log_prior: LogPrior | None,
    observables: Mapping[str, Observable],
    params: TensorDict,
    *,
    vmapped: bool,
) -> None:
    """Evaluate the other functions at the first chain's start, in the way that the run will."""

    def evaluate(function: Callable[[TensorDict], Any]) -> Any:
        return torch.vmap(function)(params[:1]) if vmapped else function(params[0])

    if log_prior is not None:
        evaluate(log_prior_pull(log_prior))
    for name, function in observables.items():
        checks.observable(name, function(params[0]))
        evaluate(function)


def _mean_loss(
    loss_fn: LossFn, batches: TensorData | IterableData, anchor: TensorDict
) -> Tensor | None:
    """L(w₀) on all data, `[]` or `[C]`."""

    def of_chain(params: TensorDict) -> Tensor | None:
        return mean_loss(loss_fn, params, batches.one_pass())

    with torch.no_grad():
        if not anchor.batch_size:
            return of_chain(anchor)
        losses = [of_chain(chain) for chain in anchor.unbind(0)]
    return None if losses[0] is None else torch.stack(cast(list[Tensor], losses))
