"""Simulation-based calibration: do a sampler's posteriors hold the truth as often as they claim?

For s = 1, …, S: draw w̃ from the prior and data from the likelihood at w̃, then L draws w from the
posterior, each by a chain of its own. If the posterior is right, the rank of w̃ among the draws,

    r = #{l : f(w_l, data) < f(w̃, data)},

is uniform on 0, …, L, for every function f (ties are broken at random). One chain a draw makes the
draws independent, as the theorem requires. Chains start at other draws from the prior, and need no
thinning, only enough steps to forget their start.

If f depends on the parameters alone, draws from the prior have uniform ranks too. So chains that
ignore the data, or never move, are found only by an f of parameters and data, such as the loss.

Sources: Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms
with simulation-based calibration", 2018 (arXiv:1804.06788), theorem 1 and algorithm 1; Modrák,
Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and Vehtari, "Simulation-based calibration checking
for Bayesian computation: the choice of test quantities shapes sensitivity", 2023
(arXiv:2211.02383), for f of parameters and data.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, random, tree
from funcsgmcmc.gradients import LossFn, loss_and_aux
from funcsgmcmc.priors import LogPrior
from funcsgmcmc.samplers.base import Sampler, State, check_sampler
from funcsgmcmc.stepping import kernel
from funcsgmcmc.testing import arguments, scores


@dataclass(frozen=True)
class Model:
    """A prior and a likelihood, all of one chain.

    Attributes:
        prior: `prior(key) -> params`: a draw w̃ from the prior.
        simulate: `simulate(params, key) -> data`: data made from w̃, a tensor or a tree of tensors.
        loss: `loss(params, data)`: nβ times the loss is −log p(data | w) up to a constant.
        log_prior: log p(w) up to a constant; None if the sampler's localization and weight decay
            are the whole prior.
    """

    prior: Callable[[Tensor], TensorDict | dict[str, Tensor]]
    simulate: Callable[[TensorDict, Tensor], Any]
    loss: LossFn
    log_prior: LogPrior | None = None

    def __post_init__(self) -> None:
        for name in ("prior", "simulate", "loss"):
            checks.function(name, getattr(self, name))
        if self.log_prior is not None:
            checks.function("log_prior", self.log_prior)

    def entries_and_loss(self, params: TensorDict, data: Any) -> Tensor:
        """Every entry of w, and L(w) on the data: `[n + 1]`."""
        loss, _ = loss_and_aux(self.loss, params, data)
        return torch.cat([tree.flatten(params), loss.reshape(1)])


@dataclass(frozen=True)
class Calibration:
    """The result of `check_calibration`.

    Attributes:
        ranks: r, int64 `[S, F]`, for each simulation and each value of f.
        num_draws: L.
        p_values: p-values, by name, of tests that the mean, the spread and the histogram of the
            ranks are those of a uniform distribution.
        limit: The smallest p-value allowed.
        smallest_scale_error: The smallest relative error in the posterior's standard deviation, the
            same for all of f, that the tests find with probability `power`.
    """

    ranks: Tensor
    num_draws: int
    p_values: Mapping[str, float]
    limit: float
    smallest_scale_error: float

    def __str__(self) -> str:
        name, least = min(self.p_values.items(), key=lambda item: item[1])
        return (
            f"{len(self.ranks)} ranks among {self.num_draws} draws: smallest of "
            f"{len(self.p_values)} p-values {least:.2g} ({name}; limit {self.limit:.2g}); an error "
            f"of {100 * self.smallest_scale_error:.2g} % in the standard deviation is found"
        )


def check_calibration(
    sampler: Sampler,
    model: Model,
    *,
    quantities: Callable[[TensorDict, Any], Tensor] | None = None,
    num_simulations: int = 2_000,
    num_draws: int = 15,
    num_steps: int = 300,
    false_alarm: float = 1e-4,
    power: float = 0.9,
    seed: int = 0,
) -> Calibration:
    """Check by simulation that a sampler's posterior is calibrated.

    Args:
        sampler: A sampler with settings shared by all chains, without mask and box. Chains start at
            draws from the prior, where they are also anchored if the sampler has no anchor.
        model: Prior and likelihood.
        quantities: f, from one chain's parameters and data to a tensor `[F]` or a number; None for
            all entries of w, and the loss.
        num_simulations: S.
        num_draws: L. S times L chains run together.
        num_steps: Steps of each chain, enough to forget the start.
        false_alarm: Probability that a right sampler fails, over all tests together.
        power: Probability with which an error of `smallest_scale_error` is found, at least 1/2.
        seed: Seed of all random numbers.

    Returns:
        The ranks, and the p-values of tests of their uniformity.

    Raises:
        AssertionError: A p-value is below the limit, or chains diverge.
        TypeError, ValueError: An argument is not of the kind above, or a function of the model
            returns values that are not finite.
    """
    check_sampler(sampler)
    checks.instance("model", model, Model)
    _check_shared(sampler)
    f = model.entries_and_loss if quantities is None else quantities
    checks.function("quantities", f)
    checks.count("seed", seed, minimum=0)
    checks.count("num_simulations", num_simulations, minimum=20)
    checks.count("num_draws", num_draws, minimum=2)
    checks.count("num_steps", num_steps, minimum=1)
    arguments.probability("false_alarm", false_alarm)
    arguments.power(power)
    truths, data = _simulate(model, num_simulations, seed)
    data_of_chains = _repeat(data, num_draws)
    draws = _sample(sampler, model, data_of_chains, num_simulations * num_draws, num_steps, seed)
    f_of_truths = torch.vmap(f)(truths, data).reshape(num_simulations, -1)
    checks.finite_values("quantities of parameters from the prior", f_of_truths)
    if not f_of_truths.numel():
        raise ValueError(
            f"quantities must return a number at least, got {tuple(f_of_truths.shape)}"
        )
    f_of_draws = torch.vmap(f)(draws, data_of_chains).reshape(num_simulations, num_draws, -1)
    checks.finite_values("quantities of draws", f_of_draws)
    ranks = _rank(f_of_draws, f_of_truths, seed)
    p_values = _p_values(ranks, num_draws)
    limit = false_alarm / len(p_values)
    result = Calibration(
        ranks=ranks,
        num_draws=num_draws,
        p_values=p_values,
        limit=limit,
        smallest_scale_error=_smallest_scale_error(num_simulations, num_draws, limit, power),
    )
    wrong = {name: p for name, p in p_values.items() if not p >= limit}
    if wrong:
        lines = [f"{name}: p = {p:.2g}" for name, p in sorted(wrong.items(), key=lambda x: x[1])]
        raise AssertionError(
            f"{type(sampler).__name__} is not calibrated (p < {limit:.2g} for {len(wrong)} of "
            f"{len(p_values)} tests):\n  " + "\n  ".join(lines)
        )
    return result


def _check_shared(sampler: Sampler) -> None:
    """Refuse a sampler whose chains do not all sample the model's posterior."""
    arguments.shared_target(sampler)
    if sampler.anchor is None and bool((sampler.localization > 0).any()):
        raise ValueError(
            "localization needs an anchor that all chains share to be part of the prior, "
            f"got {float(sampler.localization)} and no anchor"
        )


def _rank(draws: Tensor, truths: Tensor, seed: int) -> Tensor:
    """Rank truths `[S, F]` among draws `[S, L, F]`, with ties broken at random."""
    below, equal = (draws < truths[:, None]).sum(1), (draws == truths[:, None]).sum(1)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(equal.shape, generator=generator)
    return below + (chance * (equal + 1)).long()


def _draw_from_prior(model: Model, key: Tensor, number: int) -> TensorDict:
    """Draw parameters from the prior, of batch size `[number]`."""
    drawn = torch.vmap(model.prior)(random.split(key, number))
    checks.instance("what prior returns", drawn, TensorDictBase | Mapping)
    params = tree.parameters(TensorDict(dict(drawn), batch_size=number), "what prior returns")
    tree.check_finite("what prior returns", params)
    return params


def _simulate(model: Model, number: int, seed: int) -> tuple[TensorDict, Any]:
    """Draw truths from the prior, and data from the likelihood at each: `[S]`."""
    of_truth, of_data = random.split(random.key(seed), 2)
    truths = _draw_from_prior(model, of_truth, number)
    data = torch.vmap(model.simulate)(truths, random.split(of_data, number))
    for values in pytree.tree_leaves(data):
        checks.finite_values("what simulate returns", values)
    return truths, data


def _repeat(data: Any, num_draws: int) -> Any:
    """Repeat the data of simulations `[S]` for each of their chains, `[S · L]`."""
    return pytree.tree_map(lambda values: values.repeat_interleave(num_draws, 0), data)


def _sample(
    sampler: Sampler, model: Model, data: Any, num_chains: int, num_steps: int, seed: int
) -> TensorDict:
    """Run one chain for each draw, and return their last parameters."""
    of_start, of_momentum, of_chain = random.split(random.fold_in(random.key(seed), 1), 3)
    starts = _draw_from_prior(model, of_start, num_chains)
    noise = tree.normal_like(random.split(of_momentum, num_chains), starts)
    state: State = sampler.init(starts, noise)
    step = torch.vmap(kernel(sampler, model.loss, log_prior=model.log_prior))
    keys = random.split(of_chain, num_chains)
    for _ in range(num_steps):
        state, info = step(state, data, keys)
    if info.log_weight is not None:
        raise ValueError("draws must all count alike, got a sampler that gives them weights")
    if not bool(tree.flatten(state.params).isfinite().all()):
        raise AssertionError("chains diverged: a smaller lr is needed to test calibration")
    return state.params


def _p_values(ranks: Tensor, num_draws: int) -> dict[str, float]:
    """Test uniformity on 0, …, L: by the mean, the spread around L/2, and the histogram."""
    values = torch.arange(num_draws + 1, dtype=torch.float64) - num_draws / 2
    variance, fourth = values.square().mean(), values.pow(4).mean()
    away = ranks.double() - num_draws / 2
    count = len(ranks)
    tests: dict[str, float] = {}
    for index, of_f in enumerate(away.T):
        mean = of_f.mean() / (variance / count).sqrt()
        spread = of_f.square().mean() - variance
        spread = spread / ((fourth - variance**2) / count).sqrt()
        tests[f"mean rank of quantity {index}"] = 2 * float(stats.norm.sf(abs(float(mean))))
        tests[f"spread of ranks of quantity {index}"] = 2 * float(stats.norm.sf(abs(float(spread))))
        tests[f"histogram of quantity {index}"] = _uniformity(ranks[:, index], num_draws)
    return tests


def _uniformity(ranks: Tensor, num_draws: int) -> float:
    """p-value of a χ² test, in bins of neighbouring ranks with at least ten expected in each."""
    num_bins = min(num_draws + 1, max(2, len(ranks) // 10))
    bin_of_rank = torch.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = torch.bincount(bin_of_rank) * len(ranks) / (num_draws + 1)
    found = torch.bincount(bin_of_rank[ranks], minlength=num_bins)
    return float(stats.chisquare(found.numpy(), expected.numpy()).pvalue)


def _smallest_scale_error(
    num_simulations: int, num_draws: int, limit: float, power: float
) -> float:
    """The smallest error in a posterior's standard deviation that the spread of ranks shows.

    Let u be the share of a normal posterior below the truth, and s the factor by which its standard
    deviation is too large. Then E(u − ½)² = arcsin(1/(1 + s²))/(2π), which is 1/12 for s = 1, and
    ranks among L draws have E(r/L − ½)² = 1/(4L) + (1 − 1/L) E(u − ½)².
    """
    n = num_draws + 1
    variance = (n**2 - 1) * (n**2 - 4) / 180 / num_draws**4  # of (r/L − ½)², r uniform
    critical = -scores.NORMAL.inv_cdf(limit / 2)
    shift = scores.detectable_shift(math.sqrt(variance / num_simulations), critical, power)
    remaining = 1 / 12 - shift / (1 - 1 / num_draws)
    if remaining <= 0:
        return math.inf
    return math.sqrt(1 / math.sin(2 * math.pi * remaining) - 1) - 1
