"""`sample`: check what is asked, make the run, let it go."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.gradients import LossFn, mean_loss
from funcsgmcmc.memory import keep_freed_memory
from funcsgmcmc.priors import LogPrior
from funcsgmcmc.runs.checkpoint import Timetable, held
from funcsgmcmc.runs.chunks import make_shared_memory
from funcsgmcmc.runs.clock import Clock, steps_of_draws
from funcsgmcmc.runs.data import Batches, announced, stream
from funcsgmcmc.runs.encoding import digest
from funcsgmcmc.runs.fingerprint import fingerprint
from funcsgmcmc.runs.full_data import FullData, as_before, full_data_of
from funcsgmcmc.runs.keeping import Keeper
from funcsgmcmc.runs.need import Cost
from funcsgmcmc.runs.processes import Processes, processes_of
from funcsgmcmc.runs.progress import progress_of
from funcsgmcmc.runs.record import Draw, Samples
from funcsgmcmc.runs.request import Observable, Recorded, Request
from funcsgmcmc.runs.rows import which_of
from funcsgmcmc.runs.run import Run
from funcsgmcmc.runs.shares import share_of
from funcsgmcmc.runs.start import Start, start_of
from funcsgmcmc.runs.store import MemoryStore, Recorder, Store
from funcsgmcmc.runs.timing import compile_if_it_pays, cost_of, fastest
from funcsgmcmc.runs.trial import Trial, try_functions
from funcsgmcmc.samplers.base import Sampler, State, check_sampler
from funcsgmcmc.schedules import Schedule

# Names of the record's own quantities and dimensions.
_TAKEN = {"loss", "llc", "chain", "draw", "step"}


def sample(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor] | Samples | State,
    data: Any,
    sampler: Sampler,
    *,
    num_chains: int,
    num_draws: int,
    num_burnin_steps: int | Literal["auto"] = 0,
    num_steps_between_draws: int = 1,
    batch_size: int | None = None,
    minibatches: Literal["replacement", "epochs"] = "replacement",
    shared_batches: bool = False,
    key: Tensor,
    chain_offset: int | Tensor = 0,
    init_noise: float = 0.0,
    log_prior: LogPrior | None = None,
    observables: Mapping[str, Observable] | None = None,
    record: Collection[Recorded] = (),
    chain_method: Literal["vmap", "loop", "auto"] = "vmap",
    chunk_size: int | Literal["auto"] | None = None,
    compile: bool | Literal["noise", "auto"] = "auto",
    on_divergence: Literal["freeze", "raise"] = "freeze",
    max_loss: float | None = None,
    max_distance: float | None = None,
    initial_loss: float | Tensor | None = None,
    progress: bool = False,
    full_loss: int | None = None,
    on_draw: Callable[[Draw], object] | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float | None = None,
    mesh: DeviceMesh | None = None,
) -> Samples:
    """Run many chains of a sampler.

    Every chain makes `num_burnin_steps + num_draws · num_steps_between_draws` steps. Where the
    sampler's temperature is scheduled, steps at temperature 0 explore: they come on top, and the
    parameters that they lead to make no draws. Chain c at step t adds noise from the key
    `fold_in(fold_in(key, chain_offset + c), t)`, and its minibatches are chosen by keys of the same
    form. So a chain does not depend on how many run beside it, on `chunk_size`, `chain_method` or
    `compile`, except for rounding in the gradients of batches of another shape.

    No argument is changed. Draws and other records are kept on the CPU.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss` or `-> (loss, aux)`, the mean loss over the batch
            of one chain; `module_loss(model, criterion)` makes one. Or an estimator of its
            gradient: `accumulated`, `control_variates`, `svrg`.
        params: Where to start. A tree of batch size `[]` for all chains (`params_of(model)`), or
            `[C]`: new chains, from step 0. With the key of an earlier run their noise is that
            run's again, so that a run that shall go on is not started from its last parameters but
            from its record: `Samples` (or its `state`, all of whose chains are then taken to be
            healthy) brings momenta, running averages, anchor, chain indices and the step, and with
            the same key and tensors as data the chains are those of one uninterrupted run. Leaves
            may be sharded over processes (DTensors), with `chain_method="loop"`, in memory: see
            `mesh`. A module of `fully_shard` is left at other parameters.
        data: Tensors `[n, …]` (one, or a tuple, dict, `TensorDict` or `TensorDataset` of them):
            each chain draws minibatches of its own. Or any other iterable of batches, such as a
            `DataLoader` or a list: all chains see one batch a step, so that their gradient noise is
            common, and it is started again when it ends. (A `DataLoader` that shuffles does so by
            torch's global generator, not by `key`.)
        sampler: For instance `sgld(…)`, of batch size `[]` or `[num_chains]`.
        num_chains: C ≥ 1.
        num_draws: D ≥ 1, for each chain.
        num_burnin_steps: Steps before draws are made, of this run. `"auto"`: until no drift of loss
            and distance is seen, but no more than the draws take; a warning says if it still is.
            `Samples.num_burnin_steps` tells how many these were.
        num_steps_between_draws: Steps a draw, ≥ 1.
        batch_size: Examples a minibatch, for tensors; None means all of them at every step.
        minibatches: `"replacement"`: uniform, independent at every step. `"epochs"`: a new
            permutation each epoch, without the incomplete batch at its end; its losses are biased
            (see `llc_draws`).
        shared_batches: Whether all chains see the same minibatches of tensors, chosen by `key`
            alone, as they do of an iterable. What does not depend on a chain's parameters is then
            computed once for all chains, which is most of a step where few layers are sampled
            (`restrict`). But the noise of the gradients is common to all chains, and that of the
            minibatches' losses: more chains do not average it, and neither R-hat nor the spread
            between chains sees it. `llc` takes its error from the chains' mean, draw by draw, where
            that is larger, and warns.
        key: `funcsgmcmc.key(seed)`.
        chain_offset: Index of the first chain: `num_chains=1, chain_offset=17` runs chain 17 alone.
            Or the index of each, `[C]`: chains with one index have the same noise and minibatches,
            so that what they differ in is due to their settings, as in the cells of `sweep`.
        init_noise: Standard deviation of normal noise added to each chain's start, in units of w;
            masked and clamped as the sampler's steps are. The anchor stays at `params`.
        log_prior: log p(w) of one chain's parameters, up to a constant: a further pull.
        observables: Name to a function of one chain's parameters, evaluated at each draw.
        record: What to record beside losses, distances and observables. `"draws"`: parameters at
            each draw. `"metrics"`: metrics at every step. `"aux"`: what the loss returns beside
            itself, on the draws' batches, among the observables as `aux` or `aux.name`. In memory
            that does not grow with the number of draws: `"draw_moments"`, means and variances of
            parameters, and `"observable_moments"`, means and covariances of observables in place of
            their values.
        chain_method: `"vmap"`: gradients of a chunk in one batched computation. `"loop"`: one chain
            after the other, for models that do not vmap. `"auto"`: a few steps of each are timed,
            and the faster one is taken; with `compile=True`, both are compiled. One that fails is
            left out, with a warning. Which one was taken stands in the record.
        chunk_size: Chains in one vmapped computation. Bounds memory. Default: all; on the CPU, as
            many as make one buffer of parameters of up to 32 MiB, since larger ones are slower, if
            that is 16 or more. `"auto"`: at most so many, and as many as fit the free memory of
            the device: steps of one and two chains are tried, and what they take is measured.
        compile: Whether to compile the step with `torch.compile` (a C++ compiler must be there):
            takes 15 to 20 s the first time on a machine, 4 s later, and makes small networks two
            to three times as fast. Compiled steps between draws are made in blocks of up to 16,
            which changes no chain by a bit. `"noise"` compiles the noise only, for losses that do
            not compile. `"auto"`: a few steps are timed before the first; where all of them would
            take ten times as long as compiling is likely to (150 s and more), steps are compiled,
            if that proves faster. `Samples.options["is_compiled"]` tells. The choice holds for the
            whole run, resumed or not; on another machine it may be another, and chains then differ
            by rounding. Else the noise is compiled on CUDA with Triton, where each operation would
            be a launch, and nothing elsewhere.
        on_divergence: What to do with a chain whose loss or parameters become non-finite:
            `"freeze"` it at its last finite state, the others go on untouched; or `"raise"`.
        max_loss: A chain whose loss on a batch is larger counts as diverged (default: any finite
            loss is healthy).
        max_distance: A chain further than that from its anchor, ‖w − w₀‖, counts as diverged.
        initial_loss: L(w₀), for the learning coefficient. Default: evaluated at the anchor on all
            data, where the data can be passed over twice.
        progress: Whether to show progress: on a terminal and in a notebook as a bar (which needs
            the extra `progress`), else as a line every 30 seconds by `logging`; and, before the
            first step, what the run needs on the device, in memory and on disk.
        full_loss: Number of draws, evenly spaced, at which loss and gradient on all data are
            evaluated, which tell what minibatches hide: `Samples.looks`. Default, for tensors: as
            many as take 10 % of the run's gradients, 50 at most; where not even 8 do, a fixed part
            of the examples is evaluated. 0 for none, as is the default for an iterable, and for
            models of 4 million parameters or more, since it takes the memory of some gradients.
        on_draw: A function that is called with each `Draw` when it has been recorded, for a display
            or a log of your own.
        store: A folder for the record (needs the extra `store`): what is recorded goes to disk, in
            zarr's format, and memory does not grow with the number of draws. ArviZ and xarray read
            it, also while the run goes on; `open_run` gives the record back.
        resume: Whether to go on with the run in `store`, from its last checkpoint, in place of
            refusing a folder that has one. Without a run in it, it begins; a complete one is
            returned. All other arguments must be those of the run; `num_draws` may be larger.
        checkpoint_seconds: Seconds between checkpoints. Default: as many as let them take 2 % of
            the time, and a second at least.
        mesh: The processes that run the chains together, each some of them: a mesh of one dimension
            (`torch.distributed.device_mesh.init_device_mesh`). All of them call `sample`, with the
            same arguments, and get the same record. Default: all ranks, where a process group of
            more than one is initialized; a mesh of one rank runs alone. Of sharded parameters, all
            processes of their mesh make the same chains, on the same batches: `mesh` is theirs; or
            one of two dimensions and all ranks, over the first of which chains are divided, and
            over the second parameters are sharded.

    Returns:
        The record of the run.

    Raises:
        TypeError, ValueError: An argument breaks a rule; nothing has run yet.
        DivergenceError: A chain diverged and `on_divergence` is `"raise"`.
        SamplingError: The loss, the data or an observable raised an error during the run.
        SamplingInterrupt: Ctrl-C, a `KeyboardInterrupt`. All three carry what was recorded, in
            `samples`.
        FileExistsError, ValueError: The store holds something else, another run, or one that is not
            to be resumed; or the data cannot be read again from where it was.
        RuntimeError: Another process runs in the store.
        ProcessError: Before the first step, another process of `mesh` has stopped. During the run
            it is a `SamplingError`, with this process's chains in `samples`.
    """
    given = params.state if isinstance(params, Samples) else params
    parts = shards.mesh_of(given)
    with processes_of(mesh, parts) as processes:
        request = Request(
            loss_fn=loss_fn,
            log_prior=log_prior,
            observables={} if observables is None else observables,
            key=key,
            num_chains=num_chains,
            num_draws=num_draws,
            num_burnin_steps=num_burnin_steps,
            num_steps_between_draws=num_steps_between_draws,
            batch_size=batch_size,
            minibatches=minibatches,
            shared_batches=shared_batches,
            chain_offset=chain_offset,
            init_noise=init_noise,
            record=record,
            full_loss=full_loss,
            on_draw=on_draw,
            chain_method=chain_method,
            chunk_size=chunk_size,
            compile=compile,
            on_divergence=on_divergence,
            max_loss=max_loss,
            max_distance=max_distance,
            initial_loss=initial_loss,
        )
        check_sampler(sampler)
        checks.switch("resume", resume)
        if checkpoint_seconds is not None:
            checks.number("checkpoint_seconds", checkpoint_seconds)
        processes.check_agreement(
            {
                "store": str(store),
                "resume": str(resume),
                "num_draws": str(request.num_draws),
                "initial_loss": digest(request.initial_loss),
            }
        )
        asked = _Asked(request, params, data, sampler, processes)
        if store is not None and parts is not None:
            raise ValueError(
                "store must be left out where parameters are sharded, whose record is kept in "
                f"memory, got {str(store)!r}"
            )
        if store is None:
            _refuse_without_store(resume, checkpoint_seconds)
            return _run(asked, None, progress)
        checks.instance("store", store, str | Path)
        timetable = Timetable(checkpoint_seconds)
        with held(store, processes, resume=resume) as place:
            return _run(asked, Keeper(place, timetable, resume), progress)


class _Asked(NamedTuple):
    """What is asked of all processes; each field is the argument of `sample`."""

    request: Request
    params: Any
    data: Any
    sampler: Sampler
    processes: Processes


def expected_cost(
    loss_fn: LossFn, params: TensorDictBase, data: Any, sampler: Sampler, **settings: Any
) -> Cost:
    """Tell what a run would cost, from a few steps that are timed.

    Args:
        loss_fn: As for `sample`, like the other arguments.
        params: Where chains start.
        data: The data.
        sampler: The sampler.
        **settings: Those of `sample` that say what is run; not where it is kept, or shown.

    Raises:
        TypeError, ValueError: As `sample`.
    """
    bound = inspect.signature(sample).bind(loss_fn, params, data, sampler, **settings)
    bound.apply_defaults()
    given = bound.arguments | {"observables": bound.arguments["observables"] or {}}
    request = Request(**{each.name: given[each.name] for each in fields(Request)})
    check_sampler(sampler)
    shards.refuse("expected_cost", params)
    with progress_of(1, enabled=False) as shown:
        asked = _Asked(request, params, data, sampler, Processes())
        return cost_of(fastest(_make_runs(asked, None), shown))


def _refuse_without_store(resume: bool, checkpoint_seconds: float | None) -> None:
    """Refuse settings of a store where there is none.

    Raises:
        ValueError: There is one.
    """
    if resume or checkpoint_seconds is not None:
        name = "resume" if resume else "checkpoint_seconds"
        raise ValueError(f"{name} must be left out without store, the folder of the run")


def _run(asked: _Asked, keeper: Keeper | None, progress: bool) -> Samples:
    """Make the run and let it go."""
    # With `chain_method="auto"` the run is made twice, and the faster one goes: steps are pure, so
    # that timing them changes nothing.
    runs = _make_runs(asked, keeper)
    if keeper is not None and not runs:  # it is complete
        return keeper.samples()
    clock = runs[0].clock
    checks.switch("progress", progress)
    is_timed = progress and asked.processes.shards == 1
    progress = progress and asked.processes.rank == 0
    with progress_of(clock.num_steps, done=clock.steps_done, enabled=progress) as shown:
        run = fastest(runs, shown)
        runs.clear()  # the memory of one that does not go is free
        compile_if_it_pays(run, shown)
        if run.is_resumed:
            shown.tell(
                f"after {run.clock.steps_done} of {run.clock.num_steps} steps, the run goes on"
            )
        else:
            # A step that is only tried is made by the first process alone.
            if progress and is_timed and run.step_bytes is None:
                run.measure()
            need = run.need()
            shown.tell(str(need))
            need.check()
            if progress and is_timed:
                shown.tell(str(cost_of(run)))
        return run.go(shown)


def _make_runs(asked: _Asked, keeper: Keeper | None) -> list[Run]:
    """Make the run of this process, once for each chain method that may be taken."""
    keep_freed_memory()
    processes, num_chains = asked.processes, asked.request.num_chains
    unit = 1 if keeper is None else keeper.unit(num_chains)
    rows = processes.share(num_chains, unit)
    request, given, sampler = share_of(asked.request, asked.params, asked.sampler, rows)
    start = start_of(request, given, sampler)
    _check_names(request, start.state.params)
    clock = _clock_of(request, sampler, start)
    if clock.is_open and keeper is not None and (known := keeper.burnin()) is not None:
        clock.end_burnin(*known)
    if keeper is not None:
        keeper.load(rows)
    batches = stream(
        asked.data,
        batch_size=request.batch_size,
        minibatches=request.minibatches,
        keys=start.keys.shared_minibatches if request.shared_batches else start.keys.minibatches,
        first_step=start.first_step,
        device=tree.device(start.state.params),
        position=None if keeper is None else keeper.position(),
    )
    if keeper is not None or processes.size > 1:
        sampled = {tree.dotted(name) for name in tree.names(start.state.params)}
        named = fingerprint(asked.request, asked.params, asked.sampler, batches, sampled)
        processes.check_agreement(named)
    if keeper is not None:
        keeper.check(named, batches)
        if keeper.is_complete(clock.num_steps):
            return []
    if keeper is not None and keeper.is_resumed:
        plan = _resumed(start, batches, keeper)
    else:
        plan = _begun(request, start, batches, clock)
    processes.check_agreement(batches.digests_of_batch())
    every = request.num_draws + 1 if plan.full_data is None else plan.full_data.every
    store: Store
    if keeper is None:
        store = _memory_store(request, clock, every)
    else:
        store = keeper.make_store(clock, plan.start, every)
    anchor = start.sampler.center(start.state)
    common: dict[str, Any] = {
        "request": request,
        "clock": clock,
        "start": plan.start,
        "batches": batches,
        "initial_loss": plan.initial_loss,
        "observed": plan.trial.observed,
        "shared_memory": make_shared_memory(request.estimator, anchor, batches),
        "full_data": plan.full_data,
        "recorder": Recorder(store, request.observables, request.record),
        "keeper": keeper,
        "processes": processes,
    }
    return [Run(chain_method=method, **common) for method in plan.trial.methods]


class _Plan(NamedTuple):
    """What a run finds out before its first step.

    Attributes:
        start: Where its chains begin.
        trial: How they may be run, and the observables of one.
        initial_loss: L(w₀), if it is known.
        full_data: All data, and the draws that it is evaluated at, if it is.
    """

    start: Start
    trial: Trial
    initial_loss: Tensor | None
    full_data: FullData | None


def _begun(request: Request, start: Start, batches: Batches, clock: Clock) -> _Plan:
    """The plan of a run that begins."""
    params = start.state.params
    trial = try_functions(request, params, batches, start.first_step)
    initial_loss = _anchor_loss(request, start.sampler.center(start.state), batches)
    full_data = full_data_of(request, clock, batches, tree.size(params))
    return _Plan(start, trial, initial_loss, full_data)


def _resumed(start: Start, batches: Batches, keeper: Keeper) -> _Plan:
    """The plan of a run that goes on from its checkpoint: what it found when it began."""
    trial = Trial([keeper.method()], {})
    full_data = as_before(keeper.full_data(), batches)
    return _Plan(keeper.resumed(start), trial, keeper.initial_loss, full_data)


def _clock_of(request: Request, sampler: Sampler, start: Start) -> Clock:
    """The clock of a run, before its first step.

    Raises:
        ValueError: Burn-in shall end by itself, with settings that change with the step.
    """
    is_open, burnin = request.num_burnin_steps == "auto", request.num_burnin_steps
    if isinstance(burnin, str):
        names = [
            name for name in sampler.schedulable() if isinstance(getattr(sampler, name), Schedule)
        ]
        if names:
            raise ValueError(
                "num_burnin_steps='auto' needs settings that do not change with the step, got a "
                f"schedule for {names[0]}"
            )
        burnin = request.num_draws * request.num_steps_between_draws
    draw_steps = steps_of_draws(
        sampler.temperature,
        request.num_draws,
        burnin,
        request.num_steps_between_draws,
        start.first_step,
    )
    return Clock(draw_steps, start.first_step, burnin, is_open)


def _memory_store(request: Request, clock: Clock, every: int) -> Store:
    """A store in memory for the record of a run; `every` as for `Keeper.make_store`."""
    return MemoryStore(
        {
            "chain": request.num_chains,
            "step": clock.num_steps,
            "draw": request.num_draws,
            "full_draw": request.num_draws // every,
        }
    )


def _check_names(request: Request, params: TensorDict) -> None:
    """Check the names of observables.

    Raises:
        ValueError: One is named like a quantity, a dimension or a parameter of the record.
    """
    # In `to_datatree` observables and parameters are variables of one group.
    taken = _TAKEN | {tree.dotted(name) for name in tree.names(params)}
    for name in request.observables:
        if "aux" in request.record and (name == "aux" or name.startswith("aux.")):
            raise ValueError(
                f"an observable must not be named {name!r} where record has 'aux', which is it"
            )
        if name in taken:
            raise ValueError(
                f"an observable must not be named {name!r}, which the record has already: it is "
                "the name of a parameter, a quantity or a dimension"
            )


def _distinct(anchor: TensorDict) -> tuple[Sequence[TensorDict], list[int]]:
    """The anchors that differ, and which of them each chain has; no list if they share one."""
    if not anchor.batch_size:
        return [anchor], []
    is_shared = all(bool((leaf == leaf[:1]).all()) for _, leaf in tree.leaves(anchor))
    which = [] if is_shared else which_of(anchor)
    firsts = [which.index(index) for index in range(max(which, default=-1) + 1)] or [0]
    return [anchor[row] for row in firsts], which


def _anchor_loss(request: Request, anchor: TensorDict, batches: Batches) -> Tensor | None:
    """L(w₀) as given, or on all data, `[]` or `[C]`; None if the data cannot be passed over."""
    if isinstance(request.initial_loss, Tensor):
        return request.initial_loss
    losses = []
    anchors, which = _distinct(anchor)
    with torch.no_grad():
        # One anchor at a time: a pass over all data takes the memory of a piece for each.
        for chain in anchors:
            pieces = batches.one_pass()
            if pieces is not None:
                pieces = announced(pieces, "the loss at the anchor: initial_loss=… gives it")
            loss = mean_loss(request.estimator, chain, pieces)
            if loss is None:
                return None
            losses.append(loss.cpu())
    if not any(loss.isfinite() for loss in losses):
        raise ValueError(
            f"the loss at the anchor, on all data, must be finite, got {float(losses[0])}: look at "
            "the data and the parameters"
        )
    return torch.stack(losses)[which] if which else losses[0]
