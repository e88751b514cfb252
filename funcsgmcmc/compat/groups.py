"""Parameter groups: checks of a new group, and a group's settings at each step."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.compat.shards import check_placements
from funcsgmcmc.shards import local

Group = dict[str, Any]

# Settings of all classes; a group holds those of its own class.
_NUMBERS = (
    "lr",
    "nbeta",
    "noise_level",
    "localization",
    "weight_decay",
    "diffusion_factor",
)


def check_group(group: Group) -> None:
    """Check the parameters and the numbers of a new group.

    Raises:
        TypeError, ValueError: A parameter is not real floating point, or a setting is not a finite
            number >= 0. `nbeta` may be a function, `bounding_box_size` None.
    """
    check_placements(group["params"])
    for index, param in enumerate(group["params"]):
        if not param.is_floating_point():
            raise TypeError(f"params[{index}] must be real floating point, got {param.dtype}")
        if not param.is_meta:  # which holds no values yet
            checks.finite_values(f"params[{index}]", local(param.detach()))
    for name in _NUMBERS:
        # A function is called, and its value checked, at each step.
        if name in group and not (name == "nbeta" and callable(group[name])):
            checks.number(name, group[name])
    if group.get("bounding_box_size") is not None:
        checks.number("bounding_box_size", group["bounding_box_size"])


def check_flag(name: str, value: Any) -> None:
    """Check an option that is on or off; 0 and 1 will do, as published.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def settings(groups: Iterable[Group]) -> list[dict[str, float]]:
    """Evaluate each group's numbers for a step: functions are called, tensors read.

    Raises:
        TypeError, ValueError: A function returned something else than a finite number >= 0, or a
            setting has become something else.
    """
    # By function, not by group: one that counts its calls is called once a step for all groups.
    called: dict[Callable[[], Any], float] = {}

    def number(name: str, value: Any) -> float:
        if not callable(value):
            # A float is what an in-place add takes as `alpha`, without a tensor for each product.
            now = (
                float(value)
                if isinstance(value, int | float)
                else float(checks.number(name, value))
            )
            # One comparison at every step; only a refusal, NaN included, pays for the wording.
            return now if 0 <= now < math.inf else float(checks.number(name, now))
        if value not in called:
            called[value] = float(checks.number(name, value()))
        return called[value]

    return [
        {name: number(name, group[name]) for name in _NUMBERS if name in group} for group in groups
    ]


def masks(group: Group) -> list[Tensor | None]:
    """Each parameter's mask, None for none; a group's single tensor is shared by all."""
    mask = group.get("mask")
    # Read at every step, not kept: a mask may be changed during a run.
    if mask is None or isinstance(mask, Tensor):
        return [mask] * len(group["params"])
    return list(mask)


def check_masks(given: Any, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Convert masks to tensors, one for each parameter; None stands for no mask.

    Raises:
        TypeError: They are not iterable.
        ValueError: Number or shapes differ from the parameters', or a mask is not real and finite.
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"mask must be one tensor for each parameter, got {type(given).__name__}")
    try:
        tensors = [None if each is None else torch.as_tensor(each) for each in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"mask must be one tensor for each parameter, got {given!r}") from error
    if len(tensors) != len(params):
        shapes = [tuple(param.shape) for param in params]
        given = [None if each is None else tuple(each.shape) for each in tensors]
        raise ValueError(
            f"mask must have one tensor for each parameter, of shapes {shapes}, got {given}"
        )
    present = [each for each in tensors if each is not None]
    sampled = [p for p, each in zip(params, tensors, strict=True) if each is not None]
    check_one_each("mask", present, sampled)
    for index, each in enumerate(tensors):
        if each is not None and not (
            not (each.is_complex() or each.is_meta) and each.isfinite().all()
        ):
            raise ValueError(f"mask[{index}] must be real and finite, got {each}")
        if each is not None and not (each >= 0).all():
            raise ValueError(f"mask[{index}] must be >= 0, got {each}")
    return tensors


def check_one_each(name: str, values: Sequence[Any], params: Sequence[Tensor]) -> None:
    """Check that there is one tensor for each parameter, of its shape.

    Raises:
        TypeError: A value is not a tensor.
        ValueError: The number or a shape differs.
    """
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must hold tensors, got {type(value).__name__}")
    got, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (values, params))
    if got != wanted:
        raise ValueError(
            f"{name} must have one tensor for each parameter, of shapes {wanted}, got {got}"
        )


def warn_of_settings(nbeta: Any, noise_level: Any = 1.0) -> None:
    """Warn of settings that sample another distribution than most users mean."""
    # stacklevel=3 is the line that made the optimizer. Values of other types are refused later.
    if isinstance(noise_level, int | float) and noise_level != 1.0:
        warnings.warn(f"noise_level is {noise_level}: only 1 samples the posterior", stacklevel=3)
    if isinstance(nbeta, int | float) and nbeta == 1.0:
        warnings.warn(
            "nbeta is 1: estimates of the local learning coefficient ask for "
            "default_nbeta(dataloader)",
            stacklevel=3,
        )
