"""What a law is, and the comparisons that laws make.

A law holds exactly (`identical`), or to the rounding of float64 (`close`): what is compared to a
tolerance agrees to 1e-9 of the largest number beside it.
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
from funcsgmcmc.testing.problems import Problem
from funcsgmcmc.testing.specs import SamplerSpec

Exemption = Callable[[SamplerSpec], str | None]
Further = Callable[[Problem], Mapping[str, SearchStrategy[Any]]]

SEVERAL = ((2,), (3,))
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Law:
    """A law, and which problems it is about.

    Attributes:
        holds: The law: a function of a problem, and of what else is drawn.
        restricted: What `problems` is told.
        exempt: Why a sampler need not obey, or None if it must; that a setting cannot have the
            value it is restricted to need not be said.
        further: What else is drawn, given the problem, by name.
    """

    holds: Callable[..., None]
    restricted: Mapping[str, Any]
    exempt: Exemption
    further: Further

    @property
    def name(self) -> str:
        """The function's."""
        return self.holds.__name__

    @property
    def statement(self) -> str:
        """The law in words."""
        return (self.holds.__doc__ or "").strip()

    def exemption(self, spec: SamplerSpec) -> str | None:
        """Why a sampler need not obey; None if it must."""
        return may_be(**self.restricted)(spec) or self.exempt(spec)

    def __str__(self) -> str:
        return self.name

    def __call__(self, problem: Problem, **drawn: Any) -> None:
        """Raise AssertionError if the law does not hold for the problem."""
        self.holds(problem, **drawn)


def nobody(spec: SamplerSpec) -> None:
    """The exemption of a law that all samplers must obey."""


def nothing(problem: Problem) -> Mapping[str, SearchStrategy[Any]]:
    """What is drawn beside the problem, for most laws."""
    return {}


def law(
    exempt: Exemption = nobody, further: Further = nothing, **restricted: Any
) -> Callable[[Callable[..., None]], Law]:
    """Make a law of a function; the arguments are the fields of `Law`."""
    return lambda function: Law(function, restricted, exempt, further)


def unless(attribute: str, reason: str) -> Exemption:
    """An exemption for samplers that say they do not have a property."""
    return lambda spec: None if getattr(spec, attribute) else reason


def may_be(**values: Any) -> Exemption:
    """An exemption for samplers one of whose settings cannot have a value."""

    def exempt(spec: SamplerSpec) -> str | None:
        never = [
            f"its {name} is never {value}"
            for name, value in values.items()
            if spec.takes(name) and not spec.allows(name, value)
        ]
        return never[0] if never else None

    return exempt


def without(setting: str) -> Exemption:
    """An exemption for samplers that do not take a setting."""
    return lambda spec: None if spec.takes(setting) else f"it has no {setting}"


def adapts(spec: SamplerSpec) -> str | None:
    """An exemption for samplers whose step sizes follow the gradients of the loss."""
    return "its step sizes follow the gradients of the loss alone" if spec.adaptive else None


def units_are_unknown(spec: SamplerSpec) -> str | None:
    """An exemption for samplers that do not say what their settings are measured in."""
    return "its units are not given" if spec.units is None else None


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a sampler, a state, terms or a tree."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def identical(actual: Any, expected: Any, what: str) -> None:
    """Compare bit for bit; NaN is NaN."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        same = a.shape == b.shape and a.dtype == b.dtype
        both_nan = a.isnan() & b.isnan() if same and a.is_floating_point() else False
        if not same or not bool(((a == b) | both_nan).all()):
            raise AssertionError(f"{what}: got {a.tolist()}, not {b.tolist()}")


def close(actual: Any, expected: Any, what: str) -> None:
    """Compare to the rounding of float64."""
    pairs = [
        (a.double(), b.double()) for a, b in zip(tensors(actual), tensors(expected), strict=True)
    ]
    sizes = [float(b.abs().max()) for _, b in pairs if b.numel() and b.isfinite().all()]
    tolerance = TOLERANCE * max([1.0, *sizes])
    for a, b in pairs:
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
            raise AssertionError(f"{what}: got {a.tolist()}, expected {b.tolist()}")


def parameter_like(state: State) -> dict[str, Any]:
    """What evolves and has the structure of the parameters, or none: all but averages."""
    structure = tree.names(state.params)
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, Tensor)
        or (isinstance(value, TensorDictBase) and tree.names(value) == structure)
    }
