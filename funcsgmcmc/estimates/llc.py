"""The local learning coefficient (LLC)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.convergence import diagnostics
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples, check_initial_loss


@dataclass(frozen=True)
class LLC:
    """An estimate of the local learning coefficient.

    Attributes:
        mean: λ̂, the mean over healthy chains and draws.
        mcse: Monte Carlo standard error of `mean`, autocorrelation included.
        per_chain: Each chain's mean over draws, `[C]`; NaN for frozen chains.
        mcse_per_chain: The Monte Carlo standard error of each, `[C]`; NaN for frozen chains.
        num_chains: How many chains the estimate uses.
        num_frozen: How many chains are frozen, and left out.
    """

    mean: float
    mcse: float
    per_chain: Tensor
    mcse_per_chain: Tensor
    num_chains: int
    num_frozen: int = 0

    def __str__(self) -> str:
        chains = f"{self.num_chains} chains"
        if self.num_frozen:
            chains += f", {self.num_frozen} frozen"
        if math.isnan(self.mcse):
            chains += ", too few draws for an error"
        return f"LLC = {self.mean:.4g} ± {self.mcse:.2g} (MCSE, {chains})"


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
    checks.instance("samples", samples, Samples)
    anchor_loss = samples.initial_loss if initial_loss is None else initial_loss
    if anchor_loss is None:
        raise ValueError(
            "initial_loss must be given: the run's data could not be passed over twice, "
            "so that L(w0) on all data is not known"
        )
    # A run's own may be infinite for a chain that is frozen at once.
    if initial_loss is not None:
        anchor_loss = check_initial_loss(initial_loss, samples.num_chains)
    anchor_loss = torch.as_tensor(anchor_loss, dtype=torch.float64).reshape(-1, 1)
    nbeta, temperature = settings_of_draws(samples)
    if not (temperature > 0).all():
        raise ValueError(f"temperature must be > 0 at the draws, got {float(temperature.min()):g}")
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
        The estimate with its Monte Carlo standard error, and one for each chain.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: L_n(w₀) is not known, no draw was made, no chain is healthy, chains have
            different settings (see `Samples.groups`), or the draws have weights.
    """
    checks.instance("samples", samples, Samples)
    samples.check_poolable()
    draws = llc_draws(samples, initial_loss)
    used = draws[samples.healthy]
    mcse_per_chain = torch.full_like(draws[:, 0], torch.nan)
    # Each chain by itself, for a sweep, where no two chains sample one distribution.
    mcse_per_chain[samples.healthy] = torch.stack([diagnostics(d[None]).mcse_mean for d in used])
    return LLC(
        mean=float(used.mean()),
        mcse=float(diagnostics(used).mcse_mean),
        per_chain=draws.mean(1).where(samples.healthy, torch.nan),
        mcse_per_chain=mcse_per_chain,
        num_chains=len(used),
        num_frozen=samples.num_chains - len(used),
    )


class RunningLLC(NamedTuple):
    """The learning coefficient as it would be estimated from the first draws only.

    Attributes:
        num_draws: How many draws, `[P]`, evenly spaced up to all of them.
        mean: λ̂ of these, `[P]`.
        mcse: Its Monte Carlo standard error, `[P]`; NaN below four draws.
    """

    num_draws: Tensor
    mean: Tensor
    mcse: Tensor


def running_llc(samples: Samples, num_points: int = 50) -> RunningLLC:
    """Estimate the learning coefficient from the first draws only, at some numbers of draws.

    The last estimate is that of `llc`.

    Args:
        samples: A run.
        num_points: At most so many estimates.

    Raises:
        ImportError, ValueError: As `llc`.
    """
    checks.instance("samples", samples, Samples)
    samples.check_poolable()
    draws = llc_draws(samples)[samples.healthy]
    points = torch.linspace(1, draws.shape[1], num_points).round().long().unique()
    return RunningLLC(
        num_draws=points,
        mean=torch.stack([draws[:, :count].mean() for count in points]),
        mcse=torch.stack([diagnostics(draws[:, :count]).mcse_mean for count in points]),
    )
