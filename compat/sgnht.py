"""`SGNHT`: the stochastic gradient Nosé–Hoover thermostat as an optimizer."""

import warnings
from typing import Any

import torch
from torch import Tensor

from compat.optimizer import (
    Group,
    SamplingOptimizer,
    dense_grad,
    evaluate,
    masks,
    noise_like,
    setting,
    start_mask,
    warn_of_settings,
)
from funcsgmcmc import checks, tree
from funcsgmcmc.samplers.sgnht import first_momentum, push, regulated, thermostatted
from funcsgmcmc.terms import Parts, Term, Terms, gains

_METRICS = ("noise", "dws", "localization_loss")


class SGNHT(SamplingOptimizer):
    """Stochastic gradient Nosé–Hoover thermostat (Ding et al. 2014).

        p' = (1 − ξ) (p − ε nβ g) + √(2Aε) η,    η ~ N(0, I)
        w' = w + p'
        ξ' = ξ + ‖p'‖²/d − ε

    with g the gradient in `.grad`, p₀ = √ε η₀, ξ₀ = A, one thermostat ξ a group, and d the number
    of the group's entries that have a gradient. With a box, entries that leave it are clamped and
    their momentum changes sign. Parameters without gradient stay where they are. Deprecated:
    `SGMCMC.sgnht` is the same chain.

    A group may have a `mask`: one tensor for each of its parameters, of its shape, or one tensor
    for all, if they are of one shape.

    Args:
        params: Parameters, or dicts of parameter groups with settings of their own.
        lr: ε ≥ 0, in units of w².
        diffusion_factor: A ≥ 0, a fraction of the momentum lost in a step.
        bounding_box_size: Half-width of the box around the initial parameters; None (or 0) for no
            box.
        save_noise: Accepted for compatibility, with a warning.
        save_mala_vars: Accepted for compatibility, with a warning.
        nbeta: Inverse temperature nβ ≥ 0, or a function that gives it, called at every step.
        metrics: Names among "noise", "dws" and "localization_loss", which set the two before.

    Raises:
        TypeError, ValueError: A setting or a parameter is of the wrong type or out of its range.
    """

    def __init__(
        self,
        params,
        lr=0.01,
        diffusion_factor=0.01,
        bounding_box_size=None,
        save_noise=False,
        save_mala_vars=False,
        nbeta=1.0,
        metrics: list[str] | None = None,
    ):
        warnings.warn(
            "SGNHT is deprecated: SGMCMC.sgnht does the same", DeprecationWarning, stacklevel=2
        )
        wanted = [checks.choice("metrics", name, _METRICS) for name in metrics or ()]
        save_noise = save_noise or "noise" in wanted
        save_mala_vars = save_mala_vars or "dws" in wanted or "localization_loss" in wanted
        if save_noise:
            warnings.warn("SGNHT does not record NoiseNorm: use SGLD for it", stacklevel=2)
        if save_mala_vars:
            warnings.warn("SGNHT does not record MALA: use SGLD for it", stacklevel=2)
        warn_of_settings(nbeta)
        defaults = {
            "lr": lr,
            "diffusion_factor": diffusion_factor,
            "bounding_box_size": bounding_box_size,
            "nbeta": nbeta,
            "save_noise": save_noise,
            "save_mala_vars": save_mala_vars,
        }
        super().__init__(params, defaults)

    def _start_group(self, group: Group) -> None:
        super()._start_group(group)
        start_mask(group)
        start_thermostat(group)
        for param, mask in zip(group["params"], masks(group), strict=True):
            self.state[param]["momentum"] = momentum_of(param, group, mask)
            self.state[param]["initial_param"] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        """Make one step.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            The closure's loss; None without one.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            thermostat = Thermostat(group)
            nbeta = setting(group, "nbeta")
            for param, mask in zip(group["params"], masks(group), strict=True):
                if param.grad is None:
                    continue
                parts = Parts(
                    grad=Term(nbeta, dense_grad(param)),
                    localization=(),
                    weight_decay=(),
                    noise=Term(1.0, noise_like(param)),
                    distance=(),
                    gains=gains(None, mask),
                )
                state = self.state[param]
                terms = thermostat.terms(parts, state["momentum"])
                thermostat.push(param.data, state, terms, mask, group["bounding_box_size"] or None)
            thermostat.finish()
        return loss


def start_thermostat(group: Group) -> None:
    """Give a new group its thermostat, at ξ₀ = A."""
    group["thermostat"] = torch.tensor(setting(group, "diffusion_factor"))


def momentum_of(param: Tensor, group: Group, mask: Tensor | None) -> Tensor:
    """A new parameter's momentum, drawn from the global generator."""
    noise = torch.randn_like(param.detach())
    return first_momentum(noise, setting(group, "lr"), mask).to(param.dtype)


class Thermostat:
    """A group's thermostat during one step: it serves all parameters, then takes their energy."""

    def __init__(self, group: Group):
        self._group = group
        self._lr = setting(group, "lr")
        self._friction = float(group["thermostat"])
        self._diffusion_factor = setting(group, "diffusion_factor")
        self._energies: list[Tensor] = []
        self._sampled = 0

    def terms(self, parts: Parts, momentum: Tensor) -> Terms:
        """The terms of one parameter's update."""
        friction = Term(self._friction, momentum)
        return thermostatted(parts, friction, self._lr, self._diffusion_factor, split=True)

    def push(
        self,
        param: Tensor,
        state: dict[str, Any],
        terms: Terms,
        mask: Tensor | None,
        half_width: float | None,
    ) -> None:
        """Update one parameter and its momentum, in place."""
        box = None if half_width is None else (state["initial_param"], half_width)
        friction = Term(self._friction, state["momentum"])
        moved, momentum = push(param, friction, terms, box)
        param.copy_(moved)
        state["momentum"].copy_(momentum)
        self._energies.append(tree.dot(momentum, momentum))
        self._sampled += param.numel() if mask is None else int(tree.count(param, mask))

    def finish(self) -> None:
        """Move the thermostat by what the group's momenta hold."""
        if self._sampled:
            thermostat = self._group["thermostat"]
            energy = torch.stack([each.to(thermostat.device) for each in self._energies]).sum()
            thermostat.copy_(regulated(thermostat, energy, self._sampled, self._lr))
