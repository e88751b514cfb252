"""Samplers, one algorithm a file."""

from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.samplers.sgld import SGLD, SGLDState, rmsprop_sgld, sgld
from funcsgmcmc.samplers.sgnht import SGNHT, SGNHTState, sgnht

__all__ = [
    "SGLD",
    "SGNHT",
    "SGLDState",
    "SGNHTState",
    "Sampler",
    "State",
    "rmsprop_sgld",
    "sgld",
    "sgnht",
]
