"""Norms and inner products of an update's terms, as the optimizers report them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from funcsgmcmc import norms, tree


def _zeros() -> Tensor:
    return torch.zeros(1, dtype=torch.float32)  # one entry, not a scalar: the published shape


@dataclass
class Metrics:
    """Norms and inner products of the terms of one step, each float32 `[1]`.

    Norms are of the terms as applied (step size, preconditioner and mask included), except
    `unscaled_grad`, without preconditioner and mask, and `distance`, the displacement from the
    initial parameters before the step. Cosine similarities are dot / (norm_a · norm_b).

    An optimizer with `save_metrics=True` has one for each parameter group, `group["metrics"]`. The
    methods that end in an underscore let you accumulate one yourself: `zero_`, for each parameter
    `add_sum_squared_` and `add_dot_products_`, then `sqrt_norms_`.

    Attributes:
        scaled_grad: ‖(ε/2) G nβ g‖.
        unscaled_grad: ‖(ε/2) nβ g‖.
        localization: ‖(ε/2) G γ (w − w₀)‖, other priors that are not weight decay included.
        weight_decay: ‖(ε/2) G λ w‖.
        noise: ‖√ε √G σ η‖.
        distance: ‖w − w₀‖.
        dot_grad_prior: ⟨scaled_grad, localization + weight_decay⟩.
        dot_grad_noise: ⟨scaled_grad, noise⟩.
        dot_prior_noise: ⟨localization + weight_decay, noise⟩.
        numel: Number of entries whose mask is not zero.
    """

    NORM_FIELDS: ClassVar[tuple[str, ...]] = (
        "scaled_grad",
        "unscaled_grad",
        "localization",
        "weight_decay",
        "noise",
        "distance",
    )
    DOT_FIELDS: ClassVar[tuple[str, ...]] = (
        "dot_grad_prior",
        "dot_grad_noise",
        "dot_prior_noise",
    )

    scaled_grad: Tensor = field(default_factory=_zeros)
    unscaled_grad: Tensor = field(default_factory=_zeros)
    localization: Tensor = field(default_factory=_zeros)
    weight_decay: Tensor = field(default_factory=_zeros)
    noise: Tensor = field(default_factory=_zeros)
    distance: Tensor = field(default_factory=_zeros)
    dot_grad_prior: Tensor = field(default_factory=_zeros)
    dot_grad_noise: Tensor = field(default_factory=_zeros)
    dot_prior_noise: Tensor = field(default_factory=_zeros)
    numel: int = 0

    @property
    def prior(self) -> Tensor:
        """√(‖localization‖² + ‖weight_decay‖²)."""
        return torch.hypot(self.localization, self.weight_decay)

    def to(self, device: str | torch.device | int) -> "Metrics":
        """A copy on another device, or on the same one."""
        fields = {name: getattr(self, name).to(device, copy=True) for name in _TENSORS}
        return Metrics(**fields, numel=self.numel)

    def zero_(self) -> None:
        """Set everything to zero."""
        for name in _TENSORS:
            getattr(self, name).zero_()
        self.numel = 0

    def add_sum_squared_(
        self,
        scaled_grad: Tensor,
        unscaled_grad: Tensor,
        localization: Tensor,
        weight_decay: Tensor,
        noise: Tensor,
        distance: Tensor,
    ) -> None:
        """Add a parameter's sums of squares to the norms' fields, in float32 or better."""
        vectors = (scaled_grad, unscaled_grad, localization, weight_decay, noise, distance)
        for name, vector in zip(self.NORM_FIELDS, vectors, strict=True):
            # In place: the field stays float32, whatever is added.
            getattr(self, name).add_(tree.dot(vector, vector))

    def add_dot_products_(self, scaled_grad: Tensor, prior: Tensor, noise: Tensor) -> None:
        """Add a parameter's inner products, in float32 or better.

        Args:
            scaled_grad: The gradient's term.
            prior: The sum of localization and weight decay.
            noise: The noise's term.
        """
        self.dot_grad_prior.add_(tree.dot(scaled_grad, prior))
        self.dot_grad_noise.add_(tree.dot(scaled_grad, noise))
        self.dot_prior_noise.add_(tree.dot(prior, noise))

    def sqrt_norms_(self) -> None:
        """Take the roots of the sums of squares in the norms' fields."""
        for name in self.NORM_FIELDS:
            getattr(self, name).sqrt_()

    def take(self, metrics: norms.Metrics) -> None:
        """Set all fields from a step's metrics."""
        values = [float(getattr(metrics, name)) for name in _TENSORS]
        # One tensor and a view for each field: one copy to the group's device, not nine.
        fields = torch.tensor(values, dtype=torch.float32, device=self.noise.device)
        for name, value in zip(_TENSORS, fields.reshape(-1, 1).unbind(), strict=True):
            setattr(self, name, value)  # new memory: a caller may have kept the last step's
        self.numel = int(metrics.numel)

    @staticmethod
    def aggregate(group_metrics: Iterable["Metrics"]) -> "Metrics":
        """Metrics of all groups together, on the CPU: norms in quadrature, sums of the rest."""
        result = Metrics()
        for each in group_metrics:
            metrics = each.to("cpu")  # groups may live on several devices
            # The fields hold norms, so squaring gives back the sums of squares, to be rooted below.
            result.add_sum_squared_(*(getattr(metrics, name) for name in Metrics.NORM_FIELDS))
            for name in Metrics.DOT_FIELDS:
                getattr(result, name).add_(getattr(metrics, name))
            result.numel += metrics.numel
        result.sqrt_norms_()
        return result


_TENSORS = Metrics.NORM_FIELDS + Metrics.DOT_FIELDS
