"""Property-based tests of update mathematics, for samplers of this library and of anyone.

`check_laws(sampler)` tries a sampler on problems that hypothesis draws, and shrinks what breaks a
law to a tree of one or two numbers. `check_stationary` and `check_calibration` test what it
samples. Needs the extra `test`.
"""

from funcsgmcmc import checks

try:
    import hypothesis  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise checks.missing_extra("test", str(error.name), "funcsgmcmc.testing") from error

from funcsgmcmc.testing import laws, oracles, strategies
from funcsgmcmc.testing.calibration import Calibration, Model, check_calibration
from funcsgmcmc.testing.checking import (
    PROFILES,
    Checked,
    check_law,
    check_laws,
    check_log_prior,
    check_preconditioner,
    check_refusals,
)
from funcsgmcmc.testing.laws import LAWS, Law, law
from funcsgmcmc.testing.problem import Given, Problem, problems
from funcsgmcmc.testing.specs import SPECS, SamplerSpec
from funcsgmcmc.testing.stationary import Quadratic, Stationary, check_stationary

__all__ = [
    "LAWS",
    "PROFILES",
    "SPECS",
    "Calibration",
    "Checked",
    "Given",
    "Law",
    "Model",
    "Problem",
    "Quadratic",
    "SamplerSpec",
    "Stationary",
    "check_calibration",
    "check_law",
    "check_laws",
    "check_log_prior",
    "check_preconditioner",
    "check_refusals",
    "check_stationary",
    "law",
    "laws",
    "oracles",
    "problems",
    "strategies",
]
