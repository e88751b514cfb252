"""Samplers, one algorithm a file."""

from funcsgmcmc.samplers.base import Sampler, State, Term, Terms
from funcsgmcmc.samplers.sgld import SGLD, SGLDState, rmsprop_sgld, sgld

__all__ = ["SGLD", "SGLDState", "Sampler", "State", "Term", "Terms", "rmsprop_sgld", "sgld"]
