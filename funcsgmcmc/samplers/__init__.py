"""Samplers, one algorithm a file."""

from funcsgmcmc.samplers.badoda import BADODA, badoda
from funcsgmcmc.samplers.baoa import BAOA, baoa
from funcsgmcmc.samplers.base import Evaluation, Sampler, State
from funcsgmcmc.samplers.contour_sgld import ContourSGLD, ContourState, contour_sgld
from funcsgmcmc.samplers.cyclical_sgld import cyclical_sgld
from funcsgmcmc.samplers.langevin import LangevinState
from funcsgmcmc.samplers.momentum import MomentumState, ThermostatState
from funcsgmcmc.samplers.sghmc import SGHMC, sghmc
from funcsgmcmc.samplers.sgld import SGLD, rmsprop_sgld, sgld
from funcsgmcmc.samplers.sglrw import SGLRW, sglrw
from funcsgmcmc.samplers.sgnht import SGNHT, sgnht

__all__ = [
    "BADODA",
    "BAOA",
    "SGHMC",
    "SGLD",
    "SGLRW",
    "SGNHT",
    "ContourSGLD",
    "ContourState",
    "Evaluation",
    "LangevinState",
    "MomentumState",
    "Sampler",
    "State",
    "ThermostatState",
    "badoda",
    "baoa",
    "contour_sgld",
    "cyclical_sgld",
    "rmsprop_sgld",
    "sghmc",
    "sgld",
    "sglrw",
    "sgnht",
]
