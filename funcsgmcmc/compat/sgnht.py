"""`SGNHT`: the stochastic gradient Nosé–Hoover thermostat as an optimizer."""

import warnings
from collections import Counter
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.compat.groups import (
    Group,
    check_flag,
    check_masks,
    masks,
    settings,
    warn_of_settings,
)
from funcsgmcmc.compat.optimizer import SamplingOptimizer
from funcsgmcmc.compat.shards import momentum_noise, noise_of
from funcsgmcmc.compat.step import (
    StepInputs,
    StepReport,
    dense_grad,
    entries,
    evaluate,
    not_traced,
)
from funcsgmcmc.samplers.momentum import energy, euler_terms, fresh_momentum, reflect_at_box
from funcsgmcmc.samplers.sgnht import next_thermostat
from funcsgmcmc.shards import Spread, local, part_of, spread_of
from funcsgmcmc.terms import Slope, Term, add, diagonal_factors

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
        metrics: Names among "noise", "dws" and "localization_loss"; they set `save_noise` and
            `save_mala_vars`.

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
        check_flag("save_noise", save_noise)
        check_flag("save_mala_vars", save_mala_vars)
        checks.instance("metrics", metrics, list | tuple | NoneType)
        wanted = [checks.choice("metrics", name, _METRICS) for name in metrics or ()]
        save_noise = save_noise or "noise" in wanted
        save_mala_vars = save_mala_vars or "dws" in wanted or "localization_loss" in wanted
        if save_noise:
            warnings.warn("SGNHT does not record NoiseNorm: use SGLD for it", stacklevel=2)
        if save_mala_vars:
            warnings.warn("SGNHT does not record MALA: use SGLD for it", stacklevel=2)
        warn_of_settings(nbeta)
        # The groups hold `save_noise` and `save_mala_vars`, as published; nothing reads them.
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
        check_masks(masks(group), group["params"])
        start_thermostat(group, self.state, masks(group))
        for param in group["params"]:
            self.state[param]["initial_param"] = local(param.detach()).clone()

    @torch.no_grad()
    def step(self, closure=None):
        """Make one step.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            The closure's loss; None without one.
        """
        if torch.compiler.is_compiling():
            return self._untraced_step(closure)
        return self._make_step(closure)

    def _make_step(self, closure: Any) -> Any:
        """Make one step."""
        loss = evaluate(closure)
        self.check_noise(None)
        for group, now in zip(self.param_groups, settings(self.param_groups), strict=True):
            report = StepReport(self, group)
            thermostat = Thermostat(group, now)
            for param, mask in zip(group["params"], masks(group), strict=True):
                if param.grad is None:  # as published, draws no noise
                    continue
                mask = None if mask is None else part_of(mask, param)
                inputs = StepInputs(
                    slope=Slope(Term(now["nbeta"], dense_grad(param)), None, None, None),
                    factors=diagonal_factors(None, mask),
                    noise=noise_of(param, None, self.place),
                    noise_level=1.0,
                    mask=mask,
                )
                half_width = group["bounding_box_size"] or None  # 0 is no box, as published
                self.follow(param)
                report.begin(param)
                thermostat.step_(param, self.state[param], inputs, half_width, report)
                del inputs  # so that two parameters' temporaries are never held at once
            thermostat.finish()
        return loss

    _untraced_step = not_traced(_make_step)


def start_thermostat(
    group: Group, states: dict[Tensor, dict[str, Any]], group_masks: list[Tensor | None]
) -> None:
    """Give a new group its thermostat, at ξ₀ = A, and its parameters their momenta.

    The momenta are drawn from the global generator, in the parameters' dtypes.
    """
    lr = float(group["lr"])
    # A scalar on the CPU in the default dtype, as published: reading it waits for no device.
    group["thermostat"] = torch.tensor(float(group["diffusion_factor"]))
    for param, mask in zip(group["params"], group_masks, strict=True):
        # The mask multiplies the draw and never shortens it: other parameters' draws stay theirs.
        mask = None if mask is None else part_of(mask, param)
        momentum = fresh_momentum(momentum_noise(param), lr, mask)
        states[param]["momentum"] = momentum.to(param.dtype)


class Thermostat:
    """A group's thermostat during one step: it moves the parameters, then itself.

    Args:
        group: The group.
        now: Its hyperparameters.
    """

    def __init__(self, group: Group, now: dict[str, float]):
        self._thermostat: Tensor = group["thermostat"]
        self._now = now
        self._friction = float(self._thermostat)  # one ξ for all parameters of a step
        # Sums over parameters that are spread over the same processes, if they are.
        self._energies: dict[Spread | None, list[Tensor]] = {}
        self._sampled: Counter[Spread | None] = Counter()

    def step_(
        self,
        param: Tensor,
        state: dict[str, Any],
        inputs: StepInputs,
        half_width: float | None,
        report: StepReport,
    ) -> None:
        """Update one parameter and its momentum, in place."""
        w, spread = local(param.data), spread_of(param)
        momentum, now = state["momentum"], self._now
        scale = (2 * now["diffusion_factor"] * now["lr"]) ** 0.5
        terms = euler_terms(
            inputs.slope,
            inputs.factors,
            Term(scale * inputs.noise_level, inputs.noise),
            Term(1 - self._friction, momentum),
            drift=now["lr"],
            force_first=True,  # friction acts after the force, as published
        )
        report.add(w, terms, inputs.mask)
        # In float32 or better: parameter, momentum and energy take it before it is rounded.
        new_momentum = terms.total()
        add(w, Term(1.0, new_momentum), in_place=True)
        if half_width is not None:
            clamped, new_momentum = reflect_at_box(
                w, new_momentum, state["initial_param"], half_width
            )
            w.copy_(clamped)
        momentum.copy_(new_momentum)  # in place: the tensor is the one in the state
        # Tensors, added up at the end: a number here would wait for the device at each parameter.
        self._energies.setdefault(spread, []).append(energy(new_momentum, inputs.mask))
        self._sampled[spread] += entries(w, inputs.mask)

    def finish(self) -> None:
        """Update the thermostat from the energy of the momenta."""
        totals = [self._total(spread) for spread in self._energies]
        sampled = sum(int(number) for _, number in totals)
        if sampled:  # a group without gradients keeps its ξ; d = 0 has no mean energy
            mean_energy = torch.stack([total for total, _ in totals]).sum() / sampled
            self._thermostat.copy_(
                next_thermostat(self._thermostat, mean_energy=mean_energy, variance=self._now["lr"])
            )

    def _total(self, spread: Spread | None) -> tuple[Tensor, Tensor | int]:
        """‖p'‖² and d, over all parts of some parameters."""
        energies, device = self._energies[spread], self._thermostat.device
        if spread is None:
            return torch.stack([each.to(device) for each in energies]).sum(), self._sampled[None]
        total = torch.stack([each.double() for each in energies]).sum()
        # d is exact in float64.
        both = spread.total(torch.stack([total, total.new_tensor(self._sampled[spread])]))
        return both[0].to(self._thermostat), both[1]
