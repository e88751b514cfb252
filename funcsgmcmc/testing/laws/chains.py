"""Laws of chains: a batch axis along which no chain affects another; and of their schedules."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers import Evaluation, Sampler, State
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.base import SEVERAL, close, identical, law
from funcsgmcmc.testing.problem import Problem


@law(chains=((1,), *SEVERAL))
def vmap_is_a_loop(problem: Problem) -> None:
    """A step of a batch, the step under torch.vmap and a loop over chains give the same chains."""
    sampler = problem.sampler

    def step(sampler: Sampler, state: State, evaluation: Evaluation, noise: TensorDict) -> State:
        return sampler.update(state, evaluation, noise)[0]

    step_under_vmap = torch.vmap(step, in_dims=(0 if sampler.shape else None, 0, 0, 0))
    together, under_vmap = problem.initial(), problem.initial()
    alone = [problem.take(chain).initial() for chain in range(problem.chains[0])]
    for index, given in enumerate(problem.given):
        together, _ = sampler.update(together, *given)
        under_vmap = step_under_vmap(sampler, under_vmap, *given)
        close(under_vmap, together, "torch.vmap against the batch")
        for chain, state in enumerate(alone):
            single = problem.take(chain)
            alone[chain], _ = single.sampler.update(state, *single.given[index])
            close(alone[chain], together[chain], f"chain {chain} by itself, against the batch")


@law(
    chains=SEVERAL,
    arguments=lambda problem: {
        "order": st.permutations(range(problem.chains[0])),
        "sizes": strategies.chunkings(problem.chains[0]),
    },
)
def chunks_and_order(problem: Problem, order: list[int], sizes: list[int]) -> None:
    """A chain depends neither on which others run beside it, nor on their order."""
    expected, start = problem.final(), 0
    for size in sizes:
        chunk = order[start : start + size]
        close(problem.take(chunk).final(), expected[chunk], f"chains {chunk} by themselves")
        start += size


@law(chains=SEVERAL)
def failures_stay_in_their_chain(problem: Problem) -> None:
    """NaN in one chain's gradients leaves the other chains as they were, bit for bit."""
    healthy = problem.final()

    def spoil(leaf: Tensor) -> Tensor:
        leaf = leaf.clone()
        leaf[0] = torch.nan
        return leaf

    evaluations = [
        replace(given.evaluation, grads=tree.map_leaves(spoil, given.evaluation.grads))
        for given in problem.given
    ]
    beside = problem.with_evaluation(*evaluations).final()
    identical(beside[1:], healthy[1:], "a chain beside one that fails")


@law()
def schedules_are_followed(problem: Problem) -> None:
    """A step takes from a schedule its value at the number of steps made before."""

    def at(step: int) -> Problem:
        values = {
            name: value(torch.full(tuple(value.shape), step))
            for name, value in problem.settings.items()
            if isinstance(value, Schedule)
        }
        return problem.with_settings(**values)

    scheduled, state = problem.initial(), at(0).initial()
    close(scheduled, state, "the start, scheduled, against the values at step 0")
    for step, given in enumerate(problem.given, problem.first_step):
        scheduled, _ = problem.sampler.update(scheduled, *given)
        state, _ = at(step).sampler.update(state, *given)
        close(scheduled, state, f"step {step}, scheduled, against its value then")
