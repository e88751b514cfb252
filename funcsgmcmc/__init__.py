"""Stateless stochastic-gradient MCMC samplers for PyTorch.

Pure functions over `TensorDict` parameter trees compute a sampler's step and its metrics with
`torch.func`; many chains run as a batch. `sample` runs a whole experiment, `kernel` makes one step
for loops of your own.

The functions for a run stand here. The rest has namespaces: `random`, `schedules`,
`preconditioners`, `samplers`, `gradients`, `tree`, `norms`, `sketch`, `response`, `plots`,
`testing`.
"""

import importlib
from typing import Any

from funcsgmcmc import gradients, norms, preconditioners, random, samplers, schedules, sketch, tree
from funcsgmcmc.components import restrict
from funcsgmcmc.estimates import plots, response
from funcsgmcmc.estimates.calibration import sweep
from funcsgmcmc.estimates.convergence import diagnostics, weighted_mean
from funcsgmcmc.estimates.draws import llc_draws
from funcsgmcmc.estimates.ladder import step_ladder
from funcsgmcmc.estimates.llc import LLC, default_nbeta, llc
from funcsgmcmc.estimates.predictive import predictive
from funcsgmcmc.estimates.response import influence, susceptibilities
from funcsgmcmc.estimates.summary import summary, to_datatree
from funcsgmcmc.gradients import accumulated, control_variates, svrg
from funcsgmcmc.losses import module_loss
from funcsgmcmc.modules import params_of
from funcsgmcmc.per_example import losses_on
from funcsgmcmc.random import key
from funcsgmcmc.runs.failures import DivergenceError, SamplingError, SamplingInterrupt
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.sampling import sample
from funcsgmcmc.runs.stored import open_run
from funcsgmcmc.samplers.badoda import badoda
from funcsgmcmc.samplers.baoa import baoa
from funcsgmcmc.samplers.contour_sgld import contour_sgld
from funcsgmcmc.samplers.cyclical_sgld import cyclical_sgld
from funcsgmcmc.samplers.sghmc import sghmc
from funcsgmcmc.samplers.sgld import rmsprop_sgld, sgld
from funcsgmcmc.samplers.sglrw import sglrw
from funcsgmcmc.samplers.sgnht import sgnht
from funcsgmcmc.stepping import compiled, kernel

__version__ = "0.2.0"

__all__ = [
    "LLC",
    "DivergenceError",
    "Samples",
    "SamplingError",
    "SamplingInterrupt",
    "accumulated",
    "badoda",
    "baoa",
    "compiled",
    "contour_sgld",
    "control_variates",
    "cyclical_sgld",
    "default_nbeta",
    "diagnostics",
    "gradients",
    "influence",
    "kernel",
    "key",
    "llc",
    "llc_draws",
    "losses_on",
    "module_loss",
    "norms",
    "open_run",
    "params_of",
    "plots",
    "preconditioners",
    "predictive",
    "random",
    "response",
    "restrict",
    "rmsprop_sgld",
    "sample",
    "samplers",
    "schedules",
    "sghmc",
    "sgld",
    "sglrw",
    "sgnht",
    "sketch",
    "step_ladder",
    "summary",
    "susceptibilities",
    "svrg",
    "sweep",
    "to_datatree",
    "tree",
    "weighted_mean",
]


def __getattr__(name: str) -> Any:
    # It needs an extra, which a run does not: only those who use it import it.
    if name == "testing":
        return importlib.import_module("funcsgmcmc.testing")
    raise AttributeError(f"module 'funcsgmcmc' has no attribute {name!r}")
