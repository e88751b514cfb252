"""The local learning coefficient (LLC)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.convergence import diagnostics
from funcsgmcmc.runs.record import Samples, check_initial_loss
from funcsgmcmc.schedules import over_steps


@dataclass(frozen=True)
class LLC:
    """An estimate of the local learning coefficient.

    Attributes:
        mean: λ̂, the mean over healthy chains and draws.
        mcse: Monte Carlo standard error of `mean`, autocorrelation included.
        per_chain: Each chain's mean over draws, `[C]`; NaN for frozen chains.
        mcse_per_chain: The Monte Carlo standard error of each, `[C]`; NaN for frozen chains.
        num_chains: How many chains the estimate uses.
    """

    mean: float
    mcse: float
    per_chain: Tensor
    mcse_per_chain: Tensor
    num_chains: int

    def __str__(self) -> str:
        return f"LLC = {self.mean:.4g} ± {self.mcse:.2g} (MCSE, {self.num_chains} chains)"


def default_nbeta(num_examples: int) -> float:
    """The inverse temperature of the widely applicable Bayesian information criterion.

        nβ = n / log n

    Source: Watanabe, "A widely applicable Bayesian information criterion", JMLR 14 (2013),
    section 4: β = 1/log n.

    Args:
        num_examples: n ≥ 2, the size of the training set.

    Returns:
        nβ, which multiplies the mean loss.

    Raises:
        TypeError: `num_examples` is not an integer.
        ValueError: It is less than 2, where log n vanishes.
    """
    n = checks.count("num_examples", num_examples, minimum=2)
    return n / math.log(n)


def llc_draws(samples: Samples, initial_loss: float | Tensor | None = None) -> Tensor:
    """The learning coefficient's contribution of each draw.

        λ̂_{c,d} = (nβ/T) (L_B(w_{c,d}) − L_n(w₀))

    with nβ and the temperature T those of the step that led to the draw (T σ² with a noise level
    σ), L_B the loss on the draw's minibatch and L_n(w₀) the loss on all data at the anchor. L_B is
    unbiased for L_n(w) where the batch is independent of w: drawn with replacement, or all data. It
    is not with `minibatches="epochs"` or an iterable that is passed over again, where a chain has
    just been pulled by the other batches of the epoch: there λ̂ is biased upwards.

    Source: Lau et al. 2023 (arXiv:2308.12108), eq. 8.

    Args:
        samples: A run.
        initial_loss: L_n(w₀), `[]` or `[C]` (default: the run's).

    Returns:
        `[C, D]`, float64; NaN from where a chain was frozen.

    Raises:
        ValueError: Neither the run nor the argument gives L_n(w₀), or a temperature is 0.
    """
    anchor_loss = samples.initial_loss if initial_loss is None else initial_loss
    if anchor_loss is None:
        raise ValueError(
            "initial_loss must be given: the run's data could not be passed over twice, "
            "so that L(w0) on all data is not known"
        )
    anchor_loss = check_initial_loss(anchor_loss, samples.num_chains).reshape(-1, 1)
    sampler = samples.sampler
    # A draw is where its step begins: the step before it made it.
    steps = (samples.draw_steps - 1).clamp(min=0).to(sampler.localization.device)
    nbeta = over_steps(sampler.nbeta, steps).cpu()
    temperature = sampler.sampled_temperature(steps).cpu()
    if not (temperature > 0).all():
        raise ValueError(f"temperature must be > 0 at the draws, got {float(temperature.min()):g}")
    # `[D]` where all chains share a setting, `[C, D]` where each has its own: both broadcast.
    return nbeta / temperature * (samples.draw_losses.double() - anchor_loss)


def llc(samples: Samples, initial_loss: float | Tensor | None = None) -> LLC:
    """Estimate the local learning coefficient at the anchor.

        λ̂ = (nβ/T) (E[L_n(w)] − L_n(w₀))

    where the mean over the localized, tempered posterior is that over healthy chains and draws.

    Source: Lau, Furman, Wang, Murfet and Wei, "The local learning coefficient: a singularity-aware
    complexity measure", 2023 (arXiv:2308.12108), eq. 8.

    Args:
        samples: A run.
        initial_loss: L_n(w₀), `[]` or `[C]` (default: the run's).

    Returns:
        The estimate with its Monte Carlo standard error, and one for each chain. Where chains have
        different settings (a sweep), only the latter mean something.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: L_n(w₀) is not known, no draw was made, no chain is healthy, or the draws have
            weights.
    """
    samples.check_unweighted()
    draws = llc_draws(samples, initial_loss)
    used = draws[samples.usable_chains()]
    mcse_per_chain = torch.full_like(draws[:, 0], torch.nan)
    # Each chain by itself, for a sweep, where no two chains sample one distribution.
    mcse_per_chain[samples.healthy] = torch.stack([diagnostics(d[None]).mcse_mean for d in used])
    return LLC(
        mean=float(used.mean()),
        mcse=float(diagnostics(used).mcse_mean),
        per_chain=draws.mean(1).where(samples.healthy, torch.nan),
        mcse_per_chain=mcse_per_chain,
        num_chains=len(used),
    )


def running_llc(samples: Samples) -> tuple[Tensor, Tensor]:
    """The learning coefficient as it would be estimated from the first draws only.

    Returns:
        Mean over healthy chains of each chain's mean over draws 0 … d, `[D]`; and its standard
        error over chains, sd/√C, `[D]` (NaN for one chain).

    Raises:
        ValueError: As `llc`.
    """
    samples.check_unweighted()
    draws = llc_draws(samples)[samples.usable_chains()]
    chains = draws.cumsum(1) / torch.arange(1, draws.shape[1] + 1)
    # Over chains, which are independent, so that autocorrelation is in it.
    spread = chains.std(0) if len(chains) > 1 else torch.full_like(chains[0], torch.nan)
    return chains.mean(0), spread / len(chains) ** 0.5
