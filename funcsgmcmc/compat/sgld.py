"""`SGLD`: localized, tempered stochastic gradient Langevin dynamics as an optimizer."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from funcsgmcmc.compat.groups import Group, check_masks, masks, settings, warn_of_settings
from funcsgmcmc.compat.optimizer import SamplingOptimizer
from funcsgmcmc.compat.shards import noise_of
from funcsgmcmc.compat.step import (
    StepInputs,
    StepReport,
    dense_grad,
    langevin_step_,
    not_traced,
)
from funcsgmcmc.priors import displacement
from funcsgmcmc.shards import local, part_of
from funcsgmcmc.terms import Slope, Term, diagonal_factors


class SGLD(SamplingOptimizer):
    """Stochastic gradient Langevin dynamics, localized and tempered (Lau et al. 2023).

        w' = w − (ε/2) m [nβ g + γ (w − w₀) + λ w] + √ε m σ η,    η ~ N(0, I)

    clamped to [w₀ − b, w₀ + b] if b is given, with g the gradient in `.grad`, 0 where it is None,
    and w₀ the parameters when their group was added. Deprecated: `SGMCMC.sgld` is the same chain,
    except that it leaves parameters without gradient alone, and freezes all in a box of size 0.

    A group may have a `mask` m: one tensor for each of its parameters, of its shape, or one tensor
    for all, if they are of one shape.

    Args:
        params: Parameters, or dicts of parameter groups with settings of their own.
        lr: Step size ε ≥ 0, in units of w².
        noise_level: σ ≥ 0. Other than 1 samples another distribution.
        weight_decay: Precision λ ≥ 0 of the pull to zero.
        localization: Precision γ ≥ 0 of the pull to the initial parameters.
        nbeta: Inverse temperature nβ ≥ 0, or a function that gives it, called at every step.
        bounding_box_size: Half-width b of the box; None (or 0) for no box.
        save_metrics: Whether to keep each step's norms and inner products for `get_metrics`.
        sketch_dim: Number of entries of each of a step's sketches, for `get_sketches`.
        sketch_seed: Names the sketch.

    Raises:
        TypeError, ValueError: A setting or a parameter is of the wrong type or out of its range.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float = 0.01,
        noise_level: float = 1.0,
        weight_decay: float = 0.0,
        localization: float = 0.0,
        nbeta: Callable[[], float] | float = 1.0,
        bounding_box_size: float | None = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        warnings.warn(
            "SGLD is deprecated: SGMCMC.sgld does the same", DeprecationWarning, stacklevel=2
        )
        warn_of_settings(nbeta, noise_level)
        defaults = {
            "lr": lr,
            "noise_level": noise_level,
            "weight_decay": weight_decay,
            "localization": localization,
            "nbeta": nbeta,
            "bounding_box_size": bounding_box_size,
        }
        super().__init__(
            params,
            defaults,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
        )

    def _start_group(self, group: Group) -> None:
        super()._start_group(group)
        check_masks(masks(group), group["params"])
        # Kept in any case: a group may be given its localization or box later.
        for param in group["params"]:
            self.state[param]["initial_param"] = local(param.detach()).clone()

    @torch.no_grad()
    def step(self, noise_generator: Generator | None = None) -> None:
        """Make one step.

        Args:
            noise_generator: Where the noise is drawn from (default: the global generator), or the
                step's key: see `SGMCMC.step`, of sharded parameters, too.
        """
        if torch.compiler.is_compiling():
            self._untraced_step(noise_generator, self._untraced_inputs)
        else:
            self._make_step(noise_generator, self._inputs)

    def _make_step(self, generator: Any, inputs_of: Callable[..., StepInputs]) -> None:
        """Make one step, with a function that finds the ingredients of a parameter's."""
        self.check_noise(generator)
        for group, now in zip(self.param_groups, settings(self.param_groups), strict=True):
            report = StepReport(self, group)
            half_width = group["bounding_box_size"] or None  # 0 is no box, as published
            for param, mask in zip(group["params"], masks(group), strict=True):
                # A parameter whose gradient is None moves by noise and pulls, as published.
                self.follow(param)
                report.begin(param)
                initial = self.state[param]["initial_param"]
                inputs = inputs_of(param, initial, mask, now, generator)
                # The data, as published: unseen by autograd.
                langevin_step_(local(param.data), initial, inputs, now["lr"], half_width, report)
                del inputs  # so that two parameters' temporaries are never held at once
            report.finish()

    def _inputs(
        self,
        param: Tensor,
        initial: Tensor,
        mask: Tensor | None,
        now: dict[str, float],
        generator: Generator | Tensor | None,
    ) -> StepInputs:
        """The ingredients of one parameter's step."""
        # One tensor for both: localization is the distance of the metrics times γ.
        distance = localization = weight_decay = None
        w = local(param.data)
        mask = None if mask is None else part_of(mask, param)
        if self.save_metrics or now["localization"]:
            distance = Term(1.0, displacement(w, initial))
        if distance is not None and now["localization"]:
            localization = distance.times(now["localization"])
        if now["weight_decay"]:
            weight_decay = Term(now["weight_decay"], w)
        grad = Term(now["nbeta"], dense_grad(param))
        return StepInputs(
            slope=Slope(grad, localization, weight_decay, distance),
            factors=diagonal_factors(None, mask),
            noise=noise_of(param, generator, self.place),
            noise_level=now["noise_level"],
            mask=mask,
        )

    _untraced_step, _untraced_inputs = not_traced(_make_step), not_traced(_inputs)
