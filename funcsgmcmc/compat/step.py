"""The parts of a step that the optimizers share; each is about one parameter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import sketch, tree
from funcsgmcmc.compat.groups import Group
from funcsgmcmc.compat.optimizer import SamplingOptimizer
from funcsgmcmc.compat.sketch import SketchBuffer
from funcsgmcmc.norms import PartialMetrics
from funcsgmcmc.samplers.base import clamp_to_box
from funcsgmcmc.shards import Spread, local, spread_of
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
        # Sums over parameters that are spread over the same processes, if they are.
        self._sums: dict[Spread | None, _Sums] = {}
        self._here: _Sums | None = None
        self._part: sketch.CountSketch | None = None

    def begin(self, param: Tensor) -> None:
        """Turn to another parameter."""
        spread = spread_of(param)
        if spread not in self._sums:
            self._sums[spread] = _Sums(self._optimizer, self._group)
        self._here = self._sums[spread]
        if self._optimizer.save_sketches:
            self._part = self._optimizer.sketch_part(param)

    def add(self, w: Tensor, terms: Terms, mask: Tensor | None) -> None:
        """Add the terms of one parameter's update, before the update is made."""
        here = self._here
        assert here is not None  # since `begin`
        if self._optimizer.save_metrics:
            # At once: a pull's direction may be the parameter itself, which the move overwrites.
            here.metrics.add(terms)
            here.numel += entries(w, mask)
        if here.sketches is not None:
            # Sums over parameters, as sketches are linear: a group's terms are never held at once.
            assert self._part is not None
            here.sketches.add_(sketch.sketches(terms, self._part))

    def finish(self) -> None:
        """Write the group's metrics and sketches."""
        parts = [sums.total(spread) for spread, sums in self._sums.items()]
        first, *rest = parts or [_Sums(self._optimizer, self._group)]
        for each in rest:
            first.metrics.absorb(each.metrics)
            first.numel += each.numel
        if self._optimizer.save_metrics:
            self._group["metrics"].take(first.metrics.metrics(first.numel))
        if self._optimizer.save_sketches:
            self._group["sketches"].zero_()
            for each in parts:
                assert each.sketches is not None
                self._group["sketches"].add_(each.sketches)


class _Sums:
    """Sums over parameters."""

    def __init__(self, optimizer: SamplingOptimizer, group: Group):
        self.metrics = PartialMetrics()
        self.numel = 0
        self.sketches: SketchBuffer | None = None
        self._is_kept = optimizer.save_metrics or optimizer.save_sketches
        self._device = torch.device("cpu")
        if group["params"]:
            self._device = group["params"][0].device
        if optimizer.save_sketches:
            sketches: SketchBuffer = group["sketches"]
            self.sketches = SketchBuffer.create(len(sketches.noise), sketches.device)

    def total(self, spread: Spread | None) -> "_Sums":
        """The sums over all parts: one exchange for each dimension of the mesh."""
        if spread is None or not self._is_kept:
            return self
        values = [*self.metrics.values(), self.numel]
        numbers = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self._device) for v in values]
        )
        buffers = [] if self.sketches is None else self.sketches.tensors()
        total = spread.total(torch.cat([numbers, *(each.double() for each in buffers)]))
        self.metrics.set_values(list(total[: len(values) - 1].unbind()))
        self.numel = int(total[len(values) - 1])
        if self.sketches is not None:
            for buffer, each in zip(buffers, total[len(values) :].chunk(len(buffers)), strict=True):
                buffer.copy_(each)
        return self


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call a closure, if there is one, with gradients on; a step is made with them off."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def dense_grad(param: Tensor) -> Tensor:
    """A parameter's gradient, zeros if it has none: the part that is here."""
    grad = param.grad
    if grad is None:
        return torch.zeros_like(local(param))
    grad = local(grad)
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
