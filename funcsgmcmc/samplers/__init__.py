"""Samplers, one algorithm a file: `funcsgmcmc.samplers.sgld` holds the factory `sgld`.

Here are the types that every sampler is written with. The factories are in `funcsgmcmc`.
"""

from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import Term, Terms

__all__ = ["Evaluation", "Sampler", "State", "Term", "Terms"]
