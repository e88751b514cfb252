"""The shared part of the optimizers' steps, one parameter at a time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from compat.groups import Group
from funcsgmcmc import sketch, tree
from funcsgmcmc.norms import PartialMetrics
from funcsgmcmc.samplers.base import clamp_to_box
from funcsgmcmc.terms import Factors, Slope, Term, Terms, move, step_terms

if TYPE_CHECKING:
    from compat.optimizer import SamplingOptimizer


class StepInputs(NamedTuple):
    """The inputs of one parameter's step, before step sizes.

    Attributes:
        slope: nβ g and the pulls.
        factors: Preconditioner and mask.
        noise: η.
        noise_level: σ.
        mask: m; None means 1.
    """

    slope: Slope
    factors: Factors
    noise: Tensor
    noise_level: float
    mask: Tensor | None


class StepReport:
    """Collects metrics and sketches of one step of a group, parameter by parameter."""

    def __init__(self, optimizer: "SamplingOptimizer", group: Group):
        self._optimizer = optimizer
        self._group = group
        self._metrics = PartialMetrics()
        self._numel = 0
        if optimizer.save_sketches:
            group["sketches"].zero_()

    def add(self, param: Tensor, terms: Terms, mask: Tensor | None) -> None:
        """Take in the terms of one parameter's update, before the update is made."""
        if self._optimizer.save_metrics:
            self._metrics.add(terms)
            self._numel += entries(param, mask)
        if self._optimizer.save_sketches:
            part = self._optimizer.sketch_part(param)
            self._group["sketches"].add_(sketch.sketches(terms, part))

    def finish(self) -> None:
        """Write the group's metrics."""
        if self._optimizer.save_metrics:
            self._group["metrics"].take(self._metrics.metrics(self._numel))


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call a closure, if there is one, with gradients on; a step is made with them off."""
    if closure is None:
        return None
    # A step is made without gradients; the closure's backward needs them.
    with torch.enable_grad():
        return closure()


def noise_like(param: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normals of a parameter's shape, in the default dtype."""
    # Drawn as `torch.normal` of the published package draws it: default dtype, contiguous.
    empty = torch.empty_like(
        param, dtype=torch.get_default_dtype(), memory_format=torch.contiguous_format
    )
    return empty.normal_(generator=generator)


def dense_grad(param: Tensor) -> Tensor:
    """A parameter's gradient, zeros if it has none."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(param)
    return grad.to_dense() if grad.is_sparse else grad


def entries(param: Tensor, mask: Tensor | None) -> int:
    """Number of entries whose mask is not zero."""
    return param.numel() if mask is None else int(tree.count(param, mask))


def langevin_step_(
    param: Tensor,
    initial: Tensor,
    inputs: StepInputs,
    lr: float,
    half_width: float | None,
    report: StepReport,
) -> None:
    """Make SGLD's step of one parameter, in place.

    Args:
        param: w.
        initial: w₀.
        inputs: Slope, factors and noise.
        lr: ε.
        half_width: b, or None for no box.
        report: Where the step is reported.
    """
    w = param.data
    shock = Term(lr**0.5 * inputs.noise_level, inputs.noise)
    terms = step_terms(inputs.slope, inputs.factors, shock, drift=lr / 2)
    report.add(param, terms, inputs.mask)
    move(w, terms, in_place=True)
    if half_width is not None:
        w.copy_(clamp_to_box(w, initial, half_width))
