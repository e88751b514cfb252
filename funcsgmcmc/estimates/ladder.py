"""Chains at several step sizes, or at several nβ, in one run: what these do to an estimate."""

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.samplers.base import Sampler
from funcsgmcmc.schedules import Schedule

# No power of lr describes what step sizes do over a wider range, and no slope what nβ does.
_WIDEST = 10.0


def step_ladder(
    lr: float | Tensor, num_chains: int, *, ratio: float = 2.0, num_sizes: int = 2
) -> Tensor:
    """Step sizes for the chains of one run, in turn: lr, lr/r, …, lr/r^(s − 1), lr, lr/r, ….

    `llc` extrapolates such a run to steps of size 0: `fs.baoa(fs.step_ladder(h, 32), …)`.

    Args:
        lr: The largest step size, > 0.
        num_chains: C ≥ 2 s, so that each step size has two chains at least.
        ratio: r > 1.
        num_sizes: s ≥ 2, different step sizes, of which the largest may be ten times the smallest.

    Returns:
        `[C]`, float64.

    Raises:
        TypeError, ValueError: An argument is out of its range.
    """
    largest = checks.number("lr", lr, exclusive=True)
    number = checks.count("num_sizes", num_sizes, minimum=2)
    chains = checks.count("num_chains", num_chains, minimum=2 * number)
    factor = checks.number("ratio", ratio, exclusive=True)
    if not (factor > 1 and factor ** (number - 1) <= _WIDEST):
        raise ValueError(
            f"ratio must be > 1, and ratio**(num_sizes - 1) at most {_WIDEST:g}, got {ratio} with "
            f"{number} sizes"
        )
    sizes = largest / factor ** torch.arange(number, dtype=torch.float64)
    return sizes[torch.arange(chains) % number]


def rungs_of(samples: Samples) -> list[Tensor]:
    """The chains of each step size, the smallest last, of a run that differs in nothing else.

    A friction that is one multiple of 1/lr, as is the default of `baoa`, goes with the step size.
    Step sizes further apart than a factor of 10 are a search, and no ladder.

    Returns:
        Rows of chains, bool `[C]` each, with a healthy one among them; one of all chains if the
        run is no such ladder.
    """
    everyone = torch.ones(samples.num_chains, dtype=torch.bool)
    lr = samples.sampler.lr
    if isinstance(lr, Schedule) or not lr.ndim:
        return [everyone]
    sizes = lr.cpu()
    found = sizes[samples.healthy].unique(sorted=True).flip(0)
    if len(found) < 2 or found[0] > _WIDEST * found[-1]:
        return [everyone]
    if samples.is_sweep_of(_with_one_step_size(samples.sampler)):
        return [everyone]
    return [sizes == size for size in found]


def temperatures_of(samples: Samples) -> list[Tensor]:
    """The chains of each nβ, the largest last, of a run that differs in nothing else.

    Values further apart than a factor of 10 are a search, and no ladder.

    Returns:
        As for `rungs_of`.
    """
    everyone = torch.ones(samples.num_chains, dtype=torch.bool)
    nbeta = samples.sampler.nbeta
    if isinstance(nbeta, Schedule) or not nbeta.ndim:
        return [everyone]
    values = nbeta.cpu()
    found = values[samples.healthy].unique(sorted=True)
    if len(found) < 2 or not 0 < found[-1] <= _WIDEST * found[0]:
        return [everyone]
    if samples.is_sweep_of(samples.sampler.replace(nbeta=torch.ones_like(nbeta))):
        return [everyone]
    return [values == value for value in found]


def _with_one_step_size(sampler: Sampler) -> Sampler:
    """The sampler as if its chains had one step size, and one friction where that follows."""
    shared = {"lr": torch.ones_like(sampler.lr)}
    friction = getattr(sampler, "friction", None)
    if isinstance(friction, Tensor) and sampler.has_one_damping():
        shared["friction"] = torch.ones_like(friction)
    return sampler.replace(**shared)
