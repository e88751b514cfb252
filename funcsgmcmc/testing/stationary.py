"""z-tests that a sampler has its stationary law at a quadratic potential.

With L(w) = ½ Σ hᵢ (wᵢ − mᵢ)², gradients g = ∇L(w) + s ζ, ζ ~ N(0, I), and the sampler's nβ, γ, λ,
w₀, T:

    Λᵢ = nβ hᵢ + γ + λ
    E wᵢ = (nβ hᵢ mᵢ + γ w₀ᵢ)/Λᵢ
    Cov(wᵢ, wⱼ) = 0 for i ≠ j
    Var wᵢ = T/Λᵢ for the posterior itself; `variance` for a scheme with a bias of its own

Independent chains start from this law. Each averages wᵢ, its square and products over the second
half of its steps. Means of these averages over chains have a known standard error, however slowly a
chain mixes.

The effect of a wrong noise scale is measured: the same chains run again, with the same random
numbers and noise that is 5 % larger. If the variance does not respond, because a thermostat
compensates, chains have not forgotten their start, or gradient noise dominates, the result says
that no error in the noise scale is found.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, check_sampler
from funcsgmcmc.testing import arguments, scores

SchemeVariance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Var w of a scheme, from ε, Λ, T and V."""


@dataclass(frozen=True)
class Quadratic:
    """A loss L(w) = ½ Σ hᵢ (wᵢ − mᵢ)².

    Attributes:
        hessian: h > 0, a tree of any structure.
        minimum: m, of the same structure.
        gradient_sd: s ≥ 0, the standard deviation of noise in every entry of the gradient.
    """

    hessian: Mapping[str, Tensor] = field(
        default_factory=lambda: {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([[2.0], [4.0]])}
    )
    minimum: Mapping[str, Tensor] = field(
        default_factory=lambda: {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5], [0.0]])}
    )
    gradient_sd: float = 0.0

    def __post_init__(self) -> None:
        hessian, minimum = self.trees()
        for name, values in (("hessian", hessian), ("minimum", minimum)):
            arguments.one_chain(name, values.batch_size)
            tree.check_finite(name, values)
        tree.check_same_structure("minimum", minimum, hessian)
        checks.number("gradient_sd", self.gradient_sd)
        if not bool((tree.flatten(hessian) > 0).all()):
            raise ValueError(f"hessian must be > 0, got {tree.flatten(hessian).tolist()}")

    def trees(self) -> tuple[TensorDict, TensorDict]:
        """The trees h and m, in float64."""
        hessian = tree.parameters(self.hessian, "hessian").double()
        return hessian, tree.parameters(self.minimum, "minimum").double()


@dataclass(frozen=True)
class Stationary:
    """The result of `check_stationary`.

    Attributes:
        scores: z-scores, by name.
        limit: The largest |z| allowed.
        smallest_noise_error: The smallest relative error in the noise scale that the tests find
            with probability `power`; inf if they find none.
        variance_ratio: The ratio of Var w to its value in the law, averaged over entries.
        standard_error: The standard error of `variance_ratio`.
    """

    scores: Mapping[str, float]
    limit: float
    smallest_noise_error: float
    variance_ratio: float
    standard_error: float

    def __str__(self) -> str:
        name, score = max(self.scores.items(), key=lambda item: abs(item[1]))
        error = f"an error of {100 * self.smallest_noise_error:.2g} % in the noise scale is found"
        if not math.isfinite(self.smallest_noise_error):
            error = "no error in the noise scale is found"
        return (
            f"variance {self.variance_ratio:.4f} ± {self.standard_error:.4f} of what it should be; "
            f"largest of {len(self.scores)} z-scores {score:.2f} ({name}; limit {self.limit:.2f}); "
            + error
        )


def check_stationary(
    sampler: Sampler,
    target: Quadratic | None = None,
    *,
    variance: Mapping[str, Tensor] | SchemeVariance | None = None,
    num_chains: int = 10_000,
    num_steps: int = 1_000,
    false_alarm: float = 1e-4,
    power: float = 0.9,
    seed: int = 0,
) -> Stationary:
    """Check means, variances and covariances of a sampler's draws at a quadratic potential.

    Args:
        sampler: A sampler with settings shared by all chains, without mask, box and schedules. If
            it has no anchor, the target's minimum becomes its anchor.
        target: The loss; `Quadratic()` if None, of four entries with curvatures 0.5 to 4.
        variance: Var w of the scheme at its step size: a tree like the target's, or a function
            `variance(lr, precision, temperature, gradient_variance)` of the sampler's settings, of
            Λ of each entry, and of the variance V of nβ g, such as `SPECS["sgld"].variance`. None:
            that of the posterior, T/Λ, which most schemes meet only up to an error of some order.
        num_chains: Number of independent chains, at least 200.
        num_steps: Steps of each chain, of which the first half is not counted: several times as
            many as a chain needs to forget its start.
        false_alarm: Probability that a right sampler fails, over all z-scores together.
        power: Probability with which an error of `smallest_noise_error` is found, at least 1/2.
        seed: Seed of all random numbers.

    Returns:
        The z-scores, and the smallest error in the noise scale that they find.

    Raises:
        AssertionError: A z-score exceeds the limit, or chains diverge.
        TypeError, ValueError: An argument is not of the kind above.
    """
    target = Quadratic() if target is None else target
    checks.instance("target", target, Quadratic)
    sampler = _plain(sampler, target)
    law = GaussianLaw(sampler, target, variance)
    checks.count("num_chains", num_chains, minimum=MIN_CHAINS)
    checks.count("num_steps", num_steps, minimum=2)
    checks.count("seed", seed, minimum=0)
    arguments.probability("false_alarm", false_alarm)
    arguments.power(power)

    def deviations(noise_scale: float) -> dict[str, Tensor]:
        chains = QuadraticChains(
            sampler, target, law, num_chains=num_chains, seed=seed, noise_scale=noise_scale
        )
        return _deviations_of_averages(chains, num_steps)

    found = deviations(noise_scale=1.0)
    healthy = torch.stack([*found.values()]).isfinite().all(0)
    if not bool(healthy.all()):
        diverged = int(healthy.logical_not().sum())
        raise AssertionError(
            f"{type(sampler).__name__} diverged in {diverged} of {num_chains} chains of "
            f"{num_steps} steps: a smaller lr is needed for a stationary law"
        )
    z_scores = scores.check_zero_means(
        found,
        false_alarm,
        f"{type(sampler).__name__} does not have its stationary law"
        + (", T/Λ (a scheme with an error of its own has variance=…)" if variance is None else "")
        + "; deviations are in units of the standard deviation or variance",
    )
    limit = scores.z_limit(false_alarm, len(z_scores))
    ratio = found["variance of all"]
    error = scores.standard_error(ratio)
    louder = deviations(noise_scale=1 + _LOUDER)["variance of all"]
    shift = scores.detectable_shift(error, limit, power)
    return Stationary(
        scores=z_scores,
        limit=limit,
        smallest_noise_error=_smallest(shift, louder - ratio),
        variance_ratio=1 + float(ratio.mean()),
        standard_error=error,
    )


MIN_CHAINS = 200
"""With fewer chains z-scores of moments are not normal so far out in their tails."""

_LOUDER = 0.05


def _smallest(shift: float, response: Tensor) -> float:
    """The error in the noise scale that shifts the variance so far.

    Args:
        shift: The shift of the relative variance.
        response: The shift of each chain's variance by a noise larger by `_LOUDER`, `[num_chains]`.
    """
    mean = float(response.mean())
    if not mean > 5 * scores.standard_error(response):
        return math.inf
    # The variance goes as the square of the scale, in the share that is the noise's.
    share = mean / ((1 + _LOUDER) ** 2 - 1)
    return math.sqrt(1 + shift / share) - 1


def _plain(sampler: Sampler, target: Quadratic) -> Sampler:
    """Give the sampler an anchor, and refuse a sampler whose law is not known."""
    check_sampler(sampler)
    arguments.shared_target(sampler)
    for name in sampler.schedulable():
        if not isinstance(getattr(sampler, name), Tensor):
            raise ValueError(f"{name} must not change with the step, got a schedule")
    minimum = target.trees()[1]
    if sampler.anchor is None:
        return sampler.with_anchor(minimum)
    tree.check_same_structure("anchor", sampler.anchor, minimum)
    return sampler.replace(anchor=sampler.anchor.double())


class GaussianLaw:
    """The law that a sampler should have at a quadratic potential: independent normal entries.

    Attributes:
        mean: E w, `[n]`.
        variance: Var w, `[n]`.
    """

    def __init__(
        self,
        sampler: Sampler,
        target: Quadratic,
        variance: Mapping[str, Tensor] | SchemeVariance | None = None,
    ) -> None:
        hessian, minimum = target.trees()
        h, m = tree.flatten(hessian), tree.flatten(minimum)
        settings: Any = sampler
        curvature = settings.nbeta * h + settings.localization + settings.weight_decay
        pulled = settings.localization * tree.flatten(settings.anchor).double()
        self.mean = (settings.nbeta * h * m + pulled) / curvature
        self.variance = settings.temperature / curvature
        if callable(variance):
            noise = (settings.nbeta * target.gradient_sd) ** 2
            of_scheme = variance(settings.lr, curvature, settings.temperature, noise)
            self.variance = torch.as_tensor(of_scheme).expand_as(curvature)
        elif variance is not None:
            given = tree.parameters(variance, "variance").double()
            tree.check_same_structure("variance", given, hessian)
            self.variance = tree.flatten(given)
        proper = (self.variance > 0) & self.variance.isfinite()
        if not bool(proper.all()):
            raise ValueError(f"Var w must be positive and finite, got {self.variance.tolist()}")


class QuadraticChains:
    """Independent chains of a sampler on a quadratic loss, which start from a law.

    Attributes:
        law: The law of the start.
        state: The state of all chains.
    """

    def __init__(
        self,
        sampler: Sampler,
        target: Quadratic,
        law: GaussianLaw,
        *,
        num_chains: int,
        seed: int = 0,
        noise_scale: float = 1.0,
    ) -> None:
        hessian, minimum = target.trees()
        self.sampler, self.law = sampler, law
        self._gradient_sd, self._noise_scale = target.gradient_sd, noise_scale
        self._h, self._m = tree.flatten(hessian), tree.flatten(minimum)
        self._hessian, self._like = hessian.expand(num_chains), minimum.expand(num_chains)
        self._generator = torch.Generator().manual_seed(seed)
        start = law.mean + law.variance.sqrt() * self._normals()
        self.state = sampler.init(self._tree(start), self._tree(self._normals()))

    def _normals(self) -> Tensor:
        size = (len(self._like), len(self._h))
        return torch.randn(size, generator=self._generator, dtype=torch.float64)

    def _tree(self, values: Tensor) -> TensorDict:
        return tree.unflatten(values, self._like)

    @property
    def w(self) -> Tensor:
        """The parameters, `[C, n]`."""
        return tree.flatten(self.state.params)

    def step(self) -> None:
        """Make one step of each chain."""
        away = self.w - self._m
        grads = self._h * away
        if self._gradient_sd:
            grads = grads + self._gradient_sd * self._normals()
        evaluation = Evaluation(
            self._tree(grads),
            loss=(self._h / 2 * away.square()).sum(-1),
            hessian_diagonal=self._hessian,
        )
        noise = self._tree(self._noise_scale * self._normals())
        self.state, _ = self.sampler.update(self.state, evaluation, noise)


def _deviations_of_averages(chains: QuadraticChains, num_steps: int) -> dict[str, Tensor]:
    """Run chains, and compare averages over the second half of their steps with the law.

    Returns:
        By name, the deviation of each chain's average from the law, `[C]`, in units of the law's
        standard deviation or variance.
    """
    num_chains, n = chains.w.shape
    first = torch.zeros(num_chains, n, dtype=torch.float64)
    second = torch.zeros(num_chains, n, n, dtype=torch.float64)
    burnin = num_steps // 2
    for step in range(num_steps):
        if step >= burnin:
            z = (chains.w - chains.law.mean) / chains.law.variance.sqrt()
            first += z
            second += z[:, :, None] * z[:, None, :]
        chains.step()
        if step == 0 and chains.sampler.log_weight(chains.state) is not None:
            raise ValueError("draws must all count alike, got a sampler that gives them weights")
    counted = num_steps - burnin
    first, second = first / counted, second / counted
    moments = {f"mean of entry {i}": first[:, i] for i in range(n)}
    moments |= {f"variance of entry {i}": second[:, i, i] - 1 for i in range(n)}
    moments |= {
        f"covariance of entries {i} and {j}": second[:, i, j] for i in range(n) for j in range(i)
    }
    moments["mean of all"] = first.mean(1)
    moments["variance of all"] = second.diagonal(dim1=1, dim2=2).mean(1) - 1
    return moments
