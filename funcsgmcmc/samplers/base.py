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
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.priors import gaussian_pull


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


class Term(TensorClass, frozen=True):
    """One term of an update, kept as the product coefficient · direction.

    Applying a term is then one fused multiply-add a leaf, its norm is the coefficient times the
    direction's, and a term that nobody reads beyond the update takes no memory of its own: an
    eager update is 2 to 3 times as fast as with its terms as tensors.

    Attributes:
        coefficient: `[*chains]`, the scalars of the term: step size, temperature, precision.
        direction: Tree like the parameters: gradient, displacement or noise, times whatever is a
            tensor of the leaf's shape (mask, preconditioner).
    """

    coefficient: Tensor
    direction: TensorDict

    def value(self) -> TensorDict:
        """The term itself, a tree in float32 or better."""
        return tree.map_leaves(
            lambda leaf: tree.expand_right(self.coefficient, leaf) * leaf, self.direction
        )

    def norm(self) -> Tensor:
        """L2 norm over all leaves, `[*chains]`."""
        return self.coefficient.abs() * tree.norm(self.direction)

    def dot(self, other: "Term") -> Tensor:
        """Inner product with another term, `[*chains]`."""
        return self.coefficient * other.coefficient * tree.dot(self.direction, other.direction)


class Terms(TensorClass, frozen=True):
    """The parts of one update, as applied: step size, preconditioner and mask included.

    Attributes:
        scaled_grad: Drift from the loss.
        unscaled_grad: The same without preconditioner and mask.
        localization: Drift from the pull to the anchor, and from a user's log-prior.
        weight_decay: Drift from the pull to zero.
        noise: What was added at random.
        distance: w − w₀ before the update, a tree.
        momentum: What a momentum carries over from the step before; None without one.

    Without a box, w' − w = momentum − scaled_grad − localization − weight_decay + noise.
    """

    scaled_grad: Term
    unscaled_grad: Term
    localization: Term
    weight_decay: Term
    noise: Term
    distance: TensorDict
    momentum: Term | None


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

    def terms(
        self,
        state: State,
        grads: TensorDict,
        noise: TensorDict,
        prior_pull: TensorDict | None,
        *,
        drift: Tensor,
        diffusion: Tensor,
        preconditioner: TensorDict | None = None,
        momentum: Term | None = None,
    ) -> Terms:
        """Decompose a step down the potential, drift · m G ∇U(w), with noise diffusion · m √G η.

        Args:
            state: The state before the step, of batch size `[*chains]`.
            grads: g = ∇L(w).
            noise: η.
            prior_pull: −∇log p(w), or None.
            drift: Step size of the drift, `[*chains]` or `[]`: ε/2 for SGLD.
            diffusion: Scale of the noise, likewise: √ε σ for SGLD.
            preconditioner: G, or None for 1.
            momentum: As in `Terms`.
        """
        chains, params = state.shape, state.params
        root = None if preconditioner is None else tree.map_leaves(torch.sqrt, preconditioner)
        distance = tree.map_leaves(torch.sub, params, self.center(state))
        grad_coefficient = drift * self.nbeta
        if prior_pull is None:
            localization, pull = drift * self.localization, distance
        else:
            localization, pull = drift, gaussian_pull(distance, self.localization)
            pull = tree.map_leaves(torch.add, pull, prior_pull)
        return Terms(
            scaled_grad=term(grad_coefficient, self.masked(scale(grads, preconditioner))),
            unscaled_grad=term(grad_coefficient, grads),
            localization=term(localization, self.masked(scale(pull, preconditioner))),
            weight_decay=term(
                drift * self.weight_decay, self.masked(scale(params, preconditioner))
            ),
            noise=term(diffusion, self.masked(scale(noise, root))),
            distance=distance,
            momentum=momentum,
            batch_size=chains,
            lock=False,
        )

    def masked(self, direction: TensorDict) -> TensorDict:
        """Multiply by m, if there is a mask."""
        return scale(direction, self.mask)

    def boxed(self, params: TensorDict, center: TensorDict) -> TensorDict:
        """Clamp w to [w₀ − b, w₀ + b]; without a box, return it as it is."""
        box = self.bounding_box_size
        if box is None:
            return params

        def clamp_leaf(leaf: Tensor, middle: Tensor) -> Tensor:
            half_width = tree.expand_right(box, leaf)
            return torch.clamp(leaf, middle - half_width, middle + half_width).to(leaf.dtype)

        return tree.map_leaves(clamp_leaf, params, center)


def term(coefficient: Tensor, direction: TensorDict) -> Term:
    """Make a term; a coefficient `[]` is shared by the direction's chains."""
    chains = direction.shape
    return Term(
        coefficient=coefficient.expand(chains), direction=direction, batch_size=chains, lock=False
    )


def scale(direction: TensorDict, factors: TensorDict | None) -> TensorDict:
    """Multiply elementwise, in the dtype of the direction, float32 at least; None means 1."""
    if factors is None:
        return direction

    def product(leaf: Tensor, factor: Tensor) -> Tensor:
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        return leaf.to(dtype) * factor.to(dtype)

    return tree.map_leaves(product, direction, factors)


def move(params: TensorDict, minus: Sequence[Term], plus: Sequence[Term]) -> TensorDict:
    """Make the move: w − Σ minus + Σ plus, in the order given.

    Returns:
        A tree like `params`: sums are taken in float32 or better, and rounded once.
    """
    signed = [(term, -1) for term in minus] + [(term, 1) for term in plus]
    moved: dict[tree.Name, Tensor] = {}
    for name, leaf in tree.leaves(params):
        total = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        for term, sign in signed:
            coefficient = tree.expand_right(term.coefficient, leaf)
            total = torch.addcmul(total, term.direction[name], coefficient, value=sign)
        moved[name] = total.to(leaf.dtype)
    return tree.build(moved, params.batch_size)


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
