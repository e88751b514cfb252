"""The end of a burn-in that lasts as long as drift is seen: `num_burnin_steps="auto"`.

Looks come at steps that grow by a quarter each. A look at step t compares the second with the last
third of the t steps made, in loss and in distance to the anchor. Burn-in is over when two looks
in a row see no drift, or at its limit.
"""

import math

import torch
from torch import Tensor

from funcsgmcmc.runs.store import Recorder

_FIRST_LOOK, _GROWTH = 100, 1.25
# Drift below so many standard errors is not seen, and neither is one below this share of the
# distance, which no estimate would notice.
_Z, _SHARE = 2.0, 0.01
# From so many chains on, the error of a difference is told by their spread.
_ENOUGH_CHAINS = 4
_PARTS = 8


def has_settled(recorder: Recorder, num_steps: int, healthy: Tensor) -> bool:
    """Whether two looks in a row, of which the last one is due now, see no drift.

    Args:
        recorder: The run's record.
        num_steps: Steps made.
        healthy: Which chains are not frozen, bool `[C]`.
    """
    before = _look_before(num_steps)
    if before is None or not healthy.any():
        return False
    losses = recorder.losses(num_steps)[healthy].double()
    distances = recorder.distances(num_steps)[healthy].double()
    return all(
        _is_steady(losses[:, :end]) and _is_steady(distances[:, :end], share=_SHARE)
        for end in (before, num_steps)
    )


def _look_before(num_steps: int) -> int | None:
    """The step of the look before one at this step; None if none is due, or this is the first."""
    if num_steps <= _FIRST_LOOK:
        return None
    index = round(math.log(num_steps / _FIRST_LOOK, _GROWTH))
    if num_steps != _step_of_look(index):
        return None
    return _step_of_look(index - 1)


def _step_of_look(index: int) -> int:
    return math.ceil(_FIRST_LOOK * _GROWTH**index)


def _is_steady(values: Tensor, share: float = 0.0) -> bool:
    """Whether the last third of some steps is no higher or lower than the one before.

    Args:
        values: `[c, t]`, of healthy chains.
        share: A difference below this share of the mean counts as none.
    """
    third = values.shape[1] // 3
    middle, last = values[:, -2 * third : -third], values[:, -third:]
    difference = last.mean(1) - middle.mean(1)
    size = float(difference.mean().abs())
    if size <= share * float(last.mean().abs()):
        return True
    if len(values) >= _ENOUGH_CHAINS:
        error = float(difference.std()) / math.sqrt(len(values))
    else:
        # The means of short parts: correlated, so that drift is seen rather too often.
        parts = torch.stack([_means_of_parts(middle), _means_of_parts(last)])
        error = float((parts.var(-1).sum(0) / _PARTS).sum().sqrt()) / len(values)
    return size <= _Z * error


def _means_of_parts(values: Tensor) -> Tensor:
    """Means of consecutive parts of the steps, `[c, 8]`."""
    length = values.shape[1] // _PARTS
    return values[:, : length * _PARTS].unflatten(1, (_PARTS, length)).mean(-1)
