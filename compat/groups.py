"""What a parameter group holds, checked when it enters and read at every step."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from funcsgmcmc import checks

Group = dict[str, Any]

_REQUIRED = (
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
        TypeError, ValueError: A parameter is not real floating point; a number is none, negative,
            infinite or NaN. `nbeta` may be a function, `bounding_box_size` None.
    """
    checks.optimized(group["params"])
    for name in _REQUIRED:
        if name in group and not (name == "nbeta" and callable(group[name])):
            checks.number(name, group[name])
    if group.get("bounding_box_size") is not None:
        checks.number("bounding_box_size", group["bounding_box_size"])


def settings(groups: Iterable[Group]) -> list[dict[str, float]]:
    """Each group's numbers for a step: a function is called once, a scheduler's tensor read.

    Raises:
        TypeError, ValueError: A function returned what is no number >= 0, or a number has become
            negative.
    """
    called: dict[Callable[[], Any], float] = {}

    def number(name: str, value: Any) -> float:
        if not callable(value):
            now = float(value)
            return now if now >= 0 else float(checks.number(name, now))
        if value not in called:
            called[value] = float(checks.number(name, value()))
        return called[value]

    return [
        {name: number(name, group[name]) for name in _REQUIRED if name in group} for group in groups
    ]


def masks(group: Group) -> list[Tensor | None]:
    """Each parameter's mask, from a group's tensors or its one tensor; None for none."""
    mask = group.get("mask")
    if mask is None or isinstance(mask, Tensor):
        return [mask] * len(group["params"])
    return list(mask)


def warn_of_settings(nbeta: Any, noise_level: Any = 1.0) -> None:
    """Warn of settings that sample another distribution than most users mean."""
    if noise_level != 1.0:
        warnings.warn(f"noise_level is {noise_level}: only 1 samples the posterior", stacklevel=3)
    if nbeta == 1.0:
        warnings.warn(
            "nbeta is 1: estimates of the local learning coefficient ask for "
            "default_nbeta(dataloader)",
            stacklevel=3,
        )
