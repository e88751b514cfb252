"""The parts of a step that the optimizers share; each is about one parameter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compat.groups import Group
from compat.optimizer import SamplingOptimizer
from funcsgmcmc import sketch, tree
from funcsgmcmc.norms import PartialMetrics
from funcsgmcmc.samplers.base import clamp_to_box
from funcsgmcmc.terms import Factors, Slope, Term, Terms, move, step_terms

# Under `torch.compile` a function that looks up states by parameter is not traced: it would be
# compiled anew for each of them; what it calls is, the update of one parameter among it.
not_traced = torch.compiler.disable(recursive=False)


class StepInputs(NamedTuple):
    """The ingredients of one parameter's step, before step sizes.

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

    def __init__(self, optimizer: SamplingOptimizer, group: Group):
        self._optimizer = optimizer
        self._group = group
        self._metrics = PartialMetrics()
        self._numel = 0
        self._part: sketch.CountSketch | None = None
        if optimizer.save_sketches:
            group["sketches"].zero_()

    def begin(self, param: Tensor) -> None:
        """Turn to another parameter."""
        if self._optimizer.save_sketches:
            self._part = self._optimizer.sketch_part(param)

    def add(self, w: Tensor, terms: Terms, mask: Tensor | None) -> None:
        """Add the terms of one parameter's update, before the update is made."""
        if self._optimizer.save_metrics:
            # At once: a pull's direction may be the parameter itself, which the move overwrites.
            self._metrics.add(terms)
            self._numel += entries(w, mask)
        if self._optimizer.save_sketches:
            # Sums over parameters, as sketches are linear: a group's terms are never held at once.
            assert self._part is not None  # since `begin`
            self._group["sketches"].add_(sketch.sketches(terms, self._part))

    def finish(self) -> None:
        """Write the group's metrics."""
        if self._optimizer.save_metrics:
            self._group["metrics"].take(self._metrics.metrics(self._numel))


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call a closure, if there is one, with gradients on; a step is made with them off."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def noise_like(param: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normals of a parameter's shape, in the default dtype."""
    # Contiguous, in the default dtype, as torch.normal(size=…) of the published package draws it:
    # in another layout or dtype the same seed gives other numbers.
    empty = torch.empty_like(
        param, dtype=torch.get_default_dtype(), memory_format=torch.contiguous_format
    )
    return empty.normal_(generator=generator)


def dense_grad(param: Tensor) -> Tensor:
    """A parameter's gradient, zeros if it has none."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(param)
    # Embeddings with sparse=True: noise and pulls are dense anyway.
    return grad.to_dense() if grad.is_sparse else grad


def entries(param: Tensor, mask: Tensor | None) -> int:
    """Number of entries whose mask is not zero."""
    return param.numel() if mask is None else int(tree.count(param, mask))


def langevin_step_(
    w: Tensor,
    initial: Tensor,
    inputs: StepInputs,
    lr: float,
    half_width: float | None,
    report: StepReport,
) -> None:
    """Make SGLD's step of one parameter, in place.

    Args:
        w: The parameter's data.
        initial: w₀.
        inputs: Slope, factors and noise.
        lr: ε.
        half_width: b, or None for no box.
        report: Where the step is reported.
    """
    shock = Term(lr**0.5 * inputs.noise_level, inputs.noise)
    terms = step_terms(inputs.slope, inputs.factors, shock, drift=lr / 2)
    report.add(w, terms, inputs.mask)
    # In place: the model holds this tensor, and a new one would take as much memory again.
    move(w, terms, in_place=True)
    if half_width is not None:
        w.copy_(clamp_to_box(w, initial, half_width))
