"""Priors of `SGMCMC`: pulls on one parameter, with what they remember in the optimizer's state."""

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Iterable, MutableMapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from compat.groups import check_one_each
from funcsgmcmc import checks
from funcsgmcmc.priors import displacement, gaussian_pull
from funcsgmcmc.terms import Term, sum_terms

State = MutableMapping[str, Any]


class Prior(ABC):
    """The contract of a prior; subclass it to write one.

    Attributes:
        key: Under which name the prior keeps what it remembers of a parameter.
    """

    key: str

    @abstractmethod
    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """Make the memory of each parameter of a group, at its values now."""

    @abstractmethod
    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """−∇ log p(w) for one parameter.

        Args:
            param: w.
            state: The optimizer's state of the parameter, with what `initialize` gave.
        """


class GaussianPrior(Prior):
    """A Gaussian: −∇ log p(w) = γ (w − c).

    Args:
        localization: Precision γ ≥ 0, in units of 1/w².
        center: c: "initial" for the parameters as they are when their group is added, None for
            zero, a number for all entries, or an iterable of one tensor a parameter.

    Raises:
        TypeError, ValueError: A value is not of the type above or not in its range.
    """

    def __init__(
        self,
        localization: float,
        center: Literal["initial"] | Iterable[Tensor] | Real | None = "initial",
    ):
        checks.number("localization", localization)
        if isinstance(center, str):
            checks.choice("center", center, ("initial",))
        elif isinstance(center, Real):
            checks.finite_number("center", center)
        self.localization = localization
        self.key = "prior_center"
        self.center: Any = center
        if isinstance(center, Iterable) and not isinstance(center, str):
            self.center = list(center)

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The centre of each parameter, under `key`; None for zero.

        Raises:
            ValueError: The given centres are not one for each parameter, of its shape.
        """
        if isinstance(self.center, list):
            check_one_each("center", self.center, params)
            centers: list[Tensor | None] = [center.detach().clone() for center in self.center]
        elif isinstance(self.center, str):
            centers = [param.detach().clone() for param in params]
        elif self.center is None:
            centers = [None] * len(params)
        else:
            # A 0-d tensor broadcasts against the parameter.
            centers = [param.new_tensor(float(self.center)) for param in params]
        return {param: {self.key: center} for param, center in zip(params, centers, strict=True)}

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """γ (w − c), with c from the state; in the dtype of `param`."""
        precision, direction = self.pull(param, state)
        return gaussian_pull(direction, precision).to(param.dtype)

    def pull(self, param: Tensor, state: State) -> Term:
        """The same as the product γ · (w − c)."""
        center = state.get(self.key)
        return Term(
            float(self.localization), param if center is None else displacement(param, center)
        )

    def __repr__(self) -> str:
        return f"GaussianPrior(localization={self.localization}, center={self.center})"


class UniformPrior(Prior):
    """A uniform prior on all of space: no pull.

    Args:
        box_size: Must be infinite; `bounding_box_size` of the optimizers is a finite box.

    Raises:
        ValueError: It is finite.
    """

    def __init__(self, box_size: float = np.inf):
        if not box_size == np.inf:
            raise ValueError(
                f"box_size must be infinite, got {box_size}: use the optimizer's bounding_box_size"
            )
        self.key = "uniform_prior_center"
        self.box_size = box_size

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """Nothing to remember."""
        return {}

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """Zeros."""
        return torch.zeros_like(param)

    def __repr__(self) -> str:
        return "UniformPrior()"


class CompositePrior(Prior):
    """A product of priors, whose pulls add up.

    One prior may stand in several composites, or several times in one, and a composite may stand
    in another: where two priors would remember something of a parameter under the same name, the
    later one is given a compartment of its own in the state.

    Args:
        priors: Any number; uniform ones are left out.
    """

    def __init__(self, priors: list[Prior]):
        self.key = "composite_prior"
        self.priors = [prior for prior in priors if not isinstance(prior, UniformPrior)]

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The memories of all priors, in compartments where names would meet."""
        combined: dict[Tensor, dict[str, Any]] = {param: {} for param in params}
        # A prior's own name could be that of a compartment.
        reserved = {compartment for compartment, _ in self._compartments()}
        taken: set[str] = set()
        for compartment, prior in self._compartments():
            remembered = prior.initialize(params)
            names = {name for param in params for name in remembered.get(param, {})}
            meets = bool(names & (taken | reserved))
            taken |= names
            for param in params:
                own = remembered.get(param, {})
                combined[param] |= {compartment: own} if meets else own
        return combined

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """The sum of all pulls; in the dtype of `param`."""
        result = torch.zeros_like(param)
        for prior, remembered in self.members(state):
            result += prior.grad(param, cast(dict[str, Any], remembered))
        return result

    def members(self, state: State) -> list[tuple[Prior, State]]:
        """Every prior, with the state as it sees it: its compartment before all others."""
        return [
            (prior, ChainMap(state[compartment], state) if compartment in state else state)
            for compartment, prior in self._compartments()
        ]

    def _compartments(self) -> list[tuple[str, Prior]]:
        return [(f"{self.key}_{i}", prior) for i, prior in enumerate(self.priors)]

    def __repr__(self) -> str:
        return f"CompositePrior({self.priors})"


class Pulls(NamedTuple):
    """The pulls of a prior on one parameter; None for an absent one.

    Attributes:
        localization: All but weight decay.
        weight_decay: Gaussians around zero.
        from_initial: The displacement from the initial parameters, if a pull has computed it.
    """

    localization: Term | None
    weight_decay: Term | None
    from_initial: Term | None


def pulls(prior: Prior | None, param: Tensor, state: State) -> Pulls:
    """Sort the pulls of a prior on one parameter."""
    localization: list[Term] = []
    weight_decay: list[Term] = []
    from_initial: Term | None = None
    for each, remembered in leaves(prior, state):
        if _is_plain(each, GaussianPrior):
            gaussian = cast(GaussianPrior, each)
            pull = gaussian.pull(param, remembered)
            center = remembered.get(gaussian.key)
            if center is not None and center is state.get("initial_param"):
                from_initial = Term(1.0, pull.direction)
        else:
            gradient = each.grad(param, cast(dict[str, Any], remembered))
            direction = torch.as_tensor(gradient, device=param.device).expand_as(param)
            # Several priors may return the same memory, one after the other.
            pull = Term(1.0, direction.clone() if each is not prior else direction)
        # As the published metrics have it: pulls to zero are weight decay, all others localization.
        decays = isinstance(each, GaussianPrior) and each.center is None
        (weight_decay if decays else localization).append(pull)
    return Pulls(sum_terms(localization), sum_terms(weight_decay), from_initial)


def share_initial(prior: Prior | None, state: dict[str, Any]) -> None:
    """Let Gaussians around the initial parameters share the optimizer's copy of them."""
    initial = state["initial_param"]
    for each, remembered in leaves(prior, state):
        if isinstance(each, GaussianPrior) and isinstance(each.center, str):
            center = remembered.get(each.key)
            if initial is not None and center is not None and torch.equal(initial, center):
                remembered[each.key] = initial


def leaves(prior: Prior | None, state: State) -> list[tuple[Prior, State]]:
    """The priors in a composite, at any depth, with the state as each sees it."""
    if prior is None:
        return []
    if not _is_plain(prior, CompositePrior):
        return [(prior, state)]
    found: list[tuple[Prior, State]] = []
    for member, remembered in cast(CompositePrior, prior).members(state):
        found += leaves(member, remembered)
    return found


def _is_plain(prior: Prior, kind: type[Prior]) -> bool:
    """Whether a prior pulls as its class does: a user may have given another `grad`."""
    return isinstance(prior, kind) and getattr(prior.grad, "__func__", None) is kind.grad


def gaussians(weight_decay: float, localization: float) -> CompositePrior:
    """The priors that two precisions stand for."""
    checks.number("weight_decay", weight_decay)
    checks.number("localization", localization)
    priors: list[Prior] = []
    if weight_decay > 0:
        priors.append(GaussianPrior(weight_decay, center=None))
    if localization > 0:
        priors.append(GaussianPrior(localization, center="initial"))
    return CompositePrior(priors)


def prior_of(given: Any, localization: float) -> Prior | None:
    """The prior that a group's setting stands for."""
    if isinstance(given, Prior) or (given is None and not localization):
        return given
    if given is None or isinstance(given, str | Iterable):
        center: Any = "initial" if given is None else given
        return GaussianPrior(localization or 1.0, center=center)
    if isinstance(given, Real):
        return GaussianPrior(float(given))
    raise ValueError(
        f"prior must be a Prior, 'initial', a number, tensors or None, got {type(given).__name__}"
    )
