"""Scales: the potential may be written in other units."""

from dataclasses import replace
from functools import partial
from operator import mul

from tensordict import TensorDict

from funcsgmcmc import tree
from funcsgmcmc.testing.laws.law import adapts, close, law, units_are_unknown, without
from funcsgmcmc.testing.problems import Problem
from funcsgmcmc.testing.specs import SamplerSpec


def energies_are_fixed(spec: SamplerSpec) -> str | None:
    """An exemption for samplers whose temperature or nβ cannot be set."""
    return units_are_unknown(spec) or without("temperature")(spec) or without("nbeta")(spec)


@law(exempt=lambda spec: adapts(spec) or without("nbeta")(spec), adaptive=False, scheduled=False)
def scale_of_the_loss(problem: Problem) -> None:
    """A quarter of the loss at four times nβ is the same potential."""
    fourfold = problem.map_setting("nbeta", lambda value: 4 * value)
    quarter = replace(fourfold, given=tuple(given.scaled(loss=1 / 4) for given in problem.given))
    close(quarter.final(), problem.final(), "L/4 at 4 nβ, against L at nβ")


@law(exempt=energies_are_fixed, adaptive=False, scheduled=False)
def units_of_energy(problem: Problem) -> None:
    """Nothing depends on the unit in which energies are counted: U → 4U, T → 4T."""
    in_other_units(problem, energy=4.0, length=1.0)


@law(
    exempt=lambda spec: (
        "it has a unit of length of its own" if spec.has_length else units_are_unknown(spec)
    ),
    adaptive=False,
    scheduled=False,
)
def units_of_length(problem: Problem) -> None:
    """Nothing depends on the unit in which parameters are counted: w → 2w."""
    in_other_units(problem, energy=1.0, length=2.0)


def in_other_units(problem: Problem, energy: float, length: float) -> None:
    """Compare with the same problem, its numbers in other units."""
    if problem.spec.units is None:
        raise ValueError(f"{problem.spec}: its units are not given, got None")
    powers = {
        "nbeta": (1, 0),
        "temperature": (1, 0),
        "localization": (1, -2),
        "weight_decay": (1, -2),
        "bounding_box_size": (0, 1),
        **problem.spec.units,
    }
    other = problem
    for name, (of_energy, of_length) in powers.items():
        factor = energy**of_energy * length**of_length
        other = other.map_setting(name, partial(mul, factor))

    def longer(given: TensorDict) -> TensorDict:
        return tree.map_leaves(lambda leaf: length * leaf, given)

    anchor = problem.settings.get("anchor")
    moved = replace(
        other.changed(anchor=None if anchor is None else longer(anchor)),
        params=longer(problem.params),
        given=tuple(given.scaled(log_prior=energy, length=length) for given in problem.given),
    )
    close(moved.final().params, longer(problem.final().params), "in other units")
