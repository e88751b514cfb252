"""What can be wrong with an estimate, found in its run, and said in sentences."""

import math

import torch
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.estimates.bias import Bias, noise_share
from funcsgmcmc.estimates.choice import FEWEST_LOOKS, Choice
from funcsgmcmc.estimates.convergence import FEWEST_CHAINS, diagnostics, mean_error, wider
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples

# Drift beyond this many standard errors is chance once in 10⁴ runs.
_Z_OF_DRIFT = 4.0
_LARGEST_R_HAT = 1.1
# Estimated from the draws' autocorrelation, the ratio of two errors is known to about a tenth.
_LARGEST_WIDENING = 1.3
# Priors and steps raise the estimate of a regular model, d/2, by less than the first factor. Beyond
# the second one steps are unstable, whatever the error of the estimate is.
FAR, RUN_AWAY = 1.5, 100.0
# A bias is a fault beyond this share of the estimate.
_LARGEST_SHARE = 0.03
# As is what a factor of e in nβ changes. Of deep linear networks that are within a tenth of their
# limit it changes less.
_LARGEST_SLOPE = 0.025
# Chance once in 80 runs, of those whose error is that large.
_Z_OF_SLOPE = 2.5
_HALF = 0.5


def drift_of(trace: Tensor, *, is_shared: bool = False) -> float:
    """By how much the second half of the draws differs from the first, beyond chance.

    The error of the difference is that between chains; with fewer than four chains, that of the
    autocorrelated draws of both halves. Chance alone passes for drift once in 10⁴ runs.

    Args:
        trace: `[C, D]`.
        is_shared: Whether chains share minibatches: then chance is common to them, too.

    Returns:
        The difference of the means; 0 if it is no more than chance.
    """
    half = trace.shape[1] // 2
    if half < FEWEST_LOOKS:
        return 0.0
    first, second = trace[:, :half].double(), trace[:, -half:].double()
    difference = second.mean(1) - first.mean(1)
    size, number = float(difference.mean()), len(trace)
    if number >= FEWEST_CHAINS:
        error = wider(number, _Z_OF_DRIFT) * float(difference.std()) / math.sqrt(number)
    else:
        error = float(mean_error(first, second))
    if is_shared:
        # The spread between chains lacks what they share.
        halves = [half.mean(0, keepdim=True) for half in (first, second)]
        error = max(error, float(mean_error(*halves)))
    return size if abs(size) > _Z_OF_DRIFT * error else 0.0


def find_faults(samples: Samples, chosen: Choice, bias: Bias, drift: float) -> list[str]:
    """Say what is wrong with an estimate.

    Args:
        samples: The run.
        chosen: The estimate.
        bias: Of step size and gradient noise.
        drift: As `drift_of` finds it.

    Returns:
        A sentence for each fault, which names it and what to do; none if nothing was found.
    """
    found = [
        *_mixing(samples, chosen, drift),
        *_shared(chosen),
        *_bias(samples, chosen, bias),
        *_implausible(samples, chosen),
    ]
    if not chosen.is_unbiased:
        found.append(
            "losses on batches that chains have been pulled by before are too large: give "
            "full_loss=20, or data as tensors with minibatches='replacement'"
        )
    if math.isnan(chosen.mcse):
        found.append(
            f"{samples.num_draws} draws of {samples.num_chains} chains are too few for an error: "
            "make 4 draws, or 4 chains"
        )
    return found


def still_moving(mean: float, slope: float, error: float) -> list[str]:
    """Whether an estimate is far from its limit of large nβ, as far as chains at several tell.

    Args:
        mean: The estimate.
        slope: dλ̂/d log nβ.
        error: Its standard error.

    Returns:
        A sentence, or none.
    """
    if not abs(slope) > max(_LARGEST_SLOPE * abs(mean), _Z_OF_SLOPE * error):
        return []
    share = f" ({slope / mean:+.1%})" if mean else ""
    return [
        f"the estimate changes by {slope:+.2g}{share} as nβ grows by a factor e, so that it is no "
        "limit of large nβ: raise nbeta, or compare with values at the same nβ only"
    ]


def lost_chains(samples: Samples) -> list[str]:
    """Whether chains were frozen, and are left out.

    Returns:
        A sentence, or none.
    """
    lost = samples.num_chains - int(samples.healthy.sum())
    if not lost:
        return []
    return [
        f"{lost} of {samples.num_chains} chains diverged and are left out, of which the first is "
        f"{samples.frozen[0]}: lower lr"
    ]


def _mixing(samples: Samples, chosen: Choice, drift: float) -> list[str]:
    """Chains that disagree, or are on their way."""
    found = []
    looks, trace = samples.looks, chosen.trace
    name = "draws' minibatches"
    if looks is not None and len(looks.draws) == trace.shape[1]:
        name = "all data" if looks.is_all else "a fixed part of the data"
    r_hat = float(diagnostics(trace).r_hat)
    if r_hat > _LARGEST_R_HAT:
        found.append(
            f"chains have not mixed: R-hat of the loss on {name} is {r_hat:.3g}: run longer, with "
            f"more burn-in, or take a larger lr{'' if drift else _relaxation(samples)}"
        )
    if samples.options["burnin_settled"] is False:
        found.append(
            f"burn-in ended at its limit of {samples.num_burnin_steps} steps while loss or "
            "distance still drifted: make more draws, with a larger num_steps_between_draws"
        )
    if drift:
        found.append(
            f"the estimate drifts by {drift:+.2g} between the halves of the draws: take more "
            f"burn-in{_relaxation(samples)}"
        )
    return found


def _shared(chosen: Choice) -> list[str]:
    """Chains that share minibatches, where the noise of these counts."""
    if not chosen.widening > _LARGEST_WIDENING:
        return []
    return [
        "chains see the same minibatches, whose noise more chains do not average and R-hat does "
        f"not see: the error is {chosen.widening:.2g} times that of independent chains: leave "
        "shared_batches out, or make more draws with larger batches"
    ]


def _relaxation(samples: Samples) -> str:
    """How long directions take that the loss leaves flat, where localization holds them."""
    sampler = samples.sampler
    rate = sampler.relaxation_rate()
    if rate is None or not bool((rate > 0).all()):
        return ""
    steps = float((1 / rate).max())
    burnin = int(samples.draw_steps[0])
    return (
        f" (directions that the loss leaves flat relax in {steps:.3g} steps, and the first draw "
        f"was made at step {burnin})"
    )


def _bias(samples: Samples, chosen: Choice, bias: Bias) -> list[str]:
    """A bias beyond chance, and beyond what an estimate may have.

    One that was extrapolated may have either sign.
    """
    size = abs(bias.value)
    limit = max(_LARGEST_SHARE * abs(chosen.mean), 2 * math.hypot(chosen.mcse, bias.error))
    if math.isnan(size) or size <= limit:
        return []
    part = noise_share(samples)
    if math.isnan(part):
        what, how = "the step size, or gradient noise,", "halve lr"
    elif part > _HALF:
        what, how = "gradient noise", "larger batches, control_variates, or a smaller lr"
    else:
        what, how = "the step size", "halve lr, or use baoa"
    changes = "raises" if bias.value > 0 else "lowers"
    share = f" ({size / abs(chosen.mean):.0%} of it)" if chosen.mean else ""
    return [f"{what} {changes} the estimate by about {size:.2g}{share}: {how}"]


def _implausible(samples: Samples, chosen: Choice) -> list[str]:
    """Values that no posterior near a minimum has."""
    found: list[str] = []
    if not bool((settings_of_draws(samples)[0] > 0).any()):
        found.append("nβ is 0, and so is the estimate: the loss does not pull")
    if math.isnan(chosen.mcse):
        return found
    if chosen.mean + 3 * chosen.mcse < 0:
        found.append(
            "chains find losses below that of the anchor, which is no minimum: train longer, or "
            "raise localization"
        )
    numbers = tree.count(samples.state.params, samples.sampler.mask)
    most = float(torch.as_tensor(numbers, dtype=torch.float64).max()) / 2
    if chosen.mean > RUN_AWAY * most:
        found.append(
            f"the estimate is more than {RUN_AWAY:g} times d/2 = {most:.4g}: chains run away, "
            "since lr is too large to be stable: lower it"
        )
    elif chosen.mean - 3 * chosen.mcse > FAR * most:
        found.append(
            f"the estimate is above d/2 = {most:.4g}, which a regular model of as many parameters "
            "has: chains have left the neighbourhood of the anchor, or lr is too large"
        )
    return found
