"""The local learning coefficient (LLC)."""

import math
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.bias import Bias, extrapolated_bias, measured_bias
from funcsgmcmc.estimates.choice import Choice, best_of, pooled_error, share_noise
from funcsgmcmc.estimates.draws import llc_draws
from funcsgmcmc.estimates.faults import drift_of, find_faults, lost_chains, still_moving
from funcsgmcmc.estimates.ladder import rungs_of, temperatures_of
from funcsgmcmc.runs.record import Samples, check_initial_loss, of_chains


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
        slope: dλ̂/d log nβ, of chains at several nβ; NaN of chains at one.
        slope_error: Its Monte Carlo standard error; NaN likewise.
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
    slope: float = math.nan
    slope_error: float = math.nan

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
        if not math.isnan(self.slope):
            parts.append(f"{self.slope:+.2g} ± {self.slope_error:.2g} as nβ grows by a factor e")
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
    if isinstance(num_examples, Sized):
        raise TypeError(
            f"num_examples must be an integer, got {type(num_examples).__name__}: it is "
            "len(inputs) of tensors, len(loader.dataset) of a DataLoader"
        )
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

    The Monte Carlo error is that between chains, from four on (`mean_error`). Chains that share
    minibatches (`shared_batches=True`, or an iterable) do not differ by what is common: then it is
    that of the mean over chains, draw by draw, with its autocorrelation, where this is larger.

    The bias is measured where the sampler tells how its step raises the virial of ∇U
    (`Sampler.virial_excess`): SGLD raises E⟨w − w₀, nβ g⟩ by

        (ε/4) E[⟨nβ g, ∇U⟩ + (nβ)² ‖ĝ − g‖²]

    with the gradient g on all data and its estimate ĝ. A loss that grows like ‖w − w₀‖ᵏ has
    E⟨w − w₀, nβ g⟩ = k nβ E[L − L(w₀)], so that λ̂ is too large by this over k T, with k as it is
    measured: 2 for quadratics, where all this is exact, and more where the loss is flatter.

    Chains that differ in the step size only (`step_ladder`) tell their bias themselves, for any
    sampler: their means are extrapolated by E λ̂(h) = a + b hᵖ, p the order of the sampler
    (`Sampler.step_order`). Then the estimate is that of the chains with the smallest step, b hᵖ its
    bias, and a is `corrected`.

    λ is the limit of λ̂ for large nβ, and λ̂ may be far from it, where directions are singular: by
    about (m − 1)/log nβ at a pole of multiplicity m, and more. Chains at one nβ cannot see that. Of
    chains that differ in nβ only, by at most a factor of 10, the estimate is that of the largest,
    and `slope` is (λ̂ − λ̂')/(log nβ − log nβ') with those of the smallest nβ': a slope that is no
    chance, and more than a fortieth of λ̂, is among the warnings.

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
    samples.usable_chains()
    given = None
    if initial_loss is not None:
        given = check_initial_loss(initial_loss, samples.num_chains)
    temperatures = temperatures_of(samples)
    if len(temperatures) == 1:
        found = _llc(samples, given)
    else:
        each = [_llc(samples[rows], of_chains(given, rows)) for rows in temperatures]
        found = _at_largest_nbeta(samples, temperatures, each)
    # Of all chains: a group of which none is healthy is in no estimate.
    return replace(
        found,
        warnings=[*lost_chains(samples), *found.warnings],
        num_frozen=samples.num_chains - int(samples.healthy.sum()),
    )


def _at_largest_nbeta(samples: Samples, temperatures: list[Tensor], found: list[LLC]) -> LLC:
    """The last of the estimates at several nβ, with what they say together."""
    first, last = found[0], found[-1]
    nbeta = samples.sampler.nbeta.cpu()
    span = float((nbeta[temperatures[-1]][0] / nbeta[temperatures[0]][0]).log())
    slope = (last.mean - first.mean) / span
    slope_error = math.hypot(last.mcse, first.mcse) / span
    per_chain = torch.full((2, samples.num_chains), torch.nan, dtype=torch.float64)
    for rows, each in zip(temperatures, found, strict=True):
        per_chain[:, rows] = torch.stack([each.per_chain, each.mcse_per_chain])
    return replace(
        last,
        warnings=[*last.warnings, *still_moving(last.mean, slope, slope_error)],
        per_chain=per_chain[0],
        mcse_per_chain=per_chain[1],
        slope=slope,
        slope_error=slope_error,
    )


def _llc(samples: Samples, given: Tensor | None) -> LLC:
    """The estimate of chains at one nβ."""
    # A record on disk is read whole when its chains are picked.
    rungs = [
        _Rung(rows, samples if rows.all() else samples[rows], of_chains(given, rows))
        for rows in rungs_of(samples)
    ]
    chosen = [rung.best() for rung in rungs]
    # The chains of the smallest step, if there are several.
    last, found = rungs[-1], chosen[-1]
    bias = _bias(rungs, chosen)
    drift = drift_of(found.trace, is_shared=share_noise(samples))
    parts = [found.mcse, bias.value, drift]
    per_chain = torch.full((2, samples.num_chains), torch.nan, dtype=torch.float64)
    for rung, choice in zip(rungs, chosen, strict=True):
        rows = rung.rows & samples.healthy
        per_chain[:, rows] = torch.stack([choice.per_chain, choice.mcse_per_chain])
    return LLC(
        mean=found.mean,
        # Without a Monte Carlo error there is none; a bias that is not known is left out.
        error=math.nan if math.isnan(found.mcse) else math.hypot(*(x for x in parts if x == x)),
        mcse=found.mcse,
        bias=bias.value,
        drift=drift,
        warnings=find_faults(last.samples, found, bias, drift),
        source=found.source,
        per_chain=per_chain[0],
        mcse_per_chain=per_chain[1],
        num_chains=int(last.samples.healthy.sum()),
    )


class _Rung(NamedTuple):
    """The chains of one step size.

    Attributes:
        rows: Which of the run's they are, bool `[C]`.
        samples: Their record.
        initial_loss: As for `llc`.
    """

    rows: Tensor
    samples: Samples
    initial_loss: Tensor | None

    def best(self) -> Choice:
        """The mean of these chains."""
        self.samples.check_poolable()
        return best_of(self.samples, llc_draws(self.samples, self.initial_loss), self.initial_loss)


def _bias(rungs: list[_Rung], chosen: list[Choice]) -> Bias:
    """The bias of the last rung."""
    last = rungs[-1].samples
    if len(rungs) == 1:
        return measured_bias(last, rungs[-1].initial_loss)
    sizes = torch.stack([rung.samples.sampler.lr[0].cpu() for rung in rungs])
    means = torch.tensor([choice.mean for choice in chosen])
    errors = torch.tensor([choice.mcse for choice in chosen])
    options = last.options
    is_noisy = options["batch_size"] != options["num_examples"]
    return extrapolated_bias(sizes, means, errors, last.sampler.step_order(is_noisy=is_noisy))


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
    is_shared = share_noise(samples)
    points = torch.linspace(1, draws.shape[1], num_points).round().long().unique()
    return RunningLLC(
        num_draws=points,
        mean=torch.stack([draws[:, :count].mean() for count in points]),
        mcse=torch.stack([pooled_error(draws[:, :count], is_shared=is_shared) for count in points]),
    )
