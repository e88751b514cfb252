"""Laws of any step: it is a pure function that keeps dtypes, devices and finite numbers."""

from typing import Any

import torch
from tensordict import TensorDictBase

from funcsgmcmc import tree
from funcsgmcmc.norms import metrics
from funcsgmcmc.testing.laws.base import identical, law, tensors
from funcsgmcmc.testing.problem import Problem


@law(dtypes=(torch.float64, torch.float32, torch.bfloat16), of_all_sizes=True)
def purity(problem: Problem) -> None:
    """`init` and `update` write to none of their arguments, and draw no random numbers."""
    sampler, start = problem.sampler, problem.initial()
    arguments = (sampler, problem.params, problem.start, problem.given, start)
    before, generator = [t.clone() for t in tensors(arguments)], torch.get_rng_state()
    state = start
    for given in problem.given:
        held = [t.clone() for t in tensors(state)]
        after, _ = sampler.update(state, *given)
        identical(tensors(state), held, "update wrote to the state it was given")
        state = after
    identical(tensors(arguments), before, "a call wrote to its arguments")
    assert torch.equal(torch.get_rng_state(), generator), "a call drew from the global generator"


@law(dtypes=(torch.float64, torch.float32))
def ownership(problem: Problem) -> None:
    """A state does not change when the caller writes to the tensors it was made from."""
    problem = problem.map(lambda given: given.clone())
    sampler, state = problem.sampler, problem.initial()
    held = [t.clone() for t in tensors(state)]
    for tensor in tensors((problem.params, problem.start)):
        tensor.add_(1.0)
    identical(tensors(state), held, "the state shares memory with the arguments of init")
    for given in problem.given:
        state, _ = sampler.update(state, *given)
        held = [t.clone() for t in tensors(state)]
        for tensor in tensors(given):
            tensor.add_(1.0)
        identical(tensors(state), held, "the state shares memory with gradients or noise")


@law(of_all_sizes=True, dtypes=(torch.float64, torch.float32, torch.bfloat16))
def determinism(problem: Problem) -> None:
    """The same arguments give the same bits, whatever the global generator's state."""
    first = problem.path()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second = problem.path()
    identical(first[-1].after, second[-1].after, "the same step twice")


@law(dtypes=(torch.float64, torch.float32, torch.bfloat16))
def kinds_are_kept(problem: Problem) -> None:
    """Shapes, dtypes and batch size stay; a step counts one; a momentum is float32 at least."""
    for before, after, _ in problem.path():
        assert type(after) is type(before), f"a {type(before).__name__} became {type(after)}"
        assert after.shape == problem.chains, f"batch size {after.shape}, not {problem.chains}"
        identical(after.step, before.step + 1, "number of steps made")
        for field in before.__dataclass_fields__:
            new, old = (_structure(getattr(state, field)) for state in (after, before))
            assert new == old, f"{field} was {old}, is {new}"
        for a, b in zip(tensors(after), tensors(before), strict=True):
            assert a.shape == b.shape, f"shape {tuple(b.shape)} became {tuple(a.shape)}"
            assert a.dtype == b.dtype, f"dtype {b.dtype} became {a.dtype}"
        # Also against the parameters given: `init` might have changed their dtypes already.
        for (name, leaf), (_, given) in zip(
            tree.leaves(after.params), tree.leaves(problem.params), strict=True
        ):
            assert leaf.dtype == given.dtype, f"{name} was {given.dtype}, is {leaf.dtype}"
        for leaf in tensors(getattr(after, "momentum", None)):
            assert leaf.dtype == tree.working_dtype(leaf), f"a momentum is kept in {leaf.dtype}"


def _structure(value: Any) -> Any:
    """The names of a tree's leaves; the type of any other field."""
    return tree.names(value) if isinstance(value, TensorDictBase) else type(value).__name__


@law(dtypes=(torch.float64, torch.bfloat16))
def devices_are_kept(problem: Problem) -> None:
    """On a device without data `init`, `update` and metrics give results on that device."""

    def move(value: Any) -> Any:
        return value.to("meta")  # which every machine has; reading a value there raises

    sampler = move(problem.sampler)
    state = sampler.init(move(problem.params), move(problem.start))
    for tensor in tensors(state):
        assert tensor.device.type == "meta", "init makes a state on the CPU"
    for given in problem.given:
        state, terms = sampler.update(state, *given.map(move, move))
        for tensor in tensors((state, terms, metrics(terms, sampler.mask))):
            assert tensor.device.type == "meta", "a result is on the CPU"


@law(
    of_all_sizes=True,
    max_steps=1,
    dtypes=(torch.float64, torch.float32, torch.bfloat16),
)
def finiteness(problem: Problem) -> None:
    """Finite numbers of all sizes, up to the fourth root of the largest, give finite ones."""
    state, terms = problem.path()[-1][1:]
    for tensor in tensors((state, terms, metrics(terms, problem.sampler.mask))):
        assert tensor.isfinite().all(), f"not finite: {tensor.tolist()}"


@law(dtypes=(torch.bfloat16, torch.float32), max_steps=1, bounding_box_size=None)
def narrow_leaves_are_rounded_once(problem: Problem) -> None:
    """A bfloat16 leaf moves as its float32 copy does, rounded at the end."""
    wide = problem.map(lambda given: tree.map_leaves(tree.widened, given))
    moved, expected = problem.final().params, wide.final().params
    for (name, leaf), (_, other) in zip(tree.leaves(moved), tree.leaves(expected), strict=True):
        identical(leaf, other.to(leaf.dtype), f"{tree.dotted(name)} against its float32 copy")
