"""Laws of settings at special values: temperature, step size, mask and box."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.base import (
    close,
    comparable_fields,
    identical,
    law,
    unless,
    unless_taken,
)
from funcsgmcmc.testing.problem import Problem, expand_to_chains


@law(temperature=0.0, exempt=unless_taken("temperature"))
def zero_temperature(problem: Problem) -> None:
    """At temperature 0 the noise has no effect on the parameters: their path is deterministic."""
    silence = [tree.map_leaves(torch.zeros_like, given.noise) for given in problem.given]
    start = tree.map_leaves(torch.zeros_like, problem.start)
    quiet = replace(problem.with_noise(*silence), start=start)
    # Parameters, not states: a sampler may keep its noise, for a step that multiplies it by √T.
    for index, (loud, still) in enumerate(zip(problem.path(), quiet.path(), strict=True)):
        for name, leaf in tree.leaves(loud.after.params):
            what = f"params[{tree.dotted(name)!r}] after step {index}, at temperature 0, with noise"
            identical(leaf, still.after.params[name], what)


@law(lr=0.0, bounding_box_size=None)
def zero_step_size(problem: Problem) -> None:
    """With a step size of 0 the parameters stay."""
    for _, after, _ in problem.path():
        close(after.params, problem.params, "parameters after a step of size 0")


def _draw_mask(problem: Problem) -> Mapping[str, SearchStrategy[Any]]:
    """The argument of laws that always have a mask."""
    return {"mask": strategies.masks(problem.params)}


@law(exempt=unless_taken("mask"), arguments=_draw_mask)
def masked_entries_stay(problem: Problem, mask: TensorDict) -> None:
    """Entries whose mask is 0 do not move."""
    masked, before = tree.flatten(mask) == 0, tree.flatten(problem.params)
    for _, after, _ in problem.with_settings(mask=mask, bounding_box_size=None).path():
        identical(masked * tree.flatten(after.params), masked * before, "entries whose mask is 0")


@law(
    exempt=lambda spec: (
        unless_taken("mask")(spec) or unless("entrywise", "it is not entrywise")(spec)
    ),
    arguments=_draw_mask,
)
def masked_entries_are_not_seen(problem: Problem, mask: TensorDict) -> None:
    """Gradients, pulls and noise of entries whose mask is 0 do not affect the other entries."""
    masked = problem.with_settings(mask=mask, bounding_box_size=None)
    sampled = tree.flatten(mask) != 0

    def disturb(given: TensorDict) -> TensorDict:
        return tree.map_leaves(
            lambda leaf, m: torch.where(m == 0, leaf + 7, leaf),
            given,
            expand_to_chains(mask, given),
        )

    disturbed = replace(
        masked,
        start=disturb(masked.start),
        given=tuple(given.map(disturb) for given in masked.given),
    )
    actual, expected = comparable_fields(disturbed.final()), comparable_fields(masked.final())
    for name, value in expected.items():
        a, b = actual[name], value
        if isinstance(value, TensorDictBase):
            a, b = sampled * tree.flatten(a), sampled * tree.flatten(b)
        identical(a, b, f"{name}, given something else where the mask is 0")


@law(exempt=unless_taken("mask"), mask=None)
def mask_of_ones(problem: Problem) -> None:
    """A mask of ones changes nothing."""
    ones = tree.map_leaves(torch.ones_like, strategies.one_chain(problem.params))
    close(problem.with_settings(mask=ones).final(), problem.final(), "with a mask of ones")


@law(
    exempt=unless_taken("bounding_box_size"),
    arguments=lambda problem: {
        "box": strategies.hyperparameters(0.05, 3, tuple(problem.chains)),
    },
)
def box(problem: Problem, box: float | Tensor) -> None:
    """Chains end every step in their box, wherever they start; a wide box changes nothing."""
    boxed = problem.with_settings(bounding_box_size=box)
    sampler, center = boxed.sampler, boxed.sampler.center(boxed.initial())
    for _, after, _ in boxed.path():
        for (_, leaf), (_, middle) in zip(
            tree.leaves(after.params),
            tree.leaves(expand_to_chains(center, after.params)),
            strict=True,
        ):
            half_width = tree.expand_right(torch.as_tensor(box, dtype=torch.float64), leaf)
            over = (leaf - middle).abs() - half_width
            assert bool((over <= 1e-14).all()), f"out of the box by {float(over.max())}"
        identical(sampler.boxed(after.params, center), after.params, "a clamp of what was clamped")
    wide = problem.with_settings(bounding_box_size=1e30)
    free = problem.with_settings(bounding_box_size=None)
    close(wide.final(), free.final(), "with a box that nothing leaves")
