"""The start of a run: chains at some parameters, or chains that go on from an earlier run.

Steps are counted from a chain's first one. A run that goes on counts on from there: noise,
minibatches and schedules are those of the steps that an uninterrupted run would have made.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.memory import free_memory, in_bytes
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.request import Request, RunKeys
from funcsgmcmc.runs.rows import gather
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import scaled

# Entries from which a tree is lent to a run, and not copied.
_LARGE = 1 << 22


class Lent:
    """A large tree of the user's that a run uses without copying it, and that must not change.

    Args:
        params: The tree.
    """

    def __init__(self, params: TensorDict) -> None:
        self._leaves = list(tree.leaves(params))
        self._versions = self._read()

    def check(self) -> None:
        """Refuse a tree that has been written to.

        Raises:
            ValueError: It has.
        """
        if (versions := self._read()) != self._versions:
            row = next(i for i, version in enumerate(versions) if version != self._versions[i])
            raise ValueError(
                f"params[{tree.dotted(self._leaves[row][0])!r}] must not be written to while its "
                "chains run, which are localized there and hold no copy of so large a tree: give "
                "sample a copy (params.clone())"
            )

    def _read(self) -> list[int]:
        return [leaf._version for _, leaf in self._leaves]


@dataclass(frozen=True, eq=False)
class Start:
    """Where the chains of a run begin.

    Attributes:
        sampler: The sampler, with its anchor.
        state: The chains, of batch size `[C]`.
        keys: Their keys.
        first_step: Index of the first step.
        frozen_at: The step at which a chain was frozen before, `[C]`; −1 for healthy ones.
        lent: The user's tree, if it is the anchor itself and no copy.
    """

    sampler: Sampler
    state: State
    keys: RunKeys
    first_step: int
    frozen_at: Tensor
    lent: Lent | None


def start_of(request: Request, given: Any, sampler: Sampler) -> Start:
    """Make the start of a run from what `sample` is given as its parameters.

    Args:
        request: The settings of the run.
        given: A tree, a state, or the record of a run.
        sampler: The sampler, with or without an anchor.

    Raises:
        TypeError, ValueError: The start does not fit the request or the sampler.
    """
    if isinstance(given, Samples | State):
        return _go_on(request, given, sampler)
    params = tree.parameters(given)
    _check_shards(params, request)
    for key, leaf in tree.leaves(params):
        if leaf.is_meta or leaf.is_inference():
            kind = "of the meta device" if leaf.is_meta else "of inference mode"
            raise ValueError(
                f"params[{tree.dotted(key)!r}] must have values and gradients, is {kind}"
            )
    _check_finite(params)
    check_chains("params", params.batch_size, request)
    if params.batch_size and tree.is_sharded(params):
        raise ValueError(
            "params must have batch size () where they are sharded, so that chains start at one "
            f"place (init_noise moves them apart), got {tuple(params.batch_size)}"
        )
    check_chains("sampler", sampler.shape, request)
    device = tree.device(params)
    _check_room(params, request.num_chains)
    keys = request.keys(request.chains().to(device))
    sampler, lent = _anchored(sampler.to(device), params)
    state = _first_state(params, sampler, request.init_noise, keys)
    # Masks may be those of single chains, and masks of shards are cut for one.
    counted = params if tree.is_sharded(params) else state.params
    if not tree.count(counted, sampler.mask).any():
        raise ValueError("the mask must sample at least one entry, got one that is 0 everywhere")
    return Start(sampler, state, keys, 0, torch.full_like(keys.chains, -1), lent)


def _first_state(params: TensorDict, sampler: Sampler, init_noise: float, keys: RunKeys) -> State:
    """The chains before their first step."""

    def state_at(sampler: Sampler, starts: Tensor, momenta: Tensor) -> State:
        placed = _placed(params, sampler, init_noise, starts)
        noise = tree.normal_like(momenta, placed) if sampler.uses_first_noise() else None
        return sampler.init(placed, noise)

    if not tree.is_sharded(params):
        return state_at(sampler, keys.starts, keys.momenta)
    # One after the other: the noise of a part is that of one chain's parameters.
    samplers = [sampler[row] if sampler.shape else sampler for row in range(len(keys.chains))]
    chains = zip(samplers, keys.starts, keys.momenta, strict=True)
    states: State = gather([state_at(*chain) for chain in chains])
    return states


def _check_finite(params: TensorDict) -> None:
    """Refuse parameters that are not finite, on all processes that have parts of them.

    Raises:
        ValueError: One is not.
    """
    is_finite = not tree.is_sharded(params) or bool(tree.all_finite(params, torch.Size()))
    tree.check_finite("params", params)
    if not is_finite:
        raise ValueError("params must be finite, got entries of other processes that are not")


def _check_shards(params: TensorDict, request: Request) -> None:
    """Refuse settings that sharded parameters do not take.

    Raises:
        ValueError: One is asked for.
    """
    if not tree.is_sharded(params):
        return
    if request.chain_method != "loop":
        raise ValueError(
            "chain_method must be 'loop' where parameters are sharded, whose chains step one after "
            f"the other, got {request.chain_method!r}"
        )
    if request.compile not in (False, "auto"):
        raise ValueError(
            "compile must be left out where parameters are sharded, whose steps exchange sums, got "
            f"{request.compile!r}"
        )
    for name in ("draws", "draw_moments"):
        if name in request.record:
            raise ValueError(
                f"record must not have {name!r} where parameters are sharded, as large as they are "
                "on all processes together: record observables of them"
            )


def _anchored(sampler: Sampler, params: TensorDict) -> tuple[Sampler, Lent | None]:
    """The sampler with its anchor, and the tree that is lent for it, if one is."""
    is_small = tree.size(params) < _LARGE
    # The parts of a module of `fully_shard` are overwritten at each evaluation of its loss.
    if sampler.anchor is not None or is_small or tree.is_sharded(params):
        return sampler.with_anchor(params), None
    return sampler.with_anchor(params, copy=False), Lent(params)


def _go_on(request: Request, given: Samples | State, sampler: Sampler) -> Start:
    """The start of a run that goes on where another one ended.

    Raises:
        TypeError, ValueError: The other run's chains do not fit this one.
    """
    state, frozen_at, chains, anchor = _chains_of(given, request)
    _check_shards(state.params, request)
    check_chains("params", state.shape, request, shared=False)
    check_chains("sampler", sampler.shape, request)
    if checks.number("init_noise", request.init_noise) > 0:
        raise ValueError(
            f"init_noise must be 0 where chains go on, got {request.init_noise}: give parameters "
            "to start anew"
        )
    if sampler.anchor is None and anchor is None:
        raise ValueError(
            "the sampler needs an anchor to go on from a state, whose sampler had it: "
            "give it to the factory (anchor=…), or give the record of the run"
        )
    device = tree.device(state.params)
    sampler = sampler.to(device)
    lent = None
    if anchor is not None:
        sampler, lent = _anchored(sampler, anchor.to(device))
    # `replace(anchor=None)` would keep None as a value, which stacks to a list.
    state = state.exclude("anchor")
    _check_state(state, sampler)
    healthy = frozen_at.to(device) < 0
    if not healthy.any():
        raise ValueError(
            f"at least one chain must be healthy to go on, got {len(frozen_at)} frozen ones"
        )
    steps = state.step[healthy].unique().tolist()
    if len(steps) > 1:
        raise ValueError(
            f"chains that go on must have made the same number of steps, got {steps}: their run "
            "stopped within a step"
        )
    keys = request.keys(chains.to(device))
    return Start(sampler, state, keys, steps[0], frozen_at.to(device), lent)


def _chains_of(
    given: Samples | State, request: Request
) -> tuple[State, Tensor, Tensor, TensorDict | None]:
    """State, steps of freezing, indices and anchor of the chains of a record, or of a state.

    Raises:
        ValueError: The request gives the chains of a record other indices.
    """
    offset, chains = request.chain_offset, request.chains()
    if isinstance(given, State):
        return given, torch.full_like(chains, -1), chains, given.anchor
    # Chains that were picked from a record need not follow one another.
    kept = given.chains if isinstance(offset, Tensor) else given.chains[:1]
    if (isinstance(offset, Tensor) or offset) and kept.tolist() != chains[: len(kept)].tolist():
        raise ValueError(
            f"chain_offset must be left out where chains go on, which keep their indices, got "
            f"{chains.tolist()} for chains {given.chains.tolist()}"
        )
    return given.state, given.frozen_at, given.chains, given.sampler.anchor


def _check_room(params: TensorDict, num_chains: int) -> None:
    """Refuse more chains than the device has room for, with the step that follows their start.

    Raises:
        ValueError: Parameters and next parameters of all chains need more than is free.
    """
    device = tree.device(params)
    parts = [shards.local(leaf) for _, leaf in tree.leaves(params)]
    each = sum(part.numel() * part.element_size() for part in parts)
    needed = 2 * each * (1 if params.batch_size else num_chains)
    if (free := free_memory(device)) is not None and needed > free:
        raise ValueError(
            f"num_chains must be as many as fit {device}, where {in_bytes(free)} are free, got "
            f"{num_chains} of {in_bytes(each)}: run the others later, from the same key "
            "(chain_offset)"
        )


def check_chains(name: str, batch_size: Any, request: Request, *, shared: bool = True) -> None:
    """Check a batch size against the number of chains.

    Raises:
        ValueError: It is neither that number nor, where it may be shared, none.
    """
    wanted = [torch.Size((request.num_chains,))]
    if shared:
        wanted.insert(0, torch.Size())
    if batch_size not in wanted:
        sizes = " or ".join(str(tuple(size)) for size in wanted)
        raise ValueError(
            f"{name} must have batch size {sizes}, one for each of num_chains, got "
            f"{tuple(batch_size)}"
        )


def _check_state(state: State, sampler: Sampler) -> None:
    """Check that a state is one that the sampler makes.

    Raises:
        TypeError: It is another sampler's.
        ValueError: Its parts have other names or shapes.
    """
    _check_finite(state.params)
    if tree.is_sharded(state.params):
        # Of one chain, whose parts masks are cut for.
        state, sampler = state[0], sampler[0] if sampler.shape else sampler
    like = sampler.init(state.params, tree.map_leaves(torch.zeros_like, state.params))
    if type(state) is not type(like):
        raise TypeError(
            f"params must be a state of {type(sampler).__name__}, a {type(like).__name__}, to go "
            f"on from, got a {type(state).__name__}"
        )
    tree.check_same_structure("the state", state.to_tensordict(), like.to_tensordict())


def _placed(params: TensorDict, sampler: Sampler, init_noise: float, keys: Tensor) -> TensorDict:
    """Place chains at `params`, plus normal noise times the mask.

    Args:
        params: Of one chain, or of all.
        sampler: Theirs.
        init_noise: The noise's standard deviation.
        keys: Theirs, `[*chains, 2]`.

    Raises:
        TypeError, ValueError: `init_noise` is no number ≥ 0, or a chain is outside its box.
    """
    scale = checks.number("init_noise", init_noise).to(keys.device)
    # Views of one tree, not copies: `init` copies what it is given.
    params = params if params.batch_size or keys.ndim == 1 else params.expand(len(keys))
    center = sampler.anchor
    assert center is not None  # the sampler of a run has its anchor
    if sampler.bounding_box_size is not None:
        _check_inside_box(params, sampler.boxed(params, center))
    if not scale > 0:
        return params
    # The mask keeps entries that are not sampled where they are.
    moved = tree.map_leaves(
        lambda leaf, noise: (leaf + tree.expand_right(scale, leaf) * noise).to(leaf.dtype),
        params,
        scaled(tree.normal_like(keys, params), sampler.mask),
    )
    return sampler.boxed(moved, center)


def _check_inside_box(params: TensorDictBase, boxed: TensorDictBase) -> None:
    """Refuse parameters that start outside the bounding box.

    Args:
        params: Where chains start.
        boxed: The same, clamped to the box.

    Raises:
        ValueError: They differ.
    """
    for key, leaf in tree.leaves(params):
        away = (shards.local(leaf) - shards.local(boxed[key])).abs()
        excess = away.max() if away.numel() else away.new_zeros(())
        if spread := shards.spread_of(leaf):
            excess = spread.largest(excess)
        if excess > 0:
            raise ValueError(
                f"params[{tree.dotted(key)!r}] must start within bounding_box_size of the anchor, "
                f"got an entry {excess.item():g} outside"
            )
