"""Preconditioners of `SGMCMC`: coefficients for the terms of one parameter's update.

With g the gradient, η the noise and products elementwise, a step is

    w' = w − (ε/2) overall_coef (grad_coef nβ g + prior_coef ∇prior − grad_correction)
           + √ε overall_coef noise_coef σ η
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.compat.groups import check_flag, check_masks
from funcsgmcmc.curvature import hessian_diagonal
from funcsgmcmc.preconditioners import rmsprop_correction, rmsprop_gain, square_average
from funcsgmcmc.shards import is_sharded, local, part_of
from funcsgmcmc.terms import Factors, Term, scaled


class PreconditionerCoefs(NamedTuple):
    """Coefficients of one parameter's update: numbers, or tensors that broadcast against it.

    Attributes:
        grad_coef: Factor of the gradient.
        prior_coef: Factor of the prior's pull.
        noise_coef: Factor of the noise.
        overall_coef: Factor of all terms: a mask, for instance.
        grad_correction: Drift to add, Γ; None for none.
    """

    grad_coef: float | Tensor
    prior_coef: float | Tensor
    noise_coef: float | Tensor
    overall_coef: float | Tensor
    grad_correction: float | Tensor | None = None

    def combine_with(self, other: "PreconditionerCoefs") -> "PreconditionerCoefs":
        """Coefficients of two preconditioners together: products, and the sum of corrections."""
        corrections = [
            coefs.grad_correction for coefs in (self, other) if coefs.grad_correction is not None
        ]
        return PreconditionerCoefs(
            grad_coef=self.grad_coef * other.grad_coef,
            prior_coef=self.prior_coef * other.prior_coef,
            noise_coef=self.noise_coef * other.noise_coef,
            overall_coef=self.overall_coef * other.overall_coef,
            grad_correction=reduce(operator.add, corrections) if corrections else None,
        )

    @classmethod
    def combine(cls, *coefs: "PreconditionerCoefs") -> "PreconditionerCoefs":
        """Coefficients of any number of preconditioners together."""
        return reduce(cls.combine_with, coefs, cls(1.0, 1.0, 1.0, 1.0))

    def factors(self, param: Tensor, mask: Tensor | None) -> Factors:
        """Elementwise factors of the update's terms, None for 1, times the factor of all terms."""
        grad, prior, noise = (_factor(coef, param) for coef in self[:3])
        correction = None
        if self.grad_correction is not None:
            # `overall_coef` multiplies all terms, the correction among them.
            drift = torch.as_tensor(self.grad_correction, device=param.device).expand_as(param)
            correction = Term(1.0, scaled(drift, mask))
        if mask is not None:
            grad, prior, noise = (
                mask if factor is None else mask * factor for factor in (grad, prior, noise)
            )
        return Factors(grad, prior, noise, correction)

    def mask(self, param: Tensor) -> Tensor | None:
        """The factor of all terms, None for 1."""
        return _factor(self.overall_coef, param)


def _factor(coef: float | Tensor, param: Tensor) -> Tensor | None:
    """A coefficient as an elementwise factor; None for the number 1."""
    if isinstance(coef, Tensor):
        return coef
    # A factor of 1 costs no product, and no tensor.
    return None if coef == 1 else torch.tensor(coef, device=param.device)


class Preconditioner(ABC):
    """Base class of preconditioners; subclass it to write one."""

    @abstractmethod
    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """Coefficients for this step of one parameter.

        Args:
            param: The parameter, before the step.
            grad: Its gradient, without nβ.
            state: The optimizer's state of the parameter, where running averages may be kept.
        """


class IdentityPreconditioner(Preconditioner):
    """No preconditioning: all coefficients are 1."""

    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """All coefficients are 1."""
        return PreconditionerCoefs(1.0, 1.0, 1.0, 1.0)

    def __repr__(self) -> str:
        return "IdentityPreconditioner()"


class MaskPreconditioner(Preconditioner):
    """Masks as overall coefficients: 0 keeps an entry where it is, 1 samples it.

    Args:
        masks: One for each parameter of the group, of its shape or a number.
    """

    def __init__(self, masks: list[Tensor | float]):
        self.masks = masks

    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """The parameter's mask as overall coefficient.

        Raises:
            ValueError: `state` does not say which parameter of its group this is.
        """
        if "param_idx" not in state:
            raise ValueError(f"the state of a masked parameter needs param_idx, got {list(state)}")
        return PreconditionerCoefs(1.0, 1.0, 1.0, self.masks[state["param_idx"]])

    def __repr__(self) -> str:
        return f"MaskPreconditioner(masks={self.masks})"


class CompositePreconditioner(Preconditioner):
    """Several preconditioners at once: products of their coefficients, sums of corrections.

    Args:
        preconditioners: Any number, composites among them or not.
    """

    def __init__(self, preconditioners: list[Preconditioner]):
        self.preconditioners = list(preconditioners)

    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """Coefficients of all preconditioners together."""
        return PreconditionerCoefs.combine(
            *(each.get_coefficients(param, grad, state) for each in self.preconditioners)
        )

    def __repr__(self) -> str:
        return f"CompositePreconditioner({', '.join(map(repr, self.preconditioners))})"


class RMSpropPreconditioner(Preconditioner):
    """RMSprop's diagonal: G = 1/(√V' + eps) for drift, √G for noise, V' = αV + (1 − α) g².

    Args:
        alpha: α in [0, 1], memory of the running average; at 1, V stays 0.
        eps: eps ≥ 0, in units of the gradient.
        add_grad_correction: Whether to add the curvature term Γ = ∂G/∂w to the drift. It needs
            gradients made with `backward(create_graph=True)` and not changed since (no clipping,
            no gradient scaler), and is exact for parameters of up to
            `funcsgmcmc.curvature.EXACT_UP_TO` entries, else an unbiased estimate, with probes from
            torch's global generator.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """

    # For subclasses whose __init__ does not call the one below.
    alpha: float = 0.99
    eps: float = 0.1
    add_grad_correction: bool = False

    def __init__(self, alpha: float = 0.99, eps: float = 0.1, add_grad_correction=False):
        checks.number("alpha", alpha, maximum=1.0)
        checks.number("eps", eps)
        check_flag("add_grad_correction", add_grad_correction)
        self.alpha = alpha
        self.eps = eps
        self.add_grad_correction = add_grad_correction

    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """Update V, `state["square_avg"]`, and return G and √G.

        The curvature term of a `grad` without a graph is 0.
        """
        slopes = grad.detach()  # the running average must not keep graphs alive
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(slopes)
        average = state["square_avg"]
        updated = square_average(average, slopes, self.alpha)
        gain = rmsprop_gain(updated, self.eps)
        correction = None
        if self.add_grad_correction:
            curvature = hessian_diagonal(grad, param)
            correction = rmsprop_correction(updated, gain, slopes, curvature, self.alpha)
        # Last: V' is rounded to the parameter's dtype only after G is made of it.
        average.copy_(updated)
        return PreconditionerCoefs(gain, gain, gain.sqrt(), 1.0, correction)

    def __repr__(self) -> str:
        return (
            f"RMSpropPreconditioner(alpha={self.alpha}, eps={self.eps}, "
            f"add_grad_correction={self.add_grad_correction})"
        )


class NHTPreconditioning(Preconditioner):
    """The stochastic gradient Nosé–Hoover thermostat, as a preconditioner.

    `SGMCMC` makes steps of SGNHT, with momenta and a thermostat for each group, where this is the
    group's preconditioner or part of it; the coefficients of others then scale the force on the
    momentum and its noise.

    Args:
        diffusion_factor: A ≥ 0.
        eps: Accepted for compatibility; the method has no such constant.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """

    def __init__(self, diffusion_factor: float = 0.01, eps: float = 1e-8):
        checks.number("diffusion_factor", diffusion_factor)
        checks.number("eps", eps)
        self.diffusion_factor = diffusion_factor
        self.eps = eps

    def get_coefficients(self, param: Tensor, grad: Tensor, state: dict) -> PreconditionerCoefs:
        """All coefficients are 1: friction and noise scale are the sampler's."""
        return PreconditionerCoefs(1.0, 1.0, 1.0, 1.0)

    def __repr__(self) -> str:
        return f"NHTPreconditioning(diffusion_factor={self.diffusion_factor}, eps={self.eps})"


def members(preconditioner: Preconditioner) -> Iterator[Preconditioner]:
    """A preconditioner, or those in a composite, at any depth."""
    if isinstance(preconditioner, CompositePreconditioner):
        for member in preconditioner.preconditioners:
            yield from members(member)
    else:
        yield preconditioner


_PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "identity": IdentityPreconditioner,
    "rmsprop": RMSpropPreconditioner,
}


def preconditioner_of(
    given: Any, named_settings: dict[str, Any], mask: Any, params: list[Tensor]
) -> Preconditioner:
    """Make a group's preconditioner from its settings, the mask included."""
    if isinstance(given, Preconditioner):
        chosen = given
    elif given is None or isinstance(given, str):
        name = checks.choice("preconditioner", given or "identity", tuple(_PRECONDITIONERS))
        chosen = _PRECONDITIONERS[name](**named_settings)
    else:
        raise ValueError(
            f"preconditioner must be a Preconditioner, a name or None, got {type(given).__name__}"
        )
    if mask is None:
        return chosen
    # float32, bool masks too, as published; a product takes it to the dtype of its term.
    masks = check_masks([mask] if isinstance(mask, Tensor) else mask, params)
    masking = MaskPreconditioner(
        [
            1.0 if each is None else part_of(each, param).to(param.device, torch.float32)
            for each, param in zip(masks, params, strict=True)
        ]
    )
    if isinstance(chosen, IdentityPreconditioner):  # a composite would combine coefficients of 1
        return masking
    return CompositePreconditioner([chosen, masking])


def check_unsharded(preconditioner: Preconditioner, params: list[Tensor]) -> None:
    """Refuse for sharded parameters what needs them whole.

    Raises:
        ValueError: A curvature term is asked for, or a mask was not given to the optimizer.
    """
    if not any(is_sharded(param) for param in params):
        return
    for each in members(preconditioner):
        if getattr(each, "add_grad_correction", False):
            raise ValueError(
                "add_grad_correction needs whole parameters, whose gradients it differentiates, "
                "got sharded ones"
            )
        masks = each.masks if isinstance(each, MaskPreconditioner) else []
        for mask, param in zip(masks, params, strict=False):
            if isinstance(mask, Tensor) and mask.shape != local(param).shape:
                raise ValueError(
                    "masks of sharded parameters must be given to the optimizer (mask=…), which "
                    f"cuts them, got a MaskPreconditioner of shape {tuple(mask.shape)}"
                )


def start_averages(preconditioner: Preconditioner, state: dict, param: Tensor) -> None:
    """Make running averages before the first step, which makes them else, as published.

    A distributed checkpoint loads what the optimizer has already.
    """
    if any(isinstance(each, RMSpropPreconditioner) for each in members(preconditioner)):
        state["square_avg"] = torch.zeros_like(param)


def thermostat_of(preconditioner: Preconditioner) -> NHTPreconditioning | None:
    """The thermostat among a group's preconditioners, if there is one."""
    found = (each for each in members(preconditioner) if isinstance(each, NHTPreconditioning))
    return next(found, None)


def mask_of(preconditioner: Preconditioner, index: int) -> Tensor | None:
    """The mask that a group's preconditioners put on one of its parameters."""
    masks = [
        torch.as_tensor(each.masks[index])
        for each in members(preconditioner)
        if isinstance(each, MaskPreconditioner)
    ]
    return reduce(torch.mul, masks) if masks else None
