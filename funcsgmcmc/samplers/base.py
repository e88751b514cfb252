"""What every sampler is: data with two pure methods.

    init(params, noise) -> state
    update(state, grads, noise, prior_pull) -> (state, terms)

`update` is deterministic: gradients and noise are arguments, and nothing is drawn, written in place
or read from anywhere else. It is written for any batch size `[*chains]`, `[]` or `[C]`: values of a
chain are expanded on the right to a leaf's shape, and reductions run over the other dimensions. So
the same lines serve one chain, a user's `torch.vmap`, and the batched chains of `sample`.

Shapes: hyperparameters `[]`, shared by all chains, or `[C]`; leaves of parameters, gradients, noise
and terms `[*chains, *shape]`; leaves of the anchor and the mask `[*shape]` or `[C, *shape]`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.priors import displacement, gaussian_pull
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


class Sampler(TensorClass, frozen=True):
    """Settings that every sampler shares.

    A sampler has batch size `[]`, shared by all chains, or `[C]`, one for each chain;
    `torch.stack` of samplers gives the latter, and `sampler[i]` is chain i's own.

    Attributes:
        lr: Step size ε.
        nbeta: Inverse temperature nβ, which multiplies the mean loss.
        localization: Precision γ of the pull to the anchor.
        weight_decay: Precision λ of the pull to zero.
        anchor: w₀; None means the parameters given to `init`.
        mask: m; None means 1.
        bounding_box_size: b; None means no box.
    """

    lr: Tensor
    nbeta: Tensor
    localization: Tensor
    weight_decay: Tensor
    anchor: TensorDict | None
    mask: TensorDict | None
    bounding_box_size: Tensor | None

    @abstractmethod
    def init(self, params: TensorDict, noise: TensorDict | None = None) -> State:
        """State before the first step; noise like `params` for samplers with a momentum."""

    @abstractmethod
    def update(
        self,
        state: State,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None = None,
    ) -> tuple[State, Terms]:
        """Make one step, from gradients g = ∇L(w) (raw, without nβ) and noise η ~ N(0, I)."""

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
        grads: TensorDict,
        noise: Term,
        prior_pull: TensorDict | None,
        preconditioner: TensorDict | None = None,
    ) -> Parts:
        """Collect what this sampler's update is made of.

        Args:
            state: The state before the step, of batch size `[*chains]`.
            grads: g = ∇L(w).
            noise: σ η.
            prior_pull: −∇log p(w), or None.
            preconditioner: G, or None for 1.
        """
        distance = Term(torch.ones_like(self.lr), displacement(state.params, self.center(state)))
        localization = Term(self.localization, distance.direction)
        if prior_pull is not None:
            pull = gaussian_pull(distance.direction, self.localization)
            localization = Term(distance.coefficient, tree.map_leaves(torch.add, pull, prior_pull))
        return Parts(
            grad=Term(self.nbeta, grads),
            localization=localization,
            weight_decay=Term(self.weight_decay, state.params),
            noise=noise,
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
    lr: float | Tensor,
    nbeta: float | Tensor,
    localization: float | Tensor,
    weight_decay: float | Tensor,
    anchor: TensorDictBase | Mapping[str, Tensor] | None,
    mask: TensorDictBase | Mapping[str, Tensor] | None,
    bounding_box_size: float | Tensor | None,
) -> dict[str, Tensor | TensorDict | None]:
    """Validate the settings of `Sampler`; one factory a sampler passes them on.

    Raises:
        TypeError, ValueError: A setting is of the wrong type or out of its range.
    """
    box = bounding_box_size
    return {
        "lr": checks.hyperparameter("lr", lr),
        "nbeta": checks.hyperparameter("nbeta", nbeta),
        "localization": checks.hyperparameter("localization", localization),
        "weight_decay": checks.hyperparameter("weight_decay", weight_decay),
        "anchor": None if anchor is None else checks.anchor(anchor),
        "mask": None if mask is None else checks.mask(mask),
        "bounding_box_size": None
        if box is None
        else checks.hyperparameter("bounding_box_size", box, exclusive=True),
    }
