"""The diagonal of a loss's Hessian, which the curvature term Γ of a preconditioner asks for.

    exactly      hᵢ = eᵢᵀ H eᵢ                        one Hessian-vector product an entry
    estimated    h = z ⊙ H z,   zᵢ = ±1, E h = diag H     one in all

The second is Hutchinson's estimator with Rademacher probes (Bekas, Kokiopoulou and Saad, "An
estimator for the diagonal of a matrix", 2007), unbiased, with variance Σ_{j≠i} H²ᵢⱼ.
"""

from abc import abstractmethod
from typing import Any, cast

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from funcsgmcmc import random, tree
from funcsgmcmc.gradients import LossFn, loss_and_aux

EXACT_UP_TO = 256
"""Entries of a parameter up to which `hessian_diagonal` is exact, by as many backward passes."""

_AT_ONCE = 16  # products, each with the activations of a batch


class HessianDiagonal(TensorClass, frozen=True):
    """A way to find the diagonal of ∇²L for a chain."""

    @abstractmethod
    def evaluate(self, loss_fn: LossFn, params: TensorDict, batch: Any, key: Tensor) -> TensorDict:
        """Diagonal of ∇²L(w) on a batch.

        Args:
            loss_fn: L.
            params: One chain's w, to be vmapped over chains.
            batch: The batch on which L is evaluated.
            key: The key of the random probes.
        """


class ExactDiagonal(HessianDiagonal, frozen=True):
    """All entries, by as many Hessian-vector products: for small models."""

    def evaluate(self, loss_fn: LossFn, params: TensorDict, batch: Any, key: Tensor) -> TensorDict:
        """Diagonal of ∇²L(w), 16 products at a time."""
        size, dtype = tree.size(params), tree.noise_dtype(params)
        entries = torch.arange(size, device=tree.device(params))

        def entry(index: Tensor) -> Tensor:
            # A unit vector by comparison: vmap cannot write at a batched index of a plain tensor.
            direction = (entries == index).to(dtype)
            return direction * _product(loss_fn, params, batch, direction)

        # Each product keeps one entry only: their sum is the diagonal.
        diagonal = sum(torch.vmap(entry)(some).sum(0) for some in entries.split(_AT_ONCE))
        return tree.unflatten(cast(Tensor, diagonal), params)


class Hutchinson(HessianDiagonal, frozen=True):
    """An unbiased estimate, by one Hessian-vector product with random signs."""

    def evaluate(self, loss_fn: LossFn, params: TensorDict, batch: Any, key: Tensor) -> TensorDict:
        """The estimate z ⊙ ∇²L(w) z."""
        # Any bit of a word is a fair coin.
        coins = random.bits(key, (tree.size(params),)) & 1
        signs = (2 * coins - 1).to(tree.noise_dtype(params))
        return tree.unflatten(signs * _product(loss_fn, params, batch, signs), params)


def _product(loss_fn: LossFn, params: TensorDict, batch: Any, direction: Tensor) -> Tensor:
    """∇²L(w) z, reverse over reverse, both flat.

    Forward over reverse would be cheaper, but torch 2.13 has no forward derivative of some losses'
    backward (`mse_loss`).
    """
    names = tree.names(params)

    def slopes(*leaves: Tensor) -> tuple[Tensor, ...]:
        def loss(*leaves: Tensor) -> Tensor:
            given = tree.build(dict(zip(names, leaves, strict=True)), params.batch_size)
            return loss_and_aux(loss_fn, given, batch)[0]

        return torch.func.grad(loss, argnums=tuple(range(len(names))))(*leaves)

    leaves = tuple(params[name] for name in names)
    # `unflatten` widens to float32; `vjp` wants the leaves' own dtype.
    along = tuple(
        part.to(leaf.dtype)
        for leaf, (_, part) in zip(
            leaves, tree.leaves(tree.unflatten(direction, params)), strict=True
        )
    )
    products = torch.func.vjp(slopes, *leaves)[1](along)  # ∇²L is symmetric
    return torch.cat([product.reshape(-1).to(direction.dtype) for product in products])


def hessian_diagonal(grad: Tensor, param: Tensor) -> Tensor:
    """Diagonal of ∂g/∂w for one parameter, from the graph that made its gradient.

    It is exact up to `EXACT_UP_TO` entries, and estimated beyond; probes are then drawn from
    torch's global generator.

    Args:
        grad: g, as made by `backward(create_graph=True)`.
        param: w, of the shape of `grad`.

    Returns:
        h, of the shape of `param`, detached; 0 where g does not depend on w, or has no graph.
    """
    size = param.numel()
    if not grad.requires_grad or not size:
        return torch.zeros_like(param)
    if size <= EXACT_UP_TO:
        # Rows of the identity pick the entries one by one.
        probes = torch.eye(size, dtype=grad.dtype, device=grad.device)
    else:
        probes = torch.randint(2, (1, size), device=grad.device).to(grad.dtype) * 2 - 1
    diagonal = torch.zeros_like(param.detach())
    for some in probes.reshape(-1, *grad.shape).split(_AT_ONCE):
        (products,) = torch.autograd.grad(
            grad,
            param,
            some,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        diagonal += (some * products).sum(0).detach()
    return diagonal
