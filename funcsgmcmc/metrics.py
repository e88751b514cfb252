"""Norms and inner products of the terms of an update."""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.samplers.base import Terms


class Metrics(NamedTuple):
    """L2 norms and inner products of one step's terms, each `[*chains]`.

    Sums over parameters are taken in float32 or better.

    Norms are of the terms as applied (step size, preconditioner and mask included), except
    `unscaled_grad`, without preconditioner and mask, and `distance` = ‖w − w₀‖ before the update.
    A cosine similarity is `dot / (norm_a * norm_b)`.

    Attributes:
        scaled_grad: ‖scaled_grad‖.
        unscaled_grad: ‖unscaled_grad‖.
        localization: ‖localization‖, a user's log-prior included.
        weight_decay: ‖weight_decay‖.
        noise: ‖noise‖.
        distance: ‖w − w₀‖.
        dot_grad_prior: ⟨scaled_grad, localization + weight_decay⟩.
        dot_grad_noise: ⟨scaled_grad, noise⟩.
        dot_prior_noise: ⟨localization + weight_decay, noise⟩.
        numel: Number of parameters whose mask is not zero, int64.
    """

    scaled_grad: Tensor
    unscaled_grad: Tensor
    localization: Tensor
    weight_decay: Tensor
    noise: Tensor
    distance: Tensor
    dot_grad_prior: Tensor
    dot_grad_noise: Tensor
    dot_prior_noise: Tensor
    numel: Tensor

    @property
    def prior(self) -> Tensor:
        """√(‖localization‖² + ‖weight_decay‖²)."""
        return torch.hypot(self.localization, self.weight_decay)


def metrics(terms: Terms, mask: TensorDict | None = None) -> Metrics:
    """Compute the metrics of a step.

    Args:
        terms: The step's terms, of batch size `[*chains]`.
        mask: The sampler's mask, of batch size `[]` or `[*chains]`; None means 1.

    Returns:
        Metrics, each entry `[*chains]`.
    """
    grad, localization, decay = terms.scaled_grad, terms.localization, terms.weight_decay
    return Metrics(
        scaled_grad=grad.norm(),
        unscaled_grad=terms.unscaled_grad.norm(),
        localization=localization.norm(),
        weight_decay=decay.norm(),
        noise=terms.noise.norm(),
        distance=tree.norm(terms.distance),
        dot_grad_prior=grad.dot(localization) + grad.dot(decay),
        dot_grad_noise=grad.dot(terms.noise),
        dot_prior_noise=localization.dot(terms.noise) + decay.dot(terms.noise),
        numel=tree.count(terms.distance, mask),
    )
