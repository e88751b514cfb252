"""Stateless stochastic-gradient MCMC samplers for PyTorch.

Pure functions over `TensorDict` parameter trees compute a sampler's step and its metrics with
`torch.func`; many chains run as a batch. `sample` runs a whole experiment, `kernel` makes one step
for loops of your own.
"""

from funcsgmcmc.diagnostics import (
    Diagnostics,
    Summary,
    WeightedMean,
    diagnostics,
    summary,
    to_datatree,
    weighted_mean,
)
from funcsgmcmc.gradients import (
    Reference,
    accumulated,
    control_variates,
    module_loss,
    reference,
    svrg,
)
from funcsgmcmc.kernel import Info, compiled, kernel
from funcsgmcmc.llc import LLC, default_nbeta, llc, llc_draws
from funcsgmcmc.memory import keep_freed_memory
from funcsgmcmc.metrics import Metrics, metrics
from funcsgmcmc.preconditioners import (
    Preconditioner,
    Scaling,
    adam,
    compose,
    diagonal,
    identity,
    optimizer_gain,
    rmsprop,
)
from funcsgmcmc.random import fold_in, key, split
from funcsgmcmc.running import DivergenceError, SamplingError
from funcsgmcmc.samplers import (
    Evaluation,
    Sampler,
    State,
    badoda,
    baoa,
    contour_sgld,
    cyclical_sgld,
    rmsprop_sgld,
    sghmc,
    sgld,
    sglrw,
    sgnht,
)
from funcsgmcmc.samples import Frozen, Samples
from funcsgmcmc.sampling import sample
from funcsgmcmc.schedules import (
    Schedule,
    constant,
    cosine,
    cyclical,
    polynomial_decay,
    sampling_phases,
)
from funcsgmcmc.sketch import CountSketch, Sketches, count_sketch, sketches
from funcsgmcmc.terms import Term, Terms
from funcsgmcmc.tree import normal_like, params_of

__all__ = [
    "LLC",
    "CountSketch",
    "Diagnostics",
    "DivergenceError",
    "Evaluation",
    "Frozen",
    "Info",
    "Metrics",
    "Preconditioner",
    "Reference",
    "Sampler",
    "Samples",
    "SamplingError",
    "Scaling",
    "Schedule",
    "Sketches",
    "State",
    "Summary",
    "Term",
    "Terms",
    "WeightedMean",
    "accumulated",
    "adam",
    "badoda",
    "baoa",
    "compiled",
    "compose",
    "constant",
    "contour_sgld",
    "control_variates",
    "cosine",
    "count_sketch",
    "cyclical",
    "cyclical_sgld",
    "default_nbeta",
    "diagnostics",
    "diagonal",
    "fold_in",
    "identity",
    "keep_freed_memory",
    "kernel",
    "key",
    "llc",
    "llc_draws",
    "metrics",
    "module_loss",
    "normal_like",
    "optimizer_gain",
    "params_of",
    "polynomial_decay",
    "reference",
    "rmsprop",
    "rmsprop_sgld",
    "sample",
    "sampling_phases",
    "sghmc",
    "sgld",
    "sglrw",
    "sgnht",
    "sketches",
    "split",
    "summary",
    "svrg",
    "to_datatree",
    "weighted_mean",
]
