"""Stateless stochastic-gradient MCMC samplers for PyTorch.

Pure functions over `TensorDict` parameter trees compute a sampler's step and its metrics with
`torch.func`; many chains run as a batch. `sample` runs a whole experiment, `kernel` makes one step
for loops of your own.
"""

from funcsgmcmc.diagnostics import Diagnostics, Summary, diagnostics, summary, to_datatree
from funcsgmcmc.gradients import module_loss
from funcsgmcmc.kernel import Info, compiled, kernel
from funcsgmcmc.llc import LLC, default_nbeta, llc, llc_draws
from funcsgmcmc.metrics import Metrics, metrics
from funcsgmcmc.preconditioners import Preconditioner, identity, rmsprop
from funcsgmcmc.random import fold_in, key, split
from funcsgmcmc.samplers import Sampler, State, rmsprop_sgld, sghmc, sgld, sgnht
from funcsgmcmc.samples import Frozen, Samples
from funcsgmcmc.sampling import DivergenceError, SamplingError, sample
from funcsgmcmc.sketch import CountSketch, Sketches, count_sketch, sketches
from funcsgmcmc.terms import Term, Terms
from funcsgmcmc.tree import normal_like, params_of

__all__ = [
    "LLC",
    "CountSketch",
    "Diagnostics",
    "DivergenceError",
    "Frozen",
    "Info",
    "Metrics",
    "Preconditioner",
    "Sampler",
    "Samples",
    "SamplingError",
    "Sketches",
    "State",
    "Summary",
    "Term",
    "Terms",
    "compiled",
    "count_sketch",
    "default_nbeta",
    "diagnostics",
    "fold_in",
    "identity",
    "kernel",
    "key",
    "llc",
    "llc_draws",
    "metrics",
    "module_loss",
    "normal_like",
    "params_of",
    "rmsprop",
    "rmsprop_sgld",
    "sample",
    "sghmc",
    "sgld",
    "sgnht",
    "sketches",
    "split",
    "summary",
    "to_datatree",
]
