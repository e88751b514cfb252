"""Laws of units: a potential may be written in others, and the same chain comes out."""

from dataclasses import replace
from functools import partial
from operator import mul

from tensordict import TensorDict

from funcsgmcmc import tree
from funcsgmcmc.testing.laws.base import close, if_adaptive, if_units_unknown, law, unless_taken
from funcsgmcmc.testing.problem import Problem
from funcsgmcmc.testing.specs import SamplerSpec


@law(
    exempt=lambda spec: if_adaptive(spec) or unless_taken("nbeta")(spec),
    adaptive=False,
    scheduled=False,
)
def scale_of_the_loss(problem: Problem) -> None:
    """A quarter of the loss at four times nβ is the same potential."""
    fourfold = problem.map_setting("nbeta", lambda value: 4 * value)
    quarter = replace(fourfold, given=tuple(given.scale(loss=1 / 4) for given in problem.given))
    close(quarter.final(), problem.final(), "L/4 at 4 nβ, against L at nβ")


def _if_energy_fixed(spec: SamplerSpec) -> str | None:
    """Exempt samplers whose temperature or nβ cannot be set."""
    return (
        if_units_unknown(spec) or unless_taken("temperature")(spec) or unless_taken("nbeta")(spec)
    )


@law(exempt=_if_energy_fixed, adaptive=False, scheduled=False)
def units_of_energy(problem: Problem) -> None:
    """Nothing depends on the unit in which energies are counted: U → 4U, T → 4T."""
    _check_in_other_units(problem, energy=4.0, length=1.0)


def _if_length_fixed(spec: SamplerSpec) -> str | None:
    """Exempt samplers with a unit of length of their own."""
    own = "it has a unit of length of its own" if spec.has_length else None
    return own or if_units_unknown(spec)


@law(exempt=_if_length_fixed, adaptive=False, scheduled=False)
def units_of_length(problem: Problem) -> None:
    """Nothing depends on the unit in which parameters are counted: w → 2w."""
    _check_in_other_units(problem, energy=1.0, length=2.0)


def _check_in_other_units(problem: Problem, energy: float, length: float) -> None:
    """Compare the chain with that of the same problem in units smaller by these factors."""
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

    def lengthen(params: TensorDict) -> TensorDict:
        return tree.map_leaves(lambda leaf: length * leaf, params)

    anchor = problem.settings.get("anchor")
    other = replace(
        other.with_settings(anchor=None if anchor is None else lengthen(anchor)),
        params=lengthen(problem.params),
        given=tuple(given.scale(log_prior=energy, length=length) for given in problem.given),
    )
    close(other.final().params, lengthen(problem.final().params), "in other units")
