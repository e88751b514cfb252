"""What every sampler is: data with two pure methods.

    init(params, noise) -> state
    update(state, grads, noise, prior_pull) -> (state, terms)

`update` is deterministic: gradients and noise are arguments, and nothing is drawn, written in place
or read from anywhere else. It looks up what is scheduled, and hands over to `advance`, which is the
algorithm. That is written for any batch size `[*chains]`, `[]` or `[C]`: values of a chain are
expanded on the right to a leaf's shape, and reductions run over the other dimensions. So the same
lines serve one chain, a user's `torch.vmap`, and the batched chains of `sample`.

Shapes: hyperparameters `[]`, shared by all chains, or `[C]`; leaves of parameters, gradients, noise
and terms `[*chains, *shape]`; leaves of the anchor and the mask `[*shape]` or `[C, *shape]`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, cast

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.curvature import HessianDiagonal
from funcsgmcmc.priors import displacement, gaussian_pull
from funcsgmcmc.schedules import Schedule, setting
from funcsgmcmc.terms import Parts, Term, Terms, gains
from funcsgmcmc.tree import AnyTree, Scalar


class State(TensorClass, frozen=True):
    """What evolves along a chain.

    Attributes:
        params: w, leaves `[*chains, *shape]`.
        step: Number of steps made, int64 `[*chains]`.
        anchor: w₀, kept here (and unchanged) if the sampler was made without one; else None.
    """

    params: TensorDict
    step: Tensor
    anchor: TensorDict | None


class Evaluation(NamedTuple):
    """What is known of the potential at a chain's parameters, before the step.

    Attributes:
        grads: g = ∇L(w), raw: without nβ.
        prior_pull: −∇log p(w) of a user's log-prior, or None.
        loss: L(w), `[*chains]`, for samplers that look at the energy.
        log_prior: log p(w), `[*chains]`, for those too; None for 0.
        hessian_diagonal: h, the diagonal of ∇²L, for preconditioners with the term Γ.
    """

    grads: TensorDict
    prior_pull: TensorDict | None = None
    loss: Tensor | None = None
    log_prior: Tensor | None = None
    hessian_diagonal: TensorDict | None = None


class Sampler(TensorClass, frozen=True):
    """Settings that every sampler shares.

    A sampler has batch size `[]`, shared by all chains, or `[C]`, one for each chain;
    `torch.stack` of samplers gives the latter, and `sampler[i]` is chain i's own.

    Attributes:
        lr: Step size ε, or h; may be a `Schedule`.
        nbeta: Inverse temperature nβ, which multiplies the mean loss; may be a `Schedule`.
        temperature: T, of the whole posterior; may be a `Schedule`.
        localization: Precision γ of the pull to the anchor.
        weight_decay: Precision λ of the pull to zero.
        anchor: w₀; None means the parameters given to `init`.
        mask: m; None means 1.
        bounding_box_size: b; None means no box.
    """

    lr: Tensor | Schedule
    nbeta: Tensor | Schedule
    temperature: Tensor | Schedule
    localization: Tensor
    weight_decay: Tensor
    anchor: TensorDict | None
    mask: TensorDict | None
    bounding_box_size: Tensor | None

    @abstractmethod
    def init(self, params: TensorDict, noise: TensorDict | None = None) -> State:
        """State before the first step, at `params`, which are copied.

        Args:
            params: w, a tree of batch size `[*chains]`.
            noise: η₀, a tree like `params` with entries N(0, 1), for samplers with a momentum.

        Raises:
            TypeError, ValueError: As `start`; or noise is needed and missing.
        """

    @abstractmethod
    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[State, Terms]:
        """Make one step, with settings that are tensors: the sampler's algorithm.

        Args:
            state: State of batch size `[*chains]`.
            evaluation: The potential at the state's parameters.
            noise: η, entries N(0, 1).

        Returns:
            The next state, and the terms of the update.
        """

    def update(
        self,
        state: State,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None = None,
        *,
        loss: Tensor | None = None,
        log_prior: Tensor | None = None,
        hessian_diagonal: TensorDict | None = None,
    ) -> tuple[Any, Terms]:
        """Make one step, from gradients and noise.

        Args:
            state: State of batch size `[*chains]`.
            grads: g = ∇L(w), raw: without nβ.
            noise: η, entries N(0, 1).
            prior_pull: −∇log p(w) of a user's log-prior, or None.
            loss: L(w), for samplers that look at the energy.
            log_prior: log p(w), for those too.
            hessian_diagonal: The diagonal of ∇²L, for preconditioners with the term Γ.

        Returns:
            The next state, and the terms of the update.
        """
        evaluation = Evaluation(grads, prior_pull, loss, log_prior, hessian_diagonal)
        return self.at(state.step).advance(state, evaluation, noise)

    def at(self, step: Tensor) -> Self:
        """The sampler with its schedules looked up at a step's index, `[*chains]`."""
        settings = {name: getattr(self, name) for name in self.schedulable()}
        values = {
            name: setting(step)
            for name, setting in settings.items()
            if isinstance(setting, Schedule)
        }
        if not values:
            return self
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self)(**{**fields, **values}, batch_size=self.shape, lock=False)

    def schedulable(self) -> tuple[str, ...]:
        """Names of the settings that may be schedules."""
        return ("lr", "nbeta", "temperature")

    def curvature(self) -> HessianDiagonal | None:
        """How to find the diagonal of the Hessian that `advance` needs; None if it needs none."""
        return None

    def log_weight(self, state: State) -> Tensor | tuple[()]:
        """Log of the importance weight of the parameters that the last step started from.

        Args:
            state: The state after that step.

        Returns:
            `[*chains]`; `()` for samplers whose draws all count alike.
        """
        return ()

    def start(self, given: TensorDictBase | Mapping[str, Tensor]) -> State:
        """Check parameters against the sampler, and make the part of a state that all share.

        Raises:
            TypeError, ValueError: The parameters are no tree of real floating tensors, the anchor
                or the mask does not have their structure, or the chains do not agree.
        """
        params = checks.parameters(given).detach()
        if self.shape and self.shape != params.shape:
            raise ValueError(
                f"a sampler of {self.shape[0]} chains needs params of batch size "
                f"{tuple(self.shape)}, got {tuple(params.shape)}"
            )
        for name, other in (("anchor", self.anchor), ("mask", self.mask)):
            if other is not None:
                checks.same_structure(name, other, params)
        if self.anchor is not None:
            checks.same_dtypes("anchor", self.anchor, params)
        step = torch.zeros(params.batch_size, dtype=torch.int64, device=tree.device(params))
        return State(
            params=params.clone(),
            step=step,
            anchor=params.clone() if self.anchor is None else None,
            batch_size=params.batch_size,
            lock=False,
        )

    def anchored(self, params: TensorDict) -> Self:
        """Give the sampler `params` as its anchor, if it was made without one.

        Args:
            params: Tree of batch size `[]`, or `[C]` for an anchor per chain.
        """
        if self.anchor is not None:
            return self
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields, chains = checks.per_chain({**fields, "anchor": params.detach().clone()})
        return type(self)(**fields, batch_size=chains, lock=False)

    def center(self, state: State) -> TensorDict:
        """w₀: the sampler's anchor, or the one that `init` left in the state."""
        center = state.anchor if self.anchor is None else self.anchor
        if center is None:
            raise ValueError("the state holds no anchor: make it with this sampler's init")
        return center

    def parts(
        self,
        state: State,
        evaluation: Evaluation,
        noise: TensorDict,
        preconditioner: TensorDict | None = None,
    ) -> Parts:
        """Collect what this sampler's update is made of.

        Args:
            state: The state before the step, of batch size `[*chains]`.
            evaluation: The potential at its parameters.
            noise: η, which is multiplied by √T.
            preconditioner: G, or None for 1.
        """
        one = torch.ones_like(self.localization)
        distance = Term(one, displacement(state.params, self.center(state)))
        localization = Term(self.localization, distance.direction)
        if evaluation.prior_pull is not None:
            pull = gaussian_pull(distance.direction, self.localization)
            both = tree.map_leaves(torch.add, pull, evaluation.prior_pull)
            localization = Term(one, both)
        return Parts(
            grad=Term(cast(Tensor, self.nbeta), evaluation.grads),
            localization=localization,
            weight_decay=Term(self.weight_decay, state.params),
            noise=Term(cast(Tensor, self.temperature) ** 0.5, noise),
            distance=distance,
            gains=gains(preconditioner, self.mask),
        )

    def boxed(self, params: TensorDict, center: TensorDict) -> TensorDict:
        """Clamp w to [w₀ − b, w₀ + b]; without a box, return it as it is."""
        box = self.bounding_box_size
        return params if box is None else boxed(params, center, box)


def boxed(params: AnyTree, center: AnyTree, half_width: Scalar) -> AnyTree:
    """Clamp w to [w₀ − b, w₀ + b].

    Args:
        params: w, a tree of batch size `[*chains]`.
        center: w₀, of the same structure.
        half_width: b, `[*chains]` or `[]`.
    """

    def clamp_leaf(leaf: Tensor, middle: Tensor) -> Tensor:
        width = tree.expand_right(half_width, leaf)
        return torch.clamp(leaf, middle - width, middle + width).to(leaf.dtype)

    return tree.map_leaves(clamp_leaf, params, center)


def shared_settings(
    *,
    lr: float | Tensor | Schedule,
    nbeta: float | Tensor | Schedule,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
) -> dict[str, Tensor | TensorDict | Schedule | None]:
    """Validate the settings of `Sampler`; one factory a sampler passes them on.

    Raises:
        TypeError, ValueError: A setting is of the wrong type or out of its range.
    """
    box = bounding_box_size
    return {
        "lr": setting("lr", lr),
        "nbeta": setting("nbeta", nbeta),
        "temperature": setting("temperature", temperature),
        "localization": checks.hyperparameter("localization", localization),
        "weight_decay": checks.hyperparameter("weight_decay", weight_decay),
        "anchor": None if anchor is None else checks.anchor(anchor),
        "mask": None if mask is None else checks.mask(mask),
        "bounding_box_size": None
        if box is None
        else checks.hyperparameter("bounding_box_size", box, exclusive=True),
    }
