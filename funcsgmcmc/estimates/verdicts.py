"""The judgement of a sweep's cells: what is found in a cell's record, and the verdict on it.

The rules, in the order in which they are asked; the first that holds is the verdict. λ̂ ± error is
the cell's estimate, as `llc` gives it; shares of λ̂ are of ½ where it is smaller.

| verdict | rule |
|---|---|
| control | nβ = 0: the loss does not pull |
| diverged | a chain's loss or parameters became non-finite, or its loss exceeded `max_loss`; or |
| | E‖w − w₀‖² > 100 T d/γ, or λ̂ > 100 d/2 |
| left the neighbourhood | a chain exceeded `max_distance`; or, where step and gradient noise do |
| | not explain it, E‖w − w₀‖² > 1.5 T d/γ, or λ̂ − 3 MCSE > 1.5 d/2 |
| negative | λ̂ + 3 MCSE < 0 |
| noise-dominated | the bias of step and gradient noise is more than 5 % of λ̂, mostly by the noise |
| step too large | that bias is more than 5 % of λ̂, mostly by the step |
| not burnt in | the halves of the draws differ by more than 10 % of λ̂ and 2.5 standard errors, or |
| | `llc` finds drift of more than 5 %, or ‖w − w₀‖² grows by more than 15 % between them |
| not burnt in | R-hat > 1.1, and > √(1 + 6/K) of K draws, which few draws exceed by chance |
| too few draws | MCSE of more than 3 % of λ̂, or a total error of more than 10 % |
| step too large, not burnt in | λ̂ agrees with none of its neighbours in lr (`on_plateau`) |
| step not checked | the sampler's bias is not known, and no neighbour in lr can be compared |
| fine | none of these |

Sources: d/2 bounds the learning coefficient of a model of d parameters (Watanabe, "Algebraic
geometry and statistical learning theory", 2009); T d/γ is E‖w − w₀‖² under the pull to
the anchor alone, which a loss around its minimum can only lower; R-hat as in `diagnostics`; the
bias as in `llc`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.estimates.bias import noise_share
from funcsgmcmc.estimates.choice import FEWEST_LOOKS, mixing_trace, share_noise
from funcsgmcmc.estimates.convergence import diagnostics
from funcsgmcmc.estimates.draws import forces_and_noises
from funcsgmcmc.estimates.faults import FAR, RUN_AWAY
from funcsgmcmc.estimates.llc import LLC, llc
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples

Name = Literal[
    "fine",
    "diverged",
    "left the neighbourhood",
    "negative",
    "not burnt in",
    "noise-dominated",
    "step too large",
    "too few draws",
    "step not checked",
    "control",
]

_LARGEST_R_HAT = 1.1
# The coefficient of one regular parameter: shares of less would ask for what nobody needs.
_SMALLEST = 0.5
_HALF = 0.5
# What the reason says of a cell that is fine, with which no other step size was compared.
ALONE = "no other lr is fine to compare with"
_LARGEST_DRIFT, _LARGEST_GROWTH, _Z_OF_DRIFT = 0.1, 0.15, 2.5
# Shares of λ̂: bias and Monte Carlo error of a cell that is fine; its total error; steps in lr.
_LARGEST_BIAS, _LARGEST_MCSE, _LARGEST_ERROR, _LARGEST_STEP = 0.05, 0.03, 0.1, 0.1


@dataclass(frozen=True)
class Verdict:
    """The judgement of a cell.

    Attributes:
        name: `"fine"`, or what is wrong.
        reason: A sentence with the numbers behind it.
    """

    name: Name
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Findings:
    """What the record of a cell's chains says; NaN where it does not.

    Attributes:
        frozen: The share of chains that were frozen.
        most: d/2, with d the number of entries that are sampled.
        estimate: The learning coefficient; None at nβ = 0, or if no chain is healthy, or chains
            have run away.
        r_hat: Of the loss, on all data or a part where it was evaluated.
        ess: Effective number of draws of the same.
        num_traced: How many draws of a chain it is of.
        change: By how much the second half of the draws is above the first, in units of λ̂.
        change_error: The standard error of that.
        growth: The same of ‖w − w₀‖², as a share.
        growth_error: The standard error of that.
        distance: Root mean square of ‖w − w₀‖ over draws.
        reach: E‖w − w₀‖² over the second half, in units of T d/γ; infinite for γ = 0.
        signal_to_noise: Ratio of gradient to gradient noise: ⟨nβ g, ∇U⟩ over (nβ)² ‖ĝ − g‖², both
            averaged.
        noise_share: The part of the estimate's bias that gradient noise makes; the step makes the
            rest.
        rise: E L − L(w₀).
        has_run_away: Whether `reach`, or λ̂ in units of d/2, is beyond 100: the step is
            unstable.
    """

    frozen: float
    most: float
    estimate: LLC | None = None
    r_hat: float = math.nan
    ess: float = math.nan
    num_traced: int = 0
    change: float = math.nan
    change_error: float = math.nan
    growth: float = math.nan
    growth_error: float = math.nan
    distance: float = math.nan
    reach: float = math.nan
    signal_to_noise: float = math.nan
    noise_share: float = math.nan
    rise: float = math.nan
    has_run_away: bool = False


def find(samples: Samples) -> Findings:
    """Find what the record of one cell says.

    Raises:
        ImportError: The extra `diagnostics` is not installed.
        ValueError: L(w₀) is not known, or draws have weights.
    """
    healthy = samples.healthy
    frozen = 1 - float(healthy.double().mean())
    sampled = tree.count(samples.state.params, samples.sampler.mask)
    most = float(torch.as_tensor(sampled, dtype=torch.float64).max()) / 2
    if not healthy.any() or not samples.num_draws:
        return Findings(frozen, most)
    squares = samples.distances[:, samples.draw_rows][healthy].double().square()
    late, average = float(squares[:, squares.shape[1] // 2 :].mean()), float(squares.mean())
    is_shared = share_noise(samples)
    growth, growth_error = (each / max(average, 1e-300) for each in _change(squares, is_shared))
    reach, rise = late / _free_square(samples, 2 * most), _rise(samples)
    found = Findings(
        frozen,
        most,
        growth=growth,
        growth_error=growth_error,
        distance=math.sqrt(average),
        reach=reach,
        signal_to_noise=_signal_to_noise(samples),
        noise_share=noise_share(samples),
        rise=rise,
        has_run_away=max(reach, rise * _scale(samples) / most) > RUN_AWAY,
    )
    # Squares of losses may overflow in chains that have run away.
    if found.has_run_away or not _is_pulled(samples):
        return found
    trace = mixing_trace(samples)
    mixing, (change, error) = diagnostics(trace), _change(trace, is_shared)
    return replace(
        found,
        estimate=llc(samples),
        r_hat=float(mixing.r_hat),
        ess=float(mixing.ess_bulk),
        num_traced=trace.shape[1],
        change=change,
        change_error=error,
    )


def _signal_to_noise(samples: Samples) -> float:
    """Gradient to gradient noise; NaN where nothing was seen."""
    if samples.looks is None or not len(samples.looks.draws):
        return math.nan
    force, noise = (float(each[samples.healthy].mean()) for each in forces_and_noises(samples))
    return force / noise if noise > 0 else math.inf


def _is_pulled(samples: Samples) -> bool:
    """Whether the loss pulls: nβ > 0."""
    return bool((settings_of_draws(samples)[0] > 0).any())


def _scale(samples: Samples) -> float:
    """The factor nβ/T of λ̂."""
    nbeta, temperature = settings_of_draws(samples)
    return float((nbeta / temperature).mean())


def _rise(samples: Samples) -> float:
    """E L − L(w₀), on all data where it is known."""
    if samples.initial_loss is None:
        return math.nan
    looks = samples.looks
    is_seen = looks is not None and looks.is_all and len(looks.draws) > 0
    losses = looks.losses if looks is not None and is_seen else samples.draw_losses
    anchor_loss = samples.initial_loss.reshape(-1, 1)
    return float((losses.double() - anchor_loss)[samples.healthy].mean())


def _free_square(samples: Samples, num_sampled: float) -> float:
    """T d/γ: E‖w − w₀‖² where the anchor alone pulls; 0 without a pull."""
    localization = float(torch.as_tensor(samples.sampler.localization).max())
    temperature = float(settings_of_draws(samples)[1].max())
    return temperature * num_sampled / localization if localization > 0 else math.inf


def _change(trace: Tensor, is_shared: bool) -> tuple[float, float]:
    """By how much the second half of a trace `[c, K]` is above the first, and its error.

    The error is that between chains; with fewer than four, that of the draws. Chains that share
    minibatches are taken as one, their mean.
    """
    if is_shared:
        trace = trace.mean(0, keepdim=True)
    half = trace.shape[1] // 2
    if half < 2:
        return math.nan, math.nan
    first, second = trace[:, :half].double(), trace[:, -half:].double()
    differences = second.mean(1) - first.mean(1)
    if len(trace) >= FEWEST_LOOKS:
        error = float(differences.std()) / math.sqrt(len(trace))
    else:
        error = math.hypot(*(float(diagnostics(each).mcse_mean) for each in (first, second)))
    return float(differences.mean()), error


def judge(found: Findings, samples: Samples) -> Verdict:
    """Judge a cell by itself."""
    if found.frozen:
        return _of_frozen(samples)
    if found.has_run_away:
        return Verdict(
            "diverged",
            f"chains run away, to ‖w − w₀‖ = {found.distance:.2g} and a loss {found.rise:.2g} "
            "above that of the anchor; lower lr",
        )
    estimate = found.estimate
    if estimate is None:
        if not samples.num_draws:
            return Verdict("too few draws", "the run stopped in burn-in")
        return Verdict("control", "nβ = 0: the loss does not pull")
    rules = (_left, _negative, _biased, _not_burnt_in, _unmixed, _imprecise)
    for rule in rules:
        verdict = rule(found, estimate)
        if verdict is not None:
            return verdict
    return Verdict("fine", _praise(found, estimate))


def _of_frozen(samples: Samples) -> Verdict:
    lost = samples.frozen
    limit = samples.options.get("max_distance")
    rows = (~samples.healthy).nonzero().flatten()
    columns = samples.frozen_at[rows] - samples.first_step
    count = f"{len(lost)} of {samples.num_chains} chains: {lost[0]}"
    is_far = limit is not None and bool(
        (samples.distances[rows, columns.clamp(min=0)] > limit).all()
    )
    if is_far:
        return Verdict("left the neighbourhood", f"{count}; raise localization, or lower lr")
    return Verdict("diverged", f"{count}; lower lr")


def _left(found: Findings, estimate: LLC) -> Verdict | None:
    is_far = found.reach > FAR
    is_high = estimate.mean - 3 * estimate.mcse > FAR * found.most
    # A step or noise that is too large drives chains away as well, and is then what to change.
    if not (is_far or is_high) or _share_of_bias(estimate) > _LARGEST_BIAS:
        return None
    what = (
        f"E‖w − w₀‖² is {found.reach:.3g} times that under the pull to the anchor alone"
        if is_far
        else f"the estimate is {estimate.mean:.4g}, above d/2 = {found.most:.4g}"
    )
    return Verdict("left the neighbourhood", f"{what}; raise localization, or lower lr")


def _negative(found: Findings, estimate: LLC) -> Verdict | None:
    if not estimate.mean + 3 * estimate.mcse < 0:
        return None
    return Verdict(
        "negative",
        f"{estimate.mean:.3g} ± {estimate.mcse:.2g}: chains find losses below that of the anchor; "
        "train longer, or raise localization",
    )


def _not_burnt_in(found: Findings, estimate: LLC) -> Verdict | None:
    size = size_of(estimate)
    change, limit = abs(found.change), max(_LARGEST_DRIFT * size, _Z_OF_DRIFT * found.change_error)
    if change > limit or abs(estimate.drift) > _LARGEST_BIAS * size:
        return Verdict(
            "not burnt in",
            f"the second half of the draws is {found.change:+.2g} from the first "
            f"({found.change / size:+.0%}); take more burn-in, or a larger lr",
        )
    if found.growth > max(_LARGEST_GROWTH, _Z_OF_DRIFT * found.growth_error):
        return Verdict(
            "not burnt in",
            f"‖w − w₀‖² grows by {found.growth:.0%} between the halves of the draws: the loss has "
            "flat directions; take more burn-in, a larger lr, or more localization",
        )
    return None


def _unmixed(found: Findings, estimate: LLC) -> Verdict | None:
    # Of n draws a half, n var(means)/var(draws) follows an F law, whose 99 % point is 3 to 4.
    limit = max(_LARGEST_R_HAT, math.sqrt(1 + 6 / found.num_traced))
    if not found.r_hat > limit:
        return None
    return Verdict(
        "not burnt in",
        f"chains have not mixed: R-hat {found.r_hat:.3g}; run longer, or take a larger lr",
    )


def _biased(found: Findings, estimate: LLC) -> Verdict | None:
    share = _share_of_bias(estimate)
    if not share > _LARGEST_BIAS:
        return None
    text = f"about {estimate.bias:.2g} of {estimate.mean:.4g} ({share:.0%})"
    if found.noise_share > _HALF:
        return Verdict(
            "noise-dominated",
            f"gradient noise makes {text}; take larger batches, control_variates, or a smaller lr",
        )
    return Verdict("step too large", f"the step makes {text}; lower lr, or use baoa")


def _share_of_bias(estimate: LLC) -> float:
    """The bias in units of the estimate; NaN if it is not known."""
    return estimate.bias / size_of(estimate)


def size_of(estimate: LLC) -> float:
    """What shares of an estimate are taken of."""
    return max(abs(estimate.mean), _SMALLEST)


def _imprecise(found: Findings, estimate: LLC) -> Verdict | None:
    size = size_of(estimate)
    if math.isnan(estimate.mcse):
        return Verdict("too few draws", "there are too few draws for an error")
    if estimate.mcse > _LARGEST_MCSE * size:
        return Verdict(
            "too few draws",
            f"MCSE {estimate.mcse:.2g} of {estimate.mean:.3g} ({estimate.mcse / size:.0%}); make "
            "more draws, or chains",
        )
    if estimate.error > _LARGEST_ERROR * size:
        return Verdict(
            "too few draws", f"the total error is {estimate.error:.2g} of {estimate.mean:.3g}"
        )
    return None


def _praise(found: Findings, estimate: LLC) -> str:
    return f"total error {estimate.error / size_of(estimate):.1%}, R-hat {found.r_hat:.3g}"


def on_plateau(
    lrs: Sequence[float], found: Sequence[Findings], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    """Judge the cells of several step sizes that differ in nothing else, by one another.

    Of two neighbours, with steps ε > ε', a bias of first order in the step would be
    (λ̂ − λ̂') ε/(ε − ε') at ε, and (λ̂ − λ̂') ε'/(ε − ε') at ε'. A cell that is fine by itself and
    whose neighbours that are fine all say that this is more than 10 % of λ̂, beyond 3 standard
    errors, is not fine. Where no other is fine, neighbours with too few draws can say so, too; if
    they do not, a cell of a sampler that does not know its bias is not fine, and the reason of
    one that does says that nothing was compared, with the estimate of the next smaller step.

    Args:
        lrs: In rising order.
        found: Findings of each.
        verdicts: Verdicts on each by itself.
    """
    judged = list(verdicts)
    fine = [row for row, verdict in enumerate(verdicts) if verdict.name == "fine"]
    is_alone, comparable = len(fine) == 1, fine
    if is_alone:
        comparable = [n for n in range(len(lrs)) if n in fine or _is_rough(found[n], verdicts[n])]
    for row in fine:
        excesses = [_excess(lrs, found, row, other) for other in _beside(row, comparable)]
        if excesses and all(excess.is_large for excess in excesses):
            judged[row] = excesses[0].verdict(lrs[row])
        elif is_alone and math.isnan(_estimate(found[row]).bias):
            judged[row] = Verdict(
                "step not checked",
                f"the sampler does not tell the bias of its step, and {ALONE}",
            )
        elif is_alone and len(lrs) > 1:
            nearest = _nearest(lrs, found, row)
            judged[row] = replace(verdicts[row], reason=f"{verdicts[row].reason}; {ALONE}{nearest}")
    return judged


def _is_rough(found: Findings, verdict: Verdict) -> bool:
    """Whether a cell is right for all that is known, with an error that is large."""
    has_error = found.estimate is not None and not math.isnan(found.estimate.mcse)
    return verdict.name == "too few draws" and has_error


def _beside(row: int, rows: list[int]) -> list[int]:
    """The neighbours of a row among some."""
    place = rows.index(row)
    return rows[max(0, place - 1) : place] + rows[place + 1 : place + 2]


def _nearest(lrs: Sequence[float], found: Sequence[Findings], row: int) -> str:
    """The estimate at the next smaller step, for comparison; else at the next larger one."""
    for other in (row - 1, row + 1):
        if 0 <= other < len(lrs):
            estimate = found[other].estimate
            if estimate is not None:
                return f" ({estimate.mean:.4g} ± {estimate.error:.2g} at lr={lrs[other]:g})"
    return ""


@dataclass(frozen=True)
class _Excess:
    """By how much a cell is off, if the step is what its neighbour differs in."""

    size: float
    error: float
    mean: float
    other_mean: float
    other_lr: float

    @property
    def is_large(self) -> bool:
        return abs(self.size) > max(_LARGEST_STEP * max(abs(self.mean), _SMALLEST), 3 * self.error)

    def verdict(self, lr: float) -> Verdict:
        beside = f"{self.mean:.4g}, but {self.other_mean:.4g} at lr={self.other_lr:g}"
        # Chains on their way are below where they go, the more so the smaller their steps.
        if self.other_lr > lr and self.mean < self.other_mean:
            return Verdict("not burnt in", f"{beside}; take more burn-in, or a larger lr")
        return Verdict("step too large", f"{beside}; lower lr")


def _excess(lrs: Sequence[float], found: Sequence[Findings], row: int, other: int) -> _Excess:
    one, two = _estimate(found[row]), _estimate(found[other])
    factor = lrs[row] / abs(lrs[row] - lrs[other])
    error = factor * math.hypot(one.mcse, two.mcse)
    return _Excess(factor * (one.mean - two.mean), error, one.mean, two.mean, lrs[other])


def _estimate(found: Findings) -> LLC:
    estimate: Any = found.estimate
    assert estimate is not None  # a cell that is fine has one
    return estimate
