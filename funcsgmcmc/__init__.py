"""Stateless stochastic-gradient MCMC samplers for PyTorch.

Pure functions over `TensorDict` parameter trees compute a sampler's step and its metrics with
`torch.func`; many chains run as a batch. `sample` runs a whole experiment, `kernel` makes one step
for loops of your own.

The functions for a run stand here. The rest has namespaces: `random`, `schedules`,
`preconditioners`, `samplers`, `gradients`, `tree`, `norms`, `sketch`, `response`, `plots`,
`testing`. All are imported where they are first used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read; `_HOMES` says the same when code runs
    from funcsgmcmc import (
        gradients,
        norms,
        preconditioners,
        random,
        samplers,
        schedules,
        sketch,
        tree,
    )
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


_HOMES = {
    "components": ("restrict",),
    "estimates.calibration": ("sweep",),
    "estimates.convergence": ("diagnostics", "weighted_mean"),
    "estimates.draws": ("llc_draws",),
    "estimates.ladder": ("step_ladder",),
    "estimates.llc": ("LLC", "default_nbeta", "llc"),
    "estimates.predictive": ("predictive",),
    "estimates.response": ("influence", "susceptibilities"),
    "estimates.summary": ("summary", "to_datatree"),
    "gradients": ("accumulated", "control_variates", "svrg"),
    "losses": ("module_loss",),
    "modules": ("params_of",),
    "per_example": ("losses_on",),
    "random": ("key",),
    "runs.failures": ("DivergenceError", "SamplingError", "SamplingInterrupt"),
    "runs.record": ("Samples",),
    "runs.sampling": ("sample",),
    "runs.stored": ("open_run",),
    "samplers.badoda": ("badoda",),
    "samplers.baoa": ("baoa",),
    "samplers.contour_sgld": ("contour_sgld",),
    "samplers.cyclical_sgld": ("cyclical_sgld",),
    "samplers.sghmc": ("sghmc",),
    "samplers.sgld": ("rmsprop_sgld", "sgld"),
    "samplers.sglrw": ("sglrw",),
    "samplers.sgnht": ("sgnht",),
    "stepping": ("compiled", "kernel"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Modules that have a shorter name here; all others have their own.
_SHORTER = {"plots": "estimates.plots", "response": "estimates.response"}


def __getattr__(name: str) -> Any:
    """A public name, or a module, where it is first used.

    A class of tensors takes milliseconds to define, and a program needs few of them.
    """
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        module = f"{__name__}.{_SHORTER.get(name, name)}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = importlib.import_module(module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
