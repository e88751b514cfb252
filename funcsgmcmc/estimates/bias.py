"""How much step size and gradient noise raise an estimate: measured, or extrapolated."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcsgmcmc.estimates.draws import forces_and_noises, full_llc_draws
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples


class Bias(NamedTuple):
    """By how much step size and gradient noise raise a mean.

    Attributes:
        value: The bias; NaN where it is not known.
        error: Its Monte Carlo standard error; 0 where this is far below that of the mean.
    """

    value: float
    error: float = 0.0


def measured_bias(samples: Samples, initial_loss: float | Tensor | None) -> Bias:
    """The bias as force and gradient noise on all data tell it, by the law of the sampler.

    Args:
        samples: A run.
        initial_loss: As for `llc`.

    Returns:
        NaN without looks at the data, or where the sampler knows no law.
    """
    looks, healthy = samples.looks, samples.healthy
    if looks is None or not len(looks.draws):
        return Bias(math.nan)
    sampler = samples.sampler.to(torch.device("cpu"))
    excess = sampler.virial_excess(*forces_and_noises(samples))
    if excess is None:
        return Bias(math.nan)
    _, temperature = settings_of_draws(samples)
    # The degree of a quadratic, where chains are below the anchor or L(w₀) of a part is not known.
    degree = 2.0
    if looks.is_all:
        rise = float(full_llc_draws(samples, initial_loss)[healthy].mean())
        virial = float((looks.virials.double() / temperature[:, looks.draws])[healthy].mean())
        if rise > 0 and virial > rise:
            degree = virial / rise
    excess = excess.expand(samples.num_chains) / temperature[:, -1]
    return Bias(float(excess[healthy].mean()) / degree)


def noise_share(samples: Samples) -> float:
    """The part of the measured bias that gradient noise makes; the step makes the rest.

    Args:
        samples: A run.

    Returns:
        In [0, 1]; NaN where the bias is not known.
    """
    if samples.looks is None or not len(samples.looks.draws):
        return math.nan
    sampler, healthy = samples.sampler.to(torch.device("cpu")), samples.healthy
    force, noise = forces_and_noises(samples)
    both = sampler.virial_excess(force, noise)
    of_step = sampler.virial_excess(force, torch.zeros_like(noise))
    if both is None or of_step is None:
        return math.nan
    total = float(both.expand(len(healthy))[healthy].mean())
    step = float(of_step.expand(len(healthy))[healthy].mean())
    return 1 - step / total if total > 0 else 0.0


def extrapolated_bias(sizes: Tensor, means: Tensor, errors: Tensor, order: int) -> Bias:
    """The bias at the smallest of several step sizes.

        E mean(h) = a + b hᵖ

    by least squares, weighted by the inverse squared errors; the bias is b hᵖ at the smallest h.

    Args:
        sizes: h of each step size, `[s]`, two different ones at least.
        means: The mean at each, `[s]`.
        errors: The standard error of each, `[s]`.
        order: p (`Sampler.step_order`).
    """
    x = sizes.double() ** order
    # Errors that are all 0, or not known, weigh alike.
    known = bool((errors > 0).all())
    weights = errors.double() ** -2 if known else torch.ones_like(x)
    weights = weights / weights.sum()
    away = x - (weights * x).sum()
    # The slope is a sum over the means with these coefficients.
    coefficients = weights * away / (weights * away**2).sum()
    slope = (coefficients * means.double()).sum()
    error = (coefficients * errors.double()).norm()
    smallest = x.min()
    return Bias(float(slope * smallest), float(error * smallest))
