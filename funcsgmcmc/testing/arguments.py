"""Checks of arguments that more than one test takes: the rule, then the value received."""

from collections.abc import Mapping
from typing import Any

import torch

from funcsgmcmc import checks
from funcsgmcmc.samplers import Sampler


def mapping(name: str, value: Any) -> None:
    """Check a mapping of names.

    Raises:
        TypeError: The value is no mapping, or a key is no string.
    """
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise TypeError(f"{name} must be a mapping of names, got {value!r}")


def one_chain(name: str, batch_size: torch.Size) -> None:
    """Refuse a tree of several chains.

    Raises:
        ValueError: The tree has a batch size.
    """
    if batch_size:
        raise ValueError(f"{name} must be those of one chain, got batch size {tuple(batch_size)}")


def shared_target(sampler: Sampler) -> None:
    """Refuse a sampler whose chains do not all sample one known law.

    Raises:
        ValueError: Settings are per chain, or the sampler has a mask or a box.
    """
    if sampler.shape:
        raise ValueError(f"settings must be shared by all chains, got {sampler.shape[0]} of them")
    for name in ("mask", "bounding_box_size"):
        if getattr(sampler, name) is not None:
            raise ValueError(f"what is sampled is known without {name}, got a sampler with one")


def probability(name: str, value: float) -> None:
    """Check a probability, 0 and 1 excluded.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is not between 0 and 1.
    """
    checks.finite_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def power(value: float) -> None:
    """Check the power of a test: the smallest error found is defined from 1/2 on.

    Raises:
        TypeError, ValueError: As `probability`; or the power is below 1/2.
    """
    probability("power", value)
    if value < 0.5:
        raise ValueError(f"power must be >= 0.5, got {value}")
