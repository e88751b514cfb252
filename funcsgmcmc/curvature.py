"""The diagonal of a loss's Hessian, which the curvature term Γ of a preconditioner asks for."""

import torch
from torch import Tensor

EXACT_UP_TO = 256
"""Entries of a parameter up to which `hessian_diagonal` is exact, by as many backward passes."""

_AT_ONCE = 16  # backward passes, each with the activations of a batch


def hessian_diagonal(grad: Tensor, param: Tensor) -> Tensor:
    """Diagonal of ∂g/∂w for one parameter, from the graph that made its gradient.

        exactly      hᵢ = ∂gᵢ/∂wᵢ                                  up to `EXACT_UP_TO` entries
        estimated    h = z ⊙ (∂g/∂w)ᵀ z,   zᵢ = ±1, E h = diag     beyond

    (Hutchinson's estimator with Rademacher probes; Bekas, Kokiopoulou and Saad, "An estimator for
    the diagonal of a matrix", 2007.) The probes are drawn from torch's global generator.

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
