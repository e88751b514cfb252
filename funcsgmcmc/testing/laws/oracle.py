"""The law that a step is the sampler's equation, as its oracle computes it in NumPy."""

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
from funcsgmcmc.testing.laws.base import close, comparable_fields, law, unless
from funcsgmcmc.testing.oracles import Chain, Vector
from funcsgmcmc.testing.problem import Problem


@law(exempt=unless("oracle_step", "no oracle_step is given"))
def oracle_is_followed(problem: Problem) -> None:
    """Every step of every chain gives what the oracle gives, in all fields that evolve."""
    alone = [problem.take(i) for i in range(problem.chains[0])] if problem.chains else [problem]
    state = problem.initial()
    chains = [_start(single) for single in alone]
    _compare(state, chains, "before the first step")
    for index, given in enumerate(problem.given):
        state, _ = problem.sampler.update(state, *given)
        chains = [_step(chain, single, index) for chain, single in zip(chains, alone, strict=True)]
        _compare(state, chains, f"after step {problem.first_step + index}")


def _start(problem: Problem) -> Chain:
    """The oracle's chain before the first step; without `oracle_start`, the sampler's own."""
    start = problem.spec.oracle_start
    if start is None:
        fields = comparable_fields(problem.initial())
        return {name: _to_numpy(value) for name, value in fields.items()}
    params, noise = _to_numpy(problem.params), _to_numpy(problem.start)
    chain = start(params, noise, **_settings_at(problem, 0, step=0))
    arguments.mapping("what oracle_start returns", chain)
    return {**chain, "step": problem.first_step}


def _step(chain: Chain, problem: Problem, index: int) -> Chain:
    """The oracle's chain after one more step."""
    if problem.spec.oracle_step is None:
        raise ValueError(f"{problem.spec} has no oracle_step, got None")
    evaluation, noise = problem.given[index]
    grads, pull = _to_numpy(evaluation.grads), _to_numpy(evaluation.prior_pull)
    if pull is None:
        pull = np.zeros_like(grads)
    settings = _settings_at(problem, index, step=problem.first_step + index)
    after = problem.spec.oracle_step(chain, grads, _to_numpy(noise), pull, **settings)
    arguments.mapping("what oracle_step returns", after)
    return after


def _compare(state: State, chains: list[Chain], when: str) -> None:
    """Compare a state with an oracle's chains, in every field that both have."""
    # The anchor is constant, averages may have another form, and `kinds_are_kept` counts steps.
    needed = {*comparable_fields(state)} - {"anchor", "preconditioner", "step"}
    missing = sorted(needed - chains[0].keys())
    if missing:
        raise ValueError(f"the oracle must give {', '.join(missing)}, got {[*chains[0]]}")
    for name in chains[0].keys() & state.__dataclass_fields__.keys():
        value = getattr(state, name)
        actual = tree.flatten(value) if isinstance(value, TensorDictBase) else value
        expected = _stack(name, chains)
        if actual.numel() != expected.numel():
            raise ValueError(
                f"the oracle must give {name} of shape {tuple(actual.shape[state.ndim :])}, "
                f"got {tuple(expected.shape[1:])}"
            )
        close(actual.reshape(expected.shape), expected, f"{name} {when}, against the oracle")


def _stack(name: str, chains: list[Chain]) -> Tensor:
    """One field of an oracle's chains, `[C, …]`."""
    values = [np.asarray(chain[name]) for chain in chains]
    if any(not np.issubdtype(value.dtype, np.number) for value in values):
        raise TypeError(f"the oracle must give {name} as numbers, got {chains[0][name]!r}")
    return torch.as_tensor(np.stack(values))


def _settings_at(problem: Problem, index: int, step: int) -> dict[str, Any]:
    """The keyword arguments of the oracle of one chain, as `oracles` lists them."""
    evaluation, size = problem.given[index].evaluation, tree.size(problem.params)
    defaults: dict[str, Any] = {
        "temperature": 1.0,
        "localization": 0.0,
        "weight_decay": 0.0,
        "anchor": _to_numpy(problem.params),
        "mask": np.ones(size),
        "bounding_box_size": math.inf,
        "preconditioner": None,
        "loss": 0.0,
        "log_prior": 0.0,
        "hessian_diagonal": np.zeros(size),
    }
    given = {
        **{name: _look_up(value, step) for name, value in problem.settings.items()},
        "loss": evaluation.loss,
        "log_prior": evaluation.log_prior,
        "hessian_diagonal": evaluation.hessian_diagonal,
    }
    present = {name: _to_numpy(value) for name, value in given.items() if value is not None}
    return {**given, **defaults, **present}


def _look_up(value: Any, step: int) -> Any:
    """A setting's value at a step."""
    return value(torch.tensor(step)) if isinstance(value, Schedule) else value


def _to_numpy(value: Any) -> Any:
    """A tree of one chain as a vector, a tensor as an array or number, anything else as it is."""
    if isinstance(value, TensorDictBase):
        row: Vector = tree.flatten(value).detach().double().numpy()
        return row
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.numpy()
    return value
