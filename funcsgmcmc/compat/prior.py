"""Priors of `SGMCMC`: each pulls on one parameter, and may keep entries in its state."""

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.compat.groups import check_one_each
from funcsgmcmc.priors import displacement, gaussian_pull
from funcsgmcmc.terms import Term, sum_terms

PriorT = TypeVar("PriorT", bound="Prior")
State = dict[str, Any]


class Prior(ABC):
    """Base class of priors; subclass it to write one.

    Attributes:
        key: Name of the prior's entry in a parameter's state.
    """

    key: str

    @abstractmethod
    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The entries of each parameter's state, made at the parameters' values now."""

    @abstractmethod
    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """−∇ log p(w) for one parameter.

        Args:
            param: w.
            state: The optimizer's state of the parameter, with the entries from `initialize`.
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
        self.key = "prior_center"  # fixed, unlike the published one, which a composite renames
        self.center: Any = center
        if isinstance(center, Iterable) and not isinstance(center, str):
            self.center = list(center)  # an iterator could be read for one group only

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The centre of each parameter, under `key`; None for zero.

        Raises:
            ValueError: The given centres are not one for each parameter, of its shape.
        """
        if isinstance(self.center, list):
            check_one_each("center", self.center, params)
            # Copies: steps write to parameters in place, and users may write to their tensors.
            centers: list[Tensor | None] = [center.detach().clone() for center in self.center]
        elif isinstance(self.center, str):
            centers = [param.detach().clone() for param in params]
        elif self.center is None:
            centers = [None] * len(params)
        else:
            # A scalar, which broadcasts: no memory of the parameter's size.
            centers = [param.new_tensor(float(self.center)) for param in params]
        return {param: {self.key: center} for param, center in zip(params, centers, strict=True)}

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """γ (w − c), with c from the state; in the dtype of `param`."""
        precision, direction = self.pull(param, state)
        return gaussian_pull(direction, precision).to(param.dtype)

    def pull(self, param: Tensor, state: State) -> Term:
        """The pull as a product γ · (w − c), in float32 or better if c is not zero."""
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
        NotImplementedError: It is finite.
    """

    def __init__(self, box_size: float = np.inf):
        if not box_size == np.inf:  # refuses NaN, too
            # Published as not implemented, rather than as a bad value.
            raise NotImplementedError(
                f"box_size must be infinite, got {box_size}: use the optimizer's bounding_box_size"
            )
        self.key = "uniform_prior_center"
        self.box_size = box_size

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """No entries."""
        return {}

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """Zeros."""
        return torch.zeros_like(param)

    def __repr__(self) -> str:
        return "UniformPrior()"


class CompositePrior(Prior):
    """A product of priors, whose pulls add up.

    One prior may stand in several composites, or several times in one, and a composite may stand
    in another: if two priors use the same name in a parameter's state, the later one is given a
    compartment of its own.

    Args:
        priors: Any number; uniform ones are left out.
    """

    def __init__(self, priors: list[Prior]):
        self.key = "composite_prior"
        self.priors = [prior for prior in priors if not isinstance(prior, UniformPrior)]

    def initialize(self, params: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The entries of all priors; a prior whose names are in use gets a compartment."""
        combined: dict[Tensor, dict[str, Any]] = {param: {} for param in params}
        reserved = {compartment for compartment, _ in self._compartments()}
        used: set[str] = set()
        for compartment, prior in self._compartments():
            remembered = prior.initialize(params)
            names = {name for param in params for name in remembered.get(param, {})}
            # An entry named like a compartment would be read as that compartment.
            in_use = bool(names & (used | reserved))
            used |= names
            for param in params:
                own = remembered.get(param, {})
                combined[param] |= {compartment: own} if in_use else own
        return combined

    def grad(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """The sum of all pulls; in the dtype of `param`."""
        result = torch.zeros_like(param)
        for prior, remembered in self.members(state):
            result += prior.grad(param, remembered)
        return result

    def members(self, state: State) -> list[tuple[Prior, State]]:
        """Each prior with its view of the state: its compartment, then everything else."""
        views: list[tuple[Prior, State]] = []
        for compartment, prior in self._compartments():
            view = state
            # Behaves as a dict: reads its compartment first, and writes only there.
            if compartment in state:
                view = cast(State, ChainMap(state[compartment], state))
            views.append((prior, view))
        return views

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
    """Compute the pulls of a prior on one parameter, sorted by kind."""
    localization: list[Term] = []
    weight_decay: list[Term] = []
    from_initial: Term | None = None
    for each, remembered in _leaves(prior, state):
        if _is_plain(each, GaussianPrior):
            pull = each.pull(param, remembered)  # a product: no tensor for γ (w − c)
            center = remembered.get(each.key)
            # The same tensor (see share_initial): the displacement is the distance of the metrics.
            if center is not None and center is state.get("initial_param"):
                from_initial = Term(1.0, pull.direction)
        else:
            gradient = each.grad(param, remembered)
            # A user's prior may return a number, or one tensor for several entries.
            direction = torch.as_tensor(gradient, device=param.device).expand_as(param)
            # Several priors may return the same memory, one after the other.
            pull = Term(1.0, direction.clone() if each is not prior else direction)
        # As published, a Gaussian around zero counts as weight decay, and all else as localization.
        decays = isinstance(each, GaussianPrior) and each.center is None
        (weight_decay if decays else localization).append(pull)
    return Pulls(sum_terms(localization), sum_terms(weight_decay), from_initial)


def share_initial(prior: Prior | None, state: State) -> None:
    """Let Gaussians around the initial parameters share the optimizer's copy of them."""
    initial = state["initial_param"]
    for each, remembered in _leaves(prior, state):
        if isinstance(each, GaussianPrior) and isinstance(each.center, str):
            center = remembered.get(each.key)
            # Only equal values: a user may have edited the centre in a state dict.
            if initial is not None and center is not None and torch.equal(initial, center):
                remembered[each.key] = initial  # saves one copy of the parameters


def _leaves(prior: Prior | None, state: State) -> list[tuple[Prior, State]]:
    """The priors in a composite, at any depth, each with its view of the state."""
    if prior is None:
        return []
    if not _is_plain(prior, CompositePrior):
        return [(prior, state)]
    found: list[tuple[Prior, State]] = []
    for member, remembered in prior.members(state):
        found += _leaves(member, remembered)
    return found


def _is_plain(prior: Prior, kind: type[PriorT]) -> TypeGuard[PriorT]:
    """Whether a prior's `grad` is that of a class here: a user may have overridden it."""
    # On the instance: a function that a user has put on one prior counts as well.
    return isinstance(prior, kind) and getattr(prior.grad, "__func__", None) is kind.grad


def gaussians(weight_decay: float, localization: float) -> CompositePrior:
    """Make the prior of weight decay and localization; a precision of 0 adds nothing."""
    checks.number("weight_decay", weight_decay)
    checks.number("localization", localization)
    # In the published order, which the sum of the pulls and the names in the state follow.
    priors: list[Prior] = []
    if weight_decay > 0:
        priors.append(GaussianPrior(weight_decay, center=None))
    if localization > 0:
        priors.append(GaussianPrior(localization, center="initial"))
    return CompositePrior(priors)


def prior_of(given: Any, localization: float) -> Prior | None:
    """Make a group's prior from its settings."""
    if isinstance(given, Prior) or (given is None and not localization):
        return given
    if given is None or isinstance(given, str | Iterable):
        # As published, a group's localization alone stands for a pull to its initial parameters.
        center: Any = "initial" if given is None else given
        return GaussianPrior(localization or 1.0, center=center)
    if isinstance(given, Real):
        return GaussianPrior(float(given))
    raise ValueError(
        f"prior must be a Prior, 'initial', a number, tensors or None, got {type(given).__name__}"
    )
