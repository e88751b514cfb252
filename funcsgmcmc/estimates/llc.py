"""The local learning coefficient (LLC)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.choice import best_of
from funcsgmcmc.estimates.convergence import diagnostics
from funcsgmcmc.estimates.draws import forces_and_noises, full_llc_draws, llc_draws
from funcsgmcmc.estimates.faults import drift_of, find_faults
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples


@dataclass(frozen=True)
class LLC:
    """An estimate of the local learning coefficient, and its error.

    Attributes:
        mean: λ̂, the mean over healthy chains and draws.
        error: The total error: √(mcse² + bias² + drift²), of the parts that are known.
        mcse: Monte Carlo standard error of `mean`, autocorrelation included.
        bias: By how much step size and gradient noise raise `mean`, as they are measured on all
            data; NaN where this is not known.
        drift: By how much the mean over the second half of the draws differs from that over the
            first half, where this is more than chance; else 0.
        warnings: What is wrong with the estimate, and what to do; empty if nothing was found.
        source: The losses that `mean` is of: `"minibatches"`, `"all data"`, or `"both"`.
        per_chain: Each chain's mean over draws, `[C]`; NaN for frozen chains.
        mcse_per_chain: The Monte Carlo standard error of each, `[C]`; NaN for frozen chains.
        num_chains: How many chains the estimate uses.
        num_frozen: How many chains are frozen, and left out.
    """

    mean: float
    error: float
    mcse: float
    bias: float
    drift: float
    warnings: list[str]
    source: str
    per_chain: Tensor
    mcse_per_chain: Tensor
    num_chains: int
    num_frozen: int = 0

    @property
    def corrected(self) -> float:
        """The mean without its bias: better where U is near a quadratic; NaN if it is not known."""
        return self.mean - self.bias

    def __str__(self) -> str:
        parts = [f"MCSE {self.mcse:.2g}"]
        parts.append(
            "bias of the step size unknown"
            if math.isnan(self.bias)
            else f"bias of step size and gradient noise {self.bias:+.2g}"
        )
        if self.drift:
            parts.append(f"drift {self.drift:.2g}")
        parts.append(f"{self.num_chains} chains")
        if self.num_frozen:
            parts.append(f"{self.num_frozen} frozen")
        if math.isnan(self.mcse):
            parts.append("too few draws for an error")
        lines = [f"LLC = {self.mean:.4g} ± {self.error:.2g} ({', '.join(parts)})"]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


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


def llc(samples: Samples, initial_loss: float | Tensor | None = None) -> LLC:
    """Estimate the local learning coefficient at the anchor, with its error.

        λ̂ = (nβ/T) (E[L_n(w)] − L_n(w₀))

    where the mean over the localized, tempered posterior is that over healthy chains and draws.

    Of what is recorded, the losses with the smallest Monte Carlo error are used: those of the
    draws' minibatches, L_B; those on all data at some draws, L_n (`samples.looks`); or both,
    mean(L_B) + mean(L_n − L_B), the first mean over all draws and the second over those with both.
    L_B alone is left out where it is biased: with `minibatches="epochs"`, or an iterable.

    The bias is measured where the sampler tells how its step raises the virial of ∇U
    (`Sampler.virial_excess`): SGLD raises E⟨w − w₀, nβ g⟩ by

        (ε/4) E[⟨nβ g, ∇U⟩ + (nβ)² ‖ĝ − g‖²]

    with the gradient g on all data and its estimate ĝ. A loss that grows like ‖w − w₀‖ᵏ has
    E⟨w − w₀, nβ g⟩ = k nβ E[L − L(w₀)], so that λ̂ is too large by this over k T, with k as it is
    measured: 2 for quadratics, where all this is exact, and more where the loss is flatter.

    Source: Lau, Furman, Wang, Murfet and Wei, "The local learning coefficient: a singularity-aware
    complexity measure", 2023 (arXiv:2308.12108), eq. 8, for λ̂.

    Args:
        samples: A run.
        initial_loss: L_n(w₀), `[]` or `[C]` (default: the run's).

    Returns:
        The estimate with its errors, warnings, and one estimate for each chain.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: L_n(w₀) is not known, no draw was made, no chain is healthy, chains have
            different settings (see `Samples.groups`), or the draws have weights.
    """
    checks.instance("samples", samples, Samples)
    samples.check_poolable()
    draws = llc_draws(samples, initial_loss)
    chosen = best_of(samples, draws, initial_loss)
    bias = _bias(samples, initial_loss)
    drift = drift_of(chosen.trace)
    parts = [chosen.mcse, bias, drift]
    mcse_per_chain = torch.full_like(draws[:, 0], torch.nan)
    mcse_per_chain[samples.healthy] = chosen.mcse_per_chain
    per_chain = torch.full_like(draws[:, 0], torch.nan)
    per_chain[samples.healthy] = chosen.per_chain
    number = int(samples.healthy.sum())
    return LLC(
        mean=chosen.mean,
        # Without a Monte Carlo error there is none; a bias that is not known is left out.
        error=math.nan if math.isnan(chosen.mcse) else math.hypot(*(x for x in parts if x == x)),
        mcse=chosen.mcse,
        bias=bias,
        drift=drift,
        warnings=find_faults(samples, chosen, bias, drift),
        source=chosen.source,
        per_chain=per_chain,
        mcse_per_chain=mcse_per_chain,
        num_chains=number,
        num_frozen=samples.num_chains - number,
    )


def _bias(samples: Samples, initial_loss: float | Tensor | None) -> float:
    """How much step size and gradient noise raise λ̂; NaN where it is not known."""
    looks, healthy = samples.looks, samples.healthy
    if looks is None or not len(looks.draws):
        return math.nan
    sampler = samples.sampler.to(torch.device("cpu"))
    excess = sampler.virial_excess(*forces_and_noises(samples))
    if excess is None:
        return math.nan
    _, temperature = settings_of_draws(samples)
    # The degree of a quadratic, where chains are below the anchor or L(w₀) of a part is not known.
    degree = 2.0
    if looks.is_all:
        rise = float(full_llc_draws(samples, initial_loss)[healthy].mean())
        virial = float((looks.virials.double() / temperature[:, looks.draws])[healthy].mean())
        if rise > 0 and virial > rise:
            degree = virial / rise
    excess = excess.expand(samples.num_chains) / temperature[:, -1]
    return float(excess[healthy].mean()) / degree


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
