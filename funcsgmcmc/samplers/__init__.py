"""Samplers, one algorithm a file."""

from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.samplers.momentum import MomentumState
from funcsgmcmc.samplers.sghmc import SGHMC, sghmc
from funcsgmcmc.samplers.sgld import SGLD, SGLDState, rmsprop_sgld, sgld
from funcsgmcmc.samplers.sgnht import SGNHT, SGNHTState, sgnht

__all__ = [
    "SGHMC",
    "SGLD",
    "SGNHT",
    "MomentumState",
    "SGLDState",
    "SGNHTState",
    "Sampler",
    "State",
    "rmsprop_sgld",
    "sghmc",
    "sgld",
    "sgnht",
]
