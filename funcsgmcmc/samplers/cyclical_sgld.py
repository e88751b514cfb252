"""Cyclical SGLD: SGLD in cycles that first look for another mode and then sample it.

    r   = (t mod K)/K                                     the share of the cycle that has passed
    ε_t = (ε₀/2) (1 + cos(πr))
    T_t = 0 if r < β, else T

in the update of `sgld`, with t = 0, 1, … the step. At the start of a cycle steps are large and
without noise: gradient descent that overshoots, into another mode (exploration). Then noise is
added, and steps become small: the chain samples the mode it is in (sampling). `sample` makes draws
only where a step at T_t > 0 has led.

The law of the draws is that of SGLD within a mode, in the limit of small steps; the weights of the
modes are how often the cycles find them, which is not their posterior probability.

ε₀ ↔ `lr`, K ↔ `num_steps_per_cycle`, β ↔ `exploration`, T ↔ `temperature`.

Source: Zhang, Li, Zhang, Chen and Wilson, "Cyclical stochastic gradient MCMC for Bayesian deep
learning", ICLR 2020, eq. 1 and algorithm 1.
"""

from typing import Unpack

from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.samplers.settings import SharedSettings, takes_shared_settings
from funcsgmcmc.samplers.sgld import SGLD, sgld
from funcsgmcmc.schedules import cyclical, sampling_phases


@takes_shared_settings
def cyclical_sgld(
    lr: float | Tensor,
    *,
    num_steps_per_cycle: float | Tensor,
    exploration: float | Tensor = 0.25,
    temperature: float | Tensor = 1.0,
    preconditioner: Preconditioner | None = None,
    **shared: Unpack[SharedSettings],
) -> SGLD:
    """Make a sampler of SGLD whose step size and temperature go in cycles (Zhang et al. 2020).

        ε_t = (ε₀/2) (1 + cos(πr)),    T_t = 0 if r < β, else T,    r = (t mod K)/K

    It is `sgld` with the schedules `cyclical` and `sampling_phases`, which other samplers take too.

    Args:
        lr: ε₀ ≥ 0, the first step size of each cycle, in units of w².
        num_steps_per_cycle: K ≥ 1. A run of `num_burnin_steps` = 0 begins with a whole cycle.
        exploration: β in [0, 1), the share of a cycle without noise.
        temperature: T ≥ 0 while a cycle samples.
        preconditioner: G (default: `identity()`).
        **shared: The settings that all samplers share.

    Raises:
        TypeError, ValueError: As for `sgld`, `cyclical` and `sampling_phases`.
    """
    # Checked here, so that an error names `lr` and not the schedule's `peak`.
    step_size = cyclical(checks.hyperparameter("lr", lr), num_steps_per_cycle=num_steps_per_cycle)
    shared["temperature"] = sampling_phases(
        temperature, num_steps_per_cycle=num_steps_per_cycle, exploration=exploration
    )
    return sgld(step_size, preconditioner=preconditioner, **shared)
