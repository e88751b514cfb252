"""One problem, sampled by this library."""

import time
from typing import Any

from known import Problem

import funcsgmcmc as fs


def estimate(problem: Problem, seed: int) -> dict[str, Any]:
    """What `fs.llc` says of a problem, and how long it took."""
    settings = problem.settings
    start = time.process_time()
    samples = fs.sample(
        problem.loss,
        {"w": problem.anchor},
        problem.data(),
        fs.baoa(
            settings.lr,
            friction=settings.friction,
            nbeta=settings.nbetas if settings.num_warm_chains else settings.nbeta,
            localization=settings.localization,
        ),
        num_chains=settings.num_chains,
        num_burnin_steps=settings.num_burnin_steps,
        num_draws=settings.num_draws,
        num_steps_between_draws=settings.num_steps_between_draws,
        batch_size=settings.batch_size,
        init_noise=settings.init_noise,
        full_loss=settings.full_loss,
        key=fs.key(seed),
    )
    found = fs.llc(samples)
    return {
        "mean": found.mean,
        "corrected": found.corrected,
        "error": found.error,
        "mcse": found.mcse,
        "bias": found.bias,
        "drift": found.drift,
        "slope": found.slope,
        "slope_error": found.slope_error,
        "frozen": found.num_frozen,
        "warnings": found.warnings,
        "gradients": settings.num_chains * settings.num_steps,
        "seconds": time.process_time() - start,
    }
