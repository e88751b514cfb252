"""Chains are a batch axis: they do not see each other, and each follows its own schedules."""

from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers import Evaluation, Sampler, State
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.law import SEVERAL, close, identical, law
from funcsgmcmc.testing.problems import Given, Problem, update


@law(chains=((1,), *SEVERAL))
def vmap_is_a_loop(problem: Problem) -> None:
    """Chains in a batch, chains under torch.vmap, and chain by chain are the same chains."""
    sampler = problem.sampler
    per_chain = 0 if sampler.shape else None
    together, mapped_over = problem.initial(), problem.initial()
    alone = [problem.take(chain).initial() for chain in range(problem.chains[0])]
    for index, given in enumerate(problem.given):
        together, _ = update(sampler, together, given)
        known = {
            name: each for name, each in given.evaluation._asdict().items() if each is not None
        }

        def step(sampler: Sampler, state: State, noise: TensorDict, known: Any) -> State:
            return update(sampler, state, Given(Evaluation(**known), noise))[0]

        mapped_over = torch.vmap(step, in_dims=(per_chain, 0, 0, 0))(
            sampler, mapped_over, given.noise, known
        )
        close(mapped_over, together, "torch.vmap against the batch")
        for chain, state in enumerate(alone):
            single = problem.take(chain)
            alone[chain], _ = update(single.sampler, state, single.given[index])
            close(alone[chain], together[chain], f"chain {chain} by itself, against the batch")


@law(
    chains=SEVERAL,
    further=lambda problem: {
        "order": st.permutations(range(problem.chains[0])),
        "sizes": strategies.chunkings(problem.chains[0]),
    },
)
def chunks_and_order(problem: Problem, order: list[int], sizes: list[int]) -> None:
    """Chains do not depend on which others run beside them, nor on their order."""
    expected, start = problem.final(), 0
    for size in sizes:
        chunk = order[start : start + size]
        close(problem.take(chunk).final(), expected[chunk], f"chains {chunk} by themselves")
        start += size


@law(chains=SEVERAL)
def failures_stay_in_their_chain(problem: Problem) -> None:
    """Gradients of one chain that are not numbers leave the others as they were, bit for bit."""
    healthy = problem.final()

    def spoiled(grads: TensorDict) -> TensorDict:
        def spoil(leaf: Tensor) -> Tensor:
            leaf = leaf.clone()
            leaf[0] = torch.nan
            return leaf

        return tree.map_leaves(spoil, grads)

    evaluations = [
        given.evaluation._replace(grads=spoiled(given.evaluation.grads)) for given in problem.given
    ]
    beside = problem.with_evaluation(*evaluations).final()
    identical(beside[1:], healthy[1:], "a chain beside one that fails")


@law()
def schedules_are_followed(problem: Problem) -> None:
    """A step takes from a schedule its value at the number of steps made."""

    def at(step: int) -> Problem:
        now = {
            name: value(torch.full(tuple(value.shape), step))
            for name, value in problem.settings.items()
            if isinstance(value, Schedule)
        }
        return problem.changed(**now)

    scheduled, state = problem.initial(), at(0).initial()
    close(scheduled, state, "the start, scheduled, against the values at step 0")
    for step, given in enumerate(problem.given, problem.first_step):
        scheduled, _ = update(problem.sampler, scheduled, given)
        state, _ = update(at(step).sampler, state, given)
        close(scheduled, state, f"step {step}, scheduled, against its value then")
