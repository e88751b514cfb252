"""Settings at special values: temperature, step size, mask and box."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.law import close, identical, law, parameter_like, unless, without
from funcsgmcmc.testing.problems import Problem, of_all_chains


@law(temperature=0.0, exempt=without("temperature"))
def zero_temperature(problem: Problem) -> None:
    """At temperature 0 a chain is the deterministic scheme: no noise is seen."""
    silence = [tree.map_leaves(torch.zeros_like, given.noise) for given in problem.given]
    start = tree.map_leaves(torch.zeros_like, problem.start)
    quiet = replace(problem.with_noise(*silence), start=start)
    identical(problem.final(), quiet.final(), "at temperature 0, with noise")


@law(lr=0.0, bounding_box_size=None)
def zero_step_size(problem: Problem) -> None:
    """With a step size of 0 the parameters stay."""
    for _, after, _ in problem.path():
        close(after.params, problem.params, "parameters after a step of size 0")


def a_mask(problem: Problem) -> Mapping[str, SearchStrategy[Any]]:
    """What laws of masks draw."""
    return {"mask": strategies.masks(problem.params)}


@law(exempt=without("mask"), further=a_mask)
def masked_entries_stay(problem: Problem, mask: TensorDict) -> None:
    """Where the mask is 0 nothing moves."""
    kept, before = tree.flatten(mask) == 0, tree.flatten(problem.params)
    for _, after, _ in problem.changed(mask=mask, bounding_box_size=None).path():
        moved = tree.flatten(after.params)
        identical(kept * moved, kept * before, "entries whose mask is 0")


@law(
    exempt=lambda spec: without("mask")(spec) or unless("entrywise", "it is not entrywise")(spec),
    further=a_mask,
)
def masked_entries_are_not_seen(problem: Problem, mask: TensorDict) -> None:
    """What is given where the mask is 0, gradients and noise, does not touch the rest."""
    masked = problem.changed(mask=mask, bounding_box_size=None)
    sampled = tree.flatten(mask) != 0

    def disturbed(given: TensorDict) -> TensorDict:
        return tree.map_leaves(
            lambda leaf, m: torch.where(m == 0, leaf + 7, leaf), given, of_all_chains(mask, given)
        )

    elsewhere = replace(
        masked,
        start=disturbed(masked.start),
        given=tuple(given.map(disturbed) for given in masked.given),
    )
    seen, expected = parameter_like(elsewhere.final()), parameter_like(masked.final())
    for name, value in expected.items():
        a, b = seen[name], value
        if isinstance(value, TensorDictBase):
            a, b = sampled * tree.flatten(a), sampled * tree.flatten(b)
        identical(a, b, f"{name}, given something else where the mask is 0")


@law(exempt=without("mask"), mask=None)
def mask_of_ones(problem: Problem) -> None:
    """A mask of ones is no mask."""
    ones = tree.map_leaves(torch.ones_like, strategies.one_chain(problem.params))
    close(problem.changed(mask=ones).final(), problem.final(), "with a mask of ones")


@law(
    exempt=without("bounding_box_size"),
    further=lambda problem: {
        "box": strategies.hyperparameters(0.05, 3, tuple(problem.chains)),
    },
)
def box(problem: Problem, box: float | Tensor) -> None:
    """Chains stay in their box, wherever they come from; a box that none leaves changes nothing."""
    boxed = problem.changed(bounding_box_size=box)
    sampler, center = boxed.sampler, boxed.sampler.center(boxed.initial())
    for _, after, _ in boxed.path():
        for (_, leaf), (_, middle) in zip(
            tree.leaves(after.params), tree.leaves(of_all_chains(center, after.params)), strict=True
        ):
            half_width = tree.expand_right(torch.as_tensor(box, dtype=torch.float64), leaf)
            over = (leaf - middle).abs() - half_width
            assert bool((over <= 1e-14).all()), f"out of the box by {float(over.max())}"
        identical(sampler.boxed(after.params, center), after.params, "a clamp of what was clamped")
    wide, free = problem.changed(bounding_box_size=1e30), problem.changed(bounding_box_size=None)
    close(wide.final(), free.final(), "with a box that nothing leaves")
