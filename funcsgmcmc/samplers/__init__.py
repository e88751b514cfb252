"""Samplers, one algorithm a file: `funcsgmcmc.samplers.sgld` holds the factory `sgld`.

Here are the words that every sampler is written in. The factories are at the door, `funcsgmcmc`.
"""

from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import Term, Terms

__all__ = ["Evaluation", "Sampler", "State", "Term", "Terms"]
