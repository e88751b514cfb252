"""The usual temperature, as `devinterp.utils` computes it."""

import warnings
from typing import Any

from torch.utils.data import DataLoader

import funcsgmcmc


def default_nbeta(dataloader: DataLoader[Any] | int, gradient_accumulation_steps: int = 1) -> float:
    """Inverse temperature nβ = m / log m, with m the number of examples behind a gradient.

    Args:
        dataloader: A loader, whose batch size is used, or a number of examples.
        gradient_accumulation_steps: Batches that are accumulated for one step.

    Returns:
        nβ; 1, with a warning, for m ≤ 1, where m / log m is not defined.

    Raises:
        NotImplementedError: `dataloader` is neither, as published.
        TypeError: It is a loader without a batch size.
    """
    if not isinstance(dataloader, DataLoader | int):
        raise NotImplementedError(
            f"dataloader must be a DataLoader or an int, got {dataloader!r} of type "
            f"{type(dataloader).__name__}"
        )
    size = dataloader.batch_size if isinstance(dataloader, DataLoader) else dataloader
    # A loader with a batch_sampler has the batch size None; True is an int to Python.
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(
            "dataloader must be a DataLoader with a batch size, or an int, got "
            f"{type(dataloader).__name__} with batch size {size!r}"
        )
    examples = size * gradient_accumulation_steps
    if examples <= 1:
        warnings.warn(f"nbeta = m / log m is not defined for m = {examples}: using 1", stacklevel=2)
        return 1.0
    return funcsgmcmc.default_nbeta(examples)
