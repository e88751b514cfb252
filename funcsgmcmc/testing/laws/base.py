"""`Law`: a property of updates, the samplers exempt from it, and the comparisons that laws make.

Laws compare values bit for bit (`identical`), or to the rounding of float64 (`close`): to 1e-9 of
the largest number compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import tree
from funcsgmcmc.samplers import State
from funcsgmcmc.testing.problem import Problem, field_values
from funcsgmcmc.testing.specs import SamplerSpec

Exemption = Callable[[SamplerSpec], str | None]
"""The reason why a sampler is exempt from a law; None if the law applies to it."""
Arguments = Callable[[Problem], Mapping[str, SearchStrategy[Any]]]

SEVERAL = ((2,), (3,))
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Law:
    """A property that updates should have, and the problems it is tried on.

    Attributes:
        holds: `holds(problem, **arguments)` raises AssertionError where the law fails.
        restrictions: Arguments of `problems`. A sampler that cannot have a value fixed here is
            exempt.
        exempt: The reason for another exemption, given a spec; None if there is none.
        arguments: Strategies of the law's further arguments, by name, given the problem.
    """

    holds: Callable[..., None]
    restrictions: Mapping[str, Any]
    exempt: Exemption
    arguments: Arguments

    @property
    def name(self) -> str:
        """The function's name."""
        return self.holds.__name__

    @property
    def statement(self) -> str:
        """The law in words: the function's docstring."""
        return (self.holds.__doc__ or "").strip()

    def exemption(self, spec: SamplerSpec) -> str | None:
        """The reason why a sampler is exempt; None if the law applies to it."""
        return unless_allowed(**self.restrictions)(spec) or self.exempt(spec)

    def __str__(self) -> str:
        return self.name

    def __call__(self, problem: Problem, **arguments: Any) -> None:
        """Raise AssertionError if the law fails for the problem."""
        self.holds(problem, **arguments)


def no_exemption(spec: SamplerSpec) -> None:
    """Exempt no sampler."""


def no_arguments(problem: Problem) -> Mapping[str, SearchStrategy[Any]]:
    """Draw nothing beside the problem."""
    return {}


def law(
    exempt: Exemption = no_exemption, arguments: Arguments = no_arguments, **restrictions: Any
) -> Callable[[Callable[..., None]], Law]:
    """Make a function of a problem a `Law`; see there for the arguments."""
    return lambda function: Law(function, restrictions, exempt, arguments)


def unless(attribute: str, reason: str) -> Exemption:
    """Exempt samplers whose spec says False (or None) of an attribute."""
    return lambda spec: None if getattr(spec, attribute) else reason


def unless_allowed(**values: Any) -> Exemption:
    """Exempt samplers that have one of these settings, but never with this value."""

    def exempt(spec: SamplerSpec) -> str | None:
        never = [
            f"its {name} is never {value}"
            for name, value in values.items()
            if spec.takes(name) and not spec.allows(name, value)
        ]
        return never[0] if never else None

    return exempt


def unless_taken(setting: str) -> Exemption:
    """Exempt samplers whose factory does not take a setting."""
    return lambda spec: None if spec.takes(setting) else f"it has no {setting}"


def if_adaptive(spec: SamplerSpec) -> str | None:
    """Exempt samplers whose step sizes depend on the gradients of the loss."""
    return "its step sizes follow the gradients of the loss alone" if spec.adaptive else None


def if_units_unknown(spec: SamplerSpec) -> str | None:
    """Exempt samplers whose spec does not give the units of their settings."""
    return "its units are not given" if spec.units is None else None


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a sampler, a state, terms or a tree."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def identical(actual: Any, expected: Any, what: str) -> None:
    """Compare bit for bit; NaN equals NaN."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        same = a.shape == b.shape and a.dtype == b.dtype
        both_nan = a.isnan() & b.isnan() if same and a.is_floating_point() else False
        if not same or not bool(((a == b) | both_nan).all()):
            raise AssertionError(f"{what}: got {a.tolist()}, not {b.tolist()}")


def close(actual: Any, expected: Any, what: str) -> None:
    """Compare to the rounding of float64; NaN equals NaN."""
    pairs = [
        (a.double(), b.double()) for a, b in zip(tensors(actual), tensors(expected), strict=True)
    ]
    # One scale for all: rounding of a large entry may reach small ones through sums.
    sizes = [float(b.abs().max()) for _, b in pairs if b.numel() and b.isfinite().all()]
    tolerance = TOLERANCE * max([1.0, *sizes])
    for a, b in pairs:
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
            raise AssertionError(f"{what}: got {a.tolist()}, expected {b.tolist()}")


def comparable_fields(state: State) -> dict[str, Any]:
    """The fields of a state that are tensors, or trees with the parameters' names.

    A preconditioner's averages are not among them: an oracle may keep those in another form.
    """
    names = tree.names(state.params)
    return {
        name: value
        for name, value in field_values(state)
        if isinstance(value, Tensor)
        or (isinstance(value, TensorDictBase) and tree.names(value) == names)
    }
