"""What a step is: the sampler's equation, as a reference in NumPy says it."""

import math
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers import State
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.testing import arguments
from funcsgmcmc.testing.laws.law import close, law, parameter_like, unless
from funcsgmcmc.testing.oracles import Chain, ReferenceStep, Vector
from funcsgmcmc.testing.problems import Problem, update


@law(exempt=unless("reference_step", "no reference_step is given"))
def reference(problem: Problem) -> None:
    """Every step is the reference's, chain by chain, in all that evolves."""
    alone = [problem.take(i) for i in range(problem.chains[0])] if problem.chains else [problem]
    state = problem.initial()
    chains = [first(single) for single in alone]
    compare(state, chains, "before the first step")
    for index, given in enumerate(problem.given):
        state, _ = update(problem.sampler, state, given)
        chains = [moved(chain, single, index) for chain, single in zip(chains, alone, strict=True)]
        compare(state, chains, f"after step {problem.first_step + index}")


def first(problem: Problem) -> Chain:
    """The reference's chain before the first step; without `reference_start`, that of `init`."""
    start = problem.spec.reference_start
    if start is None:
        known = parameter_like(problem.initial())
        return {name: plain(value) for name, value in known.items()}
    chain = start(plain(problem.params), plain(problem.start), **settings_at(problem, 0, step=0))
    arguments.mapping("what reference_start returns", chain)
    return {**chain, "step": problem.first_step}


def moved(chain: Chain, problem: Problem, index: int) -> Chain:
    """The reference's chain after a step."""
    reference: ReferenceStep | None = problem.spec.reference_step
    if reference is None:
        raise ValueError(f"{problem.spec} has no reference_step, got None")
    evaluation, noise = problem.given[index]
    grads, pull = plain(evaluation.grads), plain(evaluation.prior_pull)
    if pull is None:
        pull = np.zeros_like(grads)
    known = settings_at(problem, index, step=problem.first_step + index)
    after = reference(chain, grads, plain(noise), pull, **known)
    arguments.mapping("what reference_step returns", after)
    return after


def compare(state: State, chains: list[Chain], when: str) -> None:
    """Compare a state with the chains of a reference, in every field that both have."""
    compared = {*parameter_like(state)} - {"anchor", "preconditioner", "step"}
    missing = sorted(compared - chains[0].keys())
    if missing:
        raise ValueError(f"the reference must give {', '.join(missing)}, got {[*chains[0]]}")
    for name in chains[0].keys() & state.__dataclass_fields__.keys():
        value = getattr(state, name)
        actual = tree.flatten(value) if isinstance(value, TensorDictBase) else value
        expected = vectors(name, chains)
        if actual.numel() != expected.numel():
            raise ValueError(
                f"the reference must give {name} of shape {tuple(actual.shape[state.ndim :])}, "
                f"got {tuple(expected.shape[1:])}"
            )
        close(actual.reshape(expected.shape), expected, f"{name} {when}, against the reference")


def vectors(name: str, chains: list[Chain]) -> Tensor:
    """A field of a reference's chains."""
    given = [np.asarray(chain[name]) for chain in chains]
    if any(not np.issubdtype(each.dtype, np.number) for each in given):
        raise TypeError(f"the reference must give {name} as numbers, got {chains[0][name]!r}")
    return torch.as_tensor(np.stack(given))


def settings_at(problem: Problem, index: int, step: int) -> dict[str, Any]:
    """What the reference of one chain is told: see `oracles`."""
    known, size = problem.given[index].evaluation, tree.size(problem.params)
    absent: dict[str, Any] = {
        "temperature": 1.0,
        "localization": 0.0,
        "weight_decay": 0.0,
        "anchor": plain(problem.params),
        "mask": np.ones(size),
        "bounding_box_size": math.inf,
        "preconditioner": None,
        "loss": 0.0,
        "log_prior": 0.0,
        "hessian_diagonal": np.zeros(size),
    }
    given = {
        **{name: at_step(value, step) for name, value in problem.settings.items()},
        "loss": known.loss,
        "log_prior": known.log_prior,
        "hessian_diagonal": known.hessian_diagonal,
    }
    present = {name: plain(value) for name, value in given.items() if value is not None}
    return {**given, **absent, **present}


def at_step(value: Any, step: int) -> Any:
    """A setting at a step."""
    return value(torch.tensor(step)) if isinstance(value, Schedule) else value


def plain(value: Any) -> Any:
    """A tree of one chain as a vector, a tensor of one number as that number."""
    if isinstance(value, TensorDictBase):
        row: Vector = tree.flatten(value).detach().double().numpy()
        return row
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.numpy()
    return value
