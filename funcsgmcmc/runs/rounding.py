"""Steps that are too small for the dtype of the parameters."""

import warnings

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import shards, tree
from funcsgmcmc.samplers.base import Sampler

# A step of standard deviation s, rounded to numbers that are u apart, leads nowhere with
# probability P(|s η| < u/2). At 0.4 it has a tenth more variance than s²; steps below 0.3 u have
# less and less, down to none.
_LARGEST_SHARE = 0.4


def is_narrow(params: TensorDict) -> bool:
    """Whether a leaf has fewer digits than float32."""
    return any(leaf.dtype.itemsize < 4 for _, leaf in tree.leaves(params))


def warn_of_lost_steps(before: TensorDict, after: TensorDict, mask: TensorDict | None) -> bool:
    """Warn if much of a step with noise was lost to rounding.

    Args:
        before: Parameters before the step, of batch size `[*chains]`.
        after: After it.
        mask: The sampler's: entries where it is 0 stay by intention.

    Returns:
        Whether it warned.
    """
    lost = sampled = 0.0
    for name, leaf in tree.leaves(before):
        if leaf.dtype.itemsize >= 4:
            continue
        factor = None if mask is None else tree.factor_of(mask, name, leaf.ndim - before.batch_dims)
        # Of a sharded leaf, the part that is here tells enough.
        here, moved = shards.local(leaf), shards.local(after[name])
        is_sampled = torch.ones_like(here, dtype=torch.bool)
        if factor is not None:
            is_sampled = (shards.part_of(factor, leaf) != 0).expand_as(here)
        lost += float((is_sampled & (moved == here)).sum())
        sampled += float(is_sampled.sum())
    share = lost / max(sampled, 1.0)
    if share <= _LARGEST_SHARE:
        return False
    warnings.warn(
        f"{share:.0%} of the half-precision parameters did not move in a step: its size is below "
        "half a unit in their last place, so that chains move too little or too much. Keep "
        "parameters in float32, and evaluate the loss in half precision: "
        "module_loss(model, criterion, dtype=torch.bfloat16) with params_of(model).float()",
        stacklevel=5,
    )
    return True


def has_noise(sampler: Sampler, step: Tensor) -> bool:
    """Whether a step has noise, in any chain.

    Args:
        sampler: The chains' sampler.
        step: Index of the step, `[*chains]`.
    """
    now = sampler.at(step)
    temperature = now.sampled_temperature(step.reshape(-1)[:1])
    return bool(((temperature > 0) & (now.lr.reshape(-1, 1) > 0)).any())
