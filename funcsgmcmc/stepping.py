"""From a loss and a sampler to one pure step, of one chain or of many.

    fold_in(key, state.step) ─► step_key ─► normal ─► noise ───┐
    params, batch ─► L, ∇L, −∇log p, diag ∇²L ─► evaluation ───┼─► sampler.update ─► state, terms

The noise of a step depends on the chain's key and the step's index only.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, get_type_hints

import torch
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo import config
from torch.export import register_dataclass
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, random, shards, tree
from funcsgmcmc.blocks import LOOPS, Blocks
from funcsgmcmc.curvature import HessianDiagonal
from funcsgmcmc.gradients import Evaluation, GradientEstimator, LossFn, estimator_of
from funcsgmcmc.memory import keep_freed_memory
from funcsgmcmc.norms import Metrics
from funcsgmcmc.norms import metrics as metrics_of
from funcsgmcmc.pieces import pieces_of, update_in_pieces
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.samplers.base import Sampler, State, check_sampler

# Networks, and other structures, that one process may compile steps for.
_MAX_VERSIONS = 1 << 16
# Steps whose keys are made at once: 512 bytes a chain.
_STEPS_AHEAD = 64

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Info:
    """The report of a step; a pytree, which `torch.vmap` may return.

    Attributes:
        loss: L(w) on the batch at the parameters before the step, `[*chains]`.
        distance: ‖w − w₀‖ before the step, over all parameters, `[*chains]`.
        metrics: Norms and inner products of the update's terms; None if not asked for.
        aux: The second value of the loss function; None if it returned the loss alone.
        log_weight: Log of the importance weight of the parameters before the step, `[*chains]`;
            None for samplers whose draws all count alike.
        log_prior: log p(w) at the parameters before the step, `[*chains]`; None without a
            log-prior of the user's.
    """

    loss: Tensor
    distance: Tensor
    metrics: Metrics | None = None
    aux: Any = None
    log_weight: Tensor | None = None
    log_prior: Tensor | None = None


register_dataclass(Info)  # fields that are None drop out, so that a vmap may return it


Step = Callable[[State, Any, Tensor], tuple[State, Info]]
DrawNoise = Callable[[Tensor, int, torch.dtype], Tensor]
StepEvaluation = Callable[[Sampler, State, Any, Any, Tensor], Evaluation]
SamplerStep = Callable[[Sampler, State, Any, Any, Tensor], tuple[State, Info]]
FreezingStep = Callable[[Sampler, State, Any, Any, Tensor, Tensor], tuple[State, Info, Tensor]]


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

    Leaves may be sharded over processes (DTensors, as `fully_shard` makes them). All processes call
    the step, with one key, and each draws the noise of its parts: the chain is that of the whole
    parameters, to rounding. The loss is then differentiated by autograd; `module_loss` takes a
    module that `fully_shard` has sharded. Such a step is not compiled, nor vmapped.

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
    check_sampler(sampler)
    checks.switch("metrics", metrics)
    if sampler.shape:
        raise ValueError(
            f"a kernel steps one chain, got a sampler of {sampler.shape[0]} chains: make the "
            "kernel inside the function that torch.vmap maps over samplers"
        )
    if log_prior is not None:
        checks.function("log_prior", log_prior)
    # An estimator with a memory takes it as part of a kernel's batch.
    unpack = estimator_of(loss_fn).unpack
    state_class = _state_class(sampler)
    sampler_step = chain_step(loss_fn, log_prior=log_prior, metrics=metrics)

    def step(state: State, batch: Any, key: Tensor) -> tuple[State, Info]:
        if not isinstance(state, state_class):
            raise TypeError(
                f"{type(sampler).__name__} steps a {state_class.__name__}, made by its init, got "
                f"{type(state).__name__}"
            )
        random.check_key(key)
        if state.shape != torch.Size() or key.shape != torch.Size((2,)):
            raise ValueError(
                f"a kernel steps one chain, got a state of batch size {tuple(state.shape)} and a "
                f"key of shape {tuple(key.shape)}: for many chains, torch.vmap the step"
            )
        return sampler_step(sampler, state, *unpack(batch), random.fold_in(key, state.step))

    return step


def _state_class(sampler: Sampler) -> type[State]:
    """The class of the states that a sampler makes, as its `init` is annotated."""
    # A kernel may be made inside a compiled function, where annotations are not read.
    if torch.compiler.is_compiling():
        return State
    made = get_type_hints(type(sampler).init).get("return", State)
    return made if isinstance(made, type) and issubclass(made, State) else State


def step_noise(step_key: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Draw all noise of a step.

    Args:
        step_key: The step's key of each chain, `fold_in(key, step)`, `[*chains, 2]`.
        size: n, the number of parameters of a chain.
        dtype: Of the noise.

    Returns:
        Independent N(0, 1), `[*chains, n]`.
    """
    # One flat draw: an instance of the generator for each leaf would multiply the time to compile.
    return random.normal(step_key, (size,), dtype)


@dataclass(frozen=True)
class StepNoise:
    """What draws the noise of a step's chains.

    Attributes:
        draw: `step_noise`, or a compiled version of it.
        period: P, where chain c has the key of chain c mod P, as in the cells of a sweep: each
            distinct noise is drawn once, and copied. None where keys differ.
    """

    draw: DrawNoise = step_noise
    period: int | None = None

    def __call__(self, step_key: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """All noise of a step; as `step_noise`."""
        return self._of_all(self.draw(step_key[: self.period], size, dtype), step_key)

    def vectors(self, step_key: Tensor, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same, in vectors that follow one another; in constant memory if not compiled."""
        if self.draw is not step_noise:
            yield self(step_key, size, dtype)
            return
        for drawn in random.normal_vectors(step_key[: self.period], size, dtype):
            yield self._of_all(drawn, step_key)

    def _of_all(self, drawn: Tensor, step_key: Tensor) -> Tensor:
        """The noise of all chains, from that of the first P."""
        if self.period is None:
            return drawn
        return drawn.repeat(-(-len(step_key) // self.period), 1)[: len(step_key)]


class StepKeys:
    """The keys of the steps of chains, made for many steps at once.

    Those of many steps take the same hundred operations as those of one, which in eager code cost
    as much as the noise of thousands of parameters.

    Args:
        keys: The chains' keys, `[*chains, 2]`.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._block, self._ahead = -1, keys

    def at(self, step: int) -> Tensor:
        """The keys of a step, `fold_in(keys, step)`, `[*chains, 2]`."""
        block, place = divmod(step, _STEPS_AHEAD)
        return self._keys_of(block)[place]

    def of_steps(self, first: int, number: int) -> Tensor:
        """The keys of steps that follow one another, `[number, *chains, 2]`."""
        parts, stop = [], first + number
        while first < stop:
            block, place = divmod(first, _STEPS_AHEAD)
            parts.append(self._keys_of(block)[place : place + stop - first])
            first += len(parts[-1])
        return torch.cat(parts)

    def _keys_of(self, block: int) -> Tensor:
        """The keys of a block's steps, of which the last one is kept."""
        if block != self._block:
            first = block * _STEPS_AHEAD
            steps = torch.arange(first, first + _STEPS_AHEAD, device=self._keys.device)
            steps = steps.reshape(-1, *[1] * (self._keys.ndim - 1))
            self._block, self._ahead = block, random.fold_in(self._keys.unsqueeze(0), steps)
        return self._ahead


def chain_step(
    loss_fn: LossFn,
    *,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
    noise: StepNoise = StepNoise(),
) -> SamplerStep:
    """Make the step of one chain; arguments as for `chains_step`.

    Returns:
        `step(sampler, state, batch, memory, step_key) -> (state, info)`, all without a batch size.
        The step's key is `fold_in(key, state.step)`.
    """
    return _assemble(loss_fn, log_prior, metrics, noise, lambda function: function)


def chains_step(
    loss_fn: LossFn,
    *,
    batch_dim: int | None,
    memory_dim: int | None = None,
    log_prior: LogPrior | None = None,
    metrics: bool = False,
    noise: StepNoise = StepNoise(),
) -> SamplerStep:
    """Make the step of many chains: the potential under vmap, everything else batched as it is.

    Args:
        loss_fn: As for `kernel`.
        batch_dim: 0 if the batch's leaves are `[C, …]`, one batch for each chain; None if all
            chains see one batch.
        memory_dim: The same for the memory of the gradient's estimator.
        log_prior: As for `kernel`.
        metrics: As for `kernel`.
        noise: Draws the noise of the chains.

    Returns:
        `step(sampler, state, batch, memory, step_keys) -> (state, info)` for a state of batch size
        `[C]`, keys `[C, 2]` and a sampler of batch size `[]` or `[C]`.
    """
    over_chains = _vmapped(batch_dim, memory_dim)
    return _assemble(loss_fn, log_prior, metrics, noise, over_chains)


def chain_evaluation(loss_fn: LossFn, *, log_prior: LogPrior | None = None) -> StepEvaluation:
    """Make the evaluation of the potential of one chain; arguments as for `chains_step`.

    Returns:
        `evaluate(sampler, state, batch, memory, step_key) -> evaluation`, as a step makes it.
    """
    return _lifted(loss_fn, log_prior, lambda function: function)


def chains_evaluation(
    loss_fn: LossFn,
    *,
    batch_dim: int | None,
    memory_dim: int | None = None,
    log_prior: LogPrior | None = None,
) -> StepEvaluation:
    """Make the evaluation of the potential of many chains, as `chain_evaluation` does of one."""
    return _lifted(loss_fn, log_prior, _vmapped(batch_dim, memory_dim))


def _vmapped(
    batch_dim: int | None, memory_dim: int | None
) -> Callable[[Callable[..., Evaluation]], Callable[..., Evaluation]]:
    """What lifts the evaluation of one chain to many."""
    return lambda evaluate: torch.vmap(evaluate, in_dims=(0, batch_dim, memory_dim, 0))


def freezing(
    step: SamplerStep, *, max_loss: float | None = None, max_distance: float | None = None
) -> FreezingStep:
    """Make a step that keeps a chain where it is once it fails.

    It fails where its loss, its log-prior or its parameters are not finite, or where its loss or
    its distance is above a limit.

    Args:
        step: Steps chains.
        max_loss: The largest loss of a healthy chain; None for no limit.
        max_distance: The largest distance from the anchor likewise.

    Returns:
        `step(sampler, state, batch, memory, step_key, frozen_at) -> (state, info, frozen_at)`, with
        `frozen_at`, `[*chains]`, the step at which a chain failed, or −1.
    """

    def freezing_step(
        sampler: Sampler,
        state: State,
        batch: Any,
        memory: Any,
        step_key: Tensor,
        frozen_at: Tensor,
    ) -> tuple[State, Info, Tensor]:
        moved, info = step(sampler, state, batch, memory, step_key)
        # All chains are stepped as one batch; the moves of frozen ones are dropped.
        was_alive = frozen_at < 0
        finite = info.loss.isfinite() & tree.all_finite(moved, moved.shape)
        if info.log_prior is not None:
            # Where the prior is 0 no chain may go on: its pull is none there.
            finite = finite & info.log_prior.isfinite()
        if max_loss is not None:
            finite = finite & (info.loss <= max_loss)
        if max_distance is not None:
            finite = finite & (info.distance <= max_distance)
        frozen_at = torch.where(was_alive & ~finite, state.step, frozen_at)
        # The failing step reports its loss and distance; later ones report NaN.
        info = replace(
            info,
            loss=torch.where(was_alive, info.loss, torch.nan),
            distance=torch.where(was_alive, info.distance, torch.nan),
        )
        alive = frozen_at < 0
        # A compiled step chooses for free, and a CPU knows at once that there is nothing to choose.
        if not torch.compiler.is_compiling() and alive.device.type == "cpu" and alive.all():
            return moved, info, frozen_at
        return tree.where(alive, moved, state), info, frozen_at

    return freezing_step


def compiled(
    function: Callable[P, T], *, num_steps: int | None = None, cuda_graphs: bool = False
) -> Callable[P, T]:
    """Compile a function that draws noise, with `torch.compile`, without graph breaks.

    With `num_steps`, a step is compiled with a loop around it, and makes so many steps at a call:
    the same chain, to rounding, without the time that calls take, which is half of a small
    network's step. `function` is then `step(state, batch, key) -> (state, info)`, as `kernel` makes
    it, or a `torch.vmap` of it, and so is what is returned; but the batch's leaves are
    `[num_steps, …]`, one batch for each step, and the leaves of the info `[num_steps, *chains]`.

    Args:
        function: For instance a kernel's step, or a `torch.vmap` of it. Compiled anew for every
            shape, structure and loss that it meets.
        num_steps: K ≥ 1, the steps of a call; None for the function as it is.
        cuda_graphs: Whether to replay its kernels as one CUDA graph, for small networks on a GPU,
            where launching them takes longer than running them. A later call overwrites what
            this one returns: clone what you keep. Without effect on a CPU.

    Returns:
        The same function, which compiles at its first call.

    Raises:
        TypeError, ValueError: An argument is not of its type, or out of its range; or, when called,
            a leaf of the batch has not `num_steps` rows.
        RuntimeError: This version of torch has no loop that compiles.
    """
    checks.function("function", function)
    if inspect.isclass(function):
        raise TypeError(f"function must be a function, got the class {function.__name__}")
    checks.switch("cuda_graphs", cuda_graphs)
    if num_steps is None:
        return _compiled(function, cuda_graphs)
    checks.count("num_steps", num_steps, minimum=1)
    if not LOOPS:
        raise RuntimeError(
            f"num_steps needs a torch with while_loop, got torch {torch.__version__}"
        )
    return _compiled_block(function, num_steps, cuda_graphs)


def _compiled(function: Callable[P, T], cuda_graphs: bool) -> Callable[P, T]:
    keep_freed_memory()
    options: dict[str, Any] = {
        # Inline rounds of the generator into one another up to 28 operations, so that four of them
        # make one loop. Left to its defaults, Inductor inlines a step's key into every value drawn
        # from it as well, and takes several times as long; stopped earlier, it writes more words to
        # memory, and the noise takes 1.2 times as long.
        "realize_opcount_threshold": 28,
        "max_pointwise_cat_inputs": 1,
        "triton.cudagraphs": cuda_graphs,
    }
    run = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # All kernels share one code object, so that a run finds what another has compiled. But
        # torch allows it eight versions: a sweep over networks has more.
        limits = config.recompile_limit, config.accumulated_recompile_limit
        config.recompile_limit = config.accumulated_recompile_limit = _MAX_VERSIONS
        try:
            return run(*args, **kwargs)
        finally:
            config.recompile_limit, config.accumulated_recompile_limit = limits

    return call


def _compiled_block(step: Callable[..., Any], num_steps: int, cuda_graphs: bool) -> Any:
    """Compile a step with a loop around it; see `compiled`."""
    blocks = Blocks(step, functools.partial(_compiled, cuda_graphs=cuda_graphs))

    @functools.wraps(step)
    def call(state: State, batches: Any, *constants: Any) -> tuple[State, Any]:
        for leaf in pytree.tree_leaves(batches):
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != num_steps:
                shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"a leaf of the batch must have {num_steps} rows, one a step, got {shape}"
                )
        return blocks(state, batches, num_steps, *constants)

    return call


def _assemble(
    loss_fn: LossFn,
    log_prior: LogPrior | None,
    metrics: bool,
    draw_noise: StepNoise,
    over_chains: Callable[[Callable[..., Evaluation]], Callable[..., Evaluation]],
) -> SamplerStep:
    """Make a step, of one chain or of many.

    Args:
        loss_fn: As for `kernel`.
        log_prior: As for `kernel`.
        metrics: As for `kernel`.
        draw_noise: Draws the noise of the chains.
        over_chains: Lifts the evaluation of one chain to the step's batch size.
    """
    evaluate = _lifted(loss_fn, log_prior, over_chains)

    def step(
        sampler: Sampler, state: State, batch: Any, memory: Any, step_key: Tensor
    ) -> tuple[State, Info]:
        params = state.params
        evaluation = evaluate(sampler, state, batch, memory, step_key)
        size, dtype = tree.size(params), tree.noise_dtype(params)
        known = None
        # Metrics are of whole terms, and a compiler makes no tree of a term.
        is_whole = metrics or torch.compiler.is_compiling()
        is_sharded = tree.is_sharded(params)
        pieces = [] if is_whole else pieces_of(sampler, params)
        if pieces:
            # Its gradient is used up: a tree of the step's own, whatever made its leaves.
            evaluation = replace(evaluation, grads=evaluation.grads.copy())
            vectors: Iterable[Tensor]
            if is_sharded:
                vectors = shards.keyed_vectors(
                    step_key, [leaf for _, leaf in tree.leaves(params)], dtype
                )
            else:
                vectors = draw_noise.vectors(step_key, size, dtype)
            state, distance = update_in_pieces(sampler, state, evaluation, pieces, vectors)
        else:
            noise = (
                tree.normal_like(step_key, params)
                if is_sharded
                else tree.unflatten(draw_noise(step_key, size, dtype), params)
            )
            before = state
            state, terms = sampler.update(state, evaluation, noise)
            known = metrics_of(terms, sampler.mask) if metrics else None
            distance = known.distance if known else sampler.distance(before, terms)
        assert evaluation.loss is not None  # an estimator evaluates the loss
        return state, Info(
            evaluation.loss,
            distance,
            known,
            evaluation.aux,
            sampler.log_weight(state),
            evaluation.log_prior,
        )

    return step


def _lifted(
    loss_fn: LossFn,
    log_prior: LogPrior | None,
    over_chains: Callable[[Callable[..., Evaluation]], Callable[..., Evaluation]],
) -> StepEvaluation:
    """Make the function that evaluates the potential before a step; arguments as `_assemble`."""
    estimator = estimator_of(loss_fn)
    pull = None if log_prior is None else log_prior_pull(log_prior)

    def evaluate(
        sampler: Sampler, state: State, batch: Any, memory: Any, step_key: Tensor
    ) -> Evaluation:
        # Made in the step: the sampler is an argument, and another one does not compile again.
        of_chain = _evaluation(estimator, pull, sampler.hessian_estimator())
        return over_chains(of_chain)(state.params, batch, memory, step_key)

    return evaluate


def _evaluation(
    estimator: GradientEstimator,
    pull: Callable[[TensorDict], tuple[TensorDict, Tensor]] | None,
    hessian: HessianDiagonal | None,
) -> Callable[[TensorDict, Any, Any, Tensor], Evaluation]:
    """Make the function that evaluates the potential of one chain.

    Args:
        estimator: Of the gradient of L.
        pull: w ↦ (−∇ log p(w), log p(w)).
        hessian: Estimator of the diagonal of ∇²L.
    """

    def evaluate(params: TensorDict, batch: Any, memory: Any, step_key: Tensor) -> Evaluation:
        evaluation = estimator.evaluate(params, batch, memory)
        if pull is not None:
            prior_pull, log_prior = pull(params)
            evaluation = replace(evaluation, prior_pull=prior_pull, log_prior=log_prior)
        if hessian is not None:
            if tree.is_sharded(params):
                raise ValueError(
                    "curvature=… differentiates whole gradients, got sharded parameters"
                )
            # A child of the step's key: probes share no words with the noise.
            diagonal = hessian.evaluate(estimator, params, batch, random.fold_in(step_key, 0))
            evaluation = replace(evaluation, hessian_diagonal=diagonal)
        return evaluation

    return evaluate
