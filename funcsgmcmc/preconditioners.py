"""Diagonal preconditioners G: state and gradient in, coefficients and new state out.

A sampler with preconditioner G scales its drift by G and its noise by √G, so that (for G constant)
the stationary law stays that of G = 1 while the step size adapts to each parameter. A
preconditioner is a `TensorClass` with two methods,

    init(params) -> state
    update(state, grads) -> (G, state)

where `state` is a tree of running averages of the batch size of `params` (without leaves for a
preconditioner that keeps none) and G is a tree like `params`, or None for G = 1, which costs
nothing.
"""

from abc import abstractmethod

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.tree import AnyTree, Scalar


class Preconditioner(TensorClass, frozen=True):
    """The contract of a preconditioner; see the module's docstring."""

    @abstractmethod
    def init(self, params: TensorDict) -> TensorDict:
        """Running averages before the first step, for parameters of batch size `[*chains]`."""

    @abstractmethod
    def update(self, state: TensorDict, grads: TensorDict) -> tuple[TensorDict | None, TensorDict]:
        """Coefficients for this step's gradients, and the next state."""


class Identity(Preconditioner, frozen=True):
    """G = 1."""

    def init(self, params: TensorDict) -> TensorDict:
        """No state: a tree without leaves."""
        return tree.build({}, params.batch_size)

    def update(self, state: TensorDict, grads: TensorDict) -> tuple[TensorDict | None, TensorDict]:
        """G = 1 (None) and the same empty state."""
        return None, state


class RMSprop(Preconditioner, frozen=True):
    """G = 1/(√V' + eps), V' = αV + (1 − α) g², V₀ = 0 (Li et al. 2016, eqs. 4 and 5)."""

    alpha: Tensor
    eps: Tensor

    def init(self, params: TensorDict) -> TensorDict:
        """V₀ = 0, in float32 or better."""
        return tree.map_leaves(
            lambda leaf: torch.zeros_like(leaf, dtype=tree.working_dtype(leaf)), params
        )

    def update(self, state: TensorDict, grads: TensorDict) -> tuple[TensorDict | None, TensorDict]:
        """V' and G from the gradient g of this step."""
        averages = square_average(state, grads, self.alpha)
        return rmsprop_gain(averages, self.eps), averages


def square_average(average: AnyTree, grads: AnyTree, alpha: Scalar) -> AnyTree:
    """V' = αV + (1 − α) g², in float32 or better."""

    def mix(average: Tensor, grad: Tensor) -> Tensor:
        squares = tree.widened(grad).square()
        return torch.lerp(tree.widened(average), squares, tree.expand_right(1 - alpha, average))

    return tree.map_leaves(mix, average, grads)


def rmsprop_gain(average: AnyTree, eps: Scalar) -> AnyTree:
    """G = 1/(√V' + eps)."""

    def gain(average: Tensor) -> Tensor:
        return (average.sqrt() + tree.expand_right(eps, average)).reciprocal()

    return tree.map_leaves(gain, average)


def rmsprop_curvature(
    average: AnyTree, gain: AnyTree, grads: AnyTree, hessian_diagonal: AnyTree, alpha: Scalar
) -> AnyTree:
    """Γ = ∂G/∂w = −(1 − α) g h G²/√V', the drift that a varying G asks for (eq. 7).

    Args:
        average: V', from this step's gradients.
        gain: G.
        grads: g.
        hessian_diagonal: h, the diagonal of ∇²L.
        alpha: α.

    Returns:
        Γ, which is 0 where V' is: there g is 0, and G has a kink of slope ±√(1 − α) h/eps².
    """

    def derivative(average: Tensor, gain: Tensor, grad: Tensor, hessian: Tensor) -> Tensor:
        forget = tree.expand_right(1 - alpha, average)
        slope = -forget * grad * hessian * gain.square() / average.sqrt()
        return torch.where(average > 0, slope, 0.0)

    return tree.map_leaves(derivative, average, gain, grads, hessian_diagonal)


def identity() -> Identity:
    """Make the preconditioner G = 1."""
    return Identity(lock=False)


def rmsprop(alpha: float | Tensor = 0.99, eps: float | Tensor = 0.1) -> RMSprop:
    """Make an RMSprop preconditioner.

        V' = α V + (1 − α) g²,    G = 1/(√V' + eps),    V₀ = 0

    Source: Li, Chen, Carlson and Carin, "Preconditioned stochastic gradient Langevin dynamics for
    deep neural networks", AAAI 2016, eqs. 4 and 5. The curvature term Γ is left out, as is usual.

    Args:
        alpha: α in [0, 1), memory of the running average: about 1/(1 − α) steps. `[]` or `[C]`.
        eps: eps > 0, in units of the gradient; bounds G by 1/eps. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "alpha": checks.hyperparameter("alpha", alpha, below=1.0),
            "eps": checks.hyperparameter("eps", eps, exclusive=True),
        }
    )
    return RMSprop(**fields, batch_size=chains, lock=False)
