"""The end of a burn-in that lasts as long as drift is seen: `num_burnin_steps="auto"`.

Looks come at steps that grow by a quarter each. A look at step t compares the second with the last
third of the t steps made, in loss and in distance to the anchor. Burn-in is over when two looks in
a row see no drift, or at its limit.
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


def is_due(num_steps: int) -> bool:
    """Whether a look is due after some steps, and one has been before."""
    return num_steps > _FIRST_LOOK and num_steps == _step_of_look(_index(num_steps))


def steps_until_due(num_steps: int) -> int:
    """Steps until a look may be due, after some steps: 1 or more."""
    if num_steps < _FIRST_LOOK:
        return _FIRST_LOOK - num_steps
    index = _index(num_steps)
    return next(due for i in (index, index + 1) if (due := _step_of_look(i) - num_steps) > 0)


def seen(recorder: Recorder, num_steps: int, healthy: Tensor) -> Tensor:
    """What the look that is due, and the one before it, see.

    Args:
        recorder: The record of some chains.
        num_steps: Steps made.
        healthy: Which of these chains are not frozen, bool `[C]`.

    Returns:
        Means of eight parts of the second and of the last third, of losses and distances of healthy
        chains, `[2 looks, 2 quantities, c, 2 thirds, 8]`.
    """
    both = torch.stack([recorder.losses(num_steps), recorder.distances(num_steps)])
    values = both[:, healthy].double()
    ends = (_step_of_look(_index(num_steps) - 1), num_steps)
    return torch.stack([_means_of_parts(values[..., :end]) for end in ends])


def has_settled(looks: Tensor, *, is_shared: bool = False) -> bool:
    """Whether two looks in a row see no drift.

    Args:
        looks: What they see of all chains, as `seen` gives it.
        is_shared: Whether chains share minibatches, whose noise their spread lacks.
    """
    if not looks.shape[2]:
        return False
    if is_shared:
        # As one chain, whose parts tell the error.
        looks = looks.mean(2, keepdim=True)
    return all(
        _is_steady(losses) and _is_steady(distances, share=_SHARE) for losses, distances in looks
    )


def _index(num_steps: int) -> int:
    return round(math.log(num_steps / _FIRST_LOOK, _GROWTH))


def _step_of_look(index: int) -> int:
    return math.ceil(_FIRST_LOOK * _GROWTH**index)


def _means_of_parts(values: Tensor) -> Tensor:
    """Means of the parts of the second and of the last third of steps `[…, t]`, `[…, 2, 8]`."""
    length = values.shape[-1] // (3 * _PARTS)
    return values[..., -2 * _PARTS * length :].unflatten(-1, (2, _PARTS, length)).mean(-1)


def _is_steady(means: Tensor, share: float = 0.0) -> bool:
    """Whether a quantity is no higher or lower in the last third than in the second.

    Args:
        means: Of the parts of both, `[c, 2, 8]`.
        share: A difference below this share of the mean counts as none.
    """
    middle, last = means.mean(-1).unbind(1)
    size = float((last - middle).mean().abs())
    if size <= share * float(last.mean().abs()):
        return True
    if len(means) >= _ENOUGH_CHAINS:
        error = float((last - middle).std()) / math.sqrt(len(means))
    else:
        # Parts that follow one another are correlated: drift is seen rather too often.
        error = float((means.var(-1) / _PARTS).sum().sqrt()) / len(means)
    return size <= _Z * error
